"""separator_attention on Hopper GPUs: what surrounds the kernels of mosaic_gpu_kernels.py.

Forward: the global keys are packed, the rows' ranges lined up, one kernel runs. Backward: two kernels, one for dQ, one
for dK and dV of packed and of near keys together; each global key then reads its packed gradient. No kernel adds to
what another block wrote, so the same input gives the same bits. Nothing of size T x T or T x S exists.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from sepjax.array_typing import Array, Keys, Queries
from sepjax.attention import mosaic_gpu_kernels as kernels
from sepjax.attention.examples import over_examples
from sepjax.attention.mosaic_gpu_kernels import KeyTiles, Shape, Tiles
from sepjax.attention.packing import (
    packed_index,
    scaled,
    unpack,
    unserved,
    value_gradients,
    vary_alike,
    with_filled_heads,
    with_positive_scale,
    with_room,
)
from sepjax.attention.ranges import Ranges, whole_rows
from sepjax.attention.target import target
from sepjax.layout import SeparatorLayout

_H100_SMS = 132  # where the device does not tell
_FEW_BLOCKS = 8  # for each SM: of fewer near keys' the work is evened out, and fewer of queries are not made longer
_SHORT_ROW = 2048  # up to it blocks of queries have three tiles, most of them masked
_LONG_ROW = 16384  # beyond it the parts of packed gradients take memory, and with separators packed blocks are many
_FEW_COMPARISONS = 2**24  # of the queries of a row with the blocks of its keys: of 32,768 tokens there are half as many
_PACK_ROWS, _PACK_COLUMNS = 32, 1024  # of a block that packs keys: two of 64 KiB fit its shared memory


def unsupported(q: Queries) -> str | None:
    """Why the kernels cannot serve a call on the device that is traced for, or None when they can."""
    device = target()
    if device.capability != "9.0":
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), the device is {device}"
    return unserved(q.dtype, q.shape[3], (jnp.bfloat16, jnp.float16), fills=True)


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
    """`separator_attention` and its log-sum-exp; the arguments are checked there and by `unsupported`."""
    q, scale = with_positive_scale(q, scale)
    q, k, v, layout, far_scale = _checked((q, k, v, layout, far_scale))
    length = q.shape[1]

    def run(heads):
        return with_room(layout, lambda layout: _attend(*_aligned(heads, layout), far_scale, scale, length))

    return with_filled_heads((q, k, v), run)


@functools.partial(jax.jit, static_argnames="scale")
def attend_ranges(
    q: Queries, near: tuple[Array, Array], far: tuple[Array, Array], seen: Ranges, *, scale: float
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`attend` over near and far (k, v), each [B, keys, K, H], of which the queries see `seen`."""
    q, scale = with_positive_scale(q, scale)
    q, near, far, seen = _checked((q, near, far, seen))
    length = q.shape[1]

    def run(heads):
        of_tokens = (_filled(x, kernels.ALIGNMENT) for x in heads[:3])
        return _attend_ranges(*of_tokens, *(_filled(x, _PACK_ROWS) for x in heads[3:]), seen, scale, length)

    return with_filled_heads((q, *near, *far), run)


def _checked(arrays):
    arrays = vary_alike(arrays)
    if jax.typeof(arrays[0]).mat.varying:
        raise NotImplementedError(
            "the Hopper kernels run inside jax.shard_map only without its check of varying axes, which Mosaic GPU does "
            "not know; pass check_vma=False to jax.shard_map"
        )
    return arrays


def _filled(x, unit):
    """[B, T, ...] with T filled up to a multiple of `unit`, at least one."""
    extra = -x.shape[1] % unit if x.shape[1] else unit
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x


def _aligned(arrays, layout):
    """Rows of tokens filled up to a multiple of kernels.ALIGNMENT, packed keys to one of _PACK_ROWS."""
    room = max(layout.capacity, 1)
    room += -room % _PACK_ROWS
    layout = layout if room == layout.capacity else layout.with_capacity(room)  # which packs again
    return *(_filled(x, kernels.ALIGNMENT) for x in arrays), layout


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, layout, far_scale, scale, length):
    return _attend_forward(q, k, v, layout, far_scale, scale, length)[0]


def _attend_forward(q, k, v, layout, far_scale, scale, length):
    @over_examples
    def rows(q, k, v, layout, far_scale):
        shape = _shape(q, k, layout, scale)
        far_k, far_v = _pack(shape, k, v, layout)
        far = far_k, scaled(far_v, far_scale, layout)
        return far, *_forward(shape, (q, k, v, *far), whole_rows(layout), length)

    far, results, of_queries = rows(q, k, v, layout, far_scale)
    return results, (((q, k, v, *far), *of_queries), layout, far_scale)


