"""Models laid out for single steps against the models themselves."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sepjax.config import AttentionConfig
from sepjax.model import few_rows, unrolled
from sepjax.model.layers import make_norm
from sepjax.model.transformer import Transformer
from sepjax.model.unrolled import Layerwise, by_layer, runner, working_copy
from tests.generation.cache.test_growing_pass import FALCON, GPT2, LLAMA, MIXED, NEOX, model_of
from tests.models import random_split

MODELS = {"llama": LLAMA, "neox": NEOX, "gpt2": GPT2, "falcon": FALCON, "layers of every kind": MIXED}
TOKENS = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (2, 5), dtype=np.int32)


@functools.partial(jax.jit, static_argnums=(0, 2))
def run(graph, params, length=5):
    """Scores, and what an attention that shifts values by its layer's input returns of every layer."""
    model = runner(graph, params)

    def attend(q, k, v, layer):
        shift, _ = layer
        mixed = jnp.cumsum(v, axis=1) + shift + 0.1 * jnp.mean(k, axis=1, keepdims=True)
        return q + jnp.repeat(mixed, q.shape[2] // v.shape[2], axis=2), (k, v)

    tokens = TOKENS if length > 1 else TOKENS[:1, :1]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    hidden, outputs = model(tokens, positions, attend, (jnp.arange(3.0), jnp.zeros(3)))
    return model.logits(hidden), outputs


def ways():
    """Of every model, how its matrices lie and how many tokens a row has: of one row of one, products are sums."""
    few = [("neox", True, 1), ("layers of every kind", True, 5), ("layers of every kind", False, 5), ("gpt2", False, 5)]
    every = [(name, *way) for name in MODELS for way in ((False, 5), (True, 5), (True, 1))]
    return [pytest.param(*x, marks=[] if x in few else pytest.mark.soak) for x in every]


@pytest.mark.parametrize(("name", "by_output", "length"), ways())
def test_the_same_results_as_the_model(name, by_output, length):
    graph, params = model_of(MODELS[name])
    laid_out = by_layer(params, MODELS[name], by_output=by_output)
    assert isinstance(runner(graph, laid_out), Layerwise)
    assert isinstance(runner(graph, params), Transformer)
    expected, got = run(graph, params, length), run(graph, laid_out, length)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert x.shape == y.shape
        # Sums of at most F terms, five a layer, relative to the largest.
        roundings = ((5 * 3 + 1) * LLAMA.mlp_dim) ** 0.5
        assert np.abs(x - y).max() <= roundings * np.finfo(np.float32).eps * np.abs(x).max()


# One with biases, which stay in float32; the rest with -m soak.
@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x == "neox" else pytest.mark.soak) for x in MODELS])
def test_converted_once_is_converted_in_every_step(name):
    config = dataclasses.replace(MODELS[name], dtype="bfloat16")
    graph, params = random_split(config, None, seed=2)
    random = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(x + 0.01 * random.standard_normal(x.shape, np.float32)), params)
    copy = working_copy(params, config)
    jax.tree.map(np.testing.assert_array_equal, run(graph, params), run(graph, copy))
    dtypes = {str(x.dtype) for x in jax.tree.leaves(copy["layers"]["attention"])}
    assert dtypes == ({"bfloat16", "float32"} if config.attention_bias or config.qkv_bias else {"bfloat16"})
    assert {str(x.dtype) for x in jax.tree.leaves(copy["final_norm"])} == {"float32"}


def test_nothing_is_copied_where_nothing_is_converted():
    _, params = model_of(LLAMA)
    assert working_copy(params, LLAMA) is params


@pytest.mark.parametrize("most", [few_rows.MOST_WITH_NORM, 0], ids=["its squares in each sum", "a kernel of their own"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_norm_whose_division_comes_after_the_sums_is_the_norm(most, dtype, monkeypatch):
    """Of features so large that float16 has no room for them times the norm's weights."""
    monkeypatch.setattr(few_rows, "MOST_WITH_NORM", most)
    random, config = np.random.default_rng(3), dataclasses.replace(LLAMA, dtype=dtype)
    norm: Any = make_norm(config, nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(random.uniform(20, 60, config.embed_dim), jnp.float32)
    shapes = (3, 1, config.embed_dim), (48, config.embed_dim)
    x, matrix = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    x *= 5000
    got = np.concatenate([np.asarray(y, np.float64) for y in few_rows.products(x, matrix, norm, 2)], axis=-1)[:, 0]
    wide, weights = np.asarray(x[:, 0], np.float64), np.asarray(matrix, np.float64).T
    normed = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + config.norm_epsilon)
    normed *= np.asarray(norm.scale[...], np.float64)
    # Each feature and each sum is rounded once.
    assert (np.abs(got - normed @ weights) <= float(jnp.finfo(dtype).eps) * (np.abs(normed) @ np.abs(weights))).all()


def test_layers_are_laid_out_in_the_memory_of_one_copy_and_one_of_their_matrices(monkeypatch):
    """Of a model that is given up: what is laid out is the same, bit for bit."""
    _, params = random_split(dataclasses.replace(LLAMA, num_layers=8), AttentionConfig(), 5)
    expected = by_layer(params, dataclasses.replace(LLAMA, num_layers=8), by_output=True)
    leaves = jax.tree.leaves(params["layers"])
    whole, largest = sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves)
    before, most = sum(x.nbytes for x in jax.live_arrays()) - whole, 0
    lay = unrolled._laid_out

    def spy(*arguments, **settings):
        nonlocal most
        found = lay(*arguments, **settings)
        most = max(most, sum(x.nbytes for x in jax.live_arrays()) - before)
        return found

    def cut(*arguments, original=unrolled._part):
        nonlocal most
        found = original(*arguments)
        most = max(most, sum(x.nbytes for x in jax.live_arrays()) - before)
        return found

    monkeypatch.setattr(unrolled, "_laid_out", spy)
    monkeypatch.setattr(unrolled, "_part", cut)
    got = by_layer(params, dataclasses.replace(LLAMA, num_layers=8), by_output=True, consume=True)
    assert whole < most <= whole + max(largest, whole / 8) * 1.01, "a layer, or a kind of matrix, is there twice"
    assert all(x.is_deleted() for x in leaves)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert np.array_equal(x, y)
