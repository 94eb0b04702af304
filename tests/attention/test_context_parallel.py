"""Context parallelism on virtual devices: outputs and gradients are those of one device, whatever the layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.attention import context_parallel
from sepjax.attention.context_parallel import ContextPlan, context_attention, from_context_order, to_context_order
from sepjax.layout import build_layout
from tests.attention.common import check, equations, examples, layouts, results, tensors

P = jax.P
ROWS = P(None, "context")


def over(plan, implementation="xla"):
    """`context_attention` as an op on whole rows in the order of the text, on `plan.ways` devices."""
    mesh = jax.make_mesh((plan.ways,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))

    def op(q, k, v, layout):
        run = functools.partial(context_attention, plan=plan, implementation=implementation)
        specs = {"in_specs": (ROWS, ROWS, ROWS, P(), P()), "out_specs": (ROWS, ROWS)}
        mapped = jax.shard_map(run, mesh=mesh, **specs, check_vma=False)
        q, k, v = (to_context_order(x, plan.ways) for x in (q, k, v))
        roomy = context_parallel.fits(layout, plan.ways, plan.capacity)
        return tuple(from_context_order(x, plan.ways) for x in mapped(q, k, v, layout, roomy))

    return op


SHAPE = (2, 64, 4, 2, 8)  # B, T, N, K, H
# Chunks of 16, 8 and 4 tokens. Room for all of a device's keys, or for few of them: many layouts need more.
PLANS = {
    "2 devices, one hop": ContextPlan(2, halo=5, capacity=32),
    "4 devices, three hops": ContextPlan(4, halo=23, capacity=5),
    "8 devices, six hops": ContextPlan(8, halo=22, capacity=3),
    "8 devices, all keys sent": ContextPlan(8, halo=40, capacity=1),
}


# Seconds each. The others, with -m soak, have fewer devices; one hop with room for all keys is in the tests below, too.
ALWAYS = "8 devices, six hops"


@pytest.mark.parametrize("name", [x if x == ALWAYS else pytest.param(x, marks=pytest.mark.soak) for x in PLANS])
@examples(8)
@given(data=st.data())
def test_equals_one_device(name, data):
    plan = PLANS[name]
    layout, inputs = data.draw(layouts(SHAPE)), tensors(SHAPE)
    layout = layout.with_window(data.draw(st.integers(1, plan.halo + 1)))
    layout = layout.with_most_far(data.draw(st.sampled_from([SHAPE[1], SHAPE[1] // 4])))
    check(results(_OPS[name], *inputs, layout), inputs, layout.as_mask())


_OPS = {name: over(plan) for name, plan in PLANS.items()}


@pytest.mark.parametrize("ways", [pytest.param(1, marks=pytest.mark.soak), 4])
def test_dense_layers(ways):
    """Layers whose window covers the row: all keys are sent, and documents still end where they do."""
    plan, inputs = ContextPlan(ways, halo=0, capacity=0, dense=True), tensors(SHAPE)
    documents = np.repeat([[1, 2, 0, 3]], [9, 30, 5, 20], axis=1).astype(np.int32).repeat(2, axis=0)
    layout = build_layout(FLAGS, window_size=SHAPE[1], num_sinks=2, segment_ids=documents)
    check(results(over(plan), *inputs, layout), inputs, layout.as_mask())


FLAGS = np.random.default_rng(0).random(SHAPE[:2]) < 0.2


@pytest.mark.soak  # windows of one are drawn above; each implementation has its ranges' tests
def test_window_of_one_and_the_definition_inside():
    """No halo at all; and the op is the same around any implementation."""
    layout, inputs = build_layout(FLAGS, window_size=1, num_sinks=3), tensors(SHAPE)
    op = over(ContextPlan(2, halo=0, capacity=32), implementation="reference")
    check(results(op, *inputs, layout), inputs, layout.as_mask())


@pytest.mark.soak  # layouts with more far keys than are packed are drawn above, too
def test_too_small_a_packed_array_is_no_loss():
    """A layout that names 5 global keys of a row is answered with all of them."""
    full, inputs = build_layout(FLAGS, window_size=4, num_sinks=3), tensors(SHAPE)
    got = results(over(ContextPlan(4, halo=3, capacity=9)), *inputs, full.with_capacity(5))
    check(got, inputs, full.as_mask())


def test_what_is_kept_for_the_gradients_is_a_devices_part():
    """Neither case keeps, or fills with zeros for the other, arrays of the length of the row."""
    layout, inputs = build_layout(FLAGS, window_size=4, num_sinks=3), tensors(SHAPE)
    op = over(ContextPlan(8, halo=3, capacity=2))
    gradient = jax.grad(lambda q, k, v: op(q, k, v, layout)[0].sum(), argnums=(0, 1, 2))
    program = jax.make_jaxpr(gradient)(*inputs[:3]).jaxpr
    conds = [equation for equation in equations(program) if equation.primitive.name == "cond"]
    assert len(conds) == 2, "forward and backward"
    B, T, _, K, H = SHAPE
    sizes = [x.aval.size for cond in conds for x in cond.outvars if jnp.issubdtype(x.aval.dtype, jnp.floating)]
    assert max(sizes) < B * T * K * H


def test_each_device_has_an_early_and_a_late_chunk():
    assert to_context_order(np.arange(8)[None], 4)[0].tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    x = np.arange(48).reshape(1, 24, 2)
    there_and_back = jax.jit(lambda x: [from_context_order(to_context_order(x, ways), ways) for ways in (1, 2, 3, 4)])
    for got in there_and_back(x):
        np.testing.assert_array_equal(got, x)


def test_lengths_that_do_not_fit_are_named():
    q, k, v, *_ = tensors((1, 36, 2, 2, 8))
    layout = build_layout(np.zeros((1, 36), bool), window_size=2, num_sinks=1)
    with pytest.raises(ValueError, match=r"T=36 tokens do not split over 4 devices: .* a multiple of 8"):
        over(ContextPlan(4, halo=1, capacity=4))(q, k, v, layout)
    with pytest.raises(ValueError, match="capacity=0 must be 1 or more"):
        over(ContextPlan(2, halo=1, capacity=0))(q, k, v, layout)
