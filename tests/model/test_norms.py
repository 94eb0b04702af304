"""A norm whose input goes on beside it, with the kernel for what comes back simulated on a CPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sepjax.attention import mosaic_gpu_norm_kernels as kernels
from sepjax.attention.target import Target
from sepjax.config import ModelConfig
from sepjax.model import layers, norms
from tests.attention.simulator import assert_no_races, simulate

CONFIG = ModelConfig(embed_dim=192, dtype="bfloat16", norm_epsilon=1e-3)


def norm_of(config, seed):
    norm = layers.make_norm(config, nnx.Rngs(0))
    weights = np.random.default_rng(seed).normal(size=config.embed_dim) / 2
    assert norm.scale is not None
    norm.scale[...] = jnp.asarray(weights, jnp.float32)
    return norm


def both_ways(op, norm, x, *gradients):
    """What an op gives, and the gradients of its input and of the norm's weights."""
    graph, state = nnx.split(norm)
    given, back = jax.vjp(lambda state, x: op(nnx.merge(graph, state), x), state, x)
    weights, dx = back(gradients)
    return *given, dx, weights["scale"][...]


def exact(norm, x, g, more):
    """The same in float64."""
    w = np.asarray(norm.scale[...], np.float64) + isinstance(norm, layers.OffsetNorm)
    x, g, more = (np.asarray(y, np.float64) for y in (x, g, more))
    r = (np.mean(x * x, axis=-1, keepdims=True) + norm.epsilon) ** -0.5
    dx = r * g * w - x * r**3 * np.mean(g * w * x, axis=-1, keepdims=True) + more
    return x * r * w, x, dx, np.sum(g * x * r, axis=(0, 1))


def plain(norm, x):
    return norm(x), x


@pytest.mark.parametrize("offset", [False, pytest.param(True, marks=pytest.mark.soak)])  # the factor is 1 + weights
def test_the_kernel_errs_no_more_than_twice_as_much_as_xla(monkeypatch, offset):
    """Against float64; five tiles of rows on two simulated SMs, whose tiles are refilled."""
    simulate(monkeypatch)
    gradients: Any = kernels.gradients
    monkeypatch.setattr(kernels, "gradients", lambda *args: gradients(*args[:-1], 2))  # SMs
    norm = norm_of(dataclasses.replace(CONFIG, norm_offset=offset), 1)
    random = np.random.default_rng(2)
    x, g, more = (jnp.asarray(random.normal(size=(5, 64, 192)) * s, jnp.bfloat16) for s in (3, 1, 0.1))
    want = exact(norm, x, g, more)
    got, usual = both_ways(norms.beside, norm, x, g, more), both_ways(plain, norm, x, g, more)
    assert_no_races()
    for ours, theirs, right in zip(got, usual, want, strict=True):
        assert ours.dtype == theirs.dtype
        errs, may = (np.abs(np.asarray(y, np.float64) - right).max() for y in (ours, theirs))
        assert errs <= 2 * may
    jitted: Any = norms._gradients
    jitted.clear_cache()  # compiled programs of this test are of no use to others


def test_who_is_served(monkeypatch):
    hopper = functools.partial(Target, "gpu", "NVIDIA H200", 132)
    bf16, served = jnp.zeros((2, 64, 576), jnp.bfloat16), norm_of(dataclasses.replace(CONFIG, embed_dim=576), 1)
    assert not norms.serves(served, bf16), "a CPU has no such kernel"
    monkeypatch.setattr(norms, "target", lambda: hopper("9.0"))
    assert norms.serves(served, bf16)
    for x, why in (
        (bf16.astype(jnp.float32), "float32"),
        (bf16[:, :5], "rows in 64s"),
        (jnp.zeros((64, 768), jnp.bfloat16), "576 features"),
        (jnp.zeros((64, 200), jnp.bfloat16), "576 features"),
    ):
        assert why in str(norms.unsupported(x, jnp.bfloat16))
    assert not norms.serves(layers.make_norm(dataclasses.replace(CONFIG, norm="layernorm"), nnx.Rngs(0)), bf16)
    assert not norms.serves(None, bf16)
    monkeypatch.setattr(norms, "target", lambda: hopper("8.0"))
    assert "Hopper" in str(norms.unsupported(bf16, jnp.bfloat16))
