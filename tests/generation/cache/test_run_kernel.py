"""Runs of tokens with the kernel's part played by plain XLA: what it is told of tiles and by numbers is enough."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import decode, runs
from sepjax.attention.target import Target
from sepjax.bench.decode_attention import filled
from sepjax.config import AttentionConfig, Config, ModelConfig
from sepjax.generation.cache.bounded_pass import attend_run, pass_inputs
from sepjax.generation.cache.bounded_run import unsupported
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.growing_pass import growing_pass
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.model.transformer import merge
from sepjax.model.unrolled import by_layer, runner
from tests.generation.cache.test_decode_kernel import CASES, MODEL, SEPARATOR
from tests.models import random_split

SEES_FAR = dataclasses.replace(SEPARATOR, layer_reach=(0, 40))  # of tokens that stay, too
WATCHED = dataclasses.replace(SEPARATOR, pattern="watched", watch_after=3, watch_layers=(1,))
T = 9


@pytest.fixture
def calls(monkeypatch):
    """Every call that the kernel would get."""
    got = []

    def seen_in(seen):
        C = seen.numbers.shape[1] - seen.first.shape[1]
        live, partial, own_ends = (seen.order[:, i] for i in range(3))
        tile = jnp.arange(C // decode.TILE)
        rank = jax.vmap(lambda order: jnp.zeros_like(tile).at[order].set(tile))(seen.order[:, 4:])
        rank = jnp.repeat(rank, decode.TILE, axis=1)
        passes = seen.numbers[:, None] >= seen.first[..., None]
        slots = jnp.where((rank < partial[:, None])[:, None], passes[..., :C], (rank < live[:, None])[:, None])
        own = jnp.where((own_ends > 0)[:, None, None], passes[..., C:], True) & jnp.tri(seen.first.shape[1], dtype=bool)
        return runs.SeenInRun(jnp.concatenate([slots, own], axis=-1))

    def stand_in(q, k, v, k_slots, v_slots, turned, seen):
        got.append(len(k_slots))
        places = seen.order[:, 3]
        return runs.attend(q, k, v, k_slots[places], v_slots[places], seen_in(seen), turned)

    monkeypatch.setattr(runs, "_kernel", stand_in)
    monkeypatch.setattr(decode, "target", lambda: Target("gpu", "NVIDIA H200", 132, "9.0"))
    return got


def layers_of(cache, q, k, v, *, implementation):
    """What a run gives in each layer; in a program, since operation after operation takes five times as long."""

    @jax.jit
    def run(cache, q, k, v):
        counts = jnp.full(len(q), q.shape[1])
        attend, inputs = attend_run(cache, q.shape[1], counts, implementation), pass_inputs(cache)
        layers = [tuple(None if x is None else x[i] for x in inputs) for i in range(len(cache.k))]
        return [attend(q, k, v, layer) for layer in layers]

    return run(cache, q, k, v)


def inputs(model: ModelConfig, rows: int):
    drawn, dtype = np.random.default_rng(1), jnp.dtype(model.dtype)
    heads = model.num_heads, model.num_kv_heads, model.num_kv_heads
    return [jnp.asarray(drawn.standard_normal((rows, T, n, model.head_dim), np.float32), dtype) for n in heads]


BOUNDED = CASES | {
    "a layer that sees no further": (MODEL, SEES_FAR),
    "watched tokens": (MODEL, WATCHED),
    "codes": (MODEL, dataclasses.replace(SEPARATOR, cache_dtype="int8")),
    "sink_window, codes": (MODEL, dataclasses.replace(CASES["sink_window"][1], cache_dtype="int8")),
}
OFTEN = ("layers with a window of their own", "watched tokens")  # the first sees separators as "separators" does


@pytest.mark.parametrize("case", [x if x in OFTEN else pytest.param(x, marks=pytest.mark.soak) for x in BOUNDED])
def test_bounded_caches(case, calls):
    """Rings that have gone round or not, an empty one; evictions during the run where they do not end it."""
    model, attention = BOUNDED[case]
    cache = filled(Config(model=model, attention=attention), StreamSizes.create(model, attention), 4)
    cache = dataclasses.replace(
        cache,
        next_recent=cache.next_recent + jnp.array([0, 150, 3, 0]),
        num_recent=cache.num_recent.at[0].add(30 if attention.pattern == "sink_window" else 0),
    ).reset(jnp.array([False, False, False, True]))
    given, largest = inputs(model, 4), []
    expected = layers_of(cache, *given, implementation="xla")
    assert not calls
    got = layers_of(cache, *given, implementation=None)
    assert len(calls) == model.num_layers
    for (x, (*_, looks)), (y, (*_, expected_looks)) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))
        if attention.pattern == "watched":
            np.testing.assert_allclose(looks, expected_looks, rtol=1e-4, atol=1e-7)
            largest.append(float(jnp.max(looks)))
    assert [x > 0.1 for x in largest] == ([False, True] if largest else []), "only the second layer is watched"


@pytest.mark.soak  # rows among others: generation/test_slots.py; what the kernel is told of them is above
@pytest.mark.parametrize("case", ["separators", "sink_window"])
def test_rows_are_read_where_they_lie(case, calls):
    """Some rows among others, one of them full afterwards and one whose positions start again; the last is no row."""
    model, attention = CASES[case]
    graph, params = random_split(model, attention)
    params, table = by_layer(params, model), jnp.arange(model.vocab_size) < 4
    cache = filled(Config(model=model, attention=attention), StreamSizes.create(model, attention), 5)
    cache = dataclasses.replace(cache, next_recent=cache.next_recent.at[3].set(cache.sizes.rotation_limit - 3))
    tokens, rows = jnp.arange(3 * T).reshape(3, T) * 7 % model.vocab_size, jnp.array([3, 1, 5])

    @functools.partial(jax.jit, static_argnums=1)
    def read(cache, implementation):
        asked = dataclasses.replace(attention, implementation=implementation)
        few = cache.where_they_lie(rows, asked)
        assert few.is_in_place == (implementation is None)
        hidden, few = few.take_up(runner(graph, params), tokens, jnp.minimum(few.room(T), 7), table, asked)
        return hidden[:2], cache.with_whole_rows(rows, few.compact())

    expected = read(cache, "xla")
    assert not calls
    got = read(cache, None)
    assert calls == [5] * model.num_layers, "all rows' keys, not copies of some"
    assert got[1].through is None
    assert int(got[1].next_recent[3]) < cache.sizes.ring
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


@pytest.mark.soak  # as bounded caches, above, but for growing_pass, of which test_growing_pass.py is
@pytest.mark.parametrize("reach", [(0, 40), *(pytest.param(x, marks=pytest.mark.soak) for x in ((), (0, 12)))])
def test_growing_caches(reach, calls):
    attention = dataclasses.replace(SEPARATOR, layer_reach=reach)
    graph, params = random_split(MODEL, attention)
    cache = SeparatorCache.create(MODEL, 2, window_size=20, capacity=44)
    table, tokens = jnp.arange(MODEL.vocab_size) < 4, jnp.arange(120).reshape(2, 60) * 7 % MODEL.vocab_size

    def run(implementation):
        asked, found = dataclasses.replace(attention, implementation=implementation), cache
        hidden = []
        for i in range(2):
            left = jnp.array([30, 30 - 5 * i])
            x, found = growing_pass(merge(graph, params), found, tokens[:, 30 * i : 30 * i + 30], left, table, asked)
            hidden.append(x)
        return hidden

    expected = jax.jit(lambda: run("xla"))()
    assert not calls
    got = jax.jit(lambda: run(None))()
    assert calls, "the kernel serves 64 slots"
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"implementation": "xla"}, "asks for plain XLA"),
        ({"pattern": "sink_window", "max_separators": 0, "layer_reach": (0, 40)}, "past evictions"),
    ],
)
def test_who_is_served(change, reason, monkeypatch):
    monkeypatch.setattr(decode, "target", lambda: Target("gpu", "NVIDIA H200", 132, "9.0"))
    attention: AttentionConfig = dataclasses.replace(SEPARATOR, **change)
    cache = filled(Config(model=MODEL, attention=attention), StreamSizes.create(MODEL, attention), 1)
    said = unsupported(cache, attention.implementation)
    assert said is reason if reason is None else reason in str(said)
