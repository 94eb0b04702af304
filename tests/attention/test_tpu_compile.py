"""The kernels compiled for real TPUs, none of which is here: XLA, Mosaic and their limits, as on the chip itself.

A kernel that does not fit vector or scalar memory, or whose tiles the hardware cannot load, fails here. It says nothing
about results (test_tpu.py) or time.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sepjax.attention import reference, separator_attention, tpu, xla
from sepjax.attention.context_parallel import ContextPlan, context_attention, fits
from sepjax.attention.op import choose
from sepjax.attention.ranges import Ranges
from sepjax.layout import build_layout
from sepjax.training.plan import compile_here
from tests.attention.common import results

pytest.importorskip("libtpu", reason="the compiler for TPUs: python -m pip install -e '.[compile]'")
compile_here()

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
# (B, T, N, K, H): the shapes of sep_small and of Llama-3-8B, with fewer heads; and one key head of size 256.
SHAPES = {2048: (2, 2048, 6, 6, 64), 8192: (1, 8192, 16, 4, 128), 32768: (1, 32768, 2, 1, 256)}


@functools.cache
def mesh_of(topology, *, chips_per_host=(1, 1, 1)):
    options = {"chips_per_host_bounds": chips_per_host}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    # TPU7x has two devices a chip.
    devices = np.asarray(devices[: math.prod(map(int, re.findall(r"\d+", topology.partition(":")[2])))])
    return jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def arguments(mesh, shape, dtype, spec):
    """The arguments of `results`, without their memory."""
    B, T, N, K, H = shape
    placed = jax.NamedSharding(mesh, spec)
    layout = jax.eval_shape(lambda: build_layout(jnp.zeros((B, T), bool), window_size=256, num_sinks=4))
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    inputs = [*(jax.ShapeDtypeStruct(x, dtype) for x in shapes), jax.ShapeDtypeStruct((B, T, N), jnp.float32), layout]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), inputs)


def compiled(mesh, shape, dtype, op=None, spec=None):
    """Forward and backward pass of `op`, and of the best implementation where it is None."""
    spec = spec or jax.P()
    op = op or functools.partial(separator_attention, return_lse=True)
    with jax.set_mesh(mesh):
        return results.lower(op, *arguments(mesh, shape, dtype, spec)).compile()


@functools.cache
def compiled_kernels(chip, T):
    return compiled(mesh_of(CHIPS[chip]), SHAPES[T], jnp.bfloat16)


def kernels(program):
    """Names of the Pallas kernels in a compiled program."""
    return set(re.findall(r"%(separator_attention_\w+?)(?:\.\d+)? = ", program.as_text()))


EVERY_KERNEL = {f"separator_attention_{name}" for name in ("forward", "query_gradient", "key_gradient")}


# A large shape for one chip, small ones for another and for float32 of the largest heads (below); the rest, minutes
# of it, with -m soak.
ALWAYS = {("v5e", 8192)}
EVERY_PAIR = [
    pytest.param(chip, T, marks=[] if (chip, T) in ALWAYS else pytest.mark.soak) for chip in CHIPS for T in SHAPES
]


@pytest.mark.parametrize(("chip", "T"), EVERY_PAIR)
def test_kernels_compile_and_are_what_is_chosen(chip, T):
    """With no implementation named: the target is the mesh's device, whatever this machine is."""
    assert kernels(compiled_kernels(chip, T)) == EVERY_KERNEL


OTHERS = ["tpu7x", *(pytest.param(x, marks=pytest.mark.soak) for x in ("v6e", "v5p"))]  # those: the limits of v5e


@pytest.mark.parametrize("chip", OTHERS)
def test_every_chip_has_them(chip):
    """Heads of 80 here, which are filled up to 128."""
    assert kernels(compiled(mesh_of(CHIPS[chip]), (1, 300, 2, 1, 80), jnp.bfloat16)) == EVERY_KERNEL


@pytest.mark.soak  # float32 is run in test_tpu.py; that larger tiles do not fit is for who changes them to see
@pytest.mark.parametrize("chip", CHIPS)
def test_float32_compiles(chip):
    """Twice the memory for every tile, and the largest head size."""
    assert kernels(compiled(mesh_of(CHIPS[chip]), (1, 300, 4, 2, 256), jnp.float32)) == EVERY_KERNEL


@pytest.mark.soak
@pytest.mark.parametrize("T", [2**17 - 1, 2**19])
def test_long_rows_compile(T):
    """Just below T = 128k, where tiles grow, the tables are largest; 512k is the longest that is served."""
    assert kernels(compiled(mesh_of(CHIPS["v5e"]), (1, T, 2, 1, 64), jnp.bfloat16)) == EVERY_KERNEL


# Parts of rows, as `context` makes them: queries, near and far keys of a device, (N, K, H). The first is a part of 1M
# tokens, whose list of visits does not fit scalar memory at once; then a part of 128k, a dense layer, large heads.
PARTS = {
    "1M over 8": ((1, 2**17, 2**17 + 510, 2**18), (2, 2, 64), jnp.bfloat16),
    "128k over 16": ((1, 8192, 8192 + 510, 2**15), (16, 4, 128), jnp.bfloat16),
    "dense": ((2, 8192, 2**16, 1), (4, 1, 128), jnp.bfloat16),
    "float32": ((2, 300, 700, 200), (4, 2, 256), jnp.float32),
}