def _attend_backward(scale, length, residuals, cotangents):
    @over_examples
    def rows(saved, layout, far_scale, cotangents):
        q, k, v = saved[0][:3]
        shape = _shape(q, k, layout, scale)
        dq, far_dk, far_dv, dk, dv = _backward(shape, saved, whole_rows(layout), length, cotangents)

        def to_tokens(far):
            far = unpack(far, layout, axis=1).reshape(shape.B, length, shape.K, -1, shape.H)
            return jnp.sum(far.astype(jnp.float32), axis=3)

        def filled(x):
            return jnp.pad(x, ((0, 0), (0, shape.T - length), (0, 0), (0, 0)))

        dk = (dk[:, :length].astype(jnp.float32) + to_tokens(far_dk)).astype(dk.dtype)
        dv, d_scale = value_gradients(dv[:, :length], to_tokens(far_dv), v[:, :length], far_scale)
        return dq, filled(dk), filled(dv), d_scale

    dq, dk, dv, d_scale = rows(*residuals, cotangents)
    return dq, dk, dv, None, d_scale


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend_ranges(q, k, v, far_k, far_v, seen, scale, length):
    return _attend_ranges_forward(q, k, v, far_k, far_v, seen, scale, length)[0]


def _attend_ranges_forward(q, k, v, far_k, far_v, seen, scale, length):
    @over_examples
    def rows(q, k, v, far_k, far_v, seen):
        return _forward(_shape(q, k, far_k, scale), (q, k, v, far_k, far_v), seen, length)

    arrays = q, k, v, far_k, far_v
    results, of_queries = rows(*arrays, seen)
    return results, ((arrays, *of_queries), seen)


def _attend_ranges_backward(scale, length, residuals, cotangents):
    @over_examples
    def rows(saved, seen, cotangents):
        q, k, _, far_k, _ = saved[0]
        shape = _shape(q, k, far_k, scale)
        dq, far_dk, far_dv, dk, dv = _backward(shape, saved, seen, length, cotangents)
        is_key = (jnp.arange(shape.S) < seen.num_far[:, None])[..., None, None]  # others may never have been written

        def combine(far):
            far = far.reshape(shape.B, shape.S, shape.K, -1, shape.H).astype(jnp.float32)
            return jnp.where(is_key, jnp.sum(far, axis=3), 0).astype(shape.dtype)

        return dq, dk, dv, combine(far_dk), combine(far_dv)

    return *rows(*residuals, cotangents), None


_attend_ranges.defvjp(_attend_ranges_forward, _attend_ranges_backward)


def _forward(shape, arrays, seen, length):
    """`attend`'s results for aligned (q, k, v, packed k, packed v), and what `_backward` needs of the queries."""
    tiles = forward_tiles(shape)
    if shape.H == 128 and shape.T <= _SHORT_ROW:
        tiles = dataclasses.replace(tiles, turns=False, halves=True)
    out, lse = kernels.forward(shape, tiles)(*arrays, _ranges(seen, shape.padded))
    natural = jnp.where(jnp.isinf(lse), -jnp.inf, lse * math.log(2))[:, :, :length].swapaxes(1, 2)
    return (out[:, :length], natural), (out, lse)


def _backward(shape, saved, seen, length, cotangents):
    """dq, the packed dk and dv in parts (`KeyTiles.splits`), and the near dk and dv."""
    arrays, out, lse = saved
    d_out, d_lse = cotangents
    d_out = jnp.pad(d_out, ((0, 0), (0, shape.T - length), (0, 0), (0, 0)))
    d_lse = jnp.pad(d_lse.swapaxes(1, 2), ((0, 0), (0, 0), (0, shape.padded - length)))
    if not shape.roomy:
        sums = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        d_lse -= jnp.pad(sums, ((0, 0), (0, 0), (0, shape.padded - shape.T)))
    inputs = *arrays, _ranges(seen, shape.padded), d_out
    dq, delta = kernels.query_gradient(shape, _query_gradient_tiles(shape))(*inputs, out, lse, d_lse)
    tiles = _key_gradient_tiles(shape)
    visitors = _visitors(seen, shape, tiles.keys)
    return dq, *kernels.key_gradients(shape, tiles)(*inputs, lse, delta, *visitors)


