"""The Hopper kernels compiled for an H100 that is not there: XLA, Mosaic and ptxas as on the real one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import decode, mosaic_gpu, runs, separator_attention, xla
from sepjax.attention.kernels_ahead import kernels_of
from sepjax.attention.op import choose
from sepjax.config import AttentionConfig, ModelConfig
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.bounded_pass import stream_pass
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.layout import build_layout
from sepjax.model.one_row import call
from sepjax.model.one_row.shape import Shape
from sepjax.model.quantised import QuantisedMatrix, product_by_outputs
from sepjax.model.transformer import abstract
from sepjax.model.unrolled import Layerwise, by_layer
from sepjax.training.plan import topology_devices
from tests.attention.common import results


@pytest.fixture(scope="module")
def h100():
    pytest.importorskip("jax_plugins.xla_cuda13", reason='compiling for a GPU needs pip install -e ".[compile]"')
    devices = np.asarray(topology_devices("h100:1x1"))
    return jax.sharding.Mesh(devices.reshape(1), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def lowered(mesh, shape, dtype, op, results=results):
    """Forward and backward of `op` for (B, T, N, K, H), or another function of it."""
    B, T, N, K, H = shape
    placed = jax.NamedSharding(mesh, jax.P())

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def run(layout, *inputs):
        return results(op, *inputs, layout)

    build = functools.partial(build_layout, window_size=64, num_sinks=4)
    layout = jax.eval_shape(build, struct(B, T, dtype=bool))  # given: what makes it would be compiled, too
    layout = jax.tree.map(lambda x: struct(*x.shape, dtype=x.dtype), layout)
    inputs = struct(B, T, N, H), struct(B, T, K, H), struct(B, T, K, H), struct(B, T, N, H)
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(layout, *inputs, struct(B, T, N, dtype=jnp.float32))


KERNEL = functools.partial(separator_attention, implementation="mosaic_gpu", return_lse=True)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 390, 8, 2, 96), jnp.bfloat16),  # as 128
        pytest.param((2, 384, 9, 3, 64), jnp.bfloat16, marks=pytest.mark.soak),  # in 160 registers; reading is below
        pytest.param((32, 576, 12, 12, 64), jnp.float16, marks=pytest.mark.soak),  # blocks of 192 tokens
        pytest.param((1, 1, 4, 1, 256), jnp.bfloat16, marks=pytest.mark.soak),
    ],
    ids=[
        "grouped heads of 96, bfloat16",
        "three heads of 64 a key head",
        "heads of 64, float16",
        "multi-query heads of 256, T = 1",
    ],
)
def test_compiles_for_an_h100(h100, shape, dtype):
    """Within an H100's shared memory and registers: ptxas would refuse, and Mosaic before it."""
    program = lowered(h100, shape, dtype, KERNEL)
    alone = kernels_of(program, h100.devices[0])
    for kernel in alone:  # which Mosaic keeps by their hashes
        kernel.compile()
    named = [set(re.findall(r'kernel_hash = ("[^"]*")', x.as_text())) for x in (program, *alone)]
    assert all(len(names) == 1 for names in named[1:])
    assert named[0] == set().union(*named[1:])
    assert len(alone) == len(named[0]) == 4, "packing, forward, dQ, dK with dV"
    assert program.compile().as_text().count("mosaic_gpu") >= 4


def test_it_is_chosen_for_an_h100_that_is_not_there(h100):
    chosen = []
    with jax.set_mesh(h100):
        for size, dtype in [(64, jnp.float32), *((size, jnp.bfloat16) for size in (32, 257, 64, 80, 96, 128, 256))]:
            q = jax.ShapeDtypeStruct((1, 128, 2, size), dtype)
            jax.eval_shape(lambda q: chosen.append(choose(None, q)), q)
            if chosen[-1] is xla:
                with pytest.raises(NotImplementedError, match=r"mosaic_gpu.* got (float32|32|257)"):
                    jax.eval_shape(functools.partial(choose, "mosaic_gpu"), q)
    assert chosen == 3 * [xla] + 5 * [mosaic_gpu], "float32 and heads of 32 and of 257 are for the XLA form"


