"""The TPU kernels on a CPU: as plain JAX, and in Pallas' simulator of a TPU's memories.

The simulator raises for a race between the two cores of a chip and for reads out of bounds, and memory that nothing was
written to holds NaN; plain interpretation is fast. What the compiler for real TPUs says is in test_tpu_compile.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sepjax.attention import reference, tpu, tpu_calls
from sepjax.bench.attention import FLOPS_PER_PAIR
from sepjax.layout import build_layout
from tests.attention.common import (
    assert_errs_at_most_twice_as_much,
    brute_force,
    check_scaled,
    equations,
    examples,
    largest_terms,
    layouts,
    results,
    tensors,
)

SIMULATOR = pltpu.InterpretParams(
    detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def _attend(q, k, v, layout, far_scale=None, *, interpret):
    return tpu.attend(q, k, v, layout, far_scale, scale=q.shape[-1] ** -0.5, interpret=interpret)


PLAIN = functools.partial(_attend, interpret=True)
SIMULATED = functools.partial(_attend, interpret=SIMULATOR)

# (B, T, N, K, H). Blocks are of 256 queries, of 128 up to T = 128: one token, a key head each; two blocks of one group
# of heads, which most tests are of; three blocks, several groups; a part of a block.
ONE_TOKEN, GROUP = (2, 1, 2, 2, 256), (2, 300, 2, 1, 64)
GROUPS, OWN_KEYS = (1, 600, 4, 2, 128), (1, 100, 2, 2, 256)
SHAPES = {"T = 1": ONE_TOKEN, "a group": GROUP, "groups": GROUPS, "H = 256": OWN_KEYS}


def check(got, shape, inputs, layout, part=slice(None)):
    """The 2x rule, against the definition with every operation in the dtype of the inputs; `part` as in common.py."""
    dtype = inputs[0].dtype
    assert [x.dtype for x in got] == [dtype, jnp.float32, dtype, dtype, dtype]
    plain = results(DEFINITION[shape[-1], dtype.name], *inputs, layout)
    exact = brute_force(*inputs, layout.as_mask())
    plain, exact = ([x[part] for x in of] for of in (plain, exact))
    assert_errs_at_most_twice_as_much(got, plain, exact, largest_terms(*inputs), dtype)


DEFINITION = {
    (H, dtype): functools.partial(reference.attend, scale=H**-0.5, dtype=dtype)
    for H in (64, 96, 128, 256)
    for dtype in ("float32", "bfloat16")
}


def run_and_check(op, shape, dtype, layout, factor=1):
    q, k, *rest = tensors(shape, dtype)
    inputs = (q * factor, k * factor, *rest)
    check(results(op, *inputs, layout), shape, inputs, layout)


# One shape, and one token below; the rest with -m soak, several groups in bfloat16 in test_large_scores, too.
ALWAYS = {("a group", jnp.float32)}
EVERY_PAIR = [
    pytest.param(shape, dtype, id=f"{name}-{dtype.__name__}", marks=[] if (name, dtype) in ALWAYS else pytest.mark.soak)
    for name, shape in SHAPES.items()
    for dtype in (jnp.float32, jnp.bfloat16)
]


@pytest.mark.soak  # far values: test_op.py; heads that are filled up, test_tpu_compile.py
def test_far_values_are_scaled_and_heads_filled_up():
    """Of 96 to 128."""
    shape = (2, 140, 2, 1, 96)
    layout = build_layout(SPARSE[:, :140], window_size=20, num_sinks=3, segment_ids=DOCUMENTS[:, 120:260])
    check_scaled(PLAIN, tensors(shape), layout, DEFINITION[96, "float32"])


@pytest.mark.parametrize(("shape", "dtype"), EVERY_PAIR)
@examples(2)
@given(data=st.data())
def test_equals_the_definition(shape, dtype, data):
    run_and_check(PLAIN, shape, dtype, data.draw(layouts(shape)))


B, T = GROUP[:2]
SPARSE = np.random.default_rng(0).random((B, T)) < 0.15
NONE, ALL = np.zeros((B, T), bool), np.ones((B, T), bool)
DOCUMENTS = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [20, 1, 240, T - 261], axis=1).astype(np.int32)
SHORT_DOCUMENTS = np.tile(np.repeat(np.arange(1, 61), 5).astype(np.int32), (B, 1))
EDGE_CASES = {
    "n = 1": (SPARSE, 1, 2, None),
    "n = T": (SPARSE, T, 2, None),
    "n above T": (SPARSE, 2**40, 2, None),
    "n = a block": (SPARSE, 256, 2, None),
    "n = a block and one": (SPARSE, 257, 2, None),
    "a = 0": (SPARSE, 5, 0, None),
    "a above T": (SPARSE, 5, 2**40, None),
    "no separators": (NONE, 5, 3, None),
    "neither separators nor sinks": (NONE, 5, 0, None),
    "only separators": (ALL, 5, 0, None),
    "a separator among the sinks": (np.tile(np.arange(T) % 30 == 1, (B, 1)), 5, 3, None),
    "left padding": (SPARSE, 5, 2, np.repeat([[0, 1], [1, 1]], [9, T - 9], axis=1).astype(np.int32)),
    "several documents and padding": (SPARSE, 5, 2, DOCUMENTS),
    "many short documents": (SPARSE, 3, 1, SHORT_DOCUMENTS),
    "only padding": (ALL, 5, 2, np.zeros((B, T), np.int32)),
}


def edge_case(case):
    is_separator, n, a, segment_ids = EDGE_CASES[case]
    return build_layout(is_separator, window_size=n, num_sinks=a, segment_ids=segment_ids)


# Which tiles are visited does not depend on the dtype: bfloat16 with -m soak.
EVERY_CASE = [
    pytest.param(dtype, case, id=f"{dtype.__name__}-{case}", marks=marks)
    for dtype, marks in ((jnp.float32, []), (jnp.bfloat16, pytest.mark.soak))
    for case in EDGE_CASES
]


@pytest.mark.parametrize(("dtype", "case"), EVERY_CASE)
def test_edge_case(dtype, case):
    run_and_check(PLAIN, GROUP, dtype, edge_case(case))


@pytest.mark.parametrize("case", [pytest.param(x, marks=pytest.mark.soak) for x in ("n = 1", "only separators")])
def test_edge_case_in_simulated_memories(case):
    run_and_check(SIMULATED, GROUP, jnp.float32, edge_case(case))


@pytest.mark.soak  # these kernels, with more keys, in test_tpu_ranges.py; the same bits of the same input below
def test_in_simulated_memories_the_same_bits_twice():
    """The simulator runs the two cores in threads, so it may take any order that a chip may take."""
    documents = np.stack([DOCUMENTS[0], np.zeros(T, np.int32)])  # and a row of padding alone
    inputs, layout = tensors(GROUP), build_layout(SPARSE, window_size=5, num_sinks=2, segment_ids=documents)
    first, second = (results(SIMULATED, *inputs, layout) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    check(first, GROUP, inputs, layout)


SIMULATED_SHAPES = {"T = 1": ONE_TOKEN, "two blocks": (1, 300, 2, 1, 128), "H = 256": OWN_KEYS}


@pytest.mark.parametrize(
    "shape",
    [pytest.param(x, id=k) for k, x in SIMULATED_SHAPES.items()],
)
@pytest.mark.soak  # of memory, half precision changes the size of tiles, which test_tpu_compile.py sees
def test_half_precision_in_simulated_memories(shape):
    is_separator = np.random.default_rng(1).random(shape[:2]) < 0.5
    run_and_check(SIMULATED, shape, jnp.bfloat16, build_layout(is_separator, window_size=70, num_sinks=1))


def test_the_simulator_sees_a_race(capfd):
    """What the tests above rely on: two cores that write the same block."""

    def kernel(out):
        out[...] = jnp.full_like(out, pl.program_id(0))

    run = pl.pallas_call(
        kernel,
        grid=(4,),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(pltpu.PARALLEL,)),
        interpret=SIMULATOR,
    )
    try:
        run().block_until_ready()
    except Exception as error:  # jax 0.12 raises; earlier ones print
        message = str(error)
    else:
        message = "".join(capfd.readouterr())
    assert "race detected" in message.lower()


def sparse_layout(**settings):
    return build_layout(SPARSE, **{"window_size": 5, "num_sinks": 2, "segment_ids": DOCUMENTS} | settings)


@pytest.mark.parametrize(
    ("shape", "dtype", "factor"),
    [(GROUP, jnp.float32, 100), pytest.param(GROUPS, jnp.bfloat16, 10, marks=pytest.mark.soak)],
    ids=["float32", "bfloat16"],
)
def test_large_scores(shape, dtype, factor):
    B, T = shape[:2]
    flags = np.random.default_rng(0).random((B, T)) < 0.15
    ids = np.resize(DOCUMENTS, (B, T))
    run_and_check(PLAIN, shape, dtype, build_layout(flags, window_size=5, num_sinks=2, segment_ids=ids), factor=factor)


@pytest.mark.parametrize("scale", [pytest.param(-0.25, marks=pytest.mark.soak), 0.0])
def test_a_scale_of_any_sign_of_one_token(scale):
    """Its lse is its only score, its output its value. Many tokens below, with -m soak."""
    q, k, v, d_out, d_lse = tensors((1, 1, 1, 1, 64))
    layout = build_layout(np.zeros((1, 1), bool), window_size=1, num_sinks=0)
    op = functools.partial(tpu.attend, scale=scale, interpret=True)
    if scale:
        out, lse, dq, dk, dv = results(op, q, k, v, d_out, d_lse, layout)
        for got, expected in ((dq, scale * d_lse[..., None] * k), (dk, scale * d_lse[..., None] * q), (dv, d_out)):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    else:
        out, lse = op(q, k, v, layout)
    np.testing.assert_allclose(lse, scale * jnp.sum(q * k, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(out, v, rtol=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("scale", [-0.25, 2.0])
def test_a_scale_of_any_sign(scale):
    """Scale s of q is scale H ** -0.5 of q * s * H ** 0.5, by factors that are powers of two."""

    def op(q, k, v, layout):
        return tpu.attend(q / (scale * GROUP[-1] ** 0.5), k, v, layout, scale=scale, interpret=True)

    run_and_check(op, GROUP, jnp.float32, sparse_layout())


@pytest.mark.soak
def test_no_scale_at_all():
    """All visible keys count the same: means of values, logs of counts, and nothing depends on q and k."""
    inputs, layout = tensors(GROUP), sparse_layout()
    op = functools.partial(tpu.attend, scale=0.0, interpret=True)
    zeros = jnp.zeros_like(inputs[0]), jnp.zeros_like(inputs[1]), *inputs[2:]
    out, lse, dq, dk, dv = results(op, *inputs, layout)
    expected = results(DEFINITION[96, "float32"], *zeros, layout)
    for x, y in zip((out, lse, dv), (expected[0], expected[1], expected[4]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.soak)])
def test_same_input_same_bits(dtype):
    inputs, layout = tensors(GROUP, dtype), sparse_layout()
    first, second = (results(PLAIN, *inputs, layout) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_gradients_reach_the_visible_keys_and_no_others():
    """Causality, and the whole mask: dv of one output is nonzero exactly where its query looks."""
    q, k, v, d_out, d_lse = tensors(GROUP)
    layout = sparse_layout()
    mask = np.asarray(layout.as_mask())
    for i in (0, 21, 255, 256, 261):
        one = jnp.zeros_like(d_out).at[:, i].set(1.0)
        *_, dq, dk, dv = results(PLAIN, q, k, v, one, jnp.zeros_like(d_lse), layout)
        np.testing.assert_array_equal(np.asarray(dv).any((2, 3)), mask[:, i])
        assert not np.asarray(dk)[~mask[:, i]].any()
        assert not np.asarray(dq)[:, np.arange(T) != i].any()


def test_other_documents_and_later_tokens_change_no_bit():
    """What a query cannot see is worth exactly nothing."""
    q, k, v, *_ = tensors(GROUP)
    noise = [10 * x for x in tensors(GROUP, seed=1)[:3]]
    layout = sparse_layout()
    inside = (np.arange(T) >= 21) & (np.arange(T) < 200)  # the first part of the third document of row 0
    mixed = [jnp.where(inside[:, None, None], x, y) for x, y in zip((q, k, v), noise, strict=True)]
    for x, y in zip(PLAIN(q, k, v, layout), PLAIN(*mixed, layout), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[0, inside], np.asarray(y)[0, inside])


@pytest.mark.soak  # a program of its own; several documents are in test_edge_case, and the like of it in test_op.py
def test_a_document_is_the_same_alone_and_packed():
    inputs, layout = tensors(GROUP), sparse_layout()
    part = (slice(0, 1), slice(21, 261))
    alone = results(PLAIN, *(x[part] for x in inputs), build_layout(SPARSE[part], window_size=5, num_sinks=2))
    packed = [x[part] for x in results(PLAIN, *inputs, layout)]
    for one in (alone, packed):
        check(one, GROUP, inputs, layout, part)


@pytest.mark.soak  # of the XLA form in test_op.py: each kernel is told of a layer's window by its ranges alone
def test_windows_that_differ_between_scanned_and_rematerialised_layers():
    q, k, v, d_out, _ = tensors(GROUP)
    windows, layout = (3, 170), sparse_layout()
    attend = jax.jit(functools.partial(reference.attend, scale=GROUP[-1] ** -0.5))

    def scanned(x):
        body = jax.checkpoint(lambda x, n: (x + PLAIN(x, k, v, layout.with_window(n))[0], None))
        return jax.lax.scan(body, x, jnp.asarray(windows))[0]

    def unrolled(x):
        return functools.reduce(lambda x, n: x + attend(x, k, v, sparse_layout(window_size=n))[0], windows, x)

    def value_and_gradient(f):
        out, vjp = jax.vjp(f, q)
        return out, *vjp(d_out)

    got, expected = jax.jit(functools.partial(value_and_gradient, scanned))(), value_and_gradient(unrolled)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.soak  # lists that do not fit are in test_tpu_ranges.py, overflow in test_op.py
def test_too_little_room_for_the_separators_is_exact_under_jit():
    inputs = tensors(GROUP)

    @jax.jit
    def run(is_separator, *inputs):
        layout = build_layout(is_separator, window_size=5, num_sinks=0, capacity=5)
        return results(PLAIN, *inputs, layout), layout.overflows()

    for is_separator, overflows in ((SPARSE, True), (SPARSE & (SPARSE.cumsum(1) <= 5), False)):
        got, overflowed = run(is_separator, *inputs)
        assert bool(overflowed) == overflows
        check(got, GROUP, inputs, build_layout(is_separator, window_size=5, num_sinks=0))


@pytest.mark.soak  # a program of its own; the packing without room is that of test_op.py
def test_no_room_and_no_global_keys():
    inputs = tensors(GROUP)
    layout, same = (build_layout(NONE, window_size=5, num_sinks=0, capacity=x) for x in (0, None))
    check(results(PLAIN, *inputs, layout), GROUP, inputs, same)  # whose definition is compiled already


def test_rows_whose_lists_do_not_fit_together_go_one_after_the_other(monkeypatch):
    """Outputs; gradients have the same lists, and their loops are counted."""
    inputs, layout = tensors(GROUP), sparse_layout()

    def loops(op):
        return str(jax.make_jaxpr(functools.partial(results, op))(*inputs, layout)).count("scan[")

    together = PLAIN(*inputs[:3], layout)
    assert loops(PLAIN) == 0
    monkeypatch.setattr(tpu_calls, "_VISIT_BYTES", 60)

    def apart(q, k, v, layout):
        return tpu.attend.__wrapped__(q, k, v, layout, scale=q.shape[-1] ** -0.5, interpret=True)

    assert loops(apart) > 0, "the rows are in a loop"
    jax.tree.map(np.testing.assert_array_equal, jax.jit(apart)(*inputs[:3], layout), together)


needs_four_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices; tests/conftest.py makes them")


@pytest.mark.soak  # that of the XLA form is in test_op.py; the kernels know no mesh, and are compiled for one elsewhere
@needs_four_devices
def test_rows_and_heads_on_several_devices():
    """Without check_vma, which Pallas' interpreters do not know; the compiled kernels do (test_tpu_compile.py)."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto, devices=jax.devices()[:4])
    shape = (2, 140, 4, 2, 64)
    layout = build_layout(SPARSE[:, :140], window_size=5, num_sinks=2, segment_ids=DOCUMENTS[:, 120:260])
    inputs = tensors(shape)
    heads, rows = jax.P("data", None, "tensor"), jax.P("data")
    mapped = jax.shard_map(
        PLAIN, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=(heads, heads), check_vma=False
    )
    check(results(mapped, *inputs, layout), shape, inputs, layout)


