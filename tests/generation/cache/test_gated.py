"""What a gate chose in a bounded cache, and zones that only some layers see, against plain lists: token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig, ConfigError
from sepjax.generation.cache import watched
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.model.rope import rope_table, rotate
from sepjax.model.transformer import merge
from tests.generation.cache.common import ListStream
from tests.generation.cache.test_bounded_pass import LLAMA, T, V, model_of, streamed_logits

DEEP = dataclasses.replace(LLAMA, num_layers=3)
GATED = AttentionConfig(
    "gated", num_sinks=2, max_separators=4, window_size=6, cache_size=16, gate_layer=1, gate_stretch=5, gate_keep=2,
    watch_half_life=256,
)  # fmt: skip
CASES = {
    "a gate": GATED,
    "that reads embeddings, for one layer, compacted at every token, never fading": dataclasses.replace(
        GATED, gate_layer=0, kept_layers=(1,), cache_size=13, watch_half_life=0
    ),
    "of stretches as long as the window, no sinks, absolute positions": dataclasses.replace(
        GATED, num_sinks=0, gate_stretch=6, gate_keep=3, stream_positions="absolute", cache_size=20
    ),
    "separators for one layer": AttentionConfig(
        num_sinks=2, max_separators=3, window_size=4, cache_size=14, kept_layers=(1,)
    ),
}


@functools.partial(jax.jit, static_argnums=(0, 7))
def list_step(graph, params, token, k_list, v_list, k_positions, q_position, gate_layer):
    """One token over lists of un-rotated keys [L, n, K, H] at positions [L, n], -1: not seen. Its gate's score, too.

    q_position: the token's own, of all layers or int32[L].
    """
    model = merge(graph, params)
    rope, H = model.config.rope, model.config.head_dim

    def attend(q, k, v, layer):
        keys, values, positions, q_position = layer
        own = rope_table(q_position[None, None], rope, H)
        keys = jnp.concatenate([rotate(keys[None], rope_table(positions[None], rope, H)), rotate(k, own)], axis=1)[0]
        queries = rotate(q, own)[0, 0].reshape(k.shape[2], -1, H)
        scores = jnp.einsum("kgh,skh->kgs", queries, keys) * H**-0.5
        there = jnp.append(positions >= 0, True)
        weights = jax.nn.softmax(jnp.where(there, scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgs,skh->kgh", weights, jnp.concatenate([values, v[0]])).reshape(q.shape), (k[0, 0], v[0, 0])

    x, kept, inputs = model.embed(token[None, None], jnp.zeros((1, 1), jnp.int32)), [], (k_list, v_list, k_positions)
    inputs = *inputs, jnp.broadcast_to(q_position, model.config.num_layers)
    score = jnp.zeros(())
    for i in range(model.config.num_layers):
        if i == gate_layer and model.gate is not None:
            score = model.gate(x)[0, 0]
        x, kept_of_layer = model.run_layers(x, attend, inputs, i, i + 1)
        kept.append(kept_of_layer)
    k, v = (jnp.concatenate(x) for x in zip(*kept, strict=True))
    return model.logits(model.final_norm(x)[0, 0]), k, v, score


class GatedLists:
    """What one row keeps: numbers of tokens, and every token's score."""

    def __init__(self, attention):
        self.attention, self.scores = attention, []
        self.sinks, self.kept, self.recent = [], [], []

    def attended(self):
        return {token: i for i, token in enumerate([*self.sinks, *self.kept, *self.recent])}

    def is_best(self, token):
        a, n = self.attention.num_sinks, self.attention.gate_stretch
        first = token // n * n
        rivals = [t for t in range(max(first, a), first + n) if t < len(self.scores)]
        return token in sorted(rivals, key=lambda t: (-self.scores[t], t))[: self.attention.gate_keep]

    def append(self, score):
        x = self.attention
        a, s, w, c = x.num_sinks, x.max_separators, x.window_size, x.cache_size
        (self.sinks if len(self.sinks) < a else self.recent).append(len(self.scores))
        self.scores.append(score)
        if len(self.recent) < c + 1 - a - s:
            return
        past, self.recent = self.recent[:-w], self.recent[-w:]

        def worth(token):
            return -np.log2(1 + np.exp(-self.scores[token])) + token / (x.watch_half_life or 2**20)

        best = sorted([*self.kept, *filter(self.is_best, past)], key=worth, reverse=True)[:s]
        come = [token for token in past if token in best]
        slots = [token if token in best else None for token in self.kept] + [None] * (s - len(self.kept))
        filled = [come.pop(0) if token is None and come else token for token in slots]
        self.kept = [token for token in filled if token is not None]


