"""The bounded cache against a plain list of tokens, over random streams in random runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepjax.config import AttentionConfig, ConfigError, ModelConfig
from sepjax.generation.cache.ahead import after_compaction
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.cache.view import of_row
from tests.generation.cache.common import ListStream

CONFIG = ModelConfig(num_layers=2, num_kv_heads=2, head_dim=4, num_heads=2)
ROWS, RUN = 3, 6
ABSOLUTE = AttentionConfig(stream_positions="absolute")
SIZES = {  # a, s, w, c
    "usual": (2, 3, 4, 14),
    "a + s + w = c - 1": (2, 3, 4, 10),
    "no sinks": (0, 2, 3, 9),
    "window of one": (3, 2, 1, 8),
    "many separators": (1, 12, 2, 17),
    "sinks only, in bursts": (3, 0, 2, 9),
    "StreamingLLM: w = c - a": (2, 0, 7, 9),
    "no sinks, no separators": (0, 0, 5, 5),
    "nearly all sinks": (11, 1, 2, 15),
}


def sizes_of(name, **changes):
    a, s, w, c = SIZES[name]
    pattern = "separator" if s else "sink_window"
    attention = AttentionConfig(pattern=pattern, num_sinks=a, max_separators=s, window_size=w, cache_size=c, **changes)
    return StreamSizes.create(CONFIG, attention)


@jax.jit
def append(cache, tokens, is_separator, counts):
    """Appends keys that are turned from one fixed vector, and values that tell which token it is."""
    T = tokens.shape[1]
    k = unit_keys(jnp.broadcast_to(cache.query_positions(T)[-1], tokens.shape))
    v = jnp.broadcast_to(tokens[None, :, :, None, None].astype(jnp.float32), k.shape)
    return cache.append(k, v, is_separator, counts)


def seen(cache):
    """Tokens that each row has seen, as Python numbers."""
    low, high = jax.device_get((cache.seen_low, cache.seen_high))
    return [int(h) * cache.sizes.count_wrap + int(l) for l, h in zip(low, high, strict=True)]


ahead = jax.jit(after_compaction)
compact = jax.jit(StreamingCache.compact)


@jax.jit
def unit_keys(p):
    """Unit vectors turned by p positions: [L, B, ..., K, H]. The first two numbers turn by 1 radian a position."""
    frequency = jnp.array([1.0, 10_000.0**-0.5])
    angle = p[..., None].astype(jnp.float32) * frequency
    k = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)  # half-split: (1, 0) turned
    return jnp.broadcast_to(k[None, :, :, None], (2, *p.shape, 2, 4))


@jax.jit
def shown(cache):
    """What the next token sees: slots, and the position of its query towards each of them."""
    recent = cache.recent_positions() >= cache.first_recent(1)
    visible = jnp.concatenate([cache.visible_old(), recent], axis=1)
    zones = np.array([cache.sizes.num_sinks, cache.sizes.max_separators, cache.sizes.ring])
    zone = np.repeat(np.arange(3), zones)
    query = cache.query_positions(1)[..., 0][zone].T  # [B, C]
    answers = {
        "held": cache.held(),
        "room": cache.room(99),
        "due": cache.is_full() | cache.turns(),
        "L": cache.held_before(1)[:, 0],
    }
    return answers | {"visible": visible, "query": query}


def check_row(cache, said, b, row):
    """Everything that the cache (as NumPy arrays) shows of row `b` against the list."""
    assert said["held"][b] == said["L"][b] == len(row.entries) <= row.cache_size
    assert cache.num_separators[b] == row.kept
    assert cache.dropped[b] == (row.dropped if row.max_separators else 0)
    assert cache.num_sinks[b] == min(row.seen, row.num_sinks)
    visible, query = said["visible"][b], said["query"][b]
    tokens = cache.v[0, b, 0, visible, 0].astype(int).tolist()
    expected = row.attended()
    assert sorted(tokens) == sorted(expected)
    view = of_row(cache, row.seen, 0, b)
    assert view.positions(1).tolist() == sorted(expected)
    assert (view.held, view.kept, view.num_sets) == (len(row.entries), row.kept, (1, 1))
    for head in range(2):  # every layer and head has the same tokens in the same slots
        np.testing.assert_array_equal(cache.v[:, b, head][:, visible], np.tile(np.array(tokens)[:, None], (2, 1, 4)))
    # The angle between query and key is that of position L towards position k. Both vectors are (1, 0), turned.
    by = (len(row.entries) - np.array([expected[token] for token in tokens])).reshape(-1, 1)
    frequency = np.array([1.0, 10_000.0**-0.5])
    angle = query[visible][:, None] * frequency
    k = cache.k[1, b, 1][visible]
    cosine = np.cos(angle) * k[:, :2] + np.sin(angle) * k[:, 2:]
    np.testing.assert_allclose(cosine, np.cos(by * frequency), atol=2e-5)


def stream(sizes, flags, cuts, cache=None):
    """Runs rows of flags through cache and lists, in runs as `cuts` draws them, and checks after each."""
    cache = cache or StreamingCache.create(CONFIG, ROWS, sizes)
    before = seen(cache)[0]
    limits = sizes.num_sinks, sizes.max_separators, sizes.window_size, sizes.cache_size
    rows = [ListStream(*limits) for _ in range(ROWS)]
    for cut in cuts:
        wanted = np.minimum(cut, [len(f) - row.seen for f, row in zip(flags, rows, strict=True)])
        counts = np.minimum(wanted, np.asarray(cache.room(RUN))).astype(np.int32)
        tokens, is_separator = np.full((ROWS, RUN), 9999, np.int32), np.ones((ROWS, RUN), bool)
        for b, row in enumerate(rows):
            for i in range(counts[b]):
                tokens[b, i], is_separator[b, i] = row.seen, flags[b][row.seen]
                row.append(bool(is_separator[b, i]))
        full = append(cache, tokens, is_separator, counts)
        told = jax.device_get(ahead(full))
        cache = compact(full)
        said = jax.device_get(shown(cache))
        assert not said["due"].any()
        np.testing.assert_array_equal(told[0], said["held"])
        np.testing.assert_array_equal(told[2], cache.num_separators)
        host = jax.device_get(cache)
        for b, row in enumerate(rows):
            check_row(host, said, b, row)
            if sizes.max_separators:
                assert said["room"][b] == min(row.room(), 99)
        assert seen(cache) == [before + row.seen for row in rows]
    return cache, rows


# Four programs each: with -m soak, what lies between the others. Without sinks, or with hardly anything else: the zone
# of separators begins where the sinks end in "usual".
RARE = ("StreamingLLM: w = c - a", "no sinks, no separators", "sinks only, in bursts", "no sinks", "nearly all sinks")
RARE += ("a + s + w = c - 1", "window of one", "many separators")  # compacted at every token: test_watched.py


@pytest.mark.parametrize("name", [x if x not in RARE else pytest.param(x, marks=pytest.mark.soak) for x in SIZES])
@given(data=st.data())
@settings(max_examples=12)
def test_slots_borders_and_attended_sets_are_those_of_a_list(name, data):
    density = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    flags = random.random((ROWS, 70)) < density
    if data.draw(st.booleans()):
        flags[:, 35:] = False  # separators, and then none
    cuts = random.integers(0, RUN + 1, (24, ROWS))
    if data.draw(st.booleans()):
        cuts = np.minimum(cuts, 1)  # token by token
    stream(sizes_of(name), flags, cuts)


MANY = pytest.param("many separators", marks=pytest.mark.soak)


@pytest.mark.parametrize("name", ["usual", "StreamingLLM: w = c - a", MANY])
def test_rotations_that_start_again_change_nothing(name):
    """Streams so long that every zone is turned back several times, on a lower limit than the usual."""
    sizes = sizes_of(name)
    random = np.random.default_rng(1)
    flags = random.random((ROWS, 400)) < 0.4
    cache, rows = stream(sizes, flags, np.full((220, ROWS), RUN))
    assert all(row.seen == 400 for row in rows)
    assert int(jnp.max(cache.next_recent)) < sizes.rotation_limit + RUN < 400
    assert int(jnp.max(cache.next_separator)) < sizes.rotation_limit + RUN


def test_positions_of_more_rows_than_start_again_at_a_time():
    """Every other of 20 rows is due: its keys turn, those of the others keep their bits."""
    cache = StreamingCache.create(CONFIG, 20, sizes_of("usual"))
    sizes, is_due = cache.sizes, np.arange(20) % 2 == 0
    recent = jnp.asarray(np.where(is_due, sizes.rotation_limit + np.arange(20), sizes.rotation_limit - 1), jnp.int32)
    cache = dataclasses.replace(cache, next_recent=recent, num_recent=cache.num_recent + 5)
    a = sizes.num_sinks + sizes.max_separators
    cache = dataclasses.replace(
        cache, k=cache.k.at[:, :, :, a:].set(jnp.swapaxes(unit_keys(cache.recent_positions()), 2, 3))
    )
    got = compact(cache)
    np.testing.assert_array_equal(got.next_recent, np.where(is_due, recent % sizes.ring, recent))
    expected = jnp.swapaxes(unit_keys(got.recent_positions()), 2, 3)
    np.testing.assert_allclose(got.k[:, :, :, a:], expected, atol=1e-4)
    np.testing.assert_array_equal(got.k[:, ~is_due], cache.k[:, ~is_due])
    np.testing.assert_array_equal(got.k[:, :, :, :a], cache.k[:, :, :, :a])


def test_a_run_and_its_tokens_one_by_one_leave_the_same_bits():
    sizes = sizes_of("usual")
    flags = np.random.default_rng(2).random((ROWS, 60)) < 0.3
    together, _ = stream(sizes, flags, np.full((40, ROWS), RUN))
    alone, _ = stream(sizes, flags, np.full((60, ROWS), 1))
    jax.tree.map(np.testing.assert_array_equal, together, alone)


def test_counters_pass_2_to_the_31():
    """A stream of months: the same slots and angles as one that has just begun, and the count goes on."""
    sizes = sizes_of("usual")
    flags = np.random.default_rng(3).random((ROWS, 60)) < 0.3
    cuts = np.full((40, ROWS), RUN)
    young, _ = stream(sizes, flags, cuts)
    begun = StreamingCache.create(CONFIG, ROWS, sizes)
    low, high = (jnp.full(ROWS, n, jnp.int32) for n in (sizes.count_wrap - 20, 5))
    old, _ = stream(sizes, flags, cuts, dataclasses.replace(begun, seen_low=low, seen_high=high))
    assert seen(old) == [6 * sizes.count_wrap + 40] * ROWS
    assert seen(old)[0] > 2**32
    ages = [(x.seen_low[:, None, None] - x.kept_at) % sizes.count_wrap for x in (old, young)]
    np.testing.assert_array_equal(*ages)
    numbers = {name: getattr(young, name) for name in ("seen_low", "seen_high", "kept_at")}
    same = dataclasses.replace(old, **numbers)
    jax.tree.map(np.testing.assert_array_equal, same, young)


def test_every_interval_is_told_from_the_counter_whatever_its_size():
    attention = AttentionConfig(pattern="fixed_interval", interval=7, num_sinks=1, max_separators=2, window_size=2)
    sizes = StreamSizes.create(CONFIG, attention)
    assert sizes.count_wrap % 7 == 0
    assert 2**29 < sizes.count_wrap <= 2**30


def test_absolute_positions_are_those_of_the_text():
    sizes = sizes_of("usual", stream_positions="absolute")
    cache = StreamingCache.create(CONFIG, 1, sizes)
    flags = np.random.default_rng(4).random(60) < 0.3
    row = ListStream(2, 3, 4, 14)
    for i, flag in enumerate(flags):
        cache = compact(append(cache, np.full((1, 1), i, np.int32), np.full((1, 1), flag), np.ones(1, np.int32)))
        row.append(bool(flag))
        said, host = jax.device_get((shown(cache), cache))
        visible = said["visible"][0]
        tokens = host.v[0, 0, 0, visible, 0].astype(int)
        assert sorted(tokens.tolist()) == sorted(row.attended())
        np.testing.assert_array_equal(said["query"][0], i + 1)
        expected = np.asarray(unit_keys(np.resize(tokens, 16)[None]))[0, 0, : len(tokens), 0]
        np.testing.assert_allclose(host.k[0, 0, 0, visible], expected, atol=1e-6)


def test_keeping_all_separators_counts_those_that_no_longer_fit():
    attention = AttentionConfig(num_sinks=1, window_size=2, max_separators=1, cache_size=6, keep_all_separators=True)
    sizes = StreamSizes.create(CONFIG, attention)
    assert (sizes.max_separators, sizes.drops_separators) == (3, False)
    cache = StreamingCache.create(CONFIG, 1, sizes)
    for i in range(12):
        flag = np.array([[i in (1, 2, 3, 8)]])
        cache = compact(append(cache, np.full((1, 1), i, np.int32), flag, np.ones(1, np.int32)))
        assert int(cache.dropped[0]) == (i >= 10)  # the fourth leaves the window with token 10


def test_reset_rows_begin_again_and_the_others_do_not_notice():
    sizes = sizes_of("usual")
    flags = np.random.default_rng(5).random((ROWS, 50)) < 0.3
    cache, _ = stream(sizes, flags, np.full((30, ROWS), RUN))
    after = cache.reset(jnp.array([False, True, False]))
    assert after.held().tolist() == [cache.held()[0], 0, cache.held()[2]]
    assert seen(after) == [50, 0, 50]
    lying = dataclasses.replace(cache, through=jnp.array([2, 0, 1])).reset(jnp.array([False, True, True]))
    assert lying.through.tolist() == [2, 0, 1], "rows stay where they lie"
    fresh = StreamingCache.create(CONFIG, ROWS, sizes)
    for _ in range(2):
        counts = np.array([0, RUN, 0], np.int32)
        tokens = np.broadcast_to(np.arange(RUN, dtype=np.int32), (ROWS, RUN))
        is_separator = np.zeros((ROWS, RUN), bool)
        after, fresh = (compact(append(c, tokens, is_separator, counts)) for c in (after, fresh))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), shown(after), shown(fresh))


def test_bytes_are_those_of_the_arrays():
    sizes = sizes_of("usual")
    assert (sizes.slots, sizes.ring) == (64, 59)
    cache = StreamingCache.create(CONFIG, ROWS, sizes)
    assert cache.nbytes == 2 * (2 * ROWS * 2 * 64 * 4 * 4) + ROWS * 59 + (9 + 3) * 4 * ROWS


@pytest.mark.parametrize(
    ("config", "attention", "message"),
    [
        (CONFIG, AttentionConfig(pattern="dense"), "keeps every token"),
        (CONFIG, AttentionConfig(layer_windows=(4, 5)), "one size for all layers has one window"),
        (CONFIG, AttentionConfig(cache_size=20, window_size=9, num_sinks=8, max_separators=4), "has no room .* = 21"),
        (dataclasses.replace(CONFIG, position_embedding="learned"), AttentionConfig(), "learned positions"),
        (dataclasses.replace(CONFIG, sliding_window=9), ABSOLUTE, "sliding_window=9 of its own must know"),
        (CONFIG, dataclasses.replace(ABSOLUTE, layer_reach=(7, 0)), r"layer_reach=\(7, 0\) must know; use \"slot\""),
    ],
)
def test_sizes_that_cannot_work_are_named(config, attention, message):
    with pytest.raises(ConfigError, match=message):
        StreamSizes.create(config, attention)
