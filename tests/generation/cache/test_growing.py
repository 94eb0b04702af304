"""The cache against a plain list of tokens, and against the mask that it must reproduce."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.config import ModelConfig
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.sizes import bucket
from sepjax.layout import build_layout

CONFIG = ModelConfig(num_layers=2, num_kv_heads=3, head_dim=2, num_heads=3)
ROWS = 3


class ListCache:
    """What a row must hold, in plain Python: global tokens and the last W."""

    def __init__(self, window_size: int):
        self.window_size = window_size
        self.tokens: list[tuple[int, bool]] = []  # (position, is_global)
        self.length = 0

    def append(self, is_global: bool) -> None:
        self.tokens.append((self.length, is_global))
        self.length += 1
        self.tokens = [(p, g) for p, g in self.tokens if g or p >= self.length - self.window_size]

    def evicted(self) -> list[int]:
        return [p for p, _ in self.tokens if p < self.length - self.window_size]

    def visible(self, window_size: int) -> set[int]:
        return {p for p, g in self.tokens if g or self.length - p < window_size}

    def is_full(self, capacity: int) -> bool:
        return (self.length - self.window_size, True) in self.tokens and len(self.evicted()) >= capacity


def key_of(layer, row, position):
    """A key [..., K, H] that tells where it comes from."""
    base = 10_000.0 * layer + 1000.0 * row + position
    return base[..., None, None] + np.arange(6).reshape(3, 2) / 8


def new_keys(positions):
    layer, row = np.arange(2)[:, None], np.arange(len(positions))
    return jnp.asarray(key_of(layer, row, np.asarray(positions)), jnp.float32)


@jax.jit
def append(cache, k, is_global, active, score=None):
    return cache.append(k, -k, is_global, active, score)


grow = jax.jit(SeparatorCache.grow, static_argnums=1)
from_prompt = jax.jit(SeparatorCache.from_prompt, static_argnames=("window_size", "capacity", "stretch", "keep"))


@jax.jit
def answers(cache):
    """What the cache says of itself: visible[n - 1] is seen through window n."""
    visible = jax.vmap(cache.visible)(jnp.arange(1, cache.window_size + 1))
    return {"visible": visible, "is_full": cache.is_full(), "held": cache.held(), "overflowed": cache.overflowed()}


def check_row(cache, said, b, row):
    """Everything that the cache (as NumPy arrays) says of row `b` against the list."""
    position, is_global = cache.position[b], cache.is_global[b]
    filled = position >= 0
    assert sorted(zip(position[filled].tolist(), is_global[filled].tolist(), strict=True)) == row.tokens
    assert not is_global[~filled].any()
    S, W = cache.capacity, cache.window_size
    assert position[:S][filled[:S]].tolist() == row.evicted()
    assert filled[: len(row.evicted())].all()  # no gaps
    assert all(p % W == slot for slot, p in enumerate(position[S:]) if p >= 0)
    counts = (cache.length[b], cache.num_global[b], said["held"][b])
    assert counts == (row.length, len(row.evicted()), len(row.tokens))
    assert said["is_full"][b] == row.is_full(S)
    for n in range(1, W + 1):
        assert set(position[said["visible"][n - 1, b]].tolist()) == row.visible(n)
    expected = key_of(np.arange(2)[:, None], b, position[filled])
    np.testing.assert_array_equal(np.swapaxes(cache.k[:, b], 1, 2)[:, filled], expected)
    np.testing.assert_array_equal(np.swapaxes(cache.v[:, b], 1, 2)[:, filled], -expected)


@pytest.mark.parametrize("window_size", [pytest.param(1, marks=pytest.mark.soak), 3])
@given(steps=st.lists(st.tuples(*[st.sampled_from(["global", "plain", "frozen"])] * ROWS), max_size=14))
def test_cache_holds_what_a_list_holds(window_size, steps):
    cache = SeparatorCache.create(CONFIG, ROWS, window_size=window_size, capacity=1)
    rows = [ListCache(window_size) for _ in range(ROWS)]
    for step in steps:
        active = np.array([kind != "frozen" for kind in step])
        if np.any(np.asarray(cache.is_full()) & active):
            cache = grow(cache, 14)
        is_global = np.array([kind == "global" for kind in step])
        cache = append(cache, new_keys(cache.length), is_global, active)
        for row, kind in zip(rows, step, strict=True):
            if kind != "frozen":
                row.append(kind == "global")
        said = jax.device_get(answers(cache))
        assert not said["overflowed"]
        for b, row in enumerate(rows):
            check_row(jax.device_get(cache), said, b, row)


@pytest.mark.parametrize("window_size", [*(pytest.param(x, marks=pytest.mark.soak) for x in (1, 20)), 4])
@given(flags=st.lists(st.lists(st.booleans(), max_size=12), min_size=ROWS, max_size=ROWS))
def test_prompt_fills_the_cache_as_its_tokens_one_by_one(window_size, flags):
    T, S = 12, 12
    lengths = np.array([len(row) for row in flags], np.int32)
    is_global = np.array([row + [True] * (T - len(row)) for row in flags])  # flags on padding mean nothing
    k = jnp.asarray(key_of(np.arange(2)[:, None, None], np.arange(ROWS)[:, None], np.arange(T)), jnp.float32)
    filled = from_prompt(k, -k, is_global, lengths, window_size=window_size, capacity=S)
    cache = SeparatorCache.create(CONFIG, ROWS, window_size=window_size, capacity=S)
    for i in range(T):
        cache = append(cache, k[:, :, i], is_global[:, i], i < lengths)
    jax.tree.map(np.testing.assert_array_equal, filled, cache)


@pytest.mark.parametrize(  # programs of their own
    ("window_size", "keep"), [(7, 1), *(pytest.param(*x, marks=pytest.mark.soak) for x in ((4, 2), (20, 3), (7, 0)))]
)
@given(data=st.data())
def test_of_every_stretch_the_best_stay(window_size, keep, data):
    """A gate's cache against a list, and prompts against their tokens one by one."""
    T, S, P, sinks = 12, 12, 4, 1
    scores = np.array(data.draw(st.lists(st.sampled_from([-1.0, 0.5, 3.0]), min_size=ROWS * T, max_size=ROWS * T)))
    scores = scores.reshape(ROWS, T).astype(np.float32)
    scores[:, :sinks] = -np.inf
    lengths = np.array(data.draw(st.lists(st.integers(0, T), min_size=ROWS, max_size=ROWS)), np.int32)
    stays = np.zeros((ROWS, T), bool)
    for b, first in np.ndindex(ROWS, T // P):
        tokens = range(max(sinks, first * P), min(first * P + P, lengths[b]))
        stays[b, sorted(tokens, key=lambda i, b=b: -scores[b, i])[:keep]] = True
    stays[:, :sinks] = True
    sizes = {"window_size": window_size, "capacity": S, "stretch": P, "keep": keep}
    k = jnp.asarray(key_of(np.arange(2)[:, None, None], np.arange(ROWS)[:, None], np.arange(T)), jnp.float32)
    filled = from_prompt(k, -k, stays, lengths, scores, **sizes)
    cache = SeparatorCache.create(CONFIG, ROWS, **sizes)
    for i in range(T):
        cache = append(cache, k[:, :, i], np.full(ROWS, i < sinks), i < lengths, scores[:, i])
    jax.tree.map(np.testing.assert_array_equal, filled, cache)
    for b, length in enumerate(lengths):
        held = {p for p in range(length) if stays[b, p] or p >= length - window_size}
        assert set(np.asarray(cache.position[b])[np.asarray(cache.position[b]) >= 0].tolist()) == held


@functools.partial(jax.jit, static_argnames=("num_sinks", "window_size"))
def seen_and_expected(is_separator, n, *, num_sinks, window_size):
    """What the last of T tokens sees through window n, bool[B, T]: in the cache of those before it, in the mask."""
    B, T = is_separator.shape
    is_global = is_separator | (jnp.arange(T) < num_sinks)
    k, lengths = jnp.zeros((1, B, T - 1, 1, 1)), jnp.full(B, T - 1, jnp.int32)
    sizes = {"window_size": window_size, "capacity": T}
    cache = SeparatorCache.from_prompt(k, k, is_global[:, :-1], lengths, **sizes)
    slots = jnp.where(cache.visible(n), cache.position, T)
    seen = jnp.zeros((B, T), bool).at[jnp.arange(B)[:, None], slots].set(True, mode="drop").at[:, -1].set(True)
    return seen, build_layout(is_separator, window_size=n, num_sinks=num_sinks).as_mask()[:, -1]


# Each number of sinks and each window, and both together at their largest.
@pytest.mark.parametrize(("window_size", "num_sinks"), [(1, 3), (6, 0), (6, 3), (20, 20)])
@given(flags=st.lists(st.booleans(), min_size=32, max_size=32), n=st.integers(1, 20))
def test_what_a_token_sees_is_the_last_row_of_the_mask(window_size, num_sinks, flags, n):
    is_separator = np.array(flags).reshape(2, 16)
    sizes = {"num_sinks": num_sinks, "window_size": window_size}
    seen, expected = seen_and_expected(is_separator, jnp.int32(min(n, window_size)), **sizes)
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize(  # a gate's scores grow as keys do
    "gate", [{}, pytest.param({"stretch": 3, "keep": 1}, marks=pytest.mark.soak)], ids=["separators", "gated"]
)
@given(flags=st.lists(st.booleans(), min_size=10, max_size=10), grow_at=st.integers(0, 6))
def test_growing_is_the_same_as_having_been_large(gate, flags, grow_at):
    small = SeparatorCache.create(CONFIG, 1, window_size=2, capacity=4, **gate)
    large = SeparatorCache.create(CONFIG, 1, window_size=2, capacity=10, **gate)
    for i, flag in enumerate(flags):
        small = grow(small, 10) if i == grow_at else small
        what = (
            (np.array([not i]), np.array([True]), np.array([float(flag)], np.float32))
            if gate
            else (np.array([flag]), np.array([True]))
        )
        args = new_keys([i]), *what
        small, large = append(small, *args), append(large, *args)
    jax.tree.map(np.testing.assert_array_equal, small, large)


def full_cache():
    """Row 0 has sinks at 0 and 1, and no room for the second; row 1 has one global token, still in its ring."""
    cache = SeparatorCache.create(CONFIG, 2, window_size=2, capacity=1)
    for i in range(3):
        cache = append(cache, new_keys([i, i]), jnp.array([i < 2, i == 1]), jnp.array([True, True]))
    return cache


def test_a_full_row_raises_and_is_reported_inside_jit():
    cache, k, plain = full_cache(), new_keys([3, 3]), jnp.array([False, False])
    assert cache.is_full().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"capacity=1 .*grow"):
        cache.append(k, k, plain)
    assert not append(cache, k, plain, jnp.array([False, True])).overflowed()
    lost = append(cache, k, plain, jnp.array([True, True]))
    assert bool(lost.overflowed())
    assert sorted(lost.position[0].tolist()) == [0, 2, 3]
    grown = append(cache.grow(2), k, plain, jnp.array([True, True]))
    assert sorted(grown.position[0].tolist()) == [0, 1, 2, 3]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="window_size=0"):
        SeparatorCache.create(CONFIG, 1, window_size=0, capacity=1)
    with pytest.raises(ValueError, match="capacity=-1"):
        SeparatorCache.create(CONFIG, 1, window_size=1, capacity=-1)
    with pytest.raises(ValueError, match="cannot shrink to 0"):
        full_cache().grow(0)


def test_bytes_are_those_of_the_arrays():
    cache = SeparatorCache.create(CONFIG, 2, window_size=3, capacity=5)
    keys = 2 * (2 * 2 * 3 * 8 * 2 * 4)  # k and v of L, B, K, C, H in float32
    assert cache.nbytes == keys + 2 * 8 * (4 + 1) + 2 * (4 + 4)
    gated = SeparatorCache.create(CONFIG, 2, window_size=3, capacity=5, stretch=3, keep=1)
    assert gated.nbytes == cache.nbytes + 2 * 3 * 4
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert SeparatorCache.create(half, 2, window_size=3, capacity=5).nbytes == cache.nbytes - keys // 2


@given(st.integers(-3, 100_000))
def test_bucket_is_the_least_that_fits(size):
    buckets = [0, *(64 << i for i in range(12))]
    assert bucket(size) == next(b for b in buckets if b >= size)
