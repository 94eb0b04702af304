"""What context parallelism sends, counted in the compiled program, and how evenly it shares the work.

Bytes are those that a device receives for one layer, keys and values, on 8 devices at a density of 12 %.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention.context_parallel import ContextPlan, context_attention, fits, gathered_keys, to_context_order
from sepjax.layout import build_layout
from sepjax.training.compiled import Program

C, N_WINDOW, SINKS, DENSITY = 8, 256, 4, 0.12
K, H = 2, 16
TOKEN = 2 * K * H * 4  # bytes of a token's key and value in float32
P, ROWS = jax.P, jax.P(None, "context")


def flags(length):
    return np.random.default_rng(0).random((1, length)) < DENSITY


@functools.cache
def layout_of(length):
    return build_layout(flags(length), window_size=N_WINDOW, num_sinks=SINKS)


def plans(length):
    """The least room that holds every device's global keys; and dense context parallelism."""
    chunks = to_context_order(layout_of(length).is_global(), C).reshape(C, -1)
    room = -(-int(jnp.max(jnp.sum(chunks, axis=1))) // 8) * 8
    assert fits(layout_of(length), C, room)
    assert not fits(layout_of(length), C, room - 8)
    return ContextPlan(C, N_WINDOW - 1, room), ContextPlan(C, length, 0, dense=True)


def received(plan, length, run, heads=(K, K), *, backward=True):
    """(bytes forward, bytes backward) of `run(plan)` over rows of this length; 0 for what is not asked for."""
    mesh = jax.make_mesh((C,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = [
        jax.ShapeDtypeStruct((1, length, n, H), jnp.float32, sharding=jax.NamedSharding(mesh, ROWS)) for n in heads
    ]
    op = jax.shard_map(run(plan), mesh=mesh, in_specs=(*[ROWS] * len(heads), P()), out_specs=ROWS, check_vma=False)

    def both(*arrays):
        outputs, vjp = jax.vjp(lambda *arrays: op(*arrays, layout_of(length)), *arrays)
        return outputs, vjp(outputs)

    forward = jax.jit(lambda *arrays: op(*arrays, layout_of(length)))
    sizes = [_bytes(Program(jax.jit(f).lower(*arrays).compile().as_text())) for f in (forward, both)[: 1 + backward]]
    return sizes[0], sizes[-1] - sizes[0]


def _bytes(program):
    """Of what is gathered or scattered, a device has its own part already."""
    share = {"all-gather": (C - 1) / C, "reduce-scatter": (C - 1) / C, "collective-permute": 1}
    return sum(x.bytes * share[x.kind] for x in program.collectives())


@pytest.mark.parametrize("length", [*(pytest.param(x, marks=pytest.mark.soak) for x in (2**15, 2**17)), 2**20])
def test_an_eighth_of_dense_context_parallelism_is_sent(length, capsys):
    run = lambda plan: functools.partial(gathered_keys, plan=plan)  # noqa: E731
    (ours, back), (dense, _) = (received(plan, length, run) for plan in plans(length))
    global_keys = int(layout_of(length).num_global[0])
    formula = (global_keys * (C - 1) / C + 2 * (N_WINDOW - 1)) * TOKEN
    with capsys.disabled():
        print(f"\nT={length}: {ours / TOKEN:,.0f} tokens sent, dense {dense / TOKEN:,.0f}: {dense / ours:.2f}x less")
    assert dense == length * (C - 1) / C * TOKEN
    assert formula <= ours <= 1.1 * formula
    assert back <= 1.01 * ours, "gradients go back the way that the keys came"
    assert dense / ours > {2**15: 6.5, 2**17: 7.5, 2**20: 8}[length]  # at 32k the halo is an eighth of what is sent


def test_nothing_else_is_sent():
    """The whole op sends what `gathered_keys` sends, and no query, output or layout."""
    length, plan = 2**12, ContextPlan(C, N_WINDOW - 1, 80)
    yes = np.asarray(True)

    def whole(plan):
        def run(q, k, v, layout):
            return context_attention(q, k, v, layout, yes, plan=plan, implementation="xla")[0]

        return run

    keys, _ = received(plan, length, lambda plan: functools.partial(gathered_keys, plan=plan), backward=False)
    assert received(plan, length, whole, heads=(2 * K, K, K), backward=False)[0] == keys


@pytest.mark.soak  # a measurement; the order itself is in test_context_parallel.py
def test_every_device_has_nearly_the_same_work(capsys):
    """Visible pairs of the busiest device over the mean; a row cut in order would leave most devices waiting."""
    shares = {}
    for length in (2**15, 2**17, 2**20):
        keys = np.asarray(layout_of(length).keys_per_query(), np.float64)
        for name, order in (("in order", keys), ("early and late", np.asarray(to_context_order(keys, C)))):
            work = order.reshape(C, -1).sum(axis=1)
            shares[length, name] = work.max() / work.mean()
    with capsys.disabled():
        print("\nbusiest device over the mean:", {k: round(float(v), 3) for k, v in shares.items()})
    assert all(share < 1.02 for (_, name), share in shares.items() if name == "early and late")
    assert all(share > 1.6 for (_, name), share in shares.items() if name == "in order")
