"""Kernels of Mosaic GPU compiled before the program that they are in.

XLA comes to them last, one after the other, when it has compiled all else: three seconds for those of a training step.
Mosaic keeps a kernel for the rest of the process by its hash, so programs of a kernel alone, compiled by threads in the
meantime, leave nothing to do then.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir

_TARGET = "mosaic_gpu_v2"
_DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32, "i32": jnp.int32, "i8": jnp.int8, "i1": bool}


def kernels_of(lowered: jax.stages.Lowered, device: Any = None) -> list[jax.stages.Lowered]:
    """The distinct kernels of a program, each as a program of its own for one device; on other platforms none.

    A kernel that reads or writes what this does not know of is left out: it is compiled with its program, as ever.

    Args:
      lowered: the program.
      device: for what device kernels are compiled; None: the first one of this process.
    """
    found: list[Any] = []

    def look(op: Any) -> Any:
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == _TARGET:
            found.append(op)
        return ir.WalkResult.ADVANCE

    module: Any = lowered.compiler_ir("stablehlo")
    with module.context:
        module.operation.walk(look)
        calls = {call.settings.get("kernel_hash"): call for call in map(_call, found) if call is not None}
    placed = None if device is None else jax.sharding.SingleDeviceSharding(device)
    return [call.alone(placed) for call in calls.values()]


class _Call(NamedTuple):
    """A call of a kernel: what it reads and writes, and its settings, the kernel itself among them."""

    inputs: list[jax.ShapeDtypeStruct]
    outputs: list[jax.ShapeDtypeStruct]
    settings: dict[str, Any]

    def alone(self, placed: Any) -> jax.stages.Lowered:
        call = jax.ffi.ffi_call(_TARGET, self.outputs)
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in self.inputs]
        return jax.jit(lambda *arrays: call(*arrays, **self.settings)).lower(*inputs)


def _call(op: Any) -> _Call | None:
    named = {x.name: x.attr for x in op.attributes["mhlo.backend_config"]}
    known = all(isinstance(x, ir.StringAttr | ir.BoolAttr) for x in named.values())
    tensors = [[ir.RankedTensorType(x.type) for x in values] for values in (op.operands, op.results)]
    if not known or any(str(x.element_type) not in _DTYPES for x in (*tensors[0], *tensors[1])):
        return None
    settings = {name: x.value_bytes if isinstance(x, ir.StringAttr) else x.value for name, x in named.items()}
    inputs, outputs = (
        [jax.ShapeDtypeStruct(tuple(x.shape), _DTYPES[str(x.element_type)]) for x in some] for some in tensors
    )
    # Of kernels of several devices, which are told of one another, nothing here is known.
    return None if settings.get("uses_xla_collective_metadata") else _Call(inputs, outputs, settings)
