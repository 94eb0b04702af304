"""Decoding from the cache against the masked forward pass, every row at every step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepjax.config import AttentionConfig, ModelConfig, RopeConfig, layer_windows
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.step import decode_step, prefill
from sepjax.model.attend import forward
from sepjax.model.transformer import merge
from sepjax.separators import flag_separators
from tests.models import random_split

V, T = 37, 24
LLAMA = ModelConfig(
    vocab_size=V, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_positions=T
)
NEOX = dataclasses.replace(
    LLAMA,
    num_kv_heads=4,
    norm="layernorm",
    activation="gelu",
    gated_mlp=False,
    attention_bias=True,
    mlp_bias=True,
    parallel_residual=True,
    rope=RopeConfig(fraction=0.25),
    tie_embeddings=False,
)
GPT2 = dataclasses.replace(NEOX, parallel_residual=False, position_embedding="learned", tie_embeddings=True)
FALCON = dataclasses.replace(NEOX, num_kv_heads=1, shared_norm=True, rope=RopeConfig(scaling="llama3", factor=4.0))
MIXED = dataclasses.replace(  # every kind of layer, and what else a family may have
    LLAMA,
    norm_offset=True,
    norm_position="both",
    qk_norm="width",
    qkv_bias=True,
    sliding_window=8,
    full_layers=(1,),
    no_rope_layers=(2,),
    sliding_rope=RopeConfig(base=50.0),
    embedding_scale=3.0,
    residual_scale=0.5,
    attention_scale=0.2,
    logit_divisor=0.5,
    final_softcap=30.0,
)
# Prompts by the op's definition, which compiles in half the time, but for layers of every kind.
SEPARATOR = AttentionConfig(window_size=5, num_sinks=2, implementation="reference")
GATED = dataclasses.replace(SEPARATOR, pattern="gated", gate_layer=1, gate_stretch=5, gate_keep=2)

CASES = {  # every kind of model, pattern, window and number of sinks at least once
    "llama": (LLAMA, SEPARATOR),
    "neox, partial rotary, a window a layer": (NEOX, dataclasses.replace(SEPARATOR, layer_windows=(7, 2, 4))),
    "gpt2, learned positions, outer layers dense": (GPT2, dataclasses.replace(SEPARATOR, layer_windows=(99, 4, 99))),
    "falcon, one key head, fixed interval": (
        FALCON,
        dataclasses.replace(SEPARATOR, pattern="fixed_interval", interval=3),
    ),
    "window of one, no sinks": (LLAMA, AttentionConfig(window_size=1, num_sinks=0)),
    "sinks beyond the text": (LLAMA, AttentionConfig(pattern="sink_window", window_size=3, num_sinks=50)),
    "dense": (LLAMA, AttentionConfig(pattern="dense")),
    "layers of every kind": (MIXED, dataclasses.replace(SEPARATOR, implementation=None)),
    "layers of every kind, dense": (MIXED, AttentionConfig(pattern="dense")),
    "gated": (LLAMA, GATED),
    "gated by embeddings, a window a layer": (
        NEOX,
        dataclasses.replace(GATED, gate_layer=0, gate_stretch=4, gate_keep=1, layer_windows=(7, 9, 4)),
    ),
    "gated for the last layer alone": (LLAMA, dataclasses.replace(GATED, kept_layers=(2,), layer_windows=(7, 4, 9))),
    "separators for the middle layer alone": (NEOX, dataclasses.replace(SEPARATOR, kept_layers=(1,))),
    "gated, a wide window below": (FALCON, dataclasses.replace(GATED, gate_layer=2, layer_windows=(12, 3, 6))),
    "8 bits": (LLAMA, dataclasses.replace(SEPARATOR, cache_dtype="int8")),
}
# A program of several seconds each: with -m soak, what the others have in other company.
RARE = ("llama", "sinks beyond the text", "dense", "layers of every kind, dense", "gated")
RARE += ("separators for the middle layer alone", "gated, a wide window below")
RARE += ("falcon, one key head, fixed interval", "gated for the last layer alone", "window of one, no sinks")
RARE += ("neox, partial rotary, a window a layer",)  # the gated one has its shape and windows, too
RARE += ("gpt2, learned positions, outer layers dense",)  # learned positions: as transformers, tests/hub/test_parity.py
EXACT = [case for case in CASES if case != "8 bits"]


def often(cases, rare):
    """Parameters of a test, the rare ones marked."""
    return [x if x not in rare else pytest.param(x, marks=pytest.mark.soak) for x in cases]


# These programs run a few times for a few milliseconds: compiling them takes the time.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(compiled, static_argnums=(0, 4))
def forward_logits(graph, params, tokens, table, attention):
    """The scores of the masked forward pass, [B, T, V]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    model = merge(graph, params)
    is_separator = flag_separators(tokens, positions, table, attention)
    return model.logits(forward(model, tokens, positions, is_separator, None, attention)[0])


