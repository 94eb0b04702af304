"""Runs of tokens over the bounded cache against a model that keeps plain lists of un-rotated keys, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig, ModelConfig, RopeConfig
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.bounded_pass import stream_pass
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.model.rope import rope_table, rotate
from sepjax.model.transformer import merge
from tests.generation.cache.common import ListStream
from tests.models import random_split

V, T = 37, 90
LLAMA = ModelConfig(vocab_size=V, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
NEOX = dataclasses.replace(
    LLAMA,
    num_kv_heads=4,
    norm="layernorm",
    activation="gelu",
    gated_mlp=False,
    attention_bias=True,
    mlp_bias=True,
    parallel_residual=True,
    rope=RopeConfig(fraction=0.5, scaling="yarn", factor=4.0, original_context=64),
    tie_embeddings=False,
)
# Layers of every kind: a window of its own with a rotation of its own, no rotation, neither.
MIXED = dataclasses.replace(
    LLAMA,
    num_layers=3,
    sliding_window=7,
    full_layers=(1, 2),
    sliding_rope=RopeConfig(base=50.0),
    rope=RopeConfig(scaling="linear", factor=3.0),
    no_rope_layers=(1,),
    norm_position="both",
    norm_offset=True,
    qk_norm="head",
)
MIXED_ROPES = MIXED.sliding_rope, None, MIXED.rope
SEPARATOR = AttentionConfig(num_sinks=2, max_separators=3, window_size=4, cache_size=14)
CASES = {
    "llama": (LLAMA, SEPARATOR),
    "a + s + w = c - 1": (LLAMA, dataclasses.replace(SEPARATOR, cache_size=10)),
    "StreamingLLM": (LLAMA, AttentionConfig(pattern="sink_window", num_sinks=2, window_size=12, cache_size=14)),
    "sinks only, in bursts": (LLAMA, dataclasses.replace(SEPARATOR, max_separators=0)),
    "neox, partial yarn rotary, no sinks, fixed interval": (
        NEOX,
        dataclasses.replace(SEPARATOR, num_sinks=0, pattern="fixed_interval", interval=3),
    ),
    "layers of every kind": (MIXED, SEPARATOR),
    "StreamingLLM, layers of every kind": (
        MIXED,
        AttentionConfig(pattern="sink_window", num_sinks=2, window_size=12, cache_size=14),
    ),
    "absolute positions": (LLAMA, dataclasses.replace(SEPARATOR, stream_positions="absolute")),
}
IN_8_BITS = {f"{name}, int8": (x[0], dataclasses.replace(x[1], cache_dtype="int8")) for name, x in CASES.items()}


@functools.cache
def model_of(config, attention=None):
    """A model whose attention matters: at the initial scale all weights would be nearly alike."""
    return random_split(config, attention, 1, scale=8)


def rounded(x):
    """Each vector as whole numbers up to 127, times its largest / 127 in bfloat16; a null vector is one."""
    scale = (jnp.abs(x).max(-1, keepdims=True) / 127).astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1)), -127, 127) * scale


def tables_at(config, positions):
    """Of every layer, [L, 1, ...]."""
    ropes = MIXED_ROPES if config is MIXED else (config.rope,) * config.num_layers
    tables = [
        rope_table((x := positions[None]) - x * (rope is None), rope or RopeConfig(), config.head_dim) for rope in ropes
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *tables)


def rounded_at(k, table):
    """Keys as they are once they were rounded in this rotation, of whatever factor."""
    factor = jnp.sqrt(table[0] ** 2 + table[1] ** 2)
    return rotate(rounded(rotate(k, table)), (table[0] / factor**2, -table[1] / factor**2))


@functools.partial(jax.jit, static_argnums=0)
def moved(config, k, number):
    """Keys [L, K, H] that lie in a slot of this number from now on."""
    return rounded_at(k[:, None, None], tables_at(config, number[None]))[:, 0, 0]


@functools.partial(jax.jit, static_argnums=(0, 7))
def list_step(graph, params, token, k_list, v_list, k_positions, q_position, in_8_bits=False, own=None):
    """One token over lists of un-rotated keys [L, n, K, H], padded; positions of the padding are -1.

    own: the position in whose rotation its key is rounded, of 8 bits.
    """
    model = merge(graph, params)
    config = model.config
    q_tables, k_tables = tables_at(config, q_position[None]), tables_at(config, k_positions)
    own_tables = q_tables if own is None else tables_at(config, own[None])
    windows = [i not in config.full_layers and config.sliding_window for i in range(config.num_layers)]
    reach = jnp.array([window or 10**6 for window in windows])

    def attend(q, k, v, layer):
        *old, q_table, k_table, own_table, reach = layer
        if in_8_bits:
            k, v = rounded_at(k, own_table), rounded(v)
        keys, values = (jnp.concatenate([x[None], new], axis=1) for x, new in zip(old, (k, v), strict=True))
        group = q.shape[2] // k.shape[2]
        turned = jnp.repeat(rotate(keys, k_table), group, axis=2)
        scores = jnp.einsum("btnh,bsnh->bnts", rotate(q, q_table), turned) * q.shape[-1] ** -0.5
        seen = jnp.append(k_positions[:-1] >= 0, True) & (q_position - k_positions < reach)
        scores = jnp.where(seen, scores, -jnp.inf)
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), jnp.repeat(values, group, axis=2))
        return out, (k, v)

    hidden, (k, v) = model(
        token[None, None], jnp.zeros((1, 1), jnp.int32), attend, (k_list, v_list, q_tables, k_tables, own_tables, reach)
    )
    return model.logits(hidden[0, 0]), k[:, 0, 0], v[:, 0, 0]


def list_logits(config, attention, tokens, is_separator):
    """The scores after every token of one row, [T, V], by METHOD section 4 as it is written.

    Of 8 bits a key is rounded in the rotation of its slot's number, and once more when it becomes a separator's.
    """
    graph, params = model_of(config)
    sizes = StreamSizes.create(config, attention)
    in_8_bits, by_slot, known = sizes.cache_dtype == "int8", sizes.turned_by_slot, []
    row = ListStream(sizes.num_sinks, sizes.max_separators, sizes.window_size, sizes.cache_size)
    shape = (len(tokens), 2, config.num_layers, config.num_kv_heads, config.head_dim)
    store, out = np.zeros(shape, np.float32), []
    for i, token in enumerate(tokens):
        seen, c = row.attended(), sizes.cache_size
        numbers = np.resize([*seen, 0], c)
        positions = np.full(c + 1, -1, np.int32)
        positions[: len(seen)] = list(seen) if sizes.absolute else list(seen.values())
        positions[-1] = position = i if sizes.absolute else len(seen)
        k, v = (jnp.moveaxis(store[numbers, x], 0, 1) for x in (0, 1))
        own = jnp.int32(i % sizes.ring) if by_slot else None
        told = jnp.int32(token), k, v, positions, jnp.int32(position), in_8_bits, own
        logits, store[i, 0], store[i, 1] = list_step(graph, params, *told)
        out.append(np.asarray(logits))
        row.append(bool(is_separator[i]))
        kept = [x for x, _ in row.entries[sizes.num_sinks :][: row.kept]]
        if by_slot and kept:
            # Separators move in order; those that are dropped on the way have numbers, too.
            first = known[-1] + 1 if known else sizes.num_sinks
            come = [x for x in range(first, kept[-1] + 1) if is_separator[x]]
            for x in come:
                known.append(x)
                if x in kept:
                    number = (len(known) - 1) % sizes.max_separators
                    store[x, 0] = moved(config, store[x, 0], jnp.int32(number))
    return np.stack(out)


@functools.partial(jax.jit, static_argnums=(0, 5))
def one_pass(graph, params, cache, tokens, counts, attention, table):
    model = merge(graph, params)
    hidden, cache = stream_pass(model, cache, tokens, counts, table, attention)
    return model.logits(hidden), cache.compact()


def streamed_logits(config, attention, tokens, lengths, table, run):
    """The scores of every row, [B, T, V], in runs of up to `run` tokens; and the last cache."""
    graph, params = model_of(config, attention if attention.pattern == "gated" else None)
    B = len(lengths)
    cache = StreamingCache.create(config, B, StreamSizes.create(config, attention))
    out, at = np.zeros((B, T, V), np.float32), np.zeros(B, int)
    while (at < lengths).any():
        counts = np.minimum(np.asarray(cache.room(run)), lengths - at).astype(np.int32)
        part = np.full((B, run), V - 1, np.int32)  # what stands in padding must not matter
        for b in range(B):
            part[b, : counts[b]] = tokens[b, at[b] :][: counts[b]]
        logits, cache = one_pass(graph, params, cache, part, counts, attention, table)
        for b in range(B):
            out[b, at[b] :][: counts[b]] = logits[b, : counts[b]]
        at += counts
    return out, cache


# A run of one token is a program of its own, as long as any: both are held against each other where others need them.
RUNS = {"llama": (1, 16), "neox, partial yarn rotary, no sinks, fixed interval": (1,), "layers of every kind": (5,)}
RUNS |= {"StreamingLLM": (5,)}
# Programs of seconds each: with -m soak, sizes and patterns that test_bounded.py has against lists of slots.
RARE = ("a + s + w = c - 1", "sinks only, in bursts", "StreamingLLM, layers of every kind", "absolute positions")
RARE += ("neox, partial yarn rotary, no sinks, fixed interval",)  # NEOX, of another rotation, in test_watched.py
RARE += ("StreamingLLM",)  # its slots and angles are in test_bounded.py


LENGTHS = np.array([T, 61, 1])


def text_for(attention):
    random = np.random.default_rng(7)
    tokens = random.integers(0, V, (3, T), dtype=np.int32)
    table = random.random(V) < 0.3
    is_separator = table[tokens]
    if attention.pattern == "fixed_interval":
        is_separator = np.broadcast_to((np.arange(T) + 1) % 3 == 0, tokens.shape)
    return tokens, table, is_separator


@pytest.mark.parametrize("case", [x if x not in RARE else pytest.param(x, marks=pytest.mark.soak) for x in CASES])
def test_runs_give_what_lists_of_unrotated_keys_give_token_by_token(case):
    config, attention = CASES[case]
    (tokens, table, is_separator), lengths = text_for(attention), LENGTHS
    expected = [list_logits(config, attention, tokens[b, :n], is_separator[b]) for b, n in enumerate(lengths)]
    caches = []
    for run in RUNS.get(case, (1, 5)):
        got, cache = streamed_logits(config, attention, tokens, lengths, jnp.asarray(table), run)
        caches.append(cache)
        for b, rows in enumerate(expected):
            # Five products a layer and the head follow one another, each a sum of at most F terms: their roundings
            # walk at random, relative to the largest score. Angles err by the size of the positions.
            roundings = ((5 * config.num_layers + 1) * config.mlp_dim) ** 0.5
            bound = (roundings + 2 * T) * np.finfo(np.float32).eps * np.abs(rows).max()
            assert np.abs(got[b, : len(rows)] - rows).max() <= bound
    for cache in caches[1:]:  # the same zones; rotations may have started again at other tokens
        for name in ("num_sinks", "num_separators", "num_recent", "dropped", "seen_low", "seen_high"):
            np.testing.assert_array_equal(getattr(cache, name), getattr(caches[0], name))


# Runs of one token and of several are programs of their own: with -m soak the other one, too, and the other cases.
# Codes know nothing of the kind of a layer, whose keys are turned before they are rounded.
OFTEN_IN_8_BITS = {"llama, int8": 1}
BOTH = [pytest.param(case, run, marks=pytest.mark.soak) for case in IN_8_BITS for run in (1, 5)]


@pytest.mark.parametrize(
    ("case", "run"), [*OFTEN_IN_8_BITS.items(), *(x for x in BOTH if OFTEN_IN_8_BITS.get(x.values[0]) != x.values[1])]
)
def test_runs_in_8_bits_give_what_lists_of_keys_rounded_alike_give_token_by_token(case, run):
    """What is rounded in another rotation, once more, or seen as it was before, errs by as much as rounding does."""
    config, attention = IN_8_BITS[case]
    tokens, table, is_separator = text_for(attention)
    plain = dataclasses.replace(attention, cache_dtype="model")
    got, _ = streamed_logits(config, attention, tokens, LENGTHS, jnp.asarray(table), run)
    for b, n in enumerate(LENGTHS):
        rounded, exact = (list_logits(config, x, tokens[b, :n], is_separator[b]) for x in (attention, plain))
        rounding, error = (np.sqrt(np.mean((x - rounded) ** 2)) for x in (exact, got[b, :n]))
        assert error < rounding / 8


def test_a_row_does_not_depend_on_its_neighbours():
    config, attention = CASES["llama"]
    random = np.random.default_rng(8)
    tokens = random.integers(0, V, (3, T), dtype=np.int32)
    table = jnp.asarray(random.random(V) < 0.3)
    lengths = np.array([T, 61, 40])
    together, _ = streamed_logits(config, attention, tokens, lengths, table, 16)
    tokens[1:] = random.integers(0, V, (2, T))
    others, _ = streamed_logits(config, attention, tokens, np.array([T, 3, T]), table, 16)
    np.testing.assert_array_equal(together[0], others[0])


@pytest.mark.soak  # caches in bfloat16 are in test_decode_kernel.py and test_run_kernel.py
def test_bfloat16_errs_no_more_than_twice_what_lists_in_bfloat16_do():
    """Keys that are turned when they move are as good as keys that are turned anew every time."""
    config, attention = CASES["llama"]
    random = np.random.default_rng(9)
    tokens = random.integers(0, V, (3, T), dtype=np.int32)
    table = random.random(V) < 0.3
    half = dataclasses.replace(config, dtype="bfloat16")
    lengths = np.array([T] * 3)
    exact = np.stack([list_logits(config, attention, row, table[row]) for row in tokens])
    lists = np.stack([list_logits(half, attention, row, table[row]) for row in tokens])
    got, _ = streamed_logits(half, attention, tokens, lengths, jnp.asarray(table), 16)
    error, floor = (np.sqrt(np.mean((x - exact) ** 2)) for x in (got, lists))
    assert error <= 2 * floor
