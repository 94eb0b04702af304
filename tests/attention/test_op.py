"""One suite for every implementation that runs on any device, against a brute force in float64 NumPy (common.py)."""

import functools
import importlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.attention import reference, separator_attention
from sepjax.attention.op import choose
from sepjax.layout import build_layout
from tests.attention.common import (
    assert_errs_at_most_twice_as_much,
    brute_force,
    check,
    check_scaled,
    equations,
    examples,
    largest_terms,
    layouts,
    results,
    scaled_results,
    tensors,
)

IMPLEMENTATIONS = ("reference", "xla")
OPS = {name: functools.partial(separator_attention, implementation=name, return_lse=True) for name in IMPLEMENTATIONS}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_kernel = pytest.mark.parametrize("op", [OPS[name] for name in IMPLEMENTATIONS[1:]], ids=IMPLEMENTATIONS[1:])

# (B, T, N, K, H). Blocks are of 64 queries: one token; two blocks, grouped heads; three blocks, one key head.
ONE_TOKEN, GROUPED, MULTI_QUERY = (2, 1, 2, 2, 8), (2, 70, 4, 2, 8), (1, 150, 3, 1, 16)


# One key head with -m soak: more than one query head has the same key head in the group, too.
SHAPES = {"T = 1": ONE_TOKEN, "grouped": GROUPED, "multi-query": MULTI_QUERY}


@every_op
@pytest.mark.parametrize(
    "shape", [pytest.param(x, id=k, marks=[pytest.mark.soak] if k == "multi-query" else []) for k, x in SHAPES.items()]
)
@examples(12)
@given(data=st.data())
def test_equals_the_definition(op, shape, data):
    inputs, layout = tensors(shape), data.draw(layouts(shape))
    check(results(op, *inputs, layout), inputs, layout.as_mask())


B, T = GROUPED[:2]
SPARSE = np.random.default_rng(0).random((B, T)) < 0.15
NONE, ALL = np.zeros((B, T), bool), np.ones((B, T), bool)
LEFT_PADDING = np.repeat([[0, 1], [1, 1]], [9, T - 9], axis=1).astype(np.int32)
DOCUMENTS = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [20, 1, 40, T - 61], axis=1).astype(np.int32)
EDGE_CASES = {
    "n = 1": (SPARSE, 1, 2, None),
    "n = T": (SPARSE, T, 2, None),
    "n above T": (SPARSE, 2**40, 2, None),
    "n = a block": (SPARSE, 64, 2, None),
    "n = a block and one": (SPARSE, 65, 2, None),
    "a = 0": (SPARSE, 5, 0, None),
    "a = T": (SPARSE, 5, T, None),
    "a above T": (SPARSE, 5, 2**40, None),
    "no separators": (NONE, 5, 3, None),
    "neither separators nor sinks": (NONE, 5, 0, None),
    "only separators": (ALL, 5, 0, None),
    "a separator among the sinks": (np.arange(T) % 30 == 1, 5, 3, None),
    "left padding": (SPARSE, 5, 2, LEFT_PADDING),
    "several documents and padding": (SPARSE, 5, 2, DOCUMENTS),
    "only padding": (ALL, 5, 2, np.zeros((B, T), np.int32)),
}


@every_op
@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_case(op, case):
    is_separator, n, a, segment_ids = EDGE_CASES[case]
    is_separator = np.broadcast_to(is_separator, (B, T))
    layout = build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=segment_ids)
    inputs = tensors(GROUPED)
    check(results(op, *inputs, layout), inputs, layout.as_mask())


def sparse_layout(**settings):
    return build_layout(SPARSE, **{"window_size": 5, "num_sinks": 2, "segment_ids": DOCUMENTS} | settings)


