"""separator_attention on TPUs: shapes, tile sizes and grids around the kernels of `tpu_kernels`.

Near keys (the row's own) and far keys (its packed global ones) are laid one after the other, so that a kernel sees a
single array and a tile is near or far by its number alone. What it visits is a list made by `block_map`; the grid is as
long as that list, so the time follows the number of visible tiles, and n and the layout are data.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32

from sepjax.array_typing import Array, Keys, Queries
from sepjax.attention import tpu_kernels as kernels
from sepjax.attention.block_map import Tiling, Visits, block_map, key_visits, query_visits
from sepjax.attention.packing import pack, unpack, unserved, vary_alike, with_positive_scale, with_room
from sepjax.attention.target import target
from sepjax.layout import SeparatorLayout

# Scalar memory is 1 MiB on every TPU since v4 and holds the list of visits of one call.
_VISIT_BYTES = 3 * 2**18
_LONGEST = 2**19  # tokens of a row whose visits are sure to fit there
_VMEM_BYTES = 48 * 2**20  # a v5p core and a TPU7x core have 64 MiB, the others more; the compiler's default is 16
_QUERIES_PER_STEP = 2048  # over the heads of a step

# What the compiler is told that a call costs, before there are data (METHOD: density of English prose; the paper's n).
_TYPICAL_DENSITY, _TYPICAL_WINDOW = 0.12, 256


def unsupported(q: Queries) -> str | None:
    """Why the kernels cannot serve a call on the device that is traced for, or None when they can."""
    device = target()
    if device.platform != "tpu":
        return f"it needs a TPU, the device is {device}"
    reason = unserved(q, (jnp.bfloat16, jnp.float32))
    if reason is None and q.shape[1] > _LONGEST:
        return f"it serves rows of up to {_LONGEST} tokens, whose visits fit scalar memory, got {q.shape[1]}"
    return reason


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend(
    q: Queries,
    k: Keys,
    v: Keys,
    layout: SeparatorLayout,
    *,
    scale: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`separator_attention` and its log-sum-exp; the arguments are checked there.

    `interpret` runs the kernels on a CPU, for tests: as plain JAX (True), or in the simulator of a TPU's memories.
    """
    q, scale = with_positive_scale(q, scale)
    q, k, v, layout = vary_alike((q, k, v, layout))
    return _attend(q, k, v, layout, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, layout, scale, interpret):
    return _attend_forward(q, k, v, layout, scale, interpret)[0]


def _attend_forward(q, k, v, layout, scale, interpret):
    run = functools.partial(_forward, scale=scale, interpret=interpret)
    out, top, total = with_room(layout, lambda layout: _in_row_groups(run, (q, k, v, layout)))
    lse = jnp.where(total > 0, top * scale + jnp.log(total), -jnp.inf)
    return (out, lse), (q, k, v, layout, out, top, total)