def _shape(q, k, packed, scale):
    """`packed`: the packed keys, or the layout that says how many there are room for."""
    B, T, N, H = q.shape
    S = packed.capacity if isinstance(packed, SeparatorLayout) else packed.shape[1]
    shape = Shape(B, T, N, k.shape[2], H, S, k.shape[1], q.dtype, scale, target().num_cores or _H100_SMS)
    wide, is_alone = 3 * kernels.ROWS, H == 64 and shape.group % 2 and shape.group % 3
    return dataclasses.replace(shape, unit=wide) if is_alone and _are_many(B * N * -(-T // wide), shape) else shape


def _are_many(blocks: int, shape: Shape) -> bool:
    """Whether so many blocks keep every SM as busy as the others."""
    return blocks >= _FEW_BLOCKS * shape.num_sms


def _rows(shape: Shape) -> tuple[int, int]:
    """Query heads of a block of queries, and the warpgroups that compute it.

    Three warpgroups have 160 registers a thread, which is enough for heads of 64. They find each other's gaps better
    than two that take turns. With a head each, the block has 64 tokens; of one head it has 192 (`Shape.unit`), where
    there are many.
    """
    if shape.H == 64 and shape.group % 2 and shape.group % 3 == 0:
        return 3, 3
    if shape.unit == 3 * kernels.ROWS:
        return 1, 3
    return max(heads for heads in (1, 2, 4) if shape.group % heads == 0), 2


def forward_tiles(shape: Shape) -> Tiles:
    """Of the forward kernel."""
    keys, stages = {64: (128, 4), 128: (128, 2), 256: (64, 2)}[shape.H]
    return Tiles(keys, stages, *_rows(shape))


def _query_gradient_tiles(shape: Shape) -> Tiles:
    keys, stages = {64: (64, 4), 128: (64, 2), 256: (64, 1)}[shape.H]
    return Tiles(keys, stages, *_rows(shape))


def _key_gradient_tiles(shape: Shape) -> KeyTiles:
    """The query heads of packed blocks are cut where there are few key heads, and where SMs have few blocks.

    Packed blocks are visited by up to T queries, near ones by those of a window. Each SM is dealt as many blocks as any
    other, so of few, the ones that have a packed block have much more to do.
    """
    ways = [s for s in range(1, shape.group + 1) if shape.group % s == 0]
    splits = next((s for s in ways if shape.B * shape.K * s >= 8), shape.group)
    stages, warpgroups = {64: (4, 3), 128: (2, 2), 256: (1, 2)}[shape.H]
    tiles = KeyTiles(splits, stages, shared=shape.H == 256, warpgroups=warpgroups)
    blocks = -(-shape.near // tiles.keys) * shape.B * shape.K
    is_uneven = not _are_many(blocks, shape) and shape.near <= _LONG_ROW
    return dataclasses.replace(tiles, splits=shape.group) if is_uneven else tiles


def _pack(shape, k, v, layout):
    heads = max(h for h in range(1, shape.K + 1) if shape.K % h == 0 and h * shape.H <= max(_PACK_COLUMNS, shape.H))
    return kernels.pack(shape, _PACK_ROWS, heads)(k, v, packed_index(layout), layout.num_global)


def _ranges(seen: Ranges, padded: int) -> jax.Array:
    """int32 [B, 4, padded]: far start and end, near start and end; queries beyond the last see nothing."""
    i = jnp.arange(padded, dtype=jnp.int32)

    def pad(x, beyond):
        x = jnp.pad(x, ((0, 0), (0, padded - seen.queries)))
        return jnp.where(i < seen.queries, x, beyond)

    far_last, near_last = seen.far_end[:, -1:], seen.near_end[:, -1:]
    far = [pad(x, far_last) for x in (seen.far_start, seen.far_end)]
    near = [pad(x, near_last) for x in (seen.near_start, seen.near_end)]
    return jnp.stack(far + near, axis=1)


def _visitors(seen: Ranges, shape: Shape, keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each block of packed keys and of near keys the queries [first, last) that see some, int32 [B, 2, blocks].

    Ranges never decrease along a row, so searching is counting. A packed block without global keys has last = -1; the
    third result, int32 [1], counts the packed blocks that have some, in the row that has most.
    """

    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def queries_before(starts, ends, first_key):
        # Comparing all with all is half as many kernels; in a row of a million tokens XLA needs a minute to compile it.
        is_short = starts.size * first_key.size <= _FEW_COMPARISONS
        search = functools.partial(jnp.searchsorted, method="compare_all" if is_short else "scan_unrolled")
        return search(ends, first_key, side="right"), search(starts, first_key + keys)

    first_key = jnp.arange(-(-shape.S // keys), dtype=jnp.int32) * keys
    far_first, far_last = queries_before(seen.far_start, seen.far_end, first_key)
    far_last = jnp.where(first_key < seen.num_far[:, None], far_last, -1)
    first_key = jnp.arange(-(-shape.near // keys), dtype=jnp.int32) * keys
    near = queries_before(seen.near_start, seen.near_end, first_key)
    far_blocks = -(-jnp.max(seen.num_far, keepdims=True) // keys)
    return jnp.stack([far_first, far_last], axis=1), jnp.stack(near, axis=1), far_blocks