@every_kernel
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(jnp.bfloat16, id="bfloat16"), pytest.param(jnp.float16, id="float16", marks=pytest.mark.soak)],
)  # float16 takes the same way with more digits
def test_half_precision(op, dtype):
    inputs, layout = tensors(GROUPED, dtype), sparse_layout()
    plain = functools.partial(reference.attend, scale=GROUPED[-1] ** -0.5, dtype=dtype)
    got = results(op, *inputs, layout)
    assert [x.dtype for x in got] == [dtype, jnp.float32, dtype, dtype, dtype]
    exact = brute_force(*inputs, layout.as_mask())
    assert_errs_at_most_twice_as_much(got, results(plain, *inputs, layout), exact, largest_terms(*inputs), dtype)


@every_op
def test_far_values_are_scaled_and_near_ones_are_not(op):
    layout = sparse_layout()
    check_scaled(op, tensors(GROUPED), layout)
    q, k, v, d_out, d_lse = tensors(GROUPED)
    got = scaled_results(op, q, k, v, d_out, d_lse, layout, jnp.ones((B, T)))
    for x, y in zip(got, results(op, q, k, v, d_out, d_lse, layout), strict=False):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg="a factor of 1 changes nothing")


@pytest.mark.soak  # half precision, scaled values and little room: each is above or below
def test_far_values_scaled_in_half_precision_without_room():
    @jax.jit
    def tight(is_separator, *inputs):
        layout = build_layout(is_separator, window_size=5, num_sinks=2, segment_ids=DOCUMENTS, capacity=7)
        return OPS["xla"](*inputs[:3], layout, far_scale=inputs[3])

    def op(q, k, v, layout, far_scale):
        return tight(SPARSE, q, k, v, far_scale)

    plain = functools.partial(reference.attend, scale=GROUPED[-1] ** -0.5, dtype=jnp.bfloat16)
    check_scaled(op, tensors(GROUPED, jnp.bfloat16), sparse_layout(), plain)


@every_op
def test_large_scores(op):
    q, k, *rest = tensors(GROUPED)
    inputs, layout = (100 * q, 100 * k, *rest), sparse_layout()
    check(results(op, *inputs, layout), inputs, layout.as_mask())


@every_op
def test_scale(op):
    """A single token's lse is its only score."""
    q, k, v, *_ = tensors(ONE_TOKEN)
    _, lse = op(q, k, v, build_layout(np.zeros((2, 1), bool), window_size=1, num_sinks=0), scale=3.0)
    np.testing.assert_allclose(lse, 3 * jnp.sum(q * k, axis=-1), rtol=1e-6)


def test_lse_is_asked_for():
    q, k, v, *_ = tensors(GROUPED)
    out = separator_attention(q, k, v, sparse_layout())
    np.testing.assert_array_equal(out, separator_attention(q, k, v, sparse_layout(), return_lse=True)[0])


@every_op
def test_same_input_same_bits(op):
    inputs, layout = tensors(GROUPED), sparse_layout()
    first, second = (results(op, *inputs, layout) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@every_op
def test_gradients_reach_the_visible_keys_and_no_others(op):
    """Causality, and the whole mask: dv of one output is nonzero exactly where its query looks."""
    q, k, v, d_out, d_lse = tensors(GROUPED)
    layout = sparse_layout()
    mask = np.asarray(layout.as_mask())
    for i in range(T):
        one = jnp.zeros_like(d_out).at[:, i].set(1.0)
        *_, dq, dk, dv = results(op, q, k, v, one, jnp.zeros_like(d_lse), layout)
        np.testing.assert_array_equal(np.asarray(dv).any((2, 3)), mask[:, i])
        assert not np.asarray(dk)[~mask[:, i]].any()
        assert not np.asarray(dq)[:, np.arange(T) != i].any()


@every_op
def test_other_documents_and_later_tokens_change_no_bit(op):
    """What a query cannot see is worth exactly nothing."""
    q, k, v, *_ = tensors(GROUPED)
    noise = [10 * x for x in tensors(GROUPED, seed=1)[:3]]
    layout = sparse_layout()
    inside = (np.arange(T) >= 21) & (np.arange(T) < 50)  # the first part of the third document of row 0
    mixed = [jnp.where(inside[:, None, None], x, y) for x, y in zip((q, k, v), noise, strict=True)]
    before, after = op(q, k, v, layout), op(*mixed, layout)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[0, inside], np.asarray(y)[0, inside])