@functools.partial(compiled, static_argnums=(0, 5))
def decoded_logits(graph, params, tokens, lengths, table, attention):
    """The scores of prefill and decode steps, [B, T, V]; 0 inside the prompts. And the last cache."""
    windows = layer_windows(attention, 3, T)
    sizes = {"window_size": min(max(windows), T), "capacity": T}
    B = len(lengths)
    padded = jnp.where(jnp.arange(T) < lengths[:, None], tokens, V - 1)  # what stands in padding must not matter
    logits, cache = prefill(graph, params, padded, lengths, table, attention, **sizes)
    out = jnp.zeros((B, T, V)).at[jnp.arange(B), lengths - 1].set(logits)

    def step(carry, _):
        cache, out = carry
        at, active = jnp.minimum(cache.length, T - 1), cache.length < T
        token = tokens[jnp.arange(B), at]
        logits, cache = decode_step(graph, params, cache, token, table, attention, active)
        return (cache, out.at[jnp.arange(B), jnp.where(active, at, T)].set(logits, mode="drop")), None

    (cache, out), _ = jax.lax.scan(step, (cache, out), None, length=T)
    return out, cache


@functools.cache
def model_of(config, attention=None):
    """A model whose attention matters: at the initial scale all weights would be nearly alike."""
    return random_split(config, attention, 1, scale=8)


