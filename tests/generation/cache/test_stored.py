"""Keys and values of 8 bits: how far rounding may be off, and that codes move as numbers do, rounded as they turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig, ModelConfig
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.mixed import bounded_sizes, empty_cache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.cache.stored import Quantised, plain, quantised, vector_bytes

CONFIG = ModelConfig(vocab_size=7, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
ROWS, RUN = 3, 6
SIZES = {"num_sinks": 2, "max_separators": 5, "window_size": 8, "cache_size": 20}
PATTERNS = {
    "separator": AttentionConfig(**SIZES),
    "StreamingLLM": AttentionConfig("sink_window", **SIZES | {"window_size": 18}),
    "watched": AttentionConfig("watched", **SIZES, watch_after=2),
    "gated": AttentionConfig("gated", **SIZES, gate_layer=1, gate_stretch=4, gate_keep=2),
}
IN_8_BITS = {name: dataclasses.replace(x, cache_dtype="int8") for name, x in PATTERNS.items()}


def same_bits(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@jax.jit
def rounded(x):
    got = quantised(x)
    numbers = plain(got, jnp.float32)
    return got, numbers, quantised(numbers), quantised(-x)


def test_no_number_is_off_by_more_than_half_a_scale_and_rounding_again_changes_nothing():
    random = np.random.default_rng(0)
    x = (random.standard_normal((500, 16)) * np.exp(random.uniform(-60, 60, (500, 1)))).astype(np.float32)
    x[7], x[8, 1:] = 0, 0
    got, numbers, again, negative = jax.device_get(rounded(x))
    assert (np.abs(numbers - x) <= np.abs(x).max(-1, keepdims=True) / 254 * (1 + 2**-8)).all()
    assert same_bits(again, got)
    assert same_bits(negative.codes, -got.codes)
    assert (got.codes[7] == 0).all()
    assert plain(x, jnp.bfloat16).dtype == np.float32  # what is not quantised stays as it is


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_are_those_of_the_arrays(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    assert (vector_bytes(config, "model"), vector_bytes(config, "int8")) == (16 if dtype == "bfloat16" else 32, 8 + 2)
    saved = vector_bytes(config, "model") - vector_bytes(config, "int8")
    watched, sizes = PATTERNS["watched"], {"window_size": 9, "capacity": 5}
    caches = [
        [empty_cache(config, 3, bounded_sizes(config, x)) for x in (watched, IN_8_BITS["watched"])],
        [SeparatorCache.create(config, 3, **sizes, cache_dtype=x) for x in ("model", "int8")],
    ]
    for wide, narrow in caches:
        assert wide.nbytes - narrow.nbytes == 2 * np.prod(wide.k.shape[:-1]) * saved


@jax.jit
def taken_up(cache, inputs):
    """`append` and `compact` of many runs, with what the pattern asks for."""
    sizes = cache.sizes

    def one(cache, run):
        k, v, flags, wanted, looks, scores = run
        if sizes.cache_dtype == "int8":
            k, v = quantised(k), quantised(v)
        counts = jnp.minimum(wanted, cache.room(RUN))
        cache = cache.append(k, v, flags, counts, looks if sizes.watch else None, scores if sizes.gate else None)
        return cache.compact(), None

    return jax.lax.scan(one, cache, inputs)[0]


@pytest.mark.parametrize(
    ("name", "by_layer"),
    [
        pytest.param("watched", True, marks=pytest.mark.soak),  # codes of runs, against lists: test_bounded_pass.py
        pytest.param("separator", False, marks=pytest.mark.soak),
        pytest.param("watched", False, marks=pytest.mark.soak),
        pytest.param("StreamingLLM", True, marks=pytest.mark.soak),
        pytest.param("gated", True, marks=pytest.mark.soak),
    ],
)
def test_codes_move_as_numbers_do_and_keys_are_rounded_once_more_where_they_turn(name, by_layer):
    """Past many compactions, and past the tokens at which positions start again; all but keys that turned bit for bit.

    A key that moves from the ring to the kept tokens turns by the difference of its slots' numbers, and never again.
    """
    numbers = dataclasses.replace(PATTERNS[name], stream_positions="absolute")
    caches = [
        StreamingCache.create(CONFIG, ROWS, StreamSizes.create(CONFIG, x), by_layer=by_layer)
        for x in (numbers, IN_8_BITS[name])
    ]
    random, sizes = np.random.default_rng(1), caches[0].sizes
    runs, L, K = sizes.rotation_limit // 2, CONFIG.num_layers, CONFIG.num_kv_heads
    k, v = random.standard_normal((2, runs, L, ROWS, RUN, K, CONFIG.head_dim), np.float32)
    looks = random.random((runs, L, ROWS, K, sizes.slots - sizes.num_sinks + RUN), np.float32)
    flags, scores = random.random((runs, ROWS, RUN)) < 0.3, random.standard_normal((runs, ROWS, RUN), np.float32)
    wanted = random.integers(0, RUN + 1, (runs, ROWS), np.int32)
    whole, codes = (taken_up(cache, (k, v, flags, wanted, looks, scores)) for cache in caches)
    assert (codes.next_recent < whole.next_recent).all(), "positions have started again"
    assert same_bits(whole.kept_at, codes.kept_at)
    a, s = sizes.num_sinks, sizes.max_separators
    turns = np.arange(s) - np.asarray(codes.kept_at) % sizes.ring  # of each set
    for layer in range(L):
        assert isinstance(codes.k[layer], Quantised)
        assert same_bits(quantised(whole.v[layer]), codes.v[layer])
        came = quantised(whole.k[layer])
        for first, last in ((0, a), (a + s, sizes.slots)):
            assert same_bits(came[:, :, first:last], codes.k[layer][:, :, first:last])
        if not s:
            continue
        x, got = (np.asarray(plain(keys[:, :, a : a + s], jnp.float32)) for keys in (came, codes.k[layer]))
        exact = np.array(turned(x, turns[layer % len(turns)]))
        is_moved = np.abs(exact).max(-1, keepdims=True) > 0
        bound = np.abs(exact).max(-1, keepdims=True) / 254 * (1 + 2**-7)
        assert (np.abs(got - exact) <= bound).all()
        assert is_moved.any()
        assert (np.abs(got - x).max(-1) > 2 * bound[..., 0])[is_moved[..., 0]].mean() > 0.9, "most of them turn"


def turned(x, by):
    """Vectors [B, K, s, H] turned by so many positions, [B, N, s], in float64."""
    half = x.shape[-1] // 2
    angles = by[..., None] * CONFIG.rope.base ** (-np.arange(half) / half)
    first, second, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.parametrize("by_layer", [pytest.param(False, marks=pytest.mark.soak), True], ids=["stacked", "by layer"])
def test_rows_go_and_come_bit_for_bit(by_layer):
    cache = StreamingCache.create(CONFIG, 4, StreamSizes.create(CONFIG, IN_8_BITS["watched"]), by_layer=by_layer)
    random = np.random.default_rng(2)
    cache = jax.tree.map(lambda x: jnp.asarray(random.integers(0, 100, x.shape)).astype(x.dtype), cache)
    rows = jnp.arange(4)
    one = cache.with_row(rows[0], cache.row(rows[2]))
    some = cache.with_whole_rows(jnp.array([0, 3, 9]), cache.whole_rows(jnp.array([2, 1, 0])))
    for got, come_from in ((one, (2, 1, 2, 3)), (some, (2, 1, 2, 1))):
        for i, j in enumerate(come_from):
            assert same_bits(got.row(rows[i]), cache.row(rows[j]))
        assert all(x.dtype == y.dtype for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(cache), strict=True))
    entries = cache.entries
    if by_layer:
        assert [x.ndim for x in entries] == [4, 3] * 4
        assert same_bits(cache.bare().with_entries(entries), cache)