@pytest.mark.soak  # the same kernel that writes, too, is below, and that of codes
@pytest.mark.parametrize(
    ("shape", "ends", "looks"),
    [
        ((64, 8, 4, 832, 128), (4, 68), True),
        ((16, 8, 4, 896, 128), (4, 68), False),
        ((1, 3, 3, 448, 64), (4, 4), True),  # blocks that share a row
        ((200, 2, 12, 512, 256), (), True),
        ((200, 1, 24, 640, 256), (4, 68), True),  # no room to keep their scores
    ],
    ids=["heads of 128", "without looks", "one row, heads of 64", "heads of 256, a dozen", "heads of 256, two dozen"],
)
def test_decoding_compiles_for_an_h100(h100, shape, ends, looks):
    B, K, G, C, H = shape
    placed = jax.NamedSharding(h100, jax.P())

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def run(visible, *given):
        assert decode.unsupported(jnp.bfloat16, H, C) is None
        return decode.attend(*given, decode.seen_slots(visible, kernel=True, part=16), ends, looks=looks)

    given = struct(B, K, len(ends) + 1, G, H), struct(B, K, H), struct(B, K, H), struct(B, K, C, H), struct(B, K, C, H)
    with jax.set_mesh(h100):
        compiled = jax.jit(run).lower(struct(B, C, dtype=bool), *given).compile()
    assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="JAX 0.12 does not compile it: decode.can_write")
