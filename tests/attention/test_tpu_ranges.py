"""The TPU kernels over any two arrays of keys, and over rows that a mesh axis splits; on a CPU, as in test_tpu.py."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.attention import reference, tpu, tpu_calls
from sepjax.attention.context_parallel import ContextPlan
from sepjax.attention.ranges import Ranges
from tests.attention.common import (
    assert_errs_at_most_twice_as_much,
    brute_force,
    check,
    examples,
    largest_terms,
    layouts,
    ranges,
    ranges_mask,
    results,
    tensors,
)
from tests.attention.test_context_parallel import over
from tests.attention.test_tpu import SIMULATOR

# (B, queries, near keys, far keys), (N, K, H). Blocks are of 256 queries, of 128 up to 128.
FEWER, MORE, FEW_KEYS = (2, 300, 520, 270), (1, 300, 150, 60), (2, 20, 3, 1)
CASES = {
    "fewer queries than keys": (FEWER, (2, 1, 64)),
    "more queries than keys": (MORE, (3, 1, 64)),
    "hardly a key": (FEW_KEYS, (2, 2, 256)),
}
RARE = CASES  # with -m soak; the first of them is simulated below


def over_arrays(attend_ranges, scale, sizes):
    """`attend_ranges` as an op of (q, k, v, ranges): near keys, then far keys, in one array."""

    def op(q, k, v, seen):
        near, far = zip(*(jnp.split(x, [sizes[2]], axis=1) for x in (k, v)), strict=True)
        return attend_ranges(q, near, far, seen, scale=scale)

    return op


@functools.cache
def ops(sizes, H, interpret, dtype):
    """The kernels', and the definition's with every operation in `dtype`."""
    kernels = functools.partial(tpu.attend_ranges, interpret=interpret)
    definition = functools.partial(reference.attend_ranges, dtype=dtype)
    return [over_arrays(f, H**-0.5, sizes) for f in (kernels, definition)]


def inputs_of(sizes, heads, dtype=jnp.float32):
    """q, k, v and cotangents, with near and far keys one after the other."""
    B, Q, near, far = sizes
    q, _, _, *cotangents = tensors((B, Q, *heads), dtype)
    _, k, v, *_ = tensors((B, near + far, *heads), dtype, seed=1)
    return q, k, v, *cotangents


def run_and_check(sizes, heads, seen, *, interpret, dtype=jnp.float32):
    """The 2x rule for the output, lse and the gradients of q and of near and far keys."""
    op, definition = ops(sizes, heads[2], interpret, jnp.dtype(dtype).name)
    inputs = inputs_of(sizes, heads, dtype)
    got = results(op, *inputs, seen)
    assert [x.dtype for x in got] == [dtype, jnp.float32, dtype, dtype, dtype]
    exact = brute_force(*inputs, ranges_mask(seen, *sizes[2:]))
    plain = results(definition, *inputs, seen)
    assert_errs_at_most_twice_as_much(got, plain, exact, largest_terms(*inputs), dtype)
    return got


@pytest.mark.parametrize("case", [x if x not in RARE else pytest.param(x, marks=pytest.mark.soak) for x in CASES])
@examples(2)
@given(data=st.data())
def test_equals_the_definition(case, data):
    sizes, heads = CASES[case]
    run_and_check(sizes, heads, data.draw(ranges(sizes)), interpret=True)


def windows(sizes):
    """A window slides over the near keys; nine far keys are none; the first 20 and the last 30 queries see nothing."""
    B, Q, near, far = sizes
    i = np.minimum(np.arange(Q), Q - 30)
    near_end, far_end = (np.where(i < 20, 0, i * n // Q).astype(np.int32) for n in (near, far - 9))
    near_start, far_start = np.maximum(near_end - 150, 0), far_end // 3
    near_start[-30:], far_start[-30:] = near_end[-30:], far_end[-30:]
    rows = (np.tile(x, (B, 1)) for x in (far_start, far_end, near_start, near_end))
    return Ranges(*rows, np.full(B, far - 9, np.int32))


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.soak)])
def test_in_simulated_memories(dtype):
    """What nobody sees, and who sees nothing, is worth nothing to the last bit, though unwritten memory is NaN."""
    sizes = (1, *FEWER[1:])
    seen = windows(sizes)
    out, lse, dq, dk, dv = run_and_check(sizes, (2, 1, 64), seen, interpret=SIMULATOR, dtype=dtype)
    mask = ranges_mask(seen, *sizes[2:])
    is_blind, is_unseen = ~mask.any(axis=2), ~mask.any(axis=1)
    assert is_blind.sum() >= 49
    assert is_unseen.sum() >= 9
    assert np.isneginf(np.asarray(lse)[is_blind]).all()
    assert not any(np.asarray(x)[is_blind].any() for x in (out, dq))
    assert not any(np.asarray(x)[is_unseen].any() for x in (dk, dv))


# Two blocks of queries and two rows; three blocks, of which the last part has one.
@pytest.mark.parametrize("sizes", [FEWER, pytest.param((1, 520, 300, 200), marks=pytest.mark.soak)])
def test_queries_whose_list_does_not_fit_go_in_parts(sizes, monkeypatch):
    """Two parts of a row, each with its own list; gradients of keys are sums over both."""
    monkeypatch.setattr(tpu_calls, "_VISIT_BYTES", 24 if sizes != FEWER else 20)
    assert tpu_calls._tiling(*sizes, False)[1] == 2
    heads, seen = (2, 1, 64), windows(sizes)
    kernels = functools.partial(tpu.attend_ranges.__wrapped__, interpret=True)
    inputs = inputs_of(sizes, heads)
    got = results(over_arrays(kernels, heads[2] ** -0.5, sizes), *inputs, seen)
    check(got, inputs, ranges_mask(seen, *sizes[2:]))


@pytest.fixture
def served_here(monkeypatch):
    """`implementation="tpu"` is served by interpreting the kernels."""
    monkeypatch.setattr(tpu, "unsupported", lambda q: None)
    monkeypatch.setattr(tpu, "attend_ranges", functools.partial(tpu.attend_ranges, interpret=True))


# Chunks of 64 with halos from three more, a block of 128 queries a device; two blocks in chunks of 256.
PLANS = {
    "4 devices": ((2, 512, 2, 1, 8), ContextPlan(4, halo=150, capacity=128)),
    "4 devices, little room": ((2, 512, 2, 1, 8), ContextPlan(4, halo=150, capacity=20)),
    "4 devices, all keys sent": ((2, 512, 2, 1, 8), ContextPlan(4, halo=0, capacity=0, dense=True)),
    "2 devices, little room": ((1, 1024, 2, 1, 8), ContextPlan(2, halo=69, capacity=200)),
}
OPS = {name: over(plan, "tpu") for name, (_, plan) in PLANS.items()}


@pytest.mark.usefixtures("served_here")
@pytest.mark.soak  # ranges of any kind are above, and the same around the XLA form in test_context_parallel.py
@pytest.mark.parametrize("name", PLANS)
@examples(2)
@given(data=st.data())
def test_rows_split_over_devices(name, data):
    """Context parallelism around the kernels: the definition's results, with room for all global keys or too little."""
    shape, plan = PLANS[name]
    layout, inputs = data.draw(layouts(shape)), tensors(shape)
    layout = layout.with_window(shape[1] if plan.dense else data.draw(st.integers(1, plan.halo + 1)))
    check(results(OPS[name], *inputs, layout), inputs, layout.as_mask())
