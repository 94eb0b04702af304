"""The parts of a block against plain definitions: what is written for speed must compute the same, gradients too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sepjax.model.layers import Linear, _gelu
from sepjax.model.transformer import Embedding

GRID = np.linspace(-12, 12, 4001).astype(np.float32)


def gelu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In float64, of the values that x has."""
    x = x.astype(np.float64)
    cumulative = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    return x * cumulative, cumulative + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gelu_errs_no_more_than_one_rounding(dtype):
    """Half a unit in the last place for the result, and what float32 arithmetic brings: a few 2^-24 times |x| <= 12."""
    x = jnp.asarray(GRID, dtype)
    out, vjp = jax.vjp(_gelu, x)
    exact, slope = gelu_and_slope(np.asarray(x, np.float32))
    for got, want in ((out, exact), (vjp(jnp.ones_like(x))[0], slope)):
        assert got.dtype == dtype
        error = np.abs(np.asarray(got, np.float64) - want)
        rounding = np.abs(want) * float(jnp.finfo(dtype).eps) / 2 + float(jnp.finfo(dtype).smallest_subnormal) / 2
        assert (error <= rounding + 4e-6).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(12, (4, 2)), ((4, 3), 5), (12, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_flax(inputs, outputs, bias):
    axis = (-2, -1) if isinstance(inputs, tuple) else -1
    settings = {"axis": axis, "use_bias": bias, "bias_init": nnx.initializers.normal()}
    ours, flax = (kind(inputs, outputs, rngs=nnx.Rngs(0), **settings) for kind in (Linear, nnx.LinearGeneral))
    features = inputs if isinstance(inputs, tuple) else (inputs,)
    x = jax.random.normal(jax.random.key(1), (2, 7, *features))

    def run(module):
        graph, state = nnx.split(module)
        out, vjp = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return out, *jax.tree.leaves(vjp(jnp.cos(out)))

    got, want = run(ours), run(flax)
    assert len(got) == len(want) == 3 + bias
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums of at most 14 products near 1


def test_rows_add_up_their_gradients_in_float32():
    """In bfloat16 a sum of ones stops at 256."""
    embedding = Embedding(3, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, state = nnx.split(embedding)
    ids = jnp.ones((1, 1000), jnp.int32)
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(ids).astype(jnp.float32)))(state)
    np.testing.assert_array_equal(jax.tree.leaves(gradient)[0], [[0, 0], [1000, 1000], [0, 0]])