@pytest.mark.parametrize(
    ("shape", "part", "looks"),
    [
        ((760, 3, 3, 832, 64), 16, True),
        pytest.param((760, 8, 4, 896, 128), 16, False, marks=pytest.mark.soak),
        pytest.param((256, 8, 4, 832, 128), 64, True, marks=pytest.mark.soak),
        pytest.param((256, 4, 8, 832, 128), 64, False, marks=pytest.mark.soak),  # no column for the key
    ],
    ids=["heads of 64, looks", "heads of 128", "heads of 128, looks", "eight heads of 128"],
)
def test_writing_compiles_for_an_h100(h100, shape, part, looks):
    """The token into three layers, one after the other, where they lie: no copy of any."""
    B, K, G, C, H = shape
    placed = jax.NamedSharding(h100, jax.P())

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def run(caches, visible, cos, sin, flat, to):
        seen, written = decode.seen_slots(visible, kernel=True, part=part), []
        q, k, v = (x.reshape(B, K, -1, H) for x in jnp.split(flat, [K * G, K * (G + 1)], axis=1))
        for cache in caches:
            given = q[:, :, None], k[:, :, 0], v[:, :, 0], *cache, seen, (4, 68)
            (out, _), new = decode.attend_and_write(*given, decode.Turn(cos, sin, flat), to, looks=looks)
            flat = jnp.concatenate([out.reshape(B, -1, H), flat[:, K * G :]], axis=1)
            written.append(new)
        return written, flat

    caches = [[struct(B, K, C, H), struct(B, K, C, H)] for _ in range(3)]
    table, seen = struct(3, B, H // 2, dtype=jnp.float32), struct(B, C, dtype=bool)
    given = caches, seen, table, table
    with jax.set_mesh(h100):
        program = jax.jit(run, donate_argnums=0)
        compiled = program.lower(*given, struct(B, K * (G + 2), H), struct(B, dtype=jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * B * K * C * H, "no copy of keys or values"


def test_a_step_of_many_rows_compiles_for_an_h100(h100):
    """Whatever the version of JAX: what it cannot compile is left to XLA (`decode.can_write`)."""
    config = ModelConfig(
        vocab_size=64, num_layers=1, embed_dim=64, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=64,
        dtype="bfloat16",
    )  # fmt: skip
    attention = AttentionConfig(num_sinks=4, max_separators=64, window_size=256, cache_size=800)
    sizes, rows = StreamSizes.create(config, attention), 256
    graph, shapes = abstract(config, attention)
    axes = ("data", "fsdp", "tensor", "context")
    mesh = jax.sharding.Mesh(h100.devices.reshape(1, 1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    placed = jax.NamedSharding(mesh, jax.P())

    def run(params, cache, tokens, counts, table):
        return stream_pass(Layerwise(graph, params), cache, tokens, counts, table, attention)

    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda x: by_layer(x, config), shapes)
        cache = jax.eval_shape(lambda: StreamingCache.create(config, rows, sizes, by_layer=True))
        of_rows = jax.ShapeDtypeStruct((rows, 1), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
        given = params, cache, *of_rows, jax.ShapeDtypeStruct((64,), bool)
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), given)
        program = jax.jit(run, donate_argnums=1).lower(*given).compile()
    assert "mosaic_gpu" in program.as_text()


@pytest.mark.parametrize(
    ("shape", "turned"),
    [
        ((32, 128, 9, 3, 64, 832), 128),
        pytest.param((4, 480, 32, 8, 128, 896), 128, marks=pytest.mark.soak),
        pytest.param((1, 100, 16, 2, 256, 448), 0, marks=pytest.mark.soak),
    ],
    ids=["heads of 64", "heads of 128", "heads of 256, no turned keys"],
)
def test_reading_compiles_for_an_h100(h100, shape, turned):
    B, T, N, K, H, C = shape
    placed = jax.NamedSharding(h100, jax.P())

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def run(numbers, first, turned, *given):
        return runs.attend(*given, runs.seen_by_numbers(numbers, first), turned)

    told = struct(B, C + T, dtype=jnp.int32), struct(B, T, dtype=jnp.int32), struct(B, K, turned, H) if turned else None
    given = struct(B, T, N, H), struct(B, T, K, H), struct(B, T, K, H), struct(B, K, C, H), struct(B, K, C, H)
    with jax.set_mesh(h100):
        compiled = jax.jit(run).lower(*told, *given).compile()
    assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.parametrize(
    ("shape", "several", "dtype", "looks"),
    [
        ((760, 8, 4, 832, 128), True, jnp.bfloat16, True),
        pytest.param((1, 3, 3, 896, 64), True, jnp.bfloat16, True, marks=pytest.mark.soak),  # blocks that share a row
        pytest.param((16, 2, 12, 512, 128), True, jnp.float16, False, marks=pytest.mark.soak),
        pytest.param((200, 2, 8, 512, 256), False, jnp.bfloat16, False, marks=pytest.mark.soak),
    ],
    ids=["heads of 128", "one row, heads of 64", "float16, more than eight", "heads of 256, one zone"],
)
def test_decoding_from_codes_compiles_for_an_h100(h100, shape, several, dtype, looks):
    B, K, G, C, H = shape
    placed = jax.NamedSharding(h100, jax.P())

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def run(visible, ends, scales, *given):
        assert decode.unsupported(jnp.int8, H, C) is None
        seen = decode.seen_slots(visible, kernel=True).told_to(given[0].shape, given[0].dtype, codes=True)
        return decode.attend(*given, seen, ends if several else (), scales, own=3 if several else 0, looks=looks)

    codes = struct(B, K, C, H, dtype=jnp.int8)
    scales = (struct(B, K, C, dtype=jnp.bfloat16),) * 2
    given = struct(B, K, 5 if several else 1, G, H), struct(B, K, H), struct(B, K, H), codes, codes
    with jax.set_mesh(h100):
        told = struct(B, C, dtype=bool), struct(B, 4, dtype=jnp.int32), scales
        compiled = jax.jit(run).lower(*told, *given).compile()
    assert "mosaic_gpu" in compiled.as_text()


def compiled_layers(h100, config, rows):
    """The main computation of all layers of so many rows, compiled: a token each, and next to no attention."""
    graph, shapes = abstract(config)
    placed = jax.NamedSharding(h100, jax.P())

    def layers(params, x):
        attend = lambda q, k, v, _: (q + jnp.repeat(k + v, 3, axis=2), None)  # noqa: E731
        return Layerwise(graph, params).run_layers(x, attend, None)[0]

    with jax.set_mesh(h100):
        given = (
            jax.eval_shape(lambda x: by_layer(x, config), shapes),
            jax.ShapeDtypeStruct((rows, 1, config.embed_dim), jnp.bfloat16),
        )
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), given)
        return jax.jit(layers).lower(*given).compile().as_text().partition("\nENTRY ")[2]


def test_a_layer_of_one_row_is_few_kernels(h100):
    """A norm and the products after it are one; so are a product and the sum after it.

    Products of XLA's own for a row are two kernels each, and their norms two more.
    """
    config = ModelConfig(
        vocab_size=64, num_layers=3, embed_dim=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
        dtype="bfloat16",
    )  # fmt: skip
    entry = compiled_layers(h100, config, 1)
    kernels = [line for line in entry.splitlines() if " fusion(" in line or " custom-call(" in line]
    # Of a layer QKV, what stands for attention (one or two), its projection, gate with up, their activation, down.
    assert len(kernels) <= 7 * config.num_layers, kernels
    assert any("bf16[3072,576]" in line for line in entry.splitlines()), "by their outputs"


@pytest.mark.parametrize("rows", [1, 256])
def test_matrices_of_8_bits_are_never_written_in_16(h100, rows):
    """A product reads codes, and its scales are part of what comes after the sums."""
    config = ModelConfig(
        vocab_size=64, num_layers=1, embed_dim=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
        dtype="bfloat16", weight_dtype="int8",
    )  # fmt: skip
    entry = compiled_layers(h100, config, rows)
    assert "s8[3072,576]" in entry, "the codes of gate and up, by their outputs"
    assert not re.search(r"= (bf16|f32)\[(3072,576|960,576|576,576|576,1536)\]", entry)


def test_products_of_digits_compile_for_an_h100(h100):
    """In a model's own program: what is large enough is one kernel, which reads codes as they lie."""
    placed = jax.NamedSharding(h100, jax.P())
    codes = jax.ShapeDtypeStruct((4096, 2048), jnp.int8, sharding=placed)
    x = jax.ShapeDtypeStruct((250, 2048), jnp.bfloat16, sharding=placed)
    scales = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=placed)
    with jax.set_mesh(h100):
        compiled = jax.jit(product_by_outputs).lower(x, QuantisedMatrix(codes, scales)).compile().as_text()
    assert "mosaic_gpu" in compiled
    assert not re.search(r"s32\[(250|256|500),4096\]", compiled), "no sums are written"


