"""Generation with weights and cache split over a mesh: the same tokens as on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig, MeshConfig, ModelConfig
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.cache.stored import quantised
from sepjax.generation.device_loop import Request, make_advance, start
from sepjax.generation.sampling import Sampling
from sepjax.model.attend import forward
from sepjax.model.transformer import abstract, merge
from sepjax.model.unrolled import by_layer
from sepjax.sharding import make_mesh, parameter_shardings
from tests.attention.common import equations
from tests.models import random_split

MODEL = ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=8, num_kv_heads=2, head_dim=8, mlp_dim=64)
ATTENTION = AttentionConfig(num_sinks=2, window_size=8, implementation="reference")  # which compiles quickest
ROWS, LENGTH, NEW = 4, 32, 12


def answers(mesh, laid_out=lambda params: params):
    """New tokens, and the shape [L, B, K, C, H] of a device's part of the cached keys."""
    graph, params = random_split(MODEL, ATTENTION, scale=20)  # so that no two tokens are nearly as likely
    rng = np.random.default_rng(0)
    request = Request(jnp.arange(64) % 7 == 0, Sampling.create(), jnp.full(1, -1), jnp.int32(NEW))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, parameter_shardings(params, mesh))
        tokens, lengths = rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32), np.array([32, 9, 20, 1], np.int32)
        keys = jax.random.split(jax.random.key(1), ROWS)
        state, first = start(graph, params, tokens, lengths, keys, request, ATTENTION, window_size=8, capacity=64)
        state, rest = make_advance(graph, ATTENTION, NEW)(laid_out(params), state, np.zeros(ROWS, bool), request)
    keys = state.cache.k
    return np.concatenate([first.token, rest.token], axis=1), keys.sharding.shard_shape(keys.shape)


@pytest.fixture(scope="module")
def alone():
    return answers(make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))[0]


# Where each device's heads and rows lie is below, without compiling; tokens on a mesh are in generation/test_stream.py.
@pytest.mark.soak
def test_fewer_key_heads_than_devices_and_rows_over_data(alone):
    """Two key heads on four devices: each keeps both in its cache, and computes two of the eight query heads."""
    tokens, part = answers(make_mesh(MeshConfig(2, 1, 4, 1)))
    np.testing.assert_array_equal(tokens, alone)
    assert len({tuple(row) for row in tokens}) == ROWS, "every row has something else to say"
    assert part == (2, ROWS // 2, 2, 72, 8), "rows are split, key heads are not"


def test_layers_of_their_own_lie_as_in_their_stack():
    """What `sepjax.generate` steps with: each layer's matrices apart, split as in their stack, none of them joined."""
    mesh, (_, params) = make_mesh(MeshConfig(1, 2, 2, 1), jax.devices()[:4]), random_split(MODEL, ATTENTION)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, parameter_shardings(params, mesh))
        layers = by_layer(params, MODEL)["layers"]
    assert len(layers) == MODEL.num_layers
    for layer in layers:
        jax.tree.map(
            lambda x, y: np.testing.assert_equal(x.sharding.shard_shape(x.shape), y.sharding.shard_shape(y.shape)[1:]),
            layer,
            params["layers"],
        )


@pytest.mark.soak  # how they lie is above; tokens of a stream over them are in generation/test_stream.py
def test_layers_of_their_own_and_key_heads_on_a_mesh(alone):
    tokens, part = answers(make_mesh(MeshConfig(1, 2, 2, 1), jax.devices()[:4]), lambda x: by_layer(x, MODEL))
    np.testing.assert_array_equal(tokens, alone)
    assert part == (2, ROWS // 2, 1, 72, 8), "rows and key heads are split"


def test_whatever_writes_to_a_growing_cache_says_how_it_lies():
    """Else the compiler chooses, and may hold every row and head on every device. Programs are traced, not compiled."""
    sizes = {"window_size": 8, "capacity": 16}
    mesh, new = make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4]), jnp.zeros((2, ROWS, 3, 2, 8))
    flags, counts = jnp.zeros((ROWS, 3), bool), jnp.full(ROWS, 3, jnp.int32)
    active = np.ones(ROWS, bool)
    empty = SeparatorCache.create(MODEL, ROWS, **sizes)
    programs = {
        "a prompt": lambda _, new: SeparatorCache.from_prompt(new, new, flags, counts, **sizes),
        "a token": lambda cache, new: cache.append(new[:, :, 0], new[:, :, 0], flags[:, 0], active),
        "a run": lambda cache, new: cache.append_run(new, new, flags, counts),
    }
    with jax.set_mesh(mesh):
        for name, program in programs.items():
            found = [
                x
                for x in equations(jax.make_jaxpr(program)(empty, new).jaxpr)
                if x.primitive.name == "sharding_constraint"
            ]
            parts = [x.params["sharding"].shard_shape(x.outvars[0].aval.shape) for x in found]
            assert parts == [(2, ROWS // 2, 1, 24, 8)] * 2, name


def test_a_bounded_cache_lies_by_its_heads_from_the_beginning_on():
    """And does so whatever is taken up, by one token or by several, in every layer's array or in one of all."""
    attention = dataclasses.replace(ATTENTION, cache_size=24, max_separators=8, cache_dtype="int8")
    sizes = StreamSizes.create(MODEL, attention)

    def taken_up(is_apart, length):
        new, flags = quantised(jnp.zeros((2, ROWS, length, 2, 8))), jnp.zeros((ROWS, length), bool)
        cache = StreamingCache.create(MODEL, ROWS, sizes, by_layer=is_apart)
        return jax.tree.leaves(cache.append(new, new, flags, jnp.ones(ROWS, jnp.int32)).entries)

    for is_apart, length in ((True, 1), (False, 3)):
        with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])):
            traced = jax.make_jaxpr(taken_up, static_argnums=(0, 1))(is_apart, length)
        found = [x for x in equations(traced.jaxpr) if x.primitive.name == "sharding_constraint"]
        assert len(found) == 2 * len(traced.out_avals), "as it is made, and when tokens are taken up"
        for x in found:
            shape = x.outvars[0].aval.shape
            parts = x.params["sharding"].shard_shape(shape)
            halved = [i for i, (n, part) in enumerate(zip(shape, parts, strict=True)) if n != part]
            assert halved == [1 if is_apart else 2], "split by heads, and by nothing else"


def test_every_device_computes_its_own_query_heads(monkeypatch):
    """Also where there are fewer key heads than devices: one of 8 query heads each, with the key head that it sees."""
    seen = []

    def record(q, k, v, layout, **settings):
        seen.append((q.shape, k.shape))
        return q

    monkeypatch.setattr("sepjax.model.attend.separator_attention", record)
    mesh = make_mesh(MeshConfig(1, 1, 8, 1))
    graph, shapes = abstract(dataclasses.replace(MODEL, scan_layers=True), ATTENTION)
    batch = jnp.zeros((ROWS, LENGTH), jnp.int32)
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda p: forward(merge(graph, p), batch, batch, batch > 0, attention=ATTENTION)[0], shapes)
    assert set(seen) == {((ROWS, LENGTH, 1, 8), (ROWS, LENGTH, 1, 8))}