def list_logits(config, attention, tokens, flags):
    """The scores after every token of one row, [T, V], and the lists at the end."""
    is_gated = attention.pattern == "gated"
    graph, params = model_of(config, attention if is_gated else None)
    sizes = StreamSizes.create(config, attention)
    row = GatedLists(attention) if is_gated else ListStream(2, 3, 4, sizes.cache_size)
    layers = np.array(attention.kept_layers or range(attention.gate_layer if is_gated else 0, config.num_layers))
    sees = np.isin(np.arange(config.num_layers), layers)[:, None]
    store = np.zeros((2, config.num_layers, len(tokens), config.num_kv_heads, config.head_dim), np.float32)
    out = []
    for i, token in enumerate(tokens):
        seen = row.attended()
        numbers, positions = np.zeros(sizes.cache_size, int), np.full((config.num_layers, sizes.cache_size), -1)
        numbers[: len(seen)] = list(seen)
        kept = row.kept if is_gated else [t for t, _ in row.entries[row.num_sinks :][: row.kept]]
        kept = np.isin(list(seen), kept)
        places = list(seen) if sizes.absolute else list(seen.values())
        positions[:, : len(seen)] = np.where(kept & ~sees, -1, places)
        position = jnp.int32(i if sizes.absolute else len(seen))
        k, v = store[:, :, numbers]
        logits, k, v, score = list_step(
            graph, params, jnp.int32(token), k, v, jnp.asarray(positions, jnp.int32), position, attention.gate_layer
        )
        store[0, :, i], store[1, :, i] = k, v
        row.append(float(score) if is_gated else bool(flags[i]))
        out.append(np.asarray(logits))
    return np.stack(out), row


# A program of seconds for each case and length: of one token where a cache is compacted at every one, else of five.
# With -m soak what test_mixed.py (separators for some layers) and test_bounded.py (absolute positions) have, too.
OFTEN = ("a gate",)  # a growing cache of one that reads embeddings is in test_growing_pass.py
RUNS = {"a gate": (5,), "that reads embeddings, for one layer, compacted at every token, never fading": (1,)}


@pytest.mark.parametrize("case", [x if x in OFTEN else pytest.param(x, marks=pytest.mark.soak) for x in CASES])
def test_runs_give_what_lists_give_token_by_token(case):
    attention, random = CASES[case], np.random.default_rng(21)
    lengths = np.array([T, 47])
    tokens = random.integers(0, V, (2, T), dtype=np.int32)
    table = random.random(V) < 0.15
    expected = [list_logits(DEEP, attention, tokens[b, :n], table[tokens[b]]) for b, n in enumerate(lengths)]
    for run in RUNS.get(case, (1, 5)):
        got, cache = streamed_logits(DEEP, attention, tokens, lengths, jnp.asarray(table), run)
        for b, (rows, lists) in enumerate(expected):
            roundings = ((5 * DEEP.num_layers + 1) * DEEP.mlp_dim) ** 0.5  # as in test_bounded_pass.py
            bound = (roundings + 2 * T) * np.finfo(np.float32).eps * np.abs(rows).max()
            assert np.abs(got[b, : len(rows)] - rows).max() <= bound
            assert int(cache.held()[b]) == len(lists.attended()) <= attention.cache_size
    if attention.pattern == "gated":
        _, row = expected[0]
        newest = [t for t in range(T) if row.is_best(t) and t < row.recent[0]][-len(row.kept) :]
        assert len(row.kept) == attention.max_separators
        assert sorted(row.kept) != newest or attention.watch_half_life == 256  # the best stay, not the newest


def test_times_begin_again_and_change_nothing():
    tokens = np.random.default_rng(12).integers(0, V, (2, T), dtype=np.int32)  # as above: the same program
    table, lengths = jnp.zeros(V, bool), np.array([T, 47])
    young, _ = streamed_logits(DEEP, GATED, tokens, lengths, table, 5)
    create, late = StreamingCache.create, watched._CLOCK - 40

    def begun(config, batch_size, sizes):
        cache = create(config, batch_size, sizes)
        return dataclasses.replace(cache, clock=cache.clock + late)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamingCache, "create", begun)
        old, cache = streamed_logits(DEEP, GATED, tokens, lengths, table, 5)
    assert int(jnp.max(cache.clock)) < T < late
    np.testing.assert_allclose(old, young, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_separators": 0}, "no room for what a gate keeps"),
        ({"keep_all_separators": True}, "keeps the best max_separators"),
        ({"pattern": "watched", "watch_after": 3, "kept_layers": (1,)}, "name the layers whose looks count"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        StreamSizes.create(DEEP, dataclasses.replace(GATED, **changes))