def test_inside_shard_map(h100):
    heads, rows = jax.P("data", None, None, None), jax.P("data")
    specs = {"in_specs": (heads, heads, heads, rows), "out_specs": (heads, jax.P("data", None, None))}
    best = functools.partial(separator_attention, return_lse=True)
    mapped = jax.shard_map(best, mesh=h100, **specs, check_vma=False)
    forward = lambda op, q, k, v, d_out, d_lse, layout: op(q, k, v, layout)  # noqa: E731
    assert "mosaic_gpu" in lowered(h100, (2, 128, 2, 1, 64), jnp.bfloat16, mapped, forward).as_text()
    with pytest.raises(NotImplementedError, match="pass check_vma=False to"):
        lowered(h100, (2, 128, 2, 1, 64), jnp.bfloat16, jax.shard_map(KERNEL, mesh=h100, **specs))


@pytest.mark.parametrize(
    ("shape", "in_place"),
    [
        (Shape(2, 576, 9, 3, 64, 1536, 896, (4, 68), 1e-5, 132), True),
        pytest.param(Shape(2, 4096, 32, 8, 128, 14336, 896, (4, 68), 1e-5, 132), True, marks=pytest.mark.soak),
        pytest.param(Shape(2, 576, 9, 3, 64, 1536, 512, (), 1e-5, 132, stacked=True), False, marks=pytest.mark.soak),
        pytest.param(Shape(2, 576, 9, 3, 64, 1536, 512, (), 1e-5, 132, stacked=True), True, marks=pytest.mark.soak),
        (
            Shape(2, 576, 9, 3, 64, 1536, 896, (4, 68), 1e-5, 132, codes=True, biased=True, head_norms=True),
            True,
        ),  # half a block of columns in each row
        pytest.param(Shape(32, 4096, 32, 8, 128, 14336, 896, (), 1e-5, 132, codes=True), True, marks=pytest.mark.soak),
    ],
    ids=[
        "SmolLM2-135M",
        "Llama-3-8B",
        "a growing cache, read",
        "a growing cache",
        "8 bits, biases, norms of heads",
        "Llama-3-8B, 8 bits",
    ],
)
def test_a_step_of_one_row_compiles_for_an_h100(h100, shape, in_place):
    s, placed = shape, jax.NamedSharding(h100, jax.P())

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    vector, table = struct(s.D, dtype=jnp.float32), struct(s.zones, s.H // 2, dtype=jnp.float32)
    layer = tuple(struct(*x.shape, dtype=x.dtype) for x in call.arrays_of(s))
    told = table, table, struct(s.C, dtype=jnp.float32), struct(1, dtype=jnp.int32), vector
    cache = (struct(s.L, s.K, s.C, s.H),) if s.stacked else (struct(s.K, s.C, s.H),) * s.L
    run = jax.jit(functools.partial(call.run, s, in_place=in_place), donate_argnums=(3, 4) if in_place else ())
    with jax.set_mesh(h100):
        compiled = run.lower((layer,) * s.L, struct(s.D), told, cache, cache).compile()
    assert "mosaic_gpu" in compiled.as_text()
    assert s.fault() is None
