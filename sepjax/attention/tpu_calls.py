"""The calls of the TPU kernels: shapes, tile sizes, grids, and what is cut into pieces that fit scalar memory.

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

from sepjax.array_typing import Array
from sepjax.attention import tpu_kernels as kernels
from sepjax.attention.block_map import Tiling, Visits, block_map, key_visits, query_visits
from sepjax.attention.packing import vary_alike
from sepjax.attention.ranges import Ranges

_VISIT_BYTES = 3 * 2**18  # of scalar memory, 1 MiB on every TPU since v4, for the list of visits of one call
_VMEM_BYTES = 48 * 2**20  # a v5p core and a TPU7x core have 64 MiB, the others more; the compiler's default is 16
_QUERIES_PER_STEP = 2048  # over the heads of a step

# What the compiler is told that a call costs, before there are data (METHOD: density of English prose; the paper's n).
_TYPICAL_DENSITY, _TYPICAL_WINDOW = 0.12, 256


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a step computes, and how steps cover the heads. All static."""

    tiling: Tiling  # of one call
    parts: int  # of the queries of a row, one after the other: 1 where the list of all of its visits fits
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

    @property
    def part(self) -> int:
        """Queries of a part."""
        return self.tiling.blocks * self.tiling.block

    @property
    def queries(self) -> int:
        """Queries of a row, filled up to whole parts."""
        return self.parts * self.part