@pytest.mark.parametrize("case", often(EXACT, RARE))
@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, T), min_size=3, max_size=3))
@settings(max_examples=4)
def test_decoding_equals_the_masked_forward_pass_at_every_step(case, seed, lengths):
    config, attention = CASES[case]
    random = np.random.default_rng(seed)
    tokens = random.integers(0, V, (3, T), dtype=np.int32)
    table = jnp.asarray(random.random(V) < random.random())
    graph, params = model_of(config, attention if attention.pattern == "gated" else None)
    expected = forward_logits(graph, params, tokens, table, attention)
    got, cache = decoded_logits(graph, params, tokens, np.array(lengths, np.int32), table, attention)
    assert cache.length.tolist() == [T] * 3
    if attention.pattern == "gated":  # all that was kept at any time; what is in the window is held besides
        most = 2 + attention.gate_keep * -(-(T - cache.window_size) // attention.gate_stretch)
        assert (cache.num_global <= most).all()
    assert not cache.overflowed()
    decoded = np.arange(T) >= np.array(lengths)[:, None] - 1
    error = np.abs(np.asarray(got - expected))[decoded].max()
    # Five products a layer and the head follow one another, each a sum of at most F terms: their roundings walk at
    # random, relative to the largest score. (A key too many or too few is thousands of times as much.)
    roundings = (5 * config.num_layers + 1) * config.mlp_dim
    assert error <= roundings**0.5 * np.finfo(np.float32).eps * np.abs(expected).max()


@pytest.mark.soak  # three programs; a bounded cache in bfloat16 is in test_bounded_pass.py, and keys are stored alike
def test_bfloat16_decoding_is_as_exact_as_the_bfloat16_forward_pass():
    random = np.random.default_rng(0)
    tokens = random.integers(0, V, (3, T), dtype=np.int32)
    table = jnp.asarray(random.random(V) < 0.3)
    config, (_, params) = dataclasses.replace(LLAMA, dtype="bfloat16"), model_of(LLAMA)
    graph, _ = model_of(config)
    exact = forward_logits(model_of(LLAMA)[0], params, tokens, table, SEPARATOR)
    whole = forward_logits(graph, params, tokens, table, SEPARATOR)
    got, cache = decoded_logits(graph, params, tokens, np.ones(3, np.int32), table, SEPARATOR)
    assert cache.k.dtype == jnp.bfloat16
    error, allowed = (float(jnp.abs(x - exact).max()) for x in (got, whole))
    assert 0 < error <= 2 * allowed


@pytest.mark.soak  # of bounded caches in test_bounded_pass.py; what is stored is test_stored.py
def test_decoding_in_8_bits_errs_by_what_rounding_does():
    """Half a code is a 254th of the largest number of a vector; a key too many or too few errs by its whole share."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, V, (3, T), dtype=np.int32)
    table = jnp.asarray(random.random(V) < 0.3)
    config, attention = CASES["8 bits"]
    graph, params = model_of(config)
    exact = forward_logits(graph, params, tokens, table, attention)
    got, cache = decoded_logits(graph, params, tokens, np.array([1, 5, 12], np.int32), table, attention)
    assert cache.cache_dtype == "int8"
    decoded = np.arange(T) >= np.array([1, 5, 12])[:, None] - 1
    error = np.sqrt(np.mean(np.asarray(got - exact)[decoded] ** 2) / np.mean(np.asarray(exact)[decoded] ** 2))
    assert 0 < error < 1 / 50
    grown = jax.jit(lambda cache: cache.grow(T + 3, 40))(cache)  # outside of a program it is thirty
    np.testing.assert_array_equal(np.asarray(grown.k.scales)[..., :T], np.asarray(cache.k.scales)[..., :T])


RUNS = ("neox, partial rotary, a window a layer", "gpt2, learned positions, outer layers dense", "dense")
RUNS += ("layers of every kind", "window of one, no sinks", "falcon, one key head, fixed interval")
RUNS += ("gated by embeddings, a window a layer", "8 bits")


@functools.partial(compiled, static_argnums=(0, 2, 6))
def run_of(graph, params, width, cache, tokens, counts, attention, table):
    """Hidden states of the first `counts` of tokens[3, width], and the cache with them."""
    return cache.take_up(merge(graph, params), tokens[:, :width], counts, table, attention)


@pytest.mark.soak  # a step, above, is a run of one; a text in turns is the whole text at once: test_engine.py
@pytest.mark.parametrize("case", RUNS)
def test_a_run_of_tokens_is_what_they_are_one_by_one(case):
    """Ragged runs, longer than the window too: the same hidden states, and the same tokens in the same slots."""
    config, attention = CASES[case]
    random = np.random.default_rng(0)
    tokens = random.integers(0, V, (3, T), dtype=np.int32)
    table = jnp.asarray(random.random(V) < 0.3)
    graph, params = model_of(config, attention if attention.pattern == "gated" else None)
    gate = {"stretch": attention.gate_stretch, "keep": attention.gate_keep} if attention.pattern == "gated" else {}
    window = min(max(layer_windows(attention, 3, T)), T)
    kind = attention.cache_dtype
    empty = SeparatorCache.create(config, 3, window_size=window, capacity=T, **gate, cache_dtype=kind)

    expected, single = np.zeros((3, T, config.embed_dim), np.float32), empty
    for i in range(T):
        one = run_of(graph, params, 1, single, tokens[:, i : i + 1], jnp.ones(3, jnp.int32), attention, table)
        expected[:, i], single = one[0][:, 0], one[1]
    assert jax.tree.map(jax.typeof, empty) == jax.tree.map(jax.typeof, single), "else each program is compiled twice"
    got, cache, at = np.zeros_like(expected), empty, np.zeros(3, np.int32)
    while (at < T).any():
        counts = np.minimum(random.integers(0, 12, 3), T - at).astype(np.int32)
        part = np.stack([np.resize(row[i:], 12) if i < T else row[:12] for row, i in zip(tokens, at, strict=True)])
        hidden, cache = run_of(graph, params, 12, cache, part, counts, attention, table)
        for b in range(3):
            got[b, at[b] : at[b] + counts[b]] = hidden[b, : counts[b]]
        at += counts
    for name in ("position", "is_global", "length", "num_global", "scores"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(single, name))
    if attention.cache_dtype == "int8":  # a rounding more or less of a number makes a code another one, seldom
        pairs = [*zip(jax.tree.leaves((cache.k, cache.v)), jax.tree.leaves((single.k, single.v)), strict=True)]
        assert max(np.mean(x != y) for x, y in pairs) < 1e-3
        assert np.abs(got - expected).max() < np.abs(expected).max() / 1000
        assert np.mean(np.abs(got - expected)) < np.mean(np.abs(expected)) / 10_000
        return
    roundings = ((5 * 3 + 1) * LLAMA.mlp_dim) ** 0.5 * np.finfo(np.float32).eps
    for x, y in ((got, expected), (cache.k, single.k), (cache.v, single.v)):
        assert np.abs(x - y).max() <= roundings * np.abs(y).max()
