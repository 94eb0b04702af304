"""The op for one example alone, and `jax.vmap` over examples: the bits of the batch, by one call of its kernel."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import linen, nnx

from sepjax.attention import dense_attention, separator_attention, tpu
from sepjax.layout import LayoutError, build_layout
from tests.attention.common import equations, results, tensors

SHAPE = (3, 70, 4, 2, 8)
FLAGS = np.random.default_rng(0).random(SHAPE[:2]) < 0.2
IDS = np.repeat([[1, 2, 0], [0, 1, 1], [1, 1, 1]], [30, 30, 10], axis=1).astype(np.int32)
build = functools.partial(build_layout, window_size=5, num_sinks=2)


def names(program):
    """How often each primitive runs, that of a rule not counted."""
    found = [equation.primitive.name for equation in equations(program.jaxpr)]
    return {name: found.count(name) for name in found if name in ("while", "scan", "cond", "pallas_call")}


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_examples_have_the_bits_of_their_batch(name):
    op = functools.partial(separator_attention, implementation=name, return_lse=True)
    q, k, v, d_out, d_lse = tensors(SHAPE)
    expected = results(op, q, k, v, d_out, d_lse, build(FLAGS, segment_ids=IDS))

    def example(q, k, v, is_separator, segment_ids):
        """With room for 9 global keys, of which some examples have more: under vmap too, exact for all."""
        return op(q, k, v, build(is_separator, segment_ids=segment_ids, capacity=9))

    def gradients_of_each(q, k, v, d_out, d_lse, *flags):
        outputs, vjp = jax.vjp(lambda *x: example(*x, *flags), q, k, v)
        return *outputs, *vjp((d_out, d_lse))

    @jax.jit
    def both(q, k, v, d_out, d_lse):
        outputs, vjp = jax.vjp(lambda *x: jax.vmap(example)(*x, FLAGS, IDS), q, k, v)
        return jax.vmap(gradients_of_each)(q, k, v, d_out, d_lse, FLAGS, IDS), (*outputs, *vjp((d_out, d_lse)))

    for got in both(q, k, v, d_out, d_lse):
        if name == "xla":
            jax.tree.map(np.testing.assert_array_equal, got, expected)
        else:  # whose sums XLA orders anew for every shape
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def test_vmap_adds_neither_loops_nor_branches():
    op = functools.partial(separator_attention, implementation="xla", return_lse=True)
    inputs = tensors(SHAPE)

    def batch(is_separator, *inputs):
        return results(op, *inputs, build(is_separator, capacity=9))

    expected = names(jax.make_jaxpr(batch)(FLAGS, *inputs))
    assert expected["cond"] == 2, "forward and backward each ask once whether there is room"
    of_batches = [x[:, None] for x in (FLAGS, *inputs)]
    for arrays in ((FLAGS, *inputs), of_batches):
        assert names(jax.make_jaxpr(jax.vmap(batch))(*arrays)) == expected


def test_examples_that_share_their_keys_add_their_gradients():
    q, k, v, d_out, d_lse = tensors(SHAPE)
    layout = build(FLAGS[0])
    op = functools.partial(separator_attention, implementation="xla", return_lse=True)

    @jax.jit
    def shared(q, k, v):
        outputs, vjp = jax.vjp(lambda *x: jax.vmap(op, in_axes=(0, None, None, None))(*x, layout), q, k, v)
        return *outputs, *vjp((d_out, d_lse))

    k, v = (jnp.broadcast_to(x[0], x.shape) for x in (k, v))
    *expected, dk, dv = results(op, q, k, v, d_out, d_lse, build(np.broadcast_to(FLAGS[0], FLAGS.shape)))
    got = shared(q, k[0], v[0])
    jax.tree.map(np.testing.assert_array_equal, got[:3], tuple(expected))
    for x, y in zip(got[3:], (dk.sum(0), dv.sum(0)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.soak  # the rule of vmap is one: of the XLA form above, of Hopper's in test_mosaic_gpu_interpret.py
def test_tpu_kernels_run_once_for_all_examples():
    """Outputs in plain interpretation; the Hopper kernels and gradients are in test_mosaic_gpu_interpret.py."""
    q, k, v, d_out, d_lse = tensors((2, 100, 2, 1, 64))
    layout = build(np.random.default_rng(0).random((2, 100)) < 0.2)
    op = functools.partial(tpu.attend, scale=0.125, interpret=True)
    example = jax.vmap(lambda q, k, v, layout: op(*(jax.tree.map(lambda x: x[None], y) for y in (q, k, v, layout))))

    def mapped(q, k, v, layout):
        return tuple(x[:, 0] for x in example(q, k, v, layout))

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    inputs = q, k, v, d_out, d_lse, layout
    jax.tree.map(close, *(jax.jit(f)(q, k, v, layout) for f in (mapped, op)))
    got, expected = (names(jax.make_jaxpr(functools.partial(results, f))(*inputs)) for f in (mapped, op))
    assert got["pallas_call"] == expected["pallas_call"] > 0


@pytest.mark.parametrize("with_ids", [False, True])
def test_dense_examples(with_ids):
    q, k, v, *_ = tensors(SHAPE)

    @jax.jit
    def both(q, k, v, *ids):
        return dense_attention(q, k, v, *ids), jax.vmap(dense_attention)(q, k, v, *ids)

    batch, mapped = both(q, k, v, *([IDS] if with_ids else []))
    np.testing.assert_allclose(mapped, batch, rtol=1e-5, atol=1e-5)


def test_a_layout_alone_is_a_row_of_the_batch_s():
    batch = build(FLAGS, segment_ids=IDS, capacity=30)
    alone = build(FLAGS[0], segment_ids=IDS[0], capacity=30)
    mapped = jax.vmap(lambda *x: build(x[0], segment_ids=x[1], capacity=30))(FLAGS, IDS)
    jax.tree.map(np.testing.assert_array_equal, mapped, batch)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), alone, batch)
    ways = {
        "as_mask": lambda x: x.as_mask(), "is_global": lambda x: x.is_global(), "num_pairs": lambda x: x.num_pairs(),
        "with_window": lambda x: x.with_window(3), "with_reach": lambda x: x.with_reach(9),
        "with_most_far": lambda x: x.with_most_far(2), "with_capacity": lambda x: x.with_capacity(4),
    }  # fmt: skip
    every = jax.jit(lambda x: {name: way(x) for name, way in ways.items()})
    of_batch = every(batch)
    for name, found in every(alone).items():
        compare = functools.partial(np.testing.assert_array_equal, err_msg=name)
        jax.tree.map(lambda x, y, compare=compare: compare(x, np.asarray(y)[0]), found, of_batch[name])
    row = jax.tree.map(lambda x: x[:1], batch)
    assert (alone.length, alone.capacity) == (70, 30)
    told = jax.jit(lambda x: (x.overflows(), x.attention_fraction(), x.kv_kept()))
    assert told(alone) == told(row)
    assert repr(alone) == "SeparatorLayout(T=70, room for 30 packed keys)"
    assert repr(batch) == "SeparatorLayout([3, 70], room for 30 packed keys)"


class Linen(linen.Module):
    """Attention of one example [T, D], in Flax's linen."""

    @linen.compact
    def __call__(self, x, layout):
        q, k, v = (linen.DenseGeneral((heads, 8), name=name)(x) for name, heads in (("q", 4), ("k", 2), ("v", 2)))
        return linen.DenseGeneral(x.shape[-1], axis=(-2, -1))(separator_attention(q, k, v, layout))


