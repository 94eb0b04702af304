"""separator_attention in plain XLA: packed keys, block by block, memory linear in T, on any backend.

A block of queries visits two arrays of keys, in each the tiles that its queries' ranges touch:

    far     packed global keys   | . x x x x . . . . . |   x: from the smallest far_start to the largest far_end
    near    all keys             | . . . . . . . x x . |      from the smallest near_start to the last query

Where these hulls begin and how many tiles they take is data: the work follows the number of separators, n may be
traced, and a packed array with room for T keys costs memory only. All tiles of a block go through one online softmax in
float32. The backward pass recomputes the weights of each tile; no array of size T x T or T x S exists in either.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32

from sepjax.array_typing import Array, Keys, Queries
from sepjax.attention.examples import over_examples
from sepjax.attention.packing import pack, scaled, unpack, value_gradients, vary_alike, with_room
from sepjax.attention.ranges import Ranges, whole_rows
from sepjax.layout import SeparatorLayout

# Queries of a block, and keys of a tile. A CPU has little work for a short window when they are few (fastest of 32 to
# 256 at T = 256 and 2048); on a GPU the steps of a loop cost more than the keys that a larger tile wastes (H100, bf16,
# T = 32768, forward: 656 ms with 64, 42 ms with 512).
_BLOCK_ON_CPU, _BLOCK_ELSEWHERE = 64, 512


def unsupported(q: Queries) -> str | None:
    """Nothing is: plain XLA runs on any device, for every dtype and head size."""
    return None


@functools.partial(jax.jit, static_argnames="scale")
def attend(
    q: Queries,
    k: Keys,
    v: Keys,
    layout: SeparatorLayout,
    far_scale: Float32[Array, "B T"] | None = None,
    *,
    scale: float,
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`separator_attention` and its log-sum-exp; the arguments are checked there."""
    return _attend(*vary_alike((q, k, v, layout, far_scale)), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, layout, far_scale, scale):
    return _attend_forward(q, k, v, layout, far_scale, scale)[0]


def _attend_forward(q, k, v, layout, far_scale, scale):
    @over_examples
    def rows(q, k, v, layout, far_scale):
        seen = whole_rows(layout)
        return with_room(layout, lambda roomy: _forward(q, (k, v), _far(k, v, roomy, far_scale), seen, scale))

    out, top, total = rows(q, k, v, layout, far_scale)
    return (out, _lse(top, total)), (q, k, v, layout, far_scale, out, top, total)


def _attend_backward(scale, residuals, cotangents):
    @over_examples
    def rows(q, k, v, layout, far_scale, out, top, total, cotangents):
        of_queries = _rows(q, out, top, total, cotangents)

        def run(layout):
            dq, d_near, d_far = _backward(of_queries, (k, v), _far(k, v, layout, far_scale), whole_rows(layout), scale)
            (near_dk, near_dv), (dk, dv) = ([x.swapaxes(1, 2) for x in pair] for pair in (d_near, d_far))
            dk = near_dk + unpack(dk, layout, axis=1)
            dv, d_scale = value_gradients(near_dv, unpack(dv, layout, axis=1), v, far_scale)
            return dq, dk.astype(k.dtype), dv, d_scale

        return with_room(layout, run)

    dq, dk, dv, d_scale = rows(*residuals, cotangents)
    return dq, dk, dv, None, d_scale


