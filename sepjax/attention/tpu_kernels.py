"""The arithmetic of separator_attention on a TPU: three Pallas kernels, each a walk over a list of visits.

A step computes one tile of keys against one block of queries, for a few heads. Arrays lie transposed, [..., H, T]: a
token in each lane, so that nothing is padded to 128 lanes where H is 64. So do the scores, a query in each lane:

                      queries  ->  lanes
        keys     s s s s s s s s      visible: key >= start[query] & key < end[query], ranges lie along lanes
        |        s s s s s s s s
        v        s s s s s s s s      maximum, sum: over sublanes, elementwise work of whole registers
     sublanes    -----------------
                 t t t t t t t t      (maximum, sum) [1, block]: one register per 1024 queries, not one per 8

The softmax state of a block is a few rows, and rescaling broadcasts along sublanes. A head's scores are issued before
the head in front of it is done with: one head at a time would leave the matrix units idle at every softmax. Softmax and
accumulation are float32; matmuls take q's dtype.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sepjax.attention.block_map import Tiling, Visit

LOWEST = float(jnp.finfo(jnp.float32).min)  # not -inf: exp(-inf - LOWEST) is 0 for a masked score, never NaN

# Rows of the int32[B, 4, T] array of ranges. Far keys are numbered after near ones, as they lie in the array.
NEAR_START, NEAR_END, FAR_START, FAR_END = range(4)
# Rows of the float32[B, N, 3, T] array of what the backward pass needs of each query.
TOP, NORM, DELTA = range(3)


def forward_kernel(words, ranges, q, k, v, out, top, total, acc, *, tiling: Tiling, scale: float):
    """Grid (head groups, visits by block): one online softmax over all tiles that a block visits.

    Blocks: ranges [1, 4, Q]; q, out [1, h, H, Q]; k, v [1, h', H, C]; top, total [1, h, 1, Q], the largest product of
    query and key and the sum of exp(scale * (product - top)); scratch acc [h, H, Q]. h query heads share h' key heads.
    scale > 0.
    """
    visit = tiling.unpack(words[pl.program_id(1)])

    @pl.when(visit.first)
    def _():
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    visible = _visible(visit, ranges, tiling)
    heads = _heads(q, k)
    for (head, shared), s in _ahead(lambda head, shared: _products(q[0, head], k[0, shared], visible), heads):
        old_top = top[0, head]
        new_top = jnp.maximum(old_top, jnp.max(s, axis=0, keepdims=True))
        p = _exp(s - new_top, scale)
        shrink = _exp(old_top - new_top, scale)
        top[0, head] = new_top
        total[0, head] = total[0, head] * shrink + jnp.sum(p, axis=0, keepdims=True)
        acc[head] = acc[head] * shrink + _dot(v[0, shared], p.astype(v.dtype))

    @pl.when(visit.last)
    def _():
        for head, _ in heads:
            norm = jnp.where(total[0, head] > 0, total[0, head], 1.0)
            out[0, head] = (acc[head] / norm).astype(out.dtype)


def query_gradient_kernel(words, ranges, q, k, v, d_out, rows, dq, acc, *, tiling: Tiling, scale: float):
    """Grid (head groups, visits by block). Blocks as in the forward pass; rows [1, h, 3, Q]; scratch acc [h, H, Q]."""
    visit = tiling.unpack(words[pl.program_id(1)])

    @pl.when(visit.first)
    def _():
        acc[...] = jnp.zeros_like(acc)

    heads = _heads(q, k)
    for (head, shared), pair in _ahead(_both_products(visit, ranges, q, k, v, d_out, tiling), heads):
        _, ds = _weights(*pair, rows[0, head], scale)
        acc[head] += _dot(k[0, shared], ds.astype(k.dtype))

    @pl.when(visit.last)
    def _():
        for head, _ in heads:
            dq[0, head] = (acc[head] * scale).astype(dq.dtype)


def key_gradient_kernel(words, ranges, q, k, v, d_out, rows, dk, dv, *, tiling: Tiling, scale: float):
    """Grid (key head groups, visits by tile, query head groups of a key head). dk, dv: float32 [1, h', H, C]."""
    visit = tiling.unpack(words[pl.program_id(1)])
    group, groups = pl.program_id(2), pl.num_programs(2)

    @pl.when(visit.first & (group == 0))
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    heads = _heads(q, k)
    for (head, shared), pair in _ahead(_both_products(visit, ranges, q, k, v, d_out, tiling), heads):
        p, ds = _weights(*pair, rows[0, head], scale)
        dv[0, shared] += _dot_nt(d_out[0, head], p.astype(q.dtype))
        dk[0, shared] += _dot_nt(q[0, head], ds.astype(q.dtype))

    @pl.when(visit.last & (group == groups - 1))
    def _():
        dk[...] *= scale


def _heads(q, k):
    """(query head, key head) of a step."""
    return [(head, head * k.shape[1] // q.shape[1]) for head in range(q.shape[1])]


def _ahead[R](compute: Callable[..., R], heads: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], R]]:
    """Each head with `compute(*head)`, which is issued before the head in front of it is done with."""
    following = compute(*heads[0])
    for i, head in enumerate(heads):
        result = following
        if i + 1 < len(heads):
            following = compute(*heads[i + 1])
        yield head, result


def _visible(visit: Visit, ranges, tiling: Tiling) -> jax.Array:
    """bool[C, Q]: which query sees which key of the visited tile."""
    is_far = visit.tile >= tiling.near_tiles
    start = jnp.where(is_far, ranges[0, FAR_START : FAR_START + 1], ranges[0, NEAR_START : NEAR_START + 1])
    end = jnp.where(is_far, ranges[0, FAR_END : FAR_END + 1], ranges[0, NEAR_END : NEAR_END + 1])
    first = visit.tile * tiling.tile
    key = jax.lax.broadcasted_iota(jnp.int32, (tiling.tile, tiling.block), 0)
    return (key >= start - first) & (key < end - first)


def _products(q, k, visible):
    """float32[C, Q], of which the scores are `scale` times as much: -inf where a query does not see a key."""
    return jnp.where(visible, _dot_tn(k, q), -jnp.inf)


def _exp(difference, scale):
    """exp(scale * difference) with one multiplication, after the subtraction: large scores are not rounded again."""
    return jnp.exp2(difference * (scale * math.log2(math.e)))


def _both_products(visit, ranges, q, k, v, d_out, tiling):
    """`_products` and the gradient of the weights of a head, [C, Q] each, as a function of (head, key head)."""
    visible = _visible(visit, ranges, tiling)

    def products(head: int, shared: int) -> tuple[jax.Array, jax.Array]:
        return _products(q[0, head], k[0, shared], visible), _dot_tn(v[0, shared], d_out[0, head])

    return products


def _weights(s, dp, rows, scale):
    """Softmax weights [C, Q] and the gradient of the scores, from rows [3, Q]."""
    top, norm, delta = (rows[i : i + 1] for i in (TOP, NORM, DELTA))
    p = _exp(s - top, scale) * norm
    return p, p * (dp - delta)


def _contract(x, y, x_axis, y_axis):
    # float32 in several bfloat16 passes: by default the MXU would round it to bfloat16.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


_dot = functools.partial(_contract, x_axis=1, y_axis=0)
_dot_nt = functools.partial(_contract, x_axis=1, y_axis=1)
_dot_tn = functools.partial(_contract, x_axis=0, y_axis=0)