class NNX(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.q, self.k, self.v = (nnx.LinearGeneral(16, (heads, 8), rngs=rngs) for heads in (4, 2, 2))
        self.out = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs)

    def __call__(self, x, layout):
        return self.out(separator_attention(self.q(x), self.k(x), self.v(x), layout))


def drawn(shapes):
    """Random parameters: those of a module's own are a dozen programs."""
    draw = np.random.default_rng(2).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(0.3 * draw(x.shape), x.dtype), shapes)


def linen_model(x, layout):
    model = Linen()
    return drawn(jax.eval_shape(model.init, jax.random.key(0), x, layout)), model.apply


def nnx_model(x, layout):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: NNX(nnx.Rngs(0))))
    return drawn(shapes), lambda params, x, layout: nnx.merge(graph, params)(x, layout)


# With -m soak, NNX: the models of sepjax are of it, and so are their tests.
@pytest.mark.parametrize("make", [linen_model, pytest.param(nnx_model, marks=pytest.mark.soak)])
def test_in_a_module_per_example_and_per_batch(make):
    x, layout = np.random.default_rng(1).standard_normal((*SHAPE[:2], 16)).astype(np.float32), build(FLAGS)
    params, apply = make(x[0], jax.tree.map(lambda a: a[0], layout))

    def loss(params, apply):
        return jnp.sum(jnp.sin(apply(params, x, layout)))

    each = jax.vmap(apply, in_axes=(None, 0, 0))
    got, expected = (jax.jit(jax.grad(functools.partial(loss, apply=f)))(params) for f in (each, apply))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(got)[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_separator": np.zeros(4, np.int64)}, r"is_separator must be bool\[B, T\].*got int64\[4\]; flags.*table\["),
        ({"is_separator": [True, False]}, "got a list"),
        ({"segment_ids": np.ones(4, np.int64)}, r"segment_ids must be int32\[4\].*got int64\[4\].*np.int32\) makes"),
        ({"segment_ids": np.ones(4, bool)}, r"got bool\[4\]"),
        ({"segment_ids": [1, 1, 1, 1]}, "got a list"),
    ],
)
def test_wrong_types_of_flags_and_ids_are_named(arguments, message, monkeypatch):
    with pytest.raises(LayoutError, match=message):
        unchecked(monkeypatch, build_layout)(
            **{"is_separator": np.zeros(4, bool), "window_size": 2, "num_sinks": 1} | arguments
        )


@pytest.mark.parametrize(
    ("q", "layout", "message"),
    [
        (np.zeros((70, 4, 8), np.float64), None, "q, k and v must share one dtype.*got float64, float32, float32"),
        ([[1.0]], None, "q, k and v must be arrays of JAX or NumPy, but q is a list; use jnp.asarray"),
        (np.zeros((3, 70, 4, 8), np.float32), None, r"or all without B, got q\[3, 70, 4, 8\], k\[70, 2, 8\]"),
        (np.zeros((70, 4, 8), np.float32), np.ones((70, 70), bool), "what build_layout returns, got a ndarray"),
        (np.zeros((70, 4, 8), np.float32), "of a batch", r"layout is for \[B, T\] = \[3, 70\] but q is \[70, 4, 8\]"),
    ],
)
def test_wrong_types_of_queries_are_named(q, layout, message, monkeypatch):
    k = np.zeros((70, 2, 8), np.float32)
    layout = build(FLAGS[0]) if layout is None else build(FLAGS) if isinstance(layout, str) else layout
    with pytest.raises(LayoutError, match=message):
        unchecked(monkeypatch, separator_attention)(q, k, k, layout)


def unchecked(monkeypatch, f):
    """`f` as users call it, without the type checker of the tests, which would complain first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    return f