@every_op
def test_a_document_is_the_same_alone_and_packed(op):
    inputs, layout = tensors(GROUPED), sparse_layout()
    part = (slice(0, 1), slice(21, 61))
    alone = results(op, *(x[part] for x in inputs), build_layout(SPARSE[part], window_size=5, num_sinks=2))
    packed = [x[part] for x in results(op, *inputs, layout)]
    for one in (alone, packed):
        check(one, inputs, layout.as_mask(), part)


@every_kernel
def test_windows_that_differ_between_scanned_and_rematerialised_layers(op):
    q, k, v, d_out, _ = tensors(GROUPED)
    windows, layout = (3, T, 17), sparse_layout()

    def layer(op, x, layout):
        return x + op(x, k, v, layout)[0]

    def scanned(x):
        body = jax.checkpoint(lambda x, n: (layer(op, x, layout.with_window(n)), None))
        return jax.lax.scan(body, x, jnp.asarray(windows))[0]

    def unrolled(x):
        return functools.reduce(lambda x, n: layer(OPS["reference"], x, sparse_layout(window_size=n)), windows, x)

    def value_and_gradient(f):
        out, vjp = jax.vjp(f, q)
        return out, *vjp(d_out)

    got, expected = (jax.jit(functools.partial(value_and_gradient, f))() for f in (scanned, unrolled))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@every_kernel
def test_too_little_room_for_the_separators_is_exact_under_jit(op):
    inputs = tensors(GROUPED)

    @jax.jit
    def run(is_separator, *inputs):
        layout = build_layout(is_separator, window_size=5, num_sinks=0, capacity=5)
        return results(op, *inputs, layout), layout.overflows()

    for is_separator, overflows in ((SPARSE, True), (SPARSE & (SPARSE.cumsum(1) <= 5), False)):
        got, overflowed = run(is_separator, *inputs)
        assert bool(overflowed) == overflows
        check(got, inputs, build_layout(is_separator, window_size=5, num_sinks=0).as_mask())


@every_kernel
@pytest.mark.soak  # too little room is above, no far key at all among the edge cases
def test_no_room_and_no_global_keys(op):
    inputs = tensors(GROUPED)
    layout = build_layout(NONE, window_size=5, num_sinks=0, capacity=0)
    check(results(op, *inputs, layout), inputs, layout.as_mask())


@every_kernel
def test_nothing_of_quadratic_size_is_ever_computed(op):
    shape = (1, 1024, 2, 1, 8)
    inputs = tensors(shape)
    layout = build_layout(np.zeros((1, 1024), bool), window_size=64, num_sinks=4)

    def largest(op):
        program = jax.make_jaxpr(functools.partial(results, op))(*inputs, layout).jaxpr
        return max(x.aval.size for equation in equations(program) for x in equation.outvars)

    assert largest(OPS["reference"]) >= 1024**2, "the measure itself: the definition does build [T, T]"
    assert largest(op) <= 1.1 * inputs[0].size, "q, with the room that the last block and tile need"


@every_kernel
def test_compiled_memory_has_no_room_for_a_square(op):
    T = 4096
    inputs = jax.eval_shape(lambda: tensors((1, T, 2, 1, 8)))
    layout = jax.eval_shape(lambda: build_layout(jnp.zeros((1, T), bool), window_size=64, num_sinks=4))
    memory = results.lower(op, *inputs, layout).compile().memory_analysis()
    assert memory.temp_size_in_bytes < T * T, "not even a bool[T, T]"


needs_four_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices; tests/conftest.py makes them")


@pytest.fixture
def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto, devices=jax.devices()[:4])