def _far(k, v, layout, far_scale):
    """The packed keys and values."""
    return pack(k, layout), scaled(pack(v, layout), far_scale, layout)


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.jit, static_argnames="scale")
def attend_ranges(
    q: Queries, near: tuple[Array, Array], far: tuple[Array, Array], seen: Ranges, *, scale: float
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`attend` over near and far (k, v), each [B, keys, K, H], of which the queries see `seen`."""
    q, near, far, seen = vary_alike((q, near, far, seen))
    return _attend_ranges(q, near, far, seen, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_ranges(q, near, far, seen, scale):
    return _attend_ranges_forward(q, near, far, seen, scale)[0]


def _attend_ranges_forward(q, near, far, seen, scale):
    out, top, total = over_examples(functools.partial(_forward, scale=scale))(q, near, far, seen)
    return (out, _lse(top, total)), (q, near, far, seen, out, top, total)


def _attend_ranges_backward(scale, residuals, cotangents):
    @over_examples
    def rows(q, near, far, seen, out, top, total, cotangents):
        dq, *gradients = _backward(_rows(q, out, top, total, cotangents), near, far, seen, scale)
        return dq, *(tuple(x.swapaxes(1, 2).astype(q.dtype) for x in pair) for pair in gradients)

    return *rows(*residuals, cotangents), None


_attend_ranges.defvjp(_attend_ranges_forward, _attend_ranges_backward)


def _lse(top, total):
    return jnp.where(total > 0, top + jnp.log(total), -jnp.inf)


def _rows(q, out, top, total, cotangents):
    """What belongs to queries in the backward pass: q, d_out, top, 1 / total and delta."""
    # Weights are recomputed as exp(S - top) / total: exp(S - lse) would carry the rounding of a large lse.
    d_out, d_lse = cotangents
    norm = jnp.where(total > 0, 1 / total, 0.0)
    # dS = P * (dP - sum(P * dP) + dlse), where sum(P * dP) = sum(O * dO).
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    return q, d_out, top, norm, delta


def _forward(q, near, far, seen, scale):
    """Returns out, and of every query the largest score and the sum of exp(score - largest): 0 if it sees nothing.

    near, far: (k, v), each [B, keys, K, H].
    """
    block, K = _block_length(seen), near[0].shape[2]
    near_seen, far_seen = _tiles(seen, block)
    near_keys, far_keys = _keys(near, block), _keys(far, block)

    def attend_block(x):
        q, near, far = x

        def step(keys, first, visible, state):
            top, total, acc = state
            k, v = (_tile(x, first, block) for x in keys)
            s = _scores(q, k, visible, scale)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + _dot("bkgqc,bkch->bkgqh", p.astype(v.dtype), v)
            return new_top, total * shrink + jnp.sum(p, axis=-1), acc

        # The lowest finite number, not -inf: exp(-inf - top) is then 0 for a masked score, never NaN.
        lowest = jnp.full_like(q, jnp.finfo(jnp.float32).min, jnp.float32, shape=q.shape[:-1])
        state = lowest, jnp.zeros_like(lowest), jnp.zeros_like(q, jnp.float32)
        state = _visit(far, block, functools.partial(step, far_keys), state)
        top, total, acc = _visit(near, block, functools.partial(step, near_keys), state)
        out = acc / jnp.where(total > 0, total, 1.0)[..., None]
        return out.astype(q.dtype), top, total

    blocks = lax.map(attend_block, (_blocks(q, K, block), near_seen, far_seen))
    return tuple(_unblocks(x, seen.queries) for x in blocks)


def _backward(rows, near, far, seen, scale):
    """Returns dq, and float32 [B, K, keys, H] dk and dv of near and of far keys; `rows` is what `_rows` returns."""
    block, K = _block_length(seen), near[0].shape[2]
    near_seen, far_seen = _tiles(seen, block)
    near_keys, far_keys = _keys(near, block), _keys(far, block)

    def block_gradients(d_keys, x):
        (q, d_out, top, norm, delta), near, far = x

        def step(keys, first, visible, state):
            dq, dk, dv = state
            k, v = (_tile(x, first, block) for x in keys)
            p = jnp.exp(_scores(q, k, visible, scale) - top[..., None]) * norm[..., None]
            dp = _dot("bkgqh,bkch->bkgqc", d_out, v)
            ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
            dq = dq + _dot("bkgqc,bkch->bkgqh", ds, k)
            dk = _add_tile(dk, first, _dot("bkgqc,bkgqh->bkch", ds, q))
            dv = _add_tile(dv, first, _dot("bkgqc,bkgqh->bkch", p.astype(q.dtype), d_out))
            return dq, dk, dv

        d_near, d_far = d_keys
        dq = jnp.zeros_like(q, jnp.float32)
        dq, *d_far = _visit(far, block, functools.partial(step, far_keys), (dq, *d_far))
        dq, *d_near = _visit(near, block, functools.partial(step, near_keys), (dq, *d_near))
        return (d_near, d_far), dq.astype(q.dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (near_keys, far_keys))
    xs = [_blocks(x, K, block) for x in rows], near_seen, far_seen
    d_keys, dq = lax.scan(block_gradients, zeros, xs)
    d_near, d_far = ([x[:, :, : x.shape[2] - block] for x in pair] for pair in d_keys)
    return _unblocks(dq, seen.queries), d_near, d_far


class _Tiles(NamedTuple):
    """What query blocks see of one array of keys. The first axis, nb, counts the blocks; Q is a block's length."""

    start: jax.Array  # int32[nb, B, Q]: each query sees the keys [start, end)
    end: jax.Array  # int32[nb, B, Q]
    first: jax.Array  # int32[nb]: the first key of the block's first tile
    tiles: jax.Array  # int32[nb]: tiles from there to the last key that a query of the block sees


def _block_length(seen: Ranges) -> int:
    return min(_BLOCK_ON_CPU if jax.default_backend() == "cpu" else _BLOCK_ELSEWHERE, seen.queries)


def _tiles(seen: Ranges, block: int) -> tuple[_Tiles, _Tiles]:
    """The near and the far tiles; queries beyond T, which fill the last block, see nothing."""

    def blocks(start, end):
        start, end = (_split(x, block) for x in (start, end))
        some = start < end
        first = jnp.min(jnp.where(some, start, jnp.iinfo(jnp.int32).max), axis=(1, 2))
        stop = jnp.max(jnp.where(some, end, 0), axis=(1, 2))
        first = jnp.minimum(first, stop)
        return _Tiles(start, end, first, -(-(stop - first) // block))

    return blocks(seen.near_start, seen.near_end), blocks(seen.far_start, seen.far_end)


def _visit(ranges, block, step, state):
    """Folds `step(first key, visible[B, Q, block], state)` over the tiles of one query block."""

    def tile(t, state):
        first = ranges.first + t * block
        key = first + jnp.arange(block, dtype=jnp.int32)
        visible = (ranges.start[..., None] <= key) & (key < ranges.end[..., None])
        return step(first, visible, state)

    return lax.fori_loop(0, ranges.tiles, tile, state)


def _scores(q, k, visible, scale):
    """float32[B, K, G, Q, block], -inf where a query does not see a key."""
    return jnp.where(visible[:, None, None], _dot("bkgqh,bkch->bkgqc", q, k) * scale, -jnp.inf)


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _tile(x, first, block):
    return lax.dynamic_slice_in_dim(x, first, block, axis=2)


def _add_tile(x, first, tile):
    return lax.dynamic_update_slice_in_dim(x, _tile(x, first, tile.shape[2]) + tile, first, axis=2)


def _keys(keys, block):
    """(k, v) [B, K, keys + block, H]: a tile from any key on is in bounds."""
    return [jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, block), (0, 0))) for x in keys]


def _split(x, block):
    """[B, T, ...] -> [nb, B, Q, ...], zeros after the last token."""
    B, T, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % block)) + ((0, 0),) * len(rest))
    return x.reshape(B, -1, block, *rest).swapaxes(0, 1)


def _blocks(x, K, block):
    """[B, T, N, ...] -> [nb, B, K, G, Q, ...], the G = N / K query heads beside the key head that they share."""
    x = _split(x, block)
    x = x.reshape(*x.shape[:3], K, -1, *x.shape[4:])
    return jnp.moveaxis(x, 2, 4)


def _unblocks(x, T):
    """[nb, B, K, G, Q, ...] -> [B, T, N, ...]."""
    x = jnp.moveaxis(x, (0, 4), (1, 2))  # [B, nb, Q, K, G, ...]
    B, nb, Q, K, G, *rest = x.shape
    return x.reshape(B, nb * Q, K * G, *rest)[:, :T]
