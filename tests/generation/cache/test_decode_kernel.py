"""Decoding steps with the kernel's part played by plain XLA: what it is told of slots, tiles and zones is enough."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import decode
from sepjax.attention.target import Target
from sepjax.bench.decode_attention import filled, inputs, layers_of
from sepjax.config import AttentionConfig, Config, ModelConfig, RopeConfig
from sepjax.generation.cache.bounded_pass import attend_run, pass_inputs
from sepjax.generation.cache.bounded_step import _turned_to_zones
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.growing_pass import growing_pass
from sepjax.generation.cache.mixed import bounded_sizes, empty_cache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.model.transformer import merge
from sepjax.model.unrolled import by_layer, runner
from tests.models import random_split

MODEL = ModelConfig(
    vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=8, dtype="bfloat16"
)
KINDS = dataclasses.replace(MODEL, sliding_window=70, full_layers=(1,), sliding_rope=RopeConfig(base=50.0))
SEPARATOR = AttentionConfig(num_sinks=2, max_separators=30, window_size=20, cache_size=90)
CASES = {
    "separators, heads of 128": (dataclasses.replace(MODEL, head_dim=128), SEPARATOR),
    "positions of the text": (MODEL, dataclasses.replace(SEPARATOR, stream_positions="absolute")),
    "sink_window": (MODEL, dataclasses.replace(SEPARATOR, pattern="sink_window", max_separators=0)),
    "layers with a window of their own": (KINDS, SEPARATOR),
    "layers without kept tokens": (MODEL, dataclasses.replace(SEPARATOR, kept_layers=(1,))),
}


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every call that a kernel would get; what it knows of slots goes through tiles and bias alone."""
    got = []

    def seen(told):
        bias, live = told
        X, tiles = live.shape[1] - 1, live[:, :1]
        parts, number = bias.reshape(len(bias), X, -1), jnp.arange(X)
        is_read = (number < tiles * (decode.TILE // parts.shape[2]))[..., None] & (parts == 0)
        visible = jnp.zeros_like(is_read).at[jnp.arange(len(bias))[:, None], live[:, 1:]].max(is_read)
        return decode.Seen(visible.reshape(bias.shape), None, None, None)

    def in_order(found, told):  # looks as the kernel has them
        out, looks = found
        if looks is None:
            return found
        X = told[1].shape[1] - 1
        parts = looks.reshape(*looks.shape[:2], X, -1)
        return out, jnp.take_along_axis(parts, told[1][:, None, 1:, None], axis=2).reshape(looks.shape)

    def stand_in(queries, k, v, k_cache, v_cache, told, turn, to=None, *, ends, looks):
        if turn is not None:  # which the kernel does, of the array of all that was projected
            K, N = queries.shape[1], queries.shape[1] * queries.shape[3]
            queries, key, v = (turn.flat[:, i:j] for i, j in ((0, N), (N, N + K), (N + K, N + 2 * K)))
            queries = _turned_to_zones(queries.reshape(len(k), K, -1, queries.shape[-1]), turn[:2])
            k = _turned_to_zones(key[:, :, None], turn[:2])[:, :, -1, 0]
        got.append(ends if not looks else "looks")
        found = in_order(decode.attend(queries, k, v, k_cache, v_cache, seen(told), ends, looks=looks), told)
        if to is None:
            return found
        rows = jnp.arange(len(k))
        written = [x.at[rows, :, to].set(own) for x, own in ((k_cache, k), (v_cache, v))]
        return found, tuple(written)

    def of_codes(queries, k, v, codes, told, ends, *, own, looks):
        (keys, of_keys), (values, of_values) = codes
        got.append(ends)
        assert keys.dtype == jnp.int8
        given = queries, k, v, keys.astype(v.dtype), values.astype(v.dtype), seen(told)
        ends = () if ends is None else ends
        return in_order(decode.attend(*given, ends, (of_keys, of_values), own=own, looks=looks), told)

    monkeypatch.setattr(decode, "_kernel", stand_in)
    monkeypatch.setattr(decode, "_kernel_of_codes", of_codes)
    monkeypatch.setattr(decode, "target", lambda: Target("gpu", "one SM", 1, "9.0"))
    monkeypatch.setattr(decode, "_WAVES", 0)  # parts for few rows
    return got


# Rings that have gone round, some up to their last slot, and not.
ROUND = {"next_separator": [3, 30, 47], "next_recent": [25, 96, 250]}
CODED = {
    "separators": (MODEL, SEPARATOR),
    "positions of the text": (MODEL, dataclasses.replace(SEPARATOR, stream_positions="absolute")),
    "sink_window": (MODEL, dataclasses.replace(SEPARATOR, pattern="sink_window", max_separators=0)),
    "layers with rotations of their own": (
        dataclasses.replace(KINDS, rope=RopeConfig(attention_factor=1.2)),
        SEPARATOR,
    ),
}


def in_a_program(cache, *given, implementation):
    """`layers_of`, compiled anew; operation after operation takes five times as long."""
    return jax.jit(lambda *x: layers_of(*x, implementation=implementation))(cache, *given)


def run_of_one(cache, q, k, v):
    """`layers_of` by the attention of a run of two tokens, of which the second is nobody's."""
    attend, inputs, outs = attend_run(cache, 2, jnp.ones(len(q), jnp.int32), "xla"), pass_inputs(cache), []
    for i in range(len(cache.k)):
        layer = tuple(x if x is None else x[i] for x in inputs)
        given: Any = [jnp.concatenate([x, x], axis=1) for x in (outs[-1] if outs else q, k, v)]
        outs.append(attend(*given, layer)[0][:, :1])
    return outs


# That keys lie turned to the positions of the text, and no zone of separators, is also of what has no codes.
@pytest.mark.parametrize(
    "case", [x if x == "layers with rotations of their own" else pytest.param(x, marks=pytest.mark.soak) for x in CODED]
)
def test_bounded_caches_of_codes(case, calls, monkeypatch):
    """Of rows whose rings have gone round, in the kernel's part, in plain XLA, and by a run, which turns every key."""
    model, attention = CODED[case]
    model, attention = dataclasses.replace(model, dtype="float32"), dataclasses.replace(attention, cache_dtype="int8")
    cache = filled(Config(model=model, attention=attention), StreamSizes.create(model, attention), 3)
    cache = dataclasses.replace(cache, **{name: jnp.array(x, jnp.int32) for name, x in ROUND.items()})
    given = inputs(model, 3)
    plainly = in_a_program(cache, *given, implementation="xla")
    for x, y in zip(in_a_program(cache, *given, implementation=None), plainly, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not calls, "float32 is for plain XLA"
    expected = jax.jit(run_of_one)(cache, *given)
    monkeypatch.setattr(decode, "_TYPES", (jnp.float32,))
    monkeypatch.setattr(decode, "unserved", lambda *_: None)
    got = in_a_program(cache, *given, implementation=None)
    assert len(calls) == model.num_layers
    assert all((ends is None) == (case == "positions of the text") for ends in calls)
    for x, y, z in zip(got, plainly, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(x, z, rtol=1e-4, atol=1e-5)


OFTEN = ("separators, heads of 128", "layers with a window of their own")


@pytest.mark.parametrize("case", [x if x in OFTEN else pytest.param(x, marks=pytest.mark.soak) for x in CASES])
def test_bounded_caches(case, calls):
    model, attention = CASES[case]
    cache = filled(Config(model=model, attention=attention), StreamSizes.create(model, attention), 3)
    given = inputs(model, 3)
    expected = in_a_program(cache, *given, implementation="xla")
    assert not calls
    got = in_a_program(cache, *given, implementation=None)
    assert len(calls) == model.num_layers
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


# Windows of layers, those that keep tokens, and what the kernel is asked for: the last layer alone is watched.
SEVERAL = {
    "a window below": ((26, 22), (1,), ["(2, 2)", "looks"]),
    "another size and another layer that keep tokens": (
        (26, 20, 22, 22), (1, 2, 3), ["(2, 14)", "(2, 14)", "(2, 2)", "looks"],
    ),
}  # fmt: skip


@pytest.mark.soak  # several sizes without the kernel: test_mixed.py; watched tokens of one size: test_run_kernel.py
@pytest.mark.parametrize("case", SEVERAL)
def test_watched_tokens_in_caches_of_several_sizes(calls, case):
    """The same tokens are kept, step by step: by looks of the layer that is watched. Others give none."""
    windows, kept_layers, asked_for = SEVERAL[case]
    model = dataclasses.replace(MODEL, num_layers=len(windows))
    attention = AttentionConfig(
        pattern="watched", num_sinks=2, max_separators=12, window_size=20, cache_size=40, watch_after=3,
        watch_half_life=64, layer_windows=windows, kept_layers=kept_layers, watch_layers=kept_layers[-1:],
    )  # fmt: skip
    graph, params = random_split(model, attention)
    params, sizes = by_layer(params, model), bounded_sizes(model, attention)
    table, tokens = jnp.arange(model.vocab_size) < 4, jnp.arange(180).reshape(90, 2, 1) ** 2 % model.vocab_size

    def run(implementation):
        asked, layers = dataclasses.replace(attention, implementation=implementation), runner(graph, params)

        def step(cache, token):
            hidden, cache = cache.take_up(layers, token, jnp.ones(2, jnp.int32), table, asked)
            cache = cache.compact()
            return cache, (hidden, *((part.kept_at, part.scores) for part in cache.parts if part.sizes.watch))

        cache = empty_cache(model, 2, sizes)
        return jax.jit(lambda cache: jax.lax.scan(step, cache, tokens))(cache)[1]

    expected = run("xla")
    assert not calls
    got = run(None)
    assert sorted(map(str, calls)) == asked_for
    assert all(len(np.unique(kept)) > 12 for kept, _ in expected[1:]), "tokens come and go"
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


@pytest.mark.parametrize("cache_dtype", ["model", pytest.param("int8", marks=pytest.mark.soak)])
def test_growing_caches(cache_dtype, calls):
    graph, params = random_split(MODEL, SEPARATOR)
    cache = SeparatorCache.create(MODEL, 2, window_size=20, capacity=44, cache_dtype=cache_dtype)
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
