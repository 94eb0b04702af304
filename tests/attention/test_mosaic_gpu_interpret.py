"""The Hopper kernels simulated on a CPU: warpgroups, barriers, copies, shared memory; races and deadlocks are found."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import mosaic_gpu, reference
from sepjax.attention.examples import alone, first
from sepjax.attention.mosaic_gpu_kernels import Shape
from sepjax.attention.ranges import Ranges, whole_rows
from sepjax.bench import kernels
from sepjax.bench.attention import Settings, make_inputs
from sepjax.config import ConfigError
from sepjax.layout import build_layout
from tests.attention.common import (
    assert_errs_at_most_twice_as_much,
    brute_force,
    check_scaled,
    largest_terms,
    results,
    tensors,
)
from tests.attention.simulator import assert_no_races, simulate


@pytest.fixture
def simulated(monkeypatch):
    """`mosaic_gpu.attend` on a simulated GPU of 2 SMs, each of which computes many blocks."""
    simulate(monkeypatch)
    shape = mosaic_gpu._shape
    monkeypatch.setattr(mosaic_gpu, "_shape", lambda *args: dataclasses.replace(shape(*args), num_sms=2))
    monkeypatch.setattr(mosaic_gpu, "_are_many", lambda blocks, shape: True)  # of one head a key head, blocks are long
    for op in (mosaic_gpu.attend, mosaic_gpu.attend_ranges):
        op.clear_cache()  # compiled programs of this test are of no use to others
    yield
    for op in (mosaic_gpu.attend, mosaic_gpu.attend_ranges):
        op.clear_cache()
    assert_no_races()


def flags(shape, density):
    return np.random.default_rng(0).random(shape[:2]) < density


def documents(shape, *lengths):
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return np.tile(np.resize(ids, shape[1]).astype(np.int32), (shape[0], 1))


# (B, T, N, K, H), density, n, a, lengths of documents, the first of them padding.
CASES = {
    "documents and padding, one head a key head": ((1, 212, 1, 1, 64), 0.2, 30, 3, (5, 60, 1, 40, 34)),
    "grouped heads, blocks beyond the last token": ((1, 200, 4, 2, 64), 0.2, 20, 3, None),
    "three heads a key head, documents and padding": ((1, 140, 3, 1, 64), 0.2, 30, 3, (5, 60, 1, 40, 34)),
    "four heads of 128 a key head": ((1, 72, 4, 1, 128), 0.2, 40, 3, (0, 50, 22)),
    "heads of 80": ((1, 72, 2, 1, 80), 0.2, 20, 3, None),
    "heads of 256": ((1, 72, 2, 1, 256), 0.2, 20, 3, None),
    "every token a separator": ((2, 78, 2, 1, 64), 1.0, 5, 0, None),
    "no key but the own": ((1, 78, 2, 1, 64), 0.0, 1, 0, None),
}


# With scaled values and with any ranges below; tiles of heads of 128 in test_mosaic_gpu_compile.py.
@pytest.mark.soak
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case):
    shape, density, window_size, num_sinks, lengths = CASES[case]
    layout = build_layout(
        flags(shape, density),
        window_size=window_size,
        num_sinks=num_sinks,
        segment_ids=None if lengths is None else documents(shape, *lengths),
    )
    inputs, scale = tensors(shape, jnp.bfloat16), shape[-1] ** -0.5
    got = results(functools.partial(mosaic_gpu.attend, scale=scale), *inputs, layout)
    plain = results(functools.partial(reference.attend, scale=scale, dtype=jnp.bfloat16), *inputs, layout)
    exact = brute_force(*inputs, layout.as_mask())
    assert_errs_at_most_twice_as_much(got, plain, exact, largest_terms(*inputs), jnp.bfloat16)


@pytest.mark.soak  # warpgroups that take turns run below, with heads of 56
@pytest.mark.usefixtures("simulated")
def test_heads_of_128_in_long_rows(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_SHORT_ROW", 0)
    test_equals_the_definition("four heads of 128 a key head")


@pytest.mark.usefixtures("simulated")
@pytest.mark.soak  # with factors, gradients too, below
def test_the_forward_kernel_without_factors():
    """As a model calls it. Its gradients have the kernels of scaled values, below; all cases of both with -m soak."""
    shape = (1, 72, 2, 1, 64)
    inputs, scale = tensors(shape, jnp.bfloat16), shape[-1] ** -0.5
    layout = build_layout(flags(shape, 0.2), window_size=20, num_sinks=3, segment_ids=documents(shape, 0, 50, 22))
    ops = (mosaic_gpu.attend, functools.partial(reference.attend, dtype=jnp.bfloat16))
    got, plain = (jax.jit(functools.partial(op, scale=scale))(*inputs[:3], layout) for op in ops)
    exact = brute_force(*inputs, layout.as_mask())[:2]
    terms = largest_terms(*inputs)
    assert_errs_at_most_twice_as_much(got, plain, exact, terms, jnp.bfloat16)


@pytest.mark.soak  # far values are scaled in test_op.py; vmap, in test_examples.py
@pytest.mark.usefixtures("simulated")
def test_far_values_are_scaled_in_an_example_under_vmap():
    """Of heads of 48, which are filled up."""
    shape = (1, 72, 2, 1, 48)
    inputs, scale = tensors(shape, jnp.bfloat16), shape[-1] ** -0.5
    layout = build_layout(flags(shape, 0.2), window_size=20, num_sinks=3, segment_ids=documents(shape, 0, 50, 22))
    layout = layout.with_most_far(4)  # three sinks and one more of the first document
    assert int((layout.far_end - layout.far_start).max()) == 4
    plain = functools.partial(reference.attend, scale=scale, dtype=jnp.bfloat16)

    def op(*arrays, far_scale):
        def example(*arrays):
            return first(mosaic_gpu.attend(*alone(arrays), scale=scale))

        return jax.vmap(example)(*arrays, far_scale)

    check_scaled(op, inputs, layout, plain)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.soak)])  # of scaled values: above
@pytest.mark.parametrize("N", [1, 2, 3])  # three warpgroups compute a head, two compute two, three compute three
def test_more_keys_than_queries(N, gradients):
    """What a device of a mesh sees: two chunks of 36 queries, each behind a halo of 20 keys, and 40 far keys.

    Heads are of 56, which zeros fill up to 64.
    """
    B, K, H, keys, num_far = 1, 1, 56, 112, 40
    near_end = np.tile(np.r_[21:57, 77:113], (B, 1)).astype(np.int32)
    far_end = np.sort(np.random.default_rng(0).integers(0, num_far - 9, near_end.shape)).astype(np.int32)
    seen = Ranges(far_end // 3, far_end, near_end - 20, near_end, np.full(B, num_far - 9, np.int32))
    (q, _, _, d_out, d_lse), (_, *near, _, _), (_, *far, _, _) = (
        tensors((B, T, N, K, H), jnp.bfloat16, seed) for seed, T in enumerate((72, keys, num_far))
    )
    scale = H**-0.5

    @functools.partial(jax.jit, static_argnums=0)
    def run(op, *arrays):
        outputs, vjp = jax.vjp(lambda q, near, far: op(q, near, far, seen, scale=scale), *arrays)
        return outputs, *([vjp((d_out.astype(arrays[0].dtype), d_lse))] if gradients else [])

    arrays = q, tuple(near), tuple(far)
    exact = run(reference.attend_ranges, *jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    got = run(mosaic_gpu.attend_ranges, *arrays)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0.03, atol=0.03), got, exact)
    for of_far in (x for gradient in got[1:] for x in gradient[2]):
        assert (np.asarray(of_far)[:, num_far - 9 :] == 0).all(), "nobody sees the last far keys"


def test_packed_blocks_are_cut_where_sms_have_few():
    """By query heads, so that each SM has as much to do; elsewhere only where there are few key heads."""

    def splits(B, T, N, K, H):
        return mosaic_gpu._key_gradient_tiles(Shape(B, T, N, K, H, T, T, jnp.bfloat16, 1.0, num_sms=132)).splits

    assert splits(8, 4096, 9, 3, 64) == 3, "5.8 blocks an SM"
    assert splits(1, 32768, 32, 8, 128) == splits(8, 4096, 32, 8, 128) == 1, "15.5 of them"
    assert splits(1, 2048, 32, 8, 128) == 4
    assert splits(1, 32768, 32, 4, 128) == 2, "a long row: as many as key heads ask for"
    assert splits(1, 512, 12, 12, 64) == 1, "one query head a key head: nothing to cut"


def test_which_queries_see_a_block_of_keys(monkeypatch):
    """Counted in rows of up to 32,768 tokens, searched for in longer ones."""
    shape = Shape(1, 300, 1, 1, 64, 300, 300, jnp.bfloat16, 1.0, num_sms=132)
    seen = whole_rows(
        build_layout(flags((1, 300), 0.6), window_size=40, num_sinks=3, segment_ids=documents((1, 300), 0, 90, 210))
    )
    counted, searched = [], []
    for found, most in ((counted, mosaic_gpu._FEW_COMPARISONS), (searched, 0)):
        monkeypatch.setattr(mosaic_gpu, "_FEW_COMPARISONS", most)
        found += jax.jit(lambda seen: mosaic_gpu._visitors(seen, shape, 64))(seen)
    jax.tree.map(np.testing.assert_array_equal, counted, searched)
    far, near = ((seen.far_start, seen.far_end), (seen.near_start, seen.near_end))
    for visitors, (start, end) in ((counted[0], far), (counted[1], near)):
        start, end = np.asarray(start)[0], np.asarray(end)[0]
        for block, (begin, stop) in enumerate(np.asarray(visitors)[0].T):
            sees = np.flatnonzero((start < end) & (start < 64 * block + 64) & (end > 64 * block))
            assert begin <= sees[0] <= sees[-1] < stop if len(sees) else stop <= begin, block


@pytest.mark.usefixtures("simulated")
@pytest.mark.soak  # what is packed is what the kernels above read
def test_packing_moves_every_global_key_and_nothing_else():
    shape = (2, 100, 2, 2, 64)
    _, k, v, *_ = tensors(shape, jnp.bfloat16)
    layout = build_layout(flags(shape, 0.9), window_size=5, num_sinks=2)
    q, k, v, layout = mosaic_gpu._aligned((k, k, v), layout)
    packed = mosaic_gpu._pack(mosaic_gpu._shape(q, k, layout, 1.0), k, v, layout)
    for row, count in enumerate(np.asarray(layout.num_global)):
        for source, target in zip((k, v), packed, strict=True):
            index = np.asarray(layout.global_index)[row, :count]
            np.testing.assert_array_equal(np.asarray(target)[row, :count], np.asarray(source)[row, index])


@pytest.mark.soak
@pytest.mark.usefixtures("simulated")
def test_the_kernel_bench_runs_every_kernel():
    settings = Settings(num_heads=2, num_kv_heads=1, head_dim=64, window_size=20)
    results = [(name, run()) for name, run in kernels.stages(*make_inputs(settings, 1, 64))]
    assert [name for name, _ in results] == ["ranges", "packing", "forward", "dQ", "visitors", "dK and dV"]
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in results[-1][1][2:])


def test_the_kernel_bench_says_what_it_needs():
    with pytest.raises(ConfigError, match="these kernels cannot run: it needs an NVIDIA Hopper GPU"):
        kernels.main(kernels.Settings())