def _attend_backward(scale, interpret, residuals, cotangents):
    # As in xla.py, weights are recomputed as exp(S - top) / total: exp(S - lse) would carry the rounding of the lse.
    q, k, v, layout, out, top, total = residuals
    d_out, d_lse = cotangents
    norm = jnp.where(total > 0, 1 / total, 0.0)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    rows = jnp.stack([top, norm, delta], axis=1)
    run = functools.partial(_backward, scale=scale, interpret=interpret)
    arrays = vary_alike((q, k, v, d_out, rows, layout))
    gradients = with_room(arrays[-1], lambda layout: _in_row_groups(run, (*arrays[:-1], layout)))
    return *gradients, None


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a step computes, and how steps cover the heads. All static."""

    tiling: Tiling
    query_heads: int  # N
    key_heads: int  # K
    step_queries: int  # h: query heads of a step, whole key heads or a part of one
    step_keys: int  # key heads that they share
    head_size: int  # H

    @property
    def query_groups(self) -> int:
        return self.query_heads // self.step_queries

    @property
    def key_groups(self) -> int:
        return self.key_heads // self.step_keys


def _plan(q: Array, k: Array, layout: SeparatorLayout) -> _Plan:
    B, T, N, H = q.shape
    K = k.shape[2]
    side = tile_length(T)
    blocks = -(-T // side)
    tiling = Tiling(B, blocks, blocks, -(-layout.capacity // side), block=side, tile=side)
    # At least two groups where there are two heads: v4 and v5p chips split them over their two cores.
    most = max(1, min(_QUERIES_PER_STEP // side, N // 2))
    if most >= N // K:
        step_keys = _largest_divisor(K, most // (N // K))
        return _Plan(tiling, N, K, step_keys * (N // K), step_keys, H)
    return _Plan(tiling, N, K, _largest_divisor(N // K, most), 1, H)


def tile_length(T: int) -> int:
    """Queries of a block and keys of a tile, for rows of T tokens; docs/kernels_tpu.md says why."""
    if T <= 128:
        return 128
    return 256 if T < 2**17 else 512 if T <= 2**18 else 1024


def _largest_divisor(n: int, most: int) -> int:
    return max(d for d in range(1, max(1, most) + 1) if n % d == 0)


def _in_row_groups(run: Callable[..., Any], arrays: Any) -> Any:
    """`run` on as many rows at a time as have their visits in scalar memory together: all of them, as a rule."""
    q, layout = arrays[0], arrays[-1]
    B = q.shape[0]
    bytes_per_row = 4 * _plan(q, arrays[1], layout).tiling.most_key_visits
    rows = _largest_divisor(B, _VISIT_BYTES // bytes_per_row)
    if rows == B:
        return run(*arrays)
    split = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), arrays)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), lax.map(lambda arrays: run(*arrays), split))


def _forward(q, k, v, layout, *, scale, interpret):
    """Returns out [B, T, N, H], and of every query two float32[B, T, N]: the largest product with a key that it sees,
    and the sum of exp(scale * (product - largest)).
    """
    plan = _plan(q, k, layout)
    tiling = plan.tiling
    visits = query_visits(block_map(layout, tiling), tiling)
    keys, values = (_near_and_far(x, layout, tiling) for x in (k, v))
    queries = _tokens_last(q, tiling)
    row = jax.ShapeDtypeStruct((*queries.shape[:2], 1, queries.shape[3]), jnp.float32)
    out, top, total = _call(
        kernels.forward_kernel,
        visits,
        plan=plan,
        operands=[("ranges", _ranges(layout, tiling)), ("queries", queries), ("keys", keys), ("keys", values)],
        results=[("queries", queries), ("rows", row), ("rows", row)],
        scale=scale,
        interpret=interpret,
    )
    return _tokens_first(out, q), *(x[:, :, 0, : q.shape[1]].swapaxes(1, 2) for x in (top, total))


def _backward(q, k, v, d_out, rows, layout, *, scale, interpret):
    """Returns dq, dk, dv; `rows` is float32[B, 3, T, N]: top, 1 / total and delta."""
    plan = _plan(q, k, layout)
    tiling = plan.tiling
    map = block_map(layout, tiling)
    keys, values = (_near_and_far(x, layout, tiling) for x in (k, v))
    queries, d_outs = (_tokens_last(x, tiling) for x in (q, d_out))
    rows = _pad(jnp.transpose(rows, (0, 3, 1, 2)), 3, tiling.blocks * tiling.block)
    operands = [("ranges", _ranges(layout, tiling)), ("queries", queries), ("keys", keys), ("keys", values)]
    operands += [("queries", d_outs), ("rows", rows)]

    call = functools.partial(_call, plan=plan, operands=operands, scale=scale, interpret=interpret)
    (dq,) = call(kernels.query_gradient_kernel, query_visits(map, tiling), results=[("queries", queries)])
    d_keys = jax.ShapeDtypeStruct(keys.shape, jnp.float32)
    dk, dv = call(kernels.key_gradient_kernel, key_visits(map, tiling), results=[("keys", d_keys)] * 2)
    return _tokens_first(dq, q), *(_to_tokens(x, layout, tiling).astype(k.dtype) for x in (dk, dv))


def _call(kernel, visits: Visits, *, plan: _Plan, operands, results, scale, interpret):
    """Runs `kernel` over `visits`. Operands and results are (kind, array or its shape), kinds as `_block` has them."""
    by_key = kernel is kernels.key_gradient_kernel
    # (head group, visit) or, sorted by tile, (key head group, visit, query head group that shares it).
    grid: Any = (plan.query_groups, visits.count)
    semantics = (pltpu.PARALLEL, pltpu.ARBITRARY)
    if by_key:
        grid = (plan.key_groups, visits.count, plan.query_groups // plan.key_groups)
        semantics = (pltpu.PARALLEL, pltpu.ARBITRARY, pltpu.ARBITRARY)
    accumulator = pltpu.VMEM((plan.step_queries, plan.head_size, plan.tiling.block), jnp.float32)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=grid,
        in_specs=[_block(plan, kind, x, by_key) for kind, x in operands],
        out_specs=[_block(plan, kind, x, by_key) for kind, x in results],
        scratch_shapes=[] if by_key else [accumulator],
    )
    arrays = vary_alike((visits.words, *(x for _, x in operands)))
    varying = jax.typeof(arrays[0]).mat
    run = pl.pallas_call(
        functools.partial(kernel, tiling=plan.tiling, scale=scale),
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for _, x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_VMEM_BYTES),
        cost_estimate=_cost(kernel, plan, operands + results),
        interpret=interpret,
        name=f"separator_attention_{kernel.__name__.removesuffix('_kernel')}",
    )
    return run(*arrays)


def _block(plan: _Plan, kind: str, x, by_key: bool) -> pl.BlockSpec:
    """The part of an operand or result that a step works on."""
    tiling = plan.tiling
    shape = {
        "ranges": (1, 4, tiling.block),  # of int32[B, 4, T]
        "queries": (1, plan.step_queries, plan.head_size, tiling.block),  # of [B, N, H, T]
        "rows": (1, plan.step_queries, x.shape[2], tiling.block),  # of float32[B, N, 1 or 3, T]
        "keys": (1, plan.step_keys, plan.head_size, tiling.tile),  # of [B, K, H, T + S]
    }[kind]

    def index(*ids):
        *ids, words = ids
        visit = tiling.unpack(words[ids[1]])
        per_key = plan.query_groups // plan.key_groups
        group = ids[0] * per_key + ids[2] if by_key else ids[0]
        key_group = ids[0] if by_key else ids[0] // per_key
        return {
            "ranges": (visit.row, 0, visit.block),
            "queries": (visit.row, group, 0, visit.block),
            "rows": (visit.row, group, 0, visit.block),
            "keys": (visit.row, key_group, 0, visit.tile),
        }[kind]

    return pl.BlockSpec(shape, index)


def _cost(kernel, plan: _Plan, arrays) -> pl.CostEstimate:
    """What is needed for typical text: two FLOPs a pair, head dimension and product; every used byte moved once.

    How many pairs are visible is data. The compiler wants a figure when it decides what to run beside the kernel.
    """
    products = {kernels.forward_kernel: 2, kernels.query_gradient_kernel: 3, kernels.key_gradient_kernel: 4}[kernel]
    T = arrays[0][1].shape[2]
    global_keys = min(_TYPICAL_DENSITY * T, plan.tiling.far_tiles * plan.tiling.tile)
    pairs = plan.tiling.rows * plan.query_heads * T * (min(_TYPICAL_WINDOW, T) + global_keys / 2)
    used = {"keys": (T + global_keys) / (plan.tiling.tiles * plan.tiling.tile)}
    moved = sum(math.prod(x.shape) * x.dtype.itemsize * used.get(kind, 1) for kind, x in arrays)
    return pl.CostEstimate(
        flops=int(2 * products * pairs * plan.head_size), transcendentals=int(pairs), bytes_accessed=int(moved)
    )


def _ranges(layout: SeparatorLayout, tiling: Tiling) -> jax.Array:
    """int32[B, 4, T]: near_start, near_end, far_start, far_end. Queries after the last see nothing."""
    near_end = jnp.broadcast_to(jnp.arange(1, layout.length + 1, dtype=jnp.int32), layout.near_start.shape)
    far = tiling.near_tiles * tiling.tile
    ranges = jnp.stack([layout.near_start, near_end, layout.far_start + far, layout.far_end + far], axis=1)
    return _pad(ranges, 2, tiling.blocks * tiling.block)


def _near_and_far(x: Array, layout: SeparatorLayout, tiling: Tiling) -> jax.Array:
    """[B, T, K, H] -> [B, K, H, T + S], both parts filled up to whole tiles: near keys, then the packed global ones."""
    near = _pad(jnp.asarray(x), 1, tiling.near_tiles * tiling.tile)
    far = _pad(pack(x, layout), 1, tiling.far_tiles * tiling.tile)
    return jnp.transpose(jnp.concatenate([near, far], axis=1), (0, 2, 3, 1))


def _to_tokens(x: jax.Array, layout: SeparatorLayout, tiling: Tiling) -> jax.Array:
    """The transpose of `_near_and_far`: gradients [B, K, H, T + S] -> [B, T, K, H], by a gather.

    Far tiles that hold no key were never written: nothing of them may reach the sum, not even as 0 * NaN.
    """
    x = jnp.transpose(x, (0, 3, 1, 2))
    near, far = jnp.split(x, [tiling.near_tiles * tiling.tile], axis=1)
    near = near[:, : layout.length]
    return near + unpack(far, layout, axis=1) if tiling.far_tiles else near


def _tokens_last(x: Array, tiling: Tiling) -> jax.Array:
    """[B, T, N, H] -> [B, N, H, T], filled up to whole blocks."""
    return jnp.transpose(_pad(jnp.asarray(x), 1, tiling.blocks * tiling.block), (0, 2, 3, 1))


def _tokens_first(x: jax.Array, like: Array) -> jax.Array:
    """The inverse of `_tokens_last`."""
    return jnp.transpose(x[..., : like.shape[1]], (0, 3, 1, 2))


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])