@needs_four_devices
@pytest.mark.parametrize(
    ("manual", "K"),
    [
        pytest.param(manual, K, id=f"{name}-{K}", marks=[] if manual and K == 2 else pytest.mark.soak)
        for manual, name in ((False, "jit"), (True, "shard_map"))
        for K in (2, 1)
    ],
)
def test_rows_and_heads_on_several_devices(mesh, K, manual):
    heads = "tensor" if K > 1 else None  # a key head that all query heads share is on every device
    specs = [jax.P("data", None, x) for x in ("tensor", heads, heads, "tensor", "tensor")]
    inputs, layout = tensors((2, 70, 4, K, 8)), sparse_layout()

    def op(q, k, v, layout):
        if not manual:
            return OPS["xla"](q, k, v, layout)
        in_specs, out_specs = (*specs[:3], jax.P("data")), tuple(specs[3:])
        return jax.shard_map(OPS["xla"], mesh=mesh, in_specs=in_specs, out_specs=out_specs)(q, k, v, layout)

    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs, strict=True)]
    rows = jax.device_put(layout, jax.NamedSharding(mesh, jax.P("data")))
    check(results(op, *placed, rows), inputs, layout.as_mask())


@pytest.fixture
def unchecked(monkeypatch):
    """Calls as users make them, without the type checker of the tests, which would refuse bad shapes first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, 70, 32), (2, 70, 2, 8), (2, 70, 2, 8), r"expected q\[B, T, N, H\].*got q\[2, 70, 32\]"),
        ((2, 70, 4, 8), (2, 70, 2, 8), (2, 70, 1, 8), r"expected q.*v\[2, 70, 1, 8\]"),
        (
            (2, 70, 4, 8),
            (2, 71, 2, 8),
            (2, 71, 2, 8),
            r"q\[2, 70, 4, 8\] and k\[2, 71, 2, 8\] must agree in B, T and H",
        ),
        ((2, 70, 4, 8), (2, 70, 2, 9), (2, 70, 2, 9), "must agree in B, T and H"),
        ((2, 70, 4, 8), (2, 70, 3, 8), (2, 70, 3, 8), "N=4 heads, k has K=3; N must be a multiple of K"),
        ((1, 70, 4, 8), (1, 70, 2, 8), (1, 70, 2, 8), r"layout is for \[B, T\] = \[2, 70\] but q is \[1, 70, 4, 8\]"),
    ],
)
def test_shapes_that_disagree(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        separator_attention(jnp.zeros(q), jnp.zeros(k), jnp.zeros(v), sparse_layout())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("far_scale", [jnp.ones((2, 69)), jnp.ones((2, 70), jnp.bfloat16)])
def test_far_scale_must_fit(far_scale):
    q, k, v, *_ = tensors(GROUPED)
    with pytest.raises(ValueError, match=r"far_scale must be float32\[B, T\] = \[2, 70\], got"):
        separator_attention(q, k, v, sparse_layout(), far_scale=far_scale)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("int32", "int32")])
def test_dtypes_that_do_not_fit(dtypes):
    q, k = (jnp.zeros((2, 70, 2, 8), dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=f"one dtype of float32, bfloat16, float16, got {dtypes[0]}, {dtypes[1]}"):
        separator_attention(q, k, k, sparse_layout())


def test_a_named_implementation_never_falls_back():
    q, k, v, *_ = tensors(GROUPED)
    with pytest.raises(ValueError, match="implementation='cudnn' is unknown; expected None or one of mosaic_gpu, tpu"):
        separator_attention(q, k, v, sparse_layout(), implementation="cudnn")
    for name, needs in (("mosaic_gpu", "an NVIDIA Hopper GPU"), ("tpu", "a TPU")):
        reason = f"'{name}' cannot serve this call: it needs {needs}.*the device is cpu.*use None .*or 'xla'"
        with pytest.raises(NotImplementedError, match=reason):
            separator_attention(q, k, v, sparse_layout(), implementation=name)


@pytest.mark.parametrize("name", ["mosaic_gpu", "tpu", "xla", "reference"])
def test_every_implementation_serves_parts_of_rows(name, monkeypatch):
    """What the mesh axis `context` needs of whatever is chosen."""
    module = importlib.import_module(f"sepjax.attention.{name}")
    monkeypatch.setattr(module, "unsupported", lambda q: None)
    q, *_ = tensors(GROUPED)
    assert choose(name, q) is module
    assert callable(choose(name, q).attend_ranges)
