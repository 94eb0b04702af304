"""The parts of a block against plain definitions: what is written for speed must compute the same, gradients too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sepjax.config import ModelConfig
from sepjax.model.layers import Linear, _gelu, make_norm, products_of
from sepjax.model.transformer import Embedding
from sepjax.training.plan import topology_devices

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


def of_module(module, x, call=lambda module, x: module(x)):
    """The result of a module and the gradients of its parameters and of x."""
    graph, state = nnx.split(module)
    out, vjp = jax.vjp(lambda state, x: call(nnx.merge(graph, state), x), state, x)
    return [out, *jax.tree.leaves(vjp(jnp.cos(out)))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_is_that_of_flax(dtype):
    config = ModelConfig(embed_dim=24, dtype=dtype)
    ours, flax = make_norm(config, nnx.Rngs(0)), nnx.RMSNorm(24, epsilon=1e-5, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    flax.scale[...] = ours.scale[...] = jax.random.normal(jax.random.key(1), (24,))
    x = 3 * jax.random.normal(jax.random.key(2), (2, 7, 24), jnp.dtype(dtype))
    for got, want in zip(of_module(ours, x), of_module(flax, x), strict=True):
        assert got.dtype == want.dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (got, want)), rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("norm_offset", [False, True])
def test_an_rms_norm_is_one_kernel_of_a_gpu(norm_offset):
    pytest.importorskip("jax_plugins.xla_cuda13", reason='compiling for a GPU needs pip install -e ".[compile]"')
    mesh = jax.sharding.Mesh(np.asarray(topology_devices("h100:1x1")), ("data",))
    placed = jax.NamedSharding(mesh, jax.P())
    graph, state = nnx.split(make_norm(ModelConfig(embed_dim=576, norm_offset=norm_offset), nnx.Rngs(0)))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), state)
    x = jax.ShapeDtypeStruct((512, 576), jnp.bfloat16, sharding=placed)
    text = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(args, x).compile().as_text()
    assert text[text.index("ENTRY") :].count(" fusion(") == 1


def test_maps_of_one_input_have_the_gradients_of_each():
    maps = nnx.List([Linear(12, size, rngs=nnx.Rngs(i), use_bias=False) for i, size in enumerate([5, (2, 4), 3])])
    x = jax.random.normal(jax.random.key(1), (2, 7, 12))

    def flat(ys):
        return jnp.concatenate([y.reshape(2, 7, -1) for y in ys], axis=-1)

    got = of_module(maps, x, lambda maps, x: flat(products_of(maps, x, "mlp")))
    want = of_module(maps, x, lambda maps, x: flat([f(x) for f in maps]))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums of at most 16 products near 1