def test_the_stated_cost_is_the_needed_one():
    """FLOPs and bytes for typical text, within a tenth of those of such a text."""
    shape = B, T, N, K, H = 1, 8192, 8, 2, 128
    inputs = jax.eval_shape(lambda: tensors(shape, jnp.bfloat16))
    layout = build_layout(np.random.default_rng(0).random((B, T)) < 0.12, window_size=256, num_sinks=4)
    program = jax.make_jaxpr(functools.partial(results, PLAIN))(*inputs, layout).jaxpr
    calls = [equation for equation in equations(program) if equation.primitive.name == "pallas_call"]
    forward, *gradients = (call.params["cost_estimate"] for call in calls)
    needed = int(layout.num_pairs()[0]) * N * H
    assert forward.flops == pytest.approx(FLOPS_PER_PAIR["forward"] * needed, rel=0.1)
    # dQ and dK/dV each compute scores and weights' gradients again: two products more than a fused backward pass.
    assert forward.flops + sum(x.flops for x in gradients) == pytest.approx(
        (FLOPS_PER_PAIR["forward+backward"] + 4) * needed, rel=0.1
    )
    keys = 2 * (T + int(layout.num_global[0])) * K * H * 2
    assert forward.bytes_accessed == pytest.approx(2 * T * N * H * 2 + keys + 2 * 4 * T * N + 16 * T, rel=0.1)
    assert forward.transcendentals == pytest.approx(needed / H, rel=0.1)


def reason_on_a_tpu(shape, dtype):
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    auto, reasons = (jax.sharding.AxisType.Auto,), []
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), auto, abstract_device=device)):
        jax.eval_shape(lambda q: reasons.append(tpu.unsupported(q)), jax.ShapeDtypeStruct(shape, dtype))
    return reasons[0]


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 8, 2, 64), jnp.bfloat16, None),
        ((1, 2**19, 2, 128), jnp.float32, None),
        ((1, 8, 2, 64), jnp.float16, "bfloat16 or float32, got float16"),
        ((1, 8, 2, 80), jnp.bfloat16, None),
        ((1, 8, 2, 33), jnp.bfloat16, None),
        ((1, 8, 2, 32), jnp.bfloat16, "head sizes 64, 128, 256, and others from 33 on filled up, got 32"),
        ((1, 8, 2, 257), jnp.bfloat16, "head sizes 64, 128, 256, and others from 33 on filled up, got 257"),
        ((1, 2**19 + 1, 2, 64), jnp.bfloat16, "up to 524288 tokens.*got 524289"),
    ],
)
def test_what_a_tpu_cannot_serve(shape, dtype, reason):
    got = reason_on_a_tpu(shape, dtype)
    assert got is None if reason is None else re.search(reason, str(got))
