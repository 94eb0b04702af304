"""Kernels of Mosaic GPU compiled before the program that they are in.

XLA comes to them last, one after the other, when it has compiled all else: three seconds for those of a training step.
Mosaic keeps a kernel for the rest of the process by its hash, so programs of a kernel alone, compiled by threads in the
meantime, leave nothing to do then.
"""

from typing import Any

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
    found: dict[Any, Any] = {}

    def look(op: Any) -> Any:
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == _TARGET:
            found.setdefault(_settings(op).get("kernel_hash"), op)
        return ir.WalkResult.ADVANCE

    module: Any = lowered.compiler_ir("stablehlo")
    with module.context:
        module.operation.walk(look)
        return [alone for op in found.values() if (alone := _alone(op, device)) is not None]


def _alone(op: Any, device: Any) -> jax.stages.Lowered | None:
    try:
        inputs, outputs = ([_struct(x.type) for x in values] for values in (op.operands, op.results))
    except KeyError:  # a type of numbers that is not among `_DTYPES`
        return None
    settings = _settings(op)
    if settings.get("uses_xla_collective_metadata"):
        return None
    call = jax.ffi.ffi_call(_TARGET, outputs)
    placed = None if device is None else jax.sharding.SingleDeviceSharding(device)
    return jax.jit(lambda *arrays: call(*arrays, **settings), in_shardings=placed).lower(*inputs)


def _settings(op: Any) -> dict[str, Any]:
    named = {x.name: x.attr for x in op.attributes["mhlo.backend_config"]}
    return {name: x.value_bytes if isinstance(x, ir.StringAttr) else x.value for name, x in named.items()}


def _struct(type_of: Any) -> jax.ShapeDtypeStruct:
    tensor = ir.RankedTensorType(type_of)
    return jax.ShapeDtypeStruct(tuple(tensor.shape), _DTYPES[str(tensor.element_type)])
