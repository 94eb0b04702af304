"""A training step compiled ahead of time for TPUs or H100s that are elsewhere: memory, collectives, largest arrays.

The step is the one that `train.py` runs, on the mesh that the config asks for; `libtpu` has the compiler for every TPU,
the CUDA plugin of JAX that for GPUs, and neither needs a device. The command is `sepjax plan`.
"""

import dataclasses
import functools
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from sepjax.config import Config, UserError, first_line, validate_attention
from sepjax.config.lora import check_adapters
from sepjax.progress import working
from sepjax.sharding import check_batch, check_heads, check_length, make_mesh, replicated
from sepjax.training import h100
from sepjax.training.compiled import Collective, LargeArray, Program
from sepjax.training.step import abstract_batch, abstract_state, model_graph, train_step

# GiB that the compiler gives to a program on one JAX device: a chip, for TPU7x half a chip.
_HBM = {"TPU v5 lite": 15.75, "TPU v5": 95.73, "TPU v6 lite": 31.24, "TPU7x": 94.74}
_HBM["NVIDIA H100 80GB HBM3"] = h100.MEMORY / 2**30  # the driver and NCCL take some of it

_JAX_TAKES = 0.75  # of a GPU's memory, unless XLA_CLIENT_MEM_FRACTION says otherwise
_AT_MOST = 0.92  # of it; the rest is the driver's, NCCL's and the libraries'


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: int  # the state, which is updated in place, and the device's rows of the batch
    outputs: int  # what is not in place of an argument
    temporaries: int
    program: int
    peak: int  # in use at once, as XLA counts; `total` is more where temporaries take each other's places

    @property
    def total(self) -> int:
        """Arguments, outputs, temporaries and program together."""
        return self.arguments + self.outputs + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a step before any device is paid for."""

    device_kind: str
    mesh: dict[str, int]
    memory: Memory
    hbm: int | None  # bytes of a device that a program may use, where known
    collectives: list[Collective]
    largest: list[LargeArray]


def compile_here() -> None:
    """Lets compilers run without a device or a word, in several processes at once; call it before any device."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of cuDNN's version, which only running needs
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_ID": "0"}
    quiet |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def topology_devices(topology: str) -> list[Any]:
    """The devices of a topology such as "v5e:16x16", "v5p:8x8x16" or "h100:4x8" (hosts, GPUs), none of which is here.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    if topology.startswith("h100"):
        return _h100s(topology)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"--topology={topology}: {reason}; expected a TPU and the grid of its chips, such as v5e:16x16, v6e:16x16, "
            "v5p:8x8x16 or tpu7x:4x4x8, or h100:4x8 for 4 hosts of 8 GPUs"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"--topology={topology} needs the compiler for TPUs, the package libtpu, which is not installed; "
            'python -m pip install "sepjax[tpu]"'
        ) from error


def _h100s(topology: str) -> list[Any]:
    found = re.fullmatch(r"h100:(\d+)x(\d+)", topology)
    if not found or not int(found[1]) * int(found[2]):
        raise UserError(f"--topology={topology}: expected h100:HOSTSxGPUS, such as h100:1x8 or h100:16x8")
    try:
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=h100.TARGET_CONFIG, topology=f"1x{found[1]}x{found[2]}"
        )
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--topology={topology} needs JAX's compiler for NVIDIA GPUs, the package jax-cuda13-plugin, which is not "
            f'installed or does not load; python -m pip install "sepjax[compile]" ({first_line(error)})'
        ) from error
    return list(description.devices)


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """`train.py`'s step for a mesh of devices that need not be here.

    Raises:
      UserError: batch, heads or rows do not split over the mesh, or a device's memory is too small.
    """
    check_batch(mesh, config.data.batch_size // config.optimizer.accumulation_steps)
    check_heads(mesh, config.model.num_heads)
    check_length(mesh, config.data.sequence_length)
    state = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = functools.partial(train_step, config, model_graph(config))
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    with jax.set_mesh(mesh):
        try:
            with working("compiling the step"):
                return step.lower(state, abstract_batch(config, mesh)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = first_line(error).rpartition("RESOURCE_EXHAUSTED: ")[2]
            raise UserError(
                f"the step does not fit {mesh.devices.flat[0].device_kind}: {reason}. Split the parameters over more "
                "devices (mesh.fsdp), raise optimizer.accumulation_steps, or keep less for the backward pass "
                "(model.remat='full')"
            ) from error


def make_plan(config: Config, topology: str, largest: int) -> Plan:
    """Compiles the step for a topology and reads what the compiler made of it; `largest` arrays are listed."""
    devices = topology_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    compiled = compile_step(config, mesh)
    sizes: Any = compiled.memory_analysis()
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        program=sizes.generated_code_size_in_bytes,
        peak=sizes.peak_memory_in_bytes,
    )
    kind, program = devices[0].device_kind, Program(compiled.as_text() or "")
    hbm = int(_HBM[kind] * 2**30) if kind in _HBM else None
    return Plan(kind, dict(mesh.shape), memory, hbm, program.collectives(), program.largest(largest))


def report(plan: Plan, config: Config) -> str:
    """A plan in words and tables; GiB are 2^30 bytes."""
    memory, steps = plan.memory, config.optimizer.accumulation_steps

    def share(size: int) -> str:
        return f"{_gib(size):>8}" + (f" of {_gib(plan.hbm)} ({size / plan.hbm:.0%})" if plan.hbm else "")

    devices = functools.reduce(int.__mul__, plan.mesh.values())
    lines = [
        f"{devices} x {plan.device_kind}, mesh {plan.mesh}",
        f"a step: {steps} micro-batch(es) of {config.data.batch_size // steps} rows of {config.data.sequence_length} "
        "tokens",
        "",
        "memory of a device, GiB",
        f"  {'arguments: state, batch':<32}{_gib(memory.arguments):>8}",
        f"  {'outputs not in their place':<32}{_gib(memory.outputs):>8}",
        f"  {'temporaries':<32}{_gib(memory.temporaries):>8}",
        f"  {'program':<32}{_gib(memory.program):>8}",
        f"  {'together':<32}{share(memory.total)}",
        f"  {'in use at once, at the most':<32}{share(memory.peak)}",
        *([f"  {_verdict(plan, plan.hbm)}"] if plan.hbm else []),
        "",
        f"collectives of a step{'times':>13}{'GiB':>10}  over",
        *(f"  {x.kind:<20}{x.times:>12}{_gib(x.bytes):>10}  {x.axes}" for x in plan.collectives or []),
        *([] if plan.collectives else ["  none"]),
        "",
        f"largest arrays, not all at once{'GiB':>9}{'times':>7}",
        *(f"  {x.shape:<29}{_gib(x.bytes):>9}{x.count:>7}  {_short(x.source)}" for x in plan.largest),
    ]
    return "\n".join(lines)


def main(config: Config, topology: str, largest: int) -> None:
    """Prints the plan of a config's step on a topology."""
    check_adapters(config.lora, config.model)
    validate_attention(config.attention, config.model.num_layers)
    print(report(make_plan(config, topology, largest), config), flush=True)


def _verdict(plan: Plan, hbm: int) -> str:
    """Whether it fits. The compiler for TPUs refuses what does not; that for GPUs compiles it all the same."""
    needed = plan.memory.total
    if not plan.device_kind.startswith("NVIDIA") or needed <= _JAX_TAKES * hbm:
        return "fits"
    if needed <= _AT_MOST * hbm:
        return f"fits with XLA_CLIENT_MEM_FRACTION={_AT_MOST}: JAX takes {_JAX_TAKES:.0%} of a GPU's memory otherwise"
    return (
        "DOES NOT FIT: split parameters over more devices (mesh.fsdp), compute fewer rows at once (data.batch_size; "
        "optimizer.accumulation_steps above 1 hold the gradients twice), keep less for the backward pass "
        "(model.remat='full'), or train adapters (lora.rank)"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _short(source: str, most: int = 60) -> str:
    return source if len(source) <= most else "..." + source[3 - most :]
