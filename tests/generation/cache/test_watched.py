"""Watched tokens against a model that keeps, for every layer and key head, a plain list: token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import decode
from sepjax.config import (
    AttentionConfig,
    ConfigError,
    ModelConfig,
    RopeConfig,
    layer_windows,
    validate,
    validate_attention,
)
from sepjax.config import Config as RunConfig
from sepjax.generation.cache import watched
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.raising import raised
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.cache.view import of_row
from sepjax.model.rope import rope_table, rotate
from sepjax.model.transformer import merge
from tests.generation.cache.test_bounded_pass import LLAMA, T, V, model_of, streamed_logits

WATCHED = AttentionConfig(
    pattern="watched", num_sinks=2, max_separators=4, window_size=6, cache_size=16, watch_after=3, watch_half_life=256
)
NEOX = dataclasses.replace(
    LLAMA, num_kv_heads=4, parallel_residual=True, rope=RopeConfig(fraction=0.5, scaling="linear", factor=2.0)
)
# The layer that is watched sees everything, the other has a window and a rotation of its own.
MIXED = dataclasses.replace(LLAMA, sliding_window=9, full_layers=(1,), sliding_rope=RopeConfig(base=50.0))
CASES = {
    "layers that differ": (MIXED, WATCHED),
    "a set a head, of the upper layer": (LLAMA, WATCHED),
    "of both layers, never fading, absolute positions, no sinks": (
        LLAMA,
        dataclasses.replace(WATCHED, watch_layers=(0, 1), watch_half_life=0, stream_positions="absolute", num_sinks=0),
    ),
    "one set": (NEOX, dataclasses.replace(WATCHED, kept_set="model", watch_layers=(0, 1))),
    "separators first, compacted at every token": (
        LLAMA,
        dataclasses.replace(WATCHED, separators_first=True, watch_after=1, cache_size=13),
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def list_step(graph, params, token, keys, values, k_positions, q_position):
    """One token over lists of un-rotated keys [L, K, n, H] at positions [L, K, n], -1: none. Its weights too.

    q_position: the token's own, of all layers or int32[L].
    """
    model = merge(graph, params)
    config = model.config
    slides = jnp.array([config.sliding_window > 0 and i not in config.full_layers for i in range(config.num_layers)])
    q_positions = jnp.broadcast_to(q_position, config.num_layers)

    def table(positions, slides):
        kinds = config.rope, config.sliding_rope if config.sliding_window else config.rope
        return jax.tree.map(
            functools.partial(jnp.where, slides), *(rope_table(positions, x, config.head_dim) for x in kinds[::-1])
        )

    def attend(q, k, v, layer):
        keys, values, positions, slides, q_position = layer
        q_table = table(q_position[None, None], slides)
        K, group = k.shape[2], q.shape[2] // k.shape[2]
        turned = rotate(keys[:, :, None], table(positions, slides))[:, :, 0]
        turned = jnp.concatenate([turned, rotate(k, q_table)[0, 0, :, None]], axis=1)
        queries = rotate(q, q_table)[0, 0].reshape(K, group, -1)
        scores = jnp.einsum("kgh,ksh->kgs", queries, turned) * q.shape[-1] ** -0.5
        near = ~slides | (q_position - positions < config.sliding_window)
        there = jnp.pad((positions >= 0) & near, ((0, 0), (0, 1)), constant_values=True)
        weights = jax.nn.softmax(jnp.where(there[:, None], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("kgs,ksh->kgh", weights, jnp.concatenate([values, v[0, 0, :, None]], axis=1))
        return out.reshape(q.shape), (k[0, 0], v[0, 0], weights.max(axis=1))

    inputs = keys, values, k_positions, slides, q_positions
    hidden, kept = model(token[None, None], jnp.zeros((1, 1), jnp.int32), attend, inputs)
    return model.logits(hidden[0, 0]), *kept


class WatchedLists:
    """What one row keeps: for each layer and head its slots, tokens or None, and what every token's score is."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig):
        self.attention, self.shape = attention, (config.num_layers, config.num_kv_heads)
        self.watched = attention.watch_layers or range(config.num_layers // 2, config.num_layers)
        self.kept = {place: [] for place in np.ndindex(self.shape)}
        self.scores = {place: {} for place in np.ndindex(self.shape)}
        self.sinks, self.recent, self.seen = [], [], 0

    def entries(self, place):
        return [*self.sinks, *self.kept[place], *self.recent]

    def look(self, weights):
        """Takes in the weights [L, K, n] of the next token's attention to `entries`."""
        half_life = self.attention.watch_half_life or 2**20
        looks = {place: {} for place in self.kept}
        for place in self.kept:
            for token, weight in zip(self.entries(place), weights[place], strict=False):
                is_old = token in self.kept[place] or self.seen - token >= self.attention.watch_after
                if is_old and place[0] in self.watched:
                    looks[place][token] = np.log2(weight) + self.seen / half_life
        if self.attention.kept_set == "model":
            all_looks = [pair for of_head in looks.values() for pair in of_head.items()]
            best = {token: max(x for t, x in all_looks if t == token) for token, _ in all_looks}
            looks = dict.fromkeys(looks, best)
        for place, scores in self.scores.items():
            for token, look in looks[place].items():
                scores[token] = max(scores.get(token, -np.inf), look)

    def append(self, separators):
        a, s, w, c = (getattr(self.attention, x) for x in ("num_sinks", "max_separators", "window_size", "cache_size"))
        (self.sinks if len(self.sinks) < a else self.recent).append(self.seen)
        self.seen += 1
        if len(self.recent) < c + 1 - a - s:
            return
        past, self.recent = self.recent[:-w], self.recent[-w:]
        for place, kept in self.kept.items():

            def rank(token, place=place):
                first = self.attention.separators_first and separators[token]
                newest = self.attention.kept_set == "head" and place[0] not in self.watched
                return first, token if newest else self.scores[place].get(token, -np.inf)

            best = sorted([*kept, *past], key=rank, reverse=True)[:s]
            come = [token for token in past if token in best]
            slots = [token if token in best else None for token in kept] + [None] * (s - len(kept))
            filled = [come.pop(0) if token is None and come else token for token in slots]
            self.kept[place] = [token for token in filled if token is not None]


def list_logits(config, attention, tokens, separators):
    """The scores after every token of one row, [T, V], and the lists at the end."""
    graph, params = model_of(config)
    row = WatchedLists(config, attention)
    most, absolute = attention.cache_size, attention.stream_positions == "absolute"
    store = np.zeros((2, *row.shape, len(tokens), config.head_dim), np.float32)
    out = []
    for i, token in enumerate(tokens):
        positions = np.full((*row.shape, most), -1, np.int32)
        numbers = np.zeros((*row.shape, most), int)
        for place in row.kept:
            entries = row.entries(place)
            numbers[place][: len(entries)] = entries
            positions[place][: len(entries)] = (
                entries if attention.stream_positions == "absolute" else range(len(entries))
            )
        held = len(row.entries((0, 0)))
        k, v = (np.take_along_axis(x, numbers[..., None], axis=2) for x in store)
        position = jnp.int32(i if absolute else held)
        logits, k, v, weights = list_step(graph, params, jnp.int32(token), k, v, positions, position)
        store[0, :, :, i], store[1, :, :, i] = k, v
        row.look(np.asarray(weights))
        row.append(separators)
        out.append(np.asarray(logits))
    return np.stack(out), row


# A program of seconds for each case and length: with -m soak what layers that differ and separators first, compacted at
# every token, have between them, and what test_mixed.py (some layers) and test_bounded.py (absolute positions) have.
RUNS = {"layers that differ": (1,), "one set": (5,), "separators first, compacted at every token": (5,)}


OFTEN = "separators first, compacted at every token"  # each is seconds; a set a head; layers that differ: test_mixed.py


@pytest.mark.parametrize("case", [x if x == OFTEN else pytest.param(x, marks=pytest.mark.soak) for x in CASES])
def test_runs_give_what_lists_give_token_by_token(case):
    config, attention = CASES[case]
    random = np.random.default_rng(11)
    lengths = np.array([T, 47])
    tokens = random.integers(0, V, (2, T), dtype=np.int32)
    table = random.random(V) < 0.15
    expected = [list_logits(config, attention, tokens[b, :n], table[tokens[b]]) for b, n in enumerate(lengths)]
    for run in RUNS.get(case, (1, 5)):
        got, cache = streamed_logits(config, attention, tokens, lengths, jnp.asarray(table), run)
        for b, (rows, lists) in enumerate(expected):
            roundings = ((5 * config.num_layers + 1) * config.mlp_dim) ** 0.5  # as in test_forward.py
            bound = (roundings + 2 * T) * np.finfo(np.float32).eps * np.abs(rows).max()
            assert np.abs(got[b, : len(rows)] - rows).max() <= bound
            view = of_row(cache, lists.seen, 0, b)
            assert view.held == len(lists.entries((0, 0))) <= attention.cache_size
            layers, heads = view.num_sets
            for layer, head in lists.kept:
                assert set(view.kept_positions[layer % layers, head % heads]) == set(lists.kept[layer, head])
            union = {token for head in range(config.num_kv_heads) for token in lists.entries((1, head))}
            assert view.positions(1).tolist() == sorted(union)
    kept = [set(lists.kept[place]) for _, lists in expected for place in lists.kept]
    one_set = attention.kept_set == "model"
    assert (
        len({frozenset(x) for x in kept[: len(kept) // 2]}) == 1
    ) == one_set  # heads differ, or the test sees little


def test_rows_and_times_do_not_matter():
    """A row's neighbours, and how long it has run: scores begin again, and change nothing."""
    config, attention = CASES["separators first, compacted at every token"]
    random = np.random.default_rng(12)
    tokens = random.integers(0, V, (2, T), dtype=np.int32)
    table = jnp.asarray(random.random(V) < 0.15)
    alone, _ = streamed_logits(config, attention, tokens, np.array([T, 3]), table, 5)
    sizes = StreamSizes.create(config, attention)
    create, late = StreamingCache.create, watched._CLOCK - 40

    def begun(config, batch_size, sizes):
        cache = create(config, batch_size, sizes)
        return dataclasses.replace(cache, clock=cache.clock + late)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamingCache, "create", begun)
        tokens[1] = random.integers(0, V, T)
        old, cache = streamed_logits(config, attention, tokens, np.array([T, T]), table, 5)
    assert int(jnp.max(cache.clock)) < T < late
    long = dataclasses.replace(cache, clock=cache.clock * 0 + 5 * watched._CLOCK + 3)  # after a cycle longer than that
    full = dataclasses.replace(long, num_recent=long.num_recent * 0 + sizes.ring_limit)
    assert full.compact().clock.tolist() == [3, 3]
    np.testing.assert_allclose(old[0], alone[0], atol=2e-6 * np.abs(alone[0]).max())
    assert sizes.slots == 64 >= attention.cache_size + 1  # no room beyond c + 1 but for alignment


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"watch_after": 6}, "watch_after=6 must be below the window of layers that keep, 6"),
        ({"watch_layers": (2,)}, "watch_layers has 2; the model's layers are 0 to 1"),
        ({"max_separators": 0}, "max_separators=0 must be 1 or more"),
        ({"keep_all_separators": True}, "keep_all_separators is for"),
        ({"kept_set": "heads"}, "did you mean 'head'"),
        ({"watch_half_life": 3}, "watch_half_life=3 must be 256 or more"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate_attention(dataclasses.replace(WATCHED, **changes), 2)


def test_whole_rows_are_refused():
    for refused in (
        lambda: validate(dataclasses.replace(RunConfig(), attention=WATCHED)),
        lambda: layer_windows(WATCHED, 2, 64),
    ):
        with pytest.raises(ConfigError, match="needs a bounded cache"):
            refused()


def test_without_a_cache_size_it_is_compacted_often():
    sizes = StreamSizes.create(LLAMA, dataclasses.replace(WATCHED, cache_size=0, window_size=400, max_separators=300))
    assert sizes.cache_size == 702 + 43


@pytest.mark.parametrize("first", [None, 1024.0])
def test_the_kernel_raises_scores_of_visible_parts(first):
    """In place, and as the definition does; what no token sees stays."""
    (L, B, K, C, before), rng = (3, 3, 2, 192, 4), np.random.default_rng(0)
    visible = rng.random((B, C)) < 0.5
    visible[:, 32:80] = False
    seen = [decode.seen_slots(visible, kernel=True, part=16), decode.seen_slots(visible[::-1], kernel=True, part=16)]
    scores = rng.normal(size=(L, B, K, C - before)).astype(np.float32)
    scores[0, 0, 0, :50] += 1024
    looks = {
        i: decode.Looks(jnp.array(rng.random((B, K, C)), jnp.float32), x.place)
        for i, x in zip((0, 2), seen, strict=True)
    }
    counts, time = rng.random((B, C - before)) < 0.7, np.array([1, -np.inf, 0.5], np.float32)
    got, expected = np.asarray(raised(scores, looks, counts, time, 1e-30, first)), scores.copy()
    for i, x in looks.items():
        look = np.where(counts[:, None], np.asarray(x.in_slots())[..., before:], 0)
        value = np.log2(np.maximum(look, np.float32(1e-30))) + time[:, None, None]
        value += 1024 * ((scores[i] > 512) & (first is not None))
        live = np.repeat(np.asarray(x.place) < C // 16, 16, axis=1)[:, None, before:]
        expected[i] = np.where(live, np.maximum(scores[i], value), scores[i])
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)  # an ulp of the terms, below 16
    assert ((got > scores).any(axis=(2, 3)) == [[True, False, True], [False] * 3, [True, False, True]]).all()
