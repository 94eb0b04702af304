"""Decoding steps with the kernel's part played by plain XLA: what it is told of slots, tiles and zones is enough."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import decode
from sepjax.attention.target import Target
from sepjax.bench.decode_attention import filled, inputs, layers_of
from sepjax.config import AttentionConfig, Config, ModelConfig, RopeConfig
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.growing_pass import growing_pass
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.model.transformer import merge
from tests.models import random_split

MODEL = ModelConfig(
    vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=8, dtype="bfloat16"
)
KINDS = dataclasses.replace(MODEL, sliding_window=70, full_layers=(1,), sliding_rope=RopeConfig(base=50.0))
SEPARATOR = AttentionConfig(num_sinks=2, max_separators=30, window_size=20, cache_size=90)
CASES = {
    "separators": (MODEL, SEPARATOR),
    "positions of the text": (MODEL, dataclasses.replace(SEPARATOR, stream_positions="absolute")),
    "sink_window": (MODEL, dataclasses.replace(SEPARATOR, pattern="sink_window", max_separators=0)),
    "layers with a window of their own": (KINDS, SEPARATOR),
    "layers without kept tokens": (MODEL, dataclasses.replace(SEPARATOR, kept_layers=(1,))),
}


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every call that the kernel would get; what it knows of slots goes through tiles and bias alone."""
    got = []

    def stand_in(queries, k, v, k_cache, v_cache, bias, live, *, ends):
        number = jnp.arange(live.shape[1] - 1)
        is_live = jax.vmap(lambda row: jnp.zeros(len(number), bool).at[row[1:]].set(number < row[0]))(live)
        seen = (bias == 0) & jnp.repeat(is_live, decode.TILE, axis=1)
        got.append(ends)
        return decode.with_weights(queries, k, v, k_cache, v_cache, decode.Seen(seen, None, None), ends)[0]

    monkeypatch.setattr(decode, "_kernel", stand_in)
    monkeypatch.setattr(decode, "target", lambda: Target("gpu", "NVIDIA H200", 132, "9.0"))
    return got


@pytest.mark.parametrize("case", CASES)
def test_bounded_caches(case, calls):
    model, attention = CASES[case]
    cache = filled(Config(model=model, attention=attention), StreamSizes.create(model, attention), 3)
    given = inputs(model, 3)
    expected = layers_of(cache, *given, implementation="xla")
    assert not calls
    got = layers_of(cache, *given, implementation=None)
    assert len(calls) == model.num_layers
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


def test_growing_caches(calls):
    graph, params = random_split(MODEL, SEPARATOR)
    cache = SeparatorCache.create(MODEL, 2, window_size=20, capacity=44)
    table, tokens = jnp.arange(MODEL.vocab_size) < 4, jnp.arange(140).reshape(70, 2, 1) * 7 % MODEL.vocab_size

    def step(cache, token, attention=SEPARATOR):
        hidden, cache = growing_pass(merge(graph, params), cache, token, jnp.ones(2, jnp.int32), table, attention)
        return cache, hidden

    cache, _ = jax.jit(lambda cache: jax.lax.scan(step, cache, tokens))(cache)
    assert calls, "the kernel serves 64 slots"
    got, calls[:] = jax.jit(step)(cache, tokens[0])[1], []
    other = functools.partial(step, attention=dataclasses.replace(SEPARATOR, implementation="xla"))
    expected = jax.jit(other)(cache, tokens[0])[1]
    assert not calls
    np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))
