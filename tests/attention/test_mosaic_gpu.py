"""The Hopper kernels on a Hopper GPU: `JAX_PLATFORMS=cuda python -m pytest -m gpu tests/attention`.

The rest of what CI can check without one is in test_mosaic_gpu_compile.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sepjax.attention import mosaic_gpu, reference, separator_attention
from sepjax.attention.op import choose
from sepjax.layout import build_layout
from tests.attention.common import (
    assert_errs_at_most_twice_as_much,
    brute_force,
    largest_terms,
    layouts,
    results,
    tensors,
)

pytestmark = pytest.mark.gpu

KERNEL = functools.partial(separator_attention, implementation="mosaic_gpu", return_lse=True)
DTYPES = (jnp.bfloat16, jnp.float16)

# (B, T, N, K, H): one token; a part of a block; some blocks and grouped heads; one key head; whole tiles; many heads.
SHAPES = {
    "T = 1": (2, 1, 2, 2, 64),
    "part of a block": (2, 70, 4, 2, 128),
    "H = 64": (2, 300, 4, 2, 64),
    "12 heads of 64": (1, 300, 12, 12, 64),
    "9 heads of 64, 3 a key head": (2, 300, 9, 3, 64),
    "multi-query": (1, 520, 3, 1, 128),
    "8 query heads a key head": (1, 384, 8, 1, 128),
    "2 rows of 2 key heads": (2, 390, 8, 2, 128),
    "H = 80, filled up": (1, 300, 4, 2, 80),
    "H = 96, filled up": (2, 390, 8, 2, 96),
    "H = 256": (1, 260, 4, 2, 256),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@functools.cache  # the same object each time, so that it is compiled once
def plain(shape, dtype):
    return functools.partial(reference.attend, scale=shape[-1] ** -0.5, dtype=dtype)


def check(shape, dtype, layout, seed=0, factor=1):
    q, k, *rest = tensors(shape, dtype, seed)
    inputs = (q * factor, k * factor, *rest)
    got = results(KERNEL, *inputs, layout)
    assert [x.dtype for x in got] == [dtype, jnp.float32, dtype, dtype, dtype]
    exact = brute_force(*inputs, layout.as_mask())
    expected = results(plain(shape, dtype), *inputs, layout)
    assert_errs_at_most_twice_as_much(got, expected, exact, largest_terms(*inputs), dtype)


# Layouts are built operation by operation on the GPU, each compiled the first time: slow draws are no fault.
@every_shape
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_equals_the_definition(shape, data):
    check(shape, jnp.float16 if shape == SHAPES["H = 64"] else jnp.bfloat16, data.draw(layouts(shape)))


def flags(shape, density, seed=0):
    return np.random.default_rng(seed).random(shape[:2]) < density


def segments(shape, *lengths):
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return np.tile(np.resize(ids, shape[1]).astype(np.int32), (shape[0], 1))


EDGES = {
    "n = 1": {"window_size": 1},
    "n = T": {"window_size": 390},
    "n above T": {"window_size": 2**40},
    "n = a block": {"window_size": 128},
    "n = a block and one": {"window_size": 129},
    "a = 0": {"num_sinks": 0},
    "a above T": {"num_sinks": 2**40},
    "no separators": {"density": 0},
    "neither separators nor sinks": {"density": 0, "num_sinks": 0},
    "only separators": {"density": 1, "num_sinks": 0},
    "left padding": {"lengths": (9, 381)},
    "documents and padding": {"lengths": (5, 133, 1, 64, 128, 59)},
    "short documents": {"lengths": (7, 1, 2, 3, 5, 8, 13)},
    "only padding": {"lengths": (390,)},
}


def edge_layout(edge, shape):
    options = {"window_size": 40, "num_sinks": 4, "density": 0.15, "lengths": None} | EDGES[edge]
    is_separator, lengths = flags(shape, options.pop("density")), options.pop("lengths")
    segment_ids = None if lengths is None else segments(shape, *lengths)
    return build_layout(is_separator, segment_ids=segment_ids, **options)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_edge_case(edge, dtype):
    shape = SHAPES["2 rows of 2 key heads"]
    check(shape, dtype, edge_layout(edge, shape))


@pytest.mark.parametrize("edge", ["n = a block and one", "documents and padding", "only padding"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_blocks_of_192_tokens(edge, dtype, monkeypatch):
    """Heads of 64 with a key head each have these where there are many."""
    monkeypatch.setattr(mosaic_gpu, "_are_many", lambda blocks, shape: True)
    shape = (2, 390, 5, 5, 64)  # of no other test: its program is this one's
    check(shape, dtype, edge_layout(edge, shape))


def some_layout(shape, **options):
    return build_layout(flags(shape, 0.15), **{"window_size": 40, "num_sinks": 4} | options)


def test_large_scores():
    shape = SHAPES["2 rows of 2 key heads"]
    check(shape, jnp.bfloat16, some_layout(shape), factor=10)


@every_shape
def test_same_input_same_bits(shape):
    inputs, layout = tensors(shape, jnp.bfloat16), some_layout(shape)
    first = results(KERNEL, *inputs, layout)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, first, results(KERNEL, *inputs, layout))


def test_long_rows_against_the_packed_xla_form():
    """T = 8192: many blocks in flight, and more packed keys than one tile; the brute force is too slow for it."""
    shape = (1, 8192, 8, 2, 128)
    inputs, layout = tensors(shape, jnp.bfloat16), build_layout(flags(shape, 0.12), window_size=256, num_sinks=4)
    got = results(KERNEL, *inputs, layout)
    wide = [jnp.asarray(x, jnp.float32) for x in inputs]
    xla = functools.partial(separator_attention, implementation="xla", return_lse=True)
    with jax.default_matmul_precision("highest"):
        exact = results(xla, *wide, layout)
    rough = results(xla, *inputs, layout)
    assert_errs_at_most_twice_as_much(got, rough, exact, largest_terms(*inputs), jnp.bfloat16)


def test_a_scale_of_any_sign():
    shape = SHAPES["part of a block"]
    q, k, v, *_ = tensors(shape, jnp.bfloat16)
    layout = some_layout(shape)
    for scale in (-0.3, 0.0, 2.0):
        out, lse = KERNEL(q, k, v, layout, scale=scale)
        exact, exact_lse = reference.attend(*(x.astype(jnp.float32) for x in (q, k, v)), layout, scale=scale)
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.05)
        np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-4)


def test_too_little_room_for_the_separators_is_exact_under_jit():
    shape = SHAPES["2 rows of 2 key heads"]
    q, k, v, *_ = tensors(shape, jnp.bfloat16)
    is_separator = flags(shape, 0.15)

    @jax.jit
    def run(capacity_is_short):
        layout = build_layout(is_separator & capacity_is_short, window_size=40, num_sinks=0, capacity=8)
        return KERNEL(q, k, v, layout)

    for short in (True, False):
        full = build_layout(is_separator & short, window_size=40, num_sinks=0)
        jax.tree.map(np.testing.assert_array_equal, run(short), KERNEL(q, k, v, full))


def test_windows_that_differ_between_scanned_and_rematerialised_layers():
    shape = SHAPES["2 rows of 2 key heads"]
    q, k, v, d_out, _ = tensors(shape, jnp.bfloat16)
    windows, layout = (3, shape[1], 17), some_layout(shape)

    def scanned(x):
        body = jax.checkpoint(lambda x, n: (x + KERNEL(x, k, v, layout.with_window(n))[0], None))
        return jax.lax.scan(body, x, jnp.asarray(windows))[0]

    def unrolled(x):
        return functools.reduce(lambda x, n: x + KERNEL(x, k, v, some_layout(shape, window_size=n))[0], windows, x)

    def value_and_gradient(f):
        out, vjp = jax.vjp(f, q)
        return out, *vjp(d_out)

    got, expected = (jax.jit(functools.partial(value_and_gradient, f))() for f in (scanned, unrolled))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_inside_shard_map():
    shape = SHAPES["2 rows of 2 key heads"]
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads, rows = jax.P("data", None, "tensor", None), jax.P("data")
    inputs, layout = tensors(shape, jnp.bfloat16), some_layout(shape)
    specs = {"in_specs": (heads, heads, heads, rows), "out_specs": (heads, jax.P("data", None, "tensor"))}
    mapped = jax.shard_map(KERNEL, mesh=mesh, **specs, check_vma=False)
    jax.tree.map(np.testing.assert_array_equal, results(mapped, *inputs, layout), results(KERNEL, *inputs, layout))


def test_it_is_the_best_that_fits():
    q = jnp.zeros((1, 8, 2, 128), jnp.bfloat16)
    assert choose(None, q).__name__.endswith("mosaic_gpu")
    assert choose(None, q.astype(jnp.float32)).__name__.endswith("xla")
    assert choose(None, q[..., :72]).__name__.endswith("mosaic_gpu")  # filled up
    assert choose(None, jnp.zeros((1, 8, 2, 264), jnp.bfloat16)).__name__.endswith("xla")
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, got float32"):
        choose("mosaic_gpu", q.astype(jnp.float32))