@pytest.mark.soak
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("chip", CHIPS)
def test_parts_of_rows_compile(chip, part):
    (B, Q, near, far), (N, K, H), dtype = PARTS[part]
    mesh = mesh_of(CHIPS[chip])

    def both(q, near, far, seen, *cotangents):
        op = functools.partial(tpu.attend_ranges, scale=H**-0.5)
        outputs, vjp = jax.vjp(lambda *arrays: op(*arrays, seen), q, near, far)
        return outputs, vjp(cotangents)

    def of(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    border = of((B, Q), jnp.int32)
    keys = [(of((B, n, K, H)),) * 2 for n in (near, far)]
    seen = Ranges(border, border, border, border, of((B,), jnp.int32))
    with jax.set_mesh(mesh):
        arguments = of((B, Q, N, H)), *keys, seen, of((B, Q, N, H)), of((B, Q, N), jnp.float32)
        assert kernels(jax.jit(both).lower(*arguments).compile()) == EVERY_KERNEL


@pytest.mark.soak  # a program of 8 s; the op over parts of rows is in test_context_parallel.py
def test_a_row_over_several_chips():
    """Context parallelism has the kernels inside, with room for the global keys that are sent and without."""
    mesh, part = mesh_of("v5e:2x2", chips_per_host=(2, 2, 1)), jax.P(None, "data")
    plan = ContextPlan(4, halo=255, capacity=128, axis="data")
    specs = {"in_specs": (part, part, part, jax.P(), jax.P()), "out_specs": (part, part)}
    mapped = jax.shard_map(functools.partial(context_attention, plan=plan), mesh=mesh, **specs, check_vma=False)

    def op(q, k, v, layout):
        return mapped(q, k, v, layout, fits(layout, plan.ways, plan.capacity))

    text = compiled(mesh, (1, 2048, 4, 2, 64), jnp.bfloat16, op).as_text()
    found = re.findall(r"%separator_attention_(\w+?)(?:\.\d+)? = ", text)
    # Two branches and no other form; the one without room computes its results again for the gradients.
    assert sorted(found) == sorted(2 * ["forward", "query_gradient", "key_gradient"] + ["forward"])
    assert text.count('custom_call_target="tpu_custom_call"') == len(found), "Mosaic's"
    assert re.search("all-gather", text)
    assert re.search("collective-permute", text)


def largest_array(program):
    """Elements of the largest array anywhere in a compiled program's text, inside fusions and loops too."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.soak  # memory is linear, below; of the XLA form in test_op.py
def test_no_array_of_quadratic_size_is_in_the_program():
    """Neither [T, T] nor [T, S], fused or not: the largest array is that of near and far keys."""
    B, T, N, _, H = SHAPES[8192]
    assert largest_array(compiled_kernels("v5e", 8192)) == B * T * N * H
    q, k, v, _, _, layout = arguments(mesh_of(CHIPS["v5e"]), (1, 1024, 2, 1, 64), jnp.bfloat16, jax.P())
    definition = jax.jit(functools.partial(reference.attend, scale=1.0)).lower(q, k, v, layout).compile()
    assert largest_array(definition) >= 1024**2, "the measure itself"


def test_stated_cost_reaches_the_compiler():
    cost = compiled_kernels("v5e", 8192).cost_analysis()
    B, T, N, _, H = SHAPES[8192]
    pairs = B * N * T * (256 + 0.12 * T / 2)  # of typical text, see test_tpu.py
    assert cost["flops"] >= (4 + 6 + 8) * H * pairs


def test_memory_is_linear_in_the_length():
    """No device memory beyond a few copies of the arguments, packed keys for all tokens and float32 gradients."""
    memory = compiled_kernels("v5e", 8192).memory_analysis()
    assert memory.temp_size_in_bytes < 4 * memory.argument_size_in_bytes


@pytest.mark.parametrize("check_vma", [pytest.param(False, marks=pytest.mark.soak), True])  # False: also above
def test_rows_on_several_chips(check_vma):
    """Under `jax.shard_map`, with and without its check of what varies over the mesh."""
    mesh, rows = mesh_of("v5e:2x2", chips_per_host=(2, 2, 1)), jax.P("data")
    op = functools.partial(separator_attention, return_lse=True, implementation="tpu")
    mapped = jax.shard_map(op, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check_vma)
    program = compiled(mesh, (4, 512, 2, 1, 64), jnp.bfloat16, mapped, rows)
    assert kernels(program) == EVERY_KERNEL
    assert not re.search(r"all-(gather|reduce|to-all)", program.as_text()), "rows need nothing from each other"


def test_what_the_kernels_do_not_serve_goes_to_xla():
    chosen = []
    with jax.set_mesh(mesh_of(CHIPS["v5e"])):
        for dtype in (jnp.bfloat16, jnp.float16):
            jax.eval_shape(lambda q: chosen.append(choose(None, q)), jax.ShapeDtypeStruct((1, 8, 2, 64), dtype))
    assert chosen == [tpu, xla]