def _plan(q: Array, k: Array, room: int, is_whole: bool) -> _Plan:
    N, H, K = *q.shape[2:], k.shape[2]
    tiling, parts = _tiling(q.shape[0], q.shape[1], k.shape[1], room, is_whole)
    # At least two groups where there are two heads: v4 and v5p chips split them over their two cores.
    most = max(1, min(_QUERIES_PER_STEP // tiling.block, N // 2))
    if most >= N // K:
        step_keys = _largest_divisor(K, most // (N // K))
        return _Plan(tiling, parts, N, K, step_keys * (N // K), step_keys, H)
    return _Plan(tiling, parts, N, K, _largest_divisor(N // K, most), 1, H)


def _tiling(rows: int, queries: int, near: int, far: int, is_whole: bool) -> tuple[Tiling, int]:
    """How a call is cut, and in how many parts the queries go when one row alone has too many visits for one call."""
    side = tile_length(queries)
    blocks, near_tiles, far_tiles = (-(-n // side) for n in (queries, max(near, 1), far))
    tiling = Tiling(rows, blocks, near_tiles, far_tiles, block=side, tile=side, is_whole=is_whole)
    if _list_bytes(tiling) <= _VISIT_BYTES:
        return tiling, 1
    most = max(1, _VISIT_BYTES // (4 * tiling.tiles))
    parts = -(-blocks // most)
    return dataclasses.replace(tiling, blocks=-(-blocks // parts), is_whole=False), parts


def _list_bytes(tiling: Tiling) -> int:
    """Of the visits of one row."""
    return 4 * tiling.most_key_visits


def tile_length(T: int) -> int:
    """Queries of a block and keys of a tile, for T queries a row; docs/kernels_tpu.md says why."""
    if T <= 128:
        return 128
    return 256 if T < 2**17 else 512 if T <= 2**18 else 1024


def rows_at_once(q: Array, k: Array, room: int, is_whole: bool) -> int:
    """How many rows have their visits in scalar memory together; it divides B. `room` is that for far keys."""
    tiling, _ = _tiling(q.shape[0], q.shape[1], k.shape[1], room, is_whole)
    return _largest_divisor(tiling.rows, _VISIT_BYTES // _list_bytes(tiling))


def _largest_divisor(n: int, most: int) -> int:
    return max(d for d in range(1, max(1, most) + 1) if n % d == 0)


def forward(
    q: Array, near: tuple[Array, Array], far: tuple[Array, Array], seen: Ranges, *, is_whole: bool, scale, interpret
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of queries [B, Q, N, H] over near and far (k, v), each [B, keys, K, H]; `is_whole` as in `Tiling`.

    Returns:
      out [B, Q, N, H], and of every query two float32[B, Q, N]: the largest product with a key that it sees, and the
      sum of exp(scale * (product - largest)).
    """
    plan = _plan(q, near[0], far[0].shape[1], is_whole)
    tiling = plan.tiling
    keys, values = (_near_and_far(*x, tiling) for x in zip(near, far, strict=True))
    queries, seen = _tokens_last(q, plan), _filled(seen, plan)

    def run(part):
        ranges, x = seen.change(part), part(queries)
        row = jax.ShapeDtypeStruct((*x.shape[:2], 1, x.shape[3]), jnp.float32)
        return _call(
            kernels.forward_kernel,
            query_visits(block_map(ranges, tiling), tiling),
            plan=plan,
            operands=[("ranges", _ranges(ranges, tiling)), ("queries", x), ("keys", keys), ("keys", values)],
            results=[("queries", x), ("rows", row), ("rows", row)],
            scale=scale,
            interpret=interpret,
        ), ()

    (out, top, total), _ = _in_parts(run, plan, queries)
    return _tokens_first(out, q), *(x[:, :, 0, : q.shape[1]].swapaxes(1, 2) for x in (top, total))


def backward(
    q: Array,
    near: tuple[Array, Array],
    far: tuple[Array, Array],
    seen: Ranges,
    d_out: Array,
    rows: Array,
    *,
    is_whole: bool,
    scale,
    interpret,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """The gradients; arguments as in `forward`, and `rows` is float32[B, 3, Q, N]: largest, 1 / sum and delta.

    Returns:
      dq, and float32 dk and dv of near and of far keys; far tiles from `seen.num_far` on may never have been written.
    """
    plan = _plan(q, near[0], far[0].shape[1], is_whole)
    tiling = plan.tiling
    keys, values = (_near_and_far(*x, tiling) for x in zip(near, far, strict=True))
    queries, d_outs = (_tokens_last(x, plan) for x in (q, d_out))
    rows, seen = _pad(jnp.transpose(rows, (0, 3, 1, 2)), 3, plan.queries), _filled(seen, plan)
    d_keys = jax.ShapeDtypeStruct(keys.shape, jnp.float32)

    def run(part):
        ranges, x = seen.change(part), part(queries)
        map = block_map(ranges, tiling)
        operands = [("ranges", _ranges(ranges, tiling)), ("queries", x), ("keys", keys), ("keys", values)]
        operands += [("queries", part(d_outs)), ("rows", part(rows))]
        call = functools.partial(_call, plan=plan, operands=operands, scale=scale, interpret=interpret)
        dq = call(kernels.query_gradient_kernel, query_visits(map, tiling), results=[("queries", x)])
        return dq, call(kernels.key_gradient_kernel, key_visits(map, tiling), results=[("keys", d_keys)] * 2)

    (dq,), gradients = _in_parts(run, plan, queries)
    d_near, d_far = zip(*(_apart(x, near[0].shape[1], far[0].shape[1], tiling) for x in gradients), strict=True)
    return _tokens_first(dq, q), list(d_near), list(d_far)


def _in_parts(run: Callable[..., Any], plan: _Plan, like: jax.Array) -> Any:
    """`run` on each part of the queries: results [..., queries] of all of them, and the sums of others.

    `run` gets a function that takes a part out of [..., queries]. `like` is an array that varies over a mesh as its
    results do.
    """
    if plan.parts == 1:
        return run(lambda x: x)

    def step(sums, number):
        results, more = run(lambda x: lax.dynamic_slice_in_dim(x, number * plan.part, plan.part, axis=-1))
        return jax.tree.map(jnp.add, sums, more), results

    _, shapes = jax.eval_shape(lambda: run(lambda x: x[..., : plan.part]))
    _, zeros = vary_alike((like, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)))
    sums, results = lax.scan(step, zeros, jnp.arange(plan.parts))
    results = [jnp.moveaxis(x, 0, -2) for x in results]
    return [x.reshape(*x.shape[:-2], plan.queries) for x in results], sums


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
        "ranges": (1, 4, tiling.block),  # of int32[B, 4, Q]
        "queries": (1, plan.step_queries, plan.head_size, tiling.block),  # of [B, N, H, Q]
        "rows": (1, plan.step_queries, x.shape[2], tiling.block),  # of float32[B, N, 1 or 3, Q]
        "keys": (1, plan.step_keys, plan.head_size, tiling.tile),  # of [B, K, H, near and far keys]
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
    tiling, Q = plan.tiling, arrays[0][1].shape[2]
    near, far = tiling.near_tiles * tiling.tile, tiling.far_tiles * tiling.tile
    # Packed keys of whole rows have room for all tokens, as a rule. A mesh has about as many as it has room for.
    global_keys = min(_TYPICAL_DENSITY * Q, far) if tiling.is_whole else far
    pairs = tiling.rows * plan.query_heads * Q * (min(_TYPICAL_WINDOW, near) + global_keys / 2)
    used = {"keys": (near + global_keys) / (near + far)}
    moved = sum(math.prod(x.shape) * x.dtype.itemsize * used.get(kind, 1) for kind, x in arrays)
    return pl.CostEstimate(
        flops=int(2 * products * pairs * plan.head_size), transcendentals=int(pairs), bytes_accessed=int(moved)
    )


def _ranges(seen: Ranges, tiling: Tiling) -> jax.Array:
    """int32[B, 4, Q]: near_start, near_end, far_start, far_end; far keys are numbered after near ones."""
    far = tiling.near_tiles * tiling.tile
    return jnp.stack([seen.near_start, seen.near_end, seen.far_start + far, seen.far_end + far], axis=1)


def _filled(seen: Ranges, plan: _Plan) -> Ranges:
    """Ranges of whole parts; queries after the last see nothing."""
    return seen.change(lambda x: _pad(jnp.asarray(x), 1, plan.queries))


def _near_and_far(near: Array, far: Array, tiling: Tiling) -> jax.Array:
    """[B, keys, K, H] each -> [B, K, H, near and far keys], both filled up to whole tiles."""
    near = _pad(jnp.asarray(near), 1, tiling.near_tiles * tiling.tile)
    far = _pad(jnp.asarray(far), 1, tiling.far_tiles * tiling.tile)
    return jnp.transpose(jnp.concatenate([near, far], axis=1), (0, 2, 3, 1))


def _apart(x: jax.Array, near: int, far: int, tiling: Tiling) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_near_and_far`, for so many near and far keys."""
    x = jnp.transpose(x, (0, 3, 1, 2))
    first = tiling.near_tiles * tiling.tile
    return x[:, :near], x[:, first : first + far]


def _tokens_last(x: Array, plan: _Plan) -> jax.Array:
    """[B, Q, N, H] -> [B, N, H, Q], filled up to whole parts."""
    return jnp.transpose(_pad(jnp.asarray(x), 1, plan.queries), (0, 2, 3, 1))


def _tokens_first(x: jax.Array, like: Array) -> jax.Array:
    """The inverse of `_tokens_last`."""
    return jnp.transpose(x[..., : like.shape[1]], (0, 3, 1, 2))


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])
