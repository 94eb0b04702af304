"""Greedy steps of one row in a loop of their own, against the steps of all rows: the same tokens, caches and records.

In the place of the kernel of all layers stands a function of all that it is told.
"""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention.target import Target
from sepjax.config import AttentionConfig, ModelConfig
from sepjax.generation import device_loop
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.device_loop import DecodeState, Request, advance
from sepjax.generation.lost import LOST
from sepjax.generation.sampling import Sampling
from sepjax.model import one_row
from sepjax.model.unrolled import by_layer
from tests.models import random_split

MODEL = ModelConfig(
    vocab_size=64, num_layers=2, embed_dim=64, num_heads=1, num_kv_heads=1, head_dim=64, mlp_dim=64, dtype="bfloat16"
)
PATTERNS = {
    "separators": AttentionConfig(num_sinks=2, max_separators=5, window_size=9, cache_size=23),
    "no separators, positions of the text": AttentionConfig(
        "sink_window", num_sinks=2, window_size=9, cache_size=23, stream_positions="absolute"
    ),
    "growing": AttentionConfig(num_sinks=2, window_size=20),
}
STEPS = 16


def in_place_of_the_kernel(shape, layers, x, told, k, v, *, in_place):
    cos, sin, bias, slot, norm = told
    seen, numbers = jnp.exp(bias), jnp.arange(shape.H)
    new = jnp.sin(x.astype(jnp.float32) * 7 + numbers + cos.sum() + 3 * sin.sum()).astype(k[0].dtype)

    def put(y, layer):
        if not in_place:
            return jnp.stack([new, new + 1])[:, None]
        if shape.stacked:
            return jax.lax.dynamic_update_slice(y, jnp.stack([new, new + 1])[:, None, None], (0, 0, slot[0], 0))
        return jax.lax.dynamic_update_slice(y, (new + layer)[None, None], (0, slot[0], 0))

    context = sum(jnp.einsum("...kch,c->h", y.astype(jnp.float32), seen) for y in (*k, *v))
    hidden = jnp.sin(context * 5 + new.astype(jnp.float32) * norm).astype(x.dtype)
    return hidden, tuple(map(put, k, range(len(k)))), tuple(map(put, v, range(len(v))))


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(one_row, "target", lambda: Target("gpu", "NVIDIA H100 80GB HBM3", 3, "9.0"))
    call = types.SimpleNamespace(run=in_place_of_the_kernel)
    monkeypatch.setitem(sys.modules, "sepjax.model.one_row.call", call)


class Both:
    """The same steps by both programs, one call after the other."""

    def __init__(self, attention, monkeypatch, steps=STEPS):
        graph, params = random_split(MODEL, attention, 1, scale=8)
        params = by_layer(params, MODEL, by_output=True)
        given = begun(attention), np.zeros(1, bool), request()
        lowered = [jax.jit(functools.partial(advance, graph, attention, steps, params)).lower(*given)]
        with monkeypatch.context() as patched:
            patched.setattr(device_loop, "numbers_of_one_row", lambda *_: None)
            lowered += [jax.jit(functools.partial(advance, graph, attention, steps, params)).lower(*given)]
        loops = [x.as_text().count("stablehlo.while") for x in lowered]
        assert loops[0] > loops[1], "loops of their own"
        self.programs, self.states = [x.compile() for x in lowered], [begun(attention)] * 2

    def run(self, request):
        """Tokens drawn, -1: none, and whether the row is stuck."""
        found = [f(state, np.zeros(1, bool), request) for f, state in zip(self.programs, self.states, strict=True)]
        self.states = [state for state, _ in found]
        keyless = [(dataclasses.replace(state, key=jax.random.key_data(state.key)), steps) for state, steps in found]
        # NumPy takes NaN of bfloat16 for different ones.
        keyless = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, keyless)
        jax.tree.map(np.testing.assert_array_equal, *keyless)
        return np.asarray(found[0][1].token)[0].tolist(), bool(found[0][1].is_stuck[0])

    def whole(self, request):
        tokens, is_stuck = self.run(request)
        assert not is_stuck
        assert min(tokens) >= 0
        return tokens

    def change(self, **new):
        self.states = [dataclasses.replace(x, **new) for x in self.states]


def begun(attention, **changes):
    if attention.cache_size:
        cache = StreamingCache.create(MODEL, 1, StreamSizes.create(MODEL, attention), by_layer=True)
    else:
        cache = SeparatorCache.create(MODEL, 1, window_size=20, capacity=108)
    state = DecodeState.create(cache, jax.random.split(jax.random.key(3), 1), MODEL.vocab_size)
    return dataclasses.replace(state, **changes)


def request(end=-1, most=-1, least=0, *, logprobs=False, **sampling):
    return jax.tree.map(
        jnp.asarray,
        Request(
            np.arange(64) < 12, Sampling.create(**sampling), np.array([-1, end], np.int32), np.int32(most),
            np.array(logprobs), np.array(False), np.int32(least),
        ),
    )  # fmt: skip


def with_nan(cache):
    return dataclasses.replace(cache, v=jax.tree.map(lambda x: x + jnp.nan, cache.v))


@pytest.mark.parametrize(
    "pattern", ["separators", "growing", pytest.param("no separators, positions of the text", marks=pytest.mark.soak)]
)
def test_the_same_as_steps_of_all_rows(served, monkeypatch, pattern):
    both, plain = Both(PATTERNS[pattern], monkeypatch), request()
    texts = [both.whole(plain) for _ in range(9)]  # past compactions, and where positions start again
    assert len({x for tokens in texts for x in tokens}) > 8, "a text that differs"
    both.whole(request(temperature=1.0))
    both.whole(
        request(temperature=0.7, top_k=9, top_p=0.9, least=10**6, logit_bias={3: 2.0}, presence_penalty=0.5, end=7)
    )
    both.whole(request(presence_penalty=0.5))
    both.whole(request(logprobs=True))
    count = both.states[0].count
    both.whole(request(least=count[0] + 5))  # greedy behind the first ones
    kept = [*both.states]
    tokens = both.whole(plain)
    both.states = [*kept]
    ended, _ = both.run(request(end=tokens[5]))
    assert -1 in ended[1:7]
    assert both.run(plain) == ([-1] * STEPS, False), "of a row that has ended nothing changes"
    both.states = [*kept]
    assert both.run(request(most=kept[0].count[0] + 3))[0][3:] == [-1] * (STEPS - 3)
    both.states = [*kept]
    both.change(count=jnp.full(1, device_loop.COUNT_WRAP - 3))
    both.whole(plain)
    for wanted in (plain, request(temperature=1.0)):
        both.states = [*kept]
        both.change(cache=with_nan(kept[0].cache))
        assert both.run(wanted)[0] == [LOST, *[-1] * (STEPS - 1)]


def test_a_step_a_call(served, monkeypatch):
    """Of a growing cache, which is full at last."""
    both = Both(PATTERNS["growing"], monkeypatch, steps=1)
    for wanted in (request(), request(temperature=1.0), request(logprobs=True)):
        for _ in range(10):
            both.whole(wanted)
    cache = both.states[0].cache
    both.change(cache=dataclasses.replace(cache, num_global=jnp.full(1, cache.capacity)))
    found = [both.run(request()) for _ in range(25)]
    assert any(is_stuck for _, is_stuck in found)
    assert found[-1] == ([-1], True), "as long as nobody makes room"
