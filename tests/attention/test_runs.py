"""A run of tokens over the slots of a cache: the Hopper kernel, simulated, against the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import runs
from sepjax.attention.target import Target
from tests.attention.common import assert_errs_at_most_twice_as_much
from tests.attention.simulator import assert_no_races, simulate

seen_by_numbers = jax.jit(runs.seen_by_numbers)  # twenty operations


def tensors(B: int, T: int, N: int, K: int, H: int, C: int, turned: int) -> tuple[list[Any], Any]:
    """q (large, so that weights differ), k and v of the run, keys and values in slots; and turned keys or None."""
    drawn = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, K, C, H), (B, K, C, H), (B, K, turned, H)
    q, *others, first = (jnp.asarray(drawn.standard_normal(shape, np.float32), jnp.bfloat16) for shape in shapes)
    return [2 * q, *others], first if turned else None


def numbers_of(B: int, T: int, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of keys and each query's first: a tile that nobody sees, one that only some queries see, holes; in the
    last row queries that see a few of their own tokens and no slot.
    """
    drawn = np.random.default_rng(1)
    numbers = np.tile(np.arange(C + T), (B, 1))
    numbers[:, :30] = runs.ALL
    numbers[:, 30:C] = np.where(drawn.random((B, C - 30)) < 0.1, runs.NOBODY, numbers[:, 30:C])
    numbers[0, 64:128], numbers[0, 128:192] = runs.NOBODY, np.arange(128, 192)
    first = np.tile(np.arange(T) + C - 70, (B, 1))
    first[0], first[-1] = 0, np.arange(T) + C - 5
    numbers[-1, :C] = runs.NOBODY
    return numbers.astype(np.int32), first.astype(np.int32)


def textbook(given: list[Any], turned: Any, seen: np.ndarray) -> list[np.ndarray]:
    """float64: the result [B, T, N, H], and log-sum-exp."""
    q, k, v, k_slots, v_slots = (np.asarray(x, np.float64) for x in given)
    if turned is not None:
        k_slots[:, :, : turned.shape[2]] = np.asarray(turned, np.float64)
    keys, values = (np.concatenate([x, np.swapaxes(y, 1, 2)], axis=2) for x, y in ((k_slots, k), (v_slots, v)))
    group = q.shape[2] // k.shape[2]
    scores = np.einsum("btnh,bnsh->bnts", q, np.repeat(keys, group, axis=1)) * q.shape[3] ** -0.5
    scores = np.where(seen[:, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bnts,bnsh->btnh", weights / total, np.repeat(values, group, axis=1))
    return [out, np.swapaxes((top + np.log(total))[..., 0], 1, 2)]


# (B, T, N, K, H, C), keys of first slots that are turned. Blocks have tokens of one, two, three or four heads.
CASES = {
    "two heads a block, turned keys": (2, 70, 2, 1, 64, 256, 64),
    "three heads a block, more tokens than one": (2, 70, 3, 1, 64, 256, 128),
    "one head a block, more tokens than one": (2, 130, 1, 1, 64, 256, 128),
    "heads of 128, four of them a block": (2, 50, 4, 1, 128, 192, 0),
    "heads of 256, a tile a chunk": (2, 20, 2, 2, 256, 192, 64),
}


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[] if i == 0 else [pytest.mark.soak]) for i, x in enumerate(CASES)]
)
def test_the_kernel_equals_the_definition(case, monkeypatch):
    *shape, first_slots = CASES[case]
    (B, T, _, _, _, C), (given, turned) = shape, tensors(*shape, first_slots)
    numbers, first = numbers_of(B, T, C)
    seen = (numbers[:, None] >= first[..., None]) & (np.arange(C + T) - C <= np.arange(T)[:, None])
    exact = textbook(given, turned, seen)
    definition = [*runs.attend(*given, runs.SeenInRun(jnp.asarray(seen)), turned)]
    simulate(monkeypatch)
    monkeypatch.setattr(runs, "target", lambda: Target("gpu", "two SMs", 2, "9.0"))
    kernel: Any = runs._kernel
    kernel.clear_cache()
    places, q, k, v = (np.array([2, 0], np.int32), *given[:3])
    among = [jnp.stack([x[1], jnp.full_like(x[0], jnp.nan), x[0]]) for x in given[3:]]
    got = [*runs.attend(q, k, v, *among, seen_by_numbers(numbers, first, places), turned)]
    kernel.clear_cache()  # a simulated program is of no use to others
    assert_no_races()
    largest = [np.abs(x).max() for x in exact]
    assert_errs_at_most_twice_as_much(got[:1], definition[:1], exact[:1], largest[:1], jnp.bfloat16)
    assert_errs_at_most_twice_as_much(got[1:], definition[1:], exact[1:], largest[1:], jnp.float32)


def test_tiles_that_no_query_sees_are_left_out():
    """Those that some do not see come first; then those that all see."""
    numbers, first = numbers_of(3, 70, 256)
    live, partial, own_ends, place, *tiles = np.asarray(seen_by_numbers(numbers, first).order)[0]
    assert (live, partial, own_ends, place) == (3, 2, 0, 0)
    assert tiles[:3] == [0, 3, 2]
    assert np.asarray(seen_by_numbers(numbers, first).order)[2, :4].tolist() == [0, 0, 1, 2]


def test_two_sets_of_keys_have_one_softmax():
    given, _ = tensors(2, 9, 4, 2, 64, 64, 0)
    q, k, v, keys, values = (x.astype(jnp.float32) for x in given)
    seen = np.random.default_rng(2).random((2, 9, 73)) < 0.7
    seen[..., 64:] = np.tri(9, dtype=bool)
    seen[:, :, :4] = seen[:, :1, :4]
    seen[1, :, :4] = False  # nothing in the second set
    rest = np.where(np.arange(73) < 4, False, seen)

    @jax.jit
    def both(q, k, v, keys, values, seen, rest):
        whole, _, _ = runs.plainly(q, k, v, keys, values, runs.SeenInRun(seen))
        found = runs.attend(q, k, v, keys, values, runs.SeenInRun(rest))
        return whole, runs.joined(*found, q, keys[:, :, :4], values[:, :, :4], seen[:, :1, :4])

    expected, got = both(q, k, v, keys, values, seen, rest)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
