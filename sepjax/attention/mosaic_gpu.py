"""separator_attention on Hopper GPUs: what surrounds the kernels of mosaic_gpu_kernels.py.

Forward: the global keys are packed, the rows' ranges lined up, one kernel runs. Backward: two kernels, one for dQ, one
for dK and dV of packed and of near keys together; each global key then reads its packed gradient. No kernel adds to
what another block wrote, so the same input gives the same bits. Nothing of size T x T or T x S exists.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from sepjax.array_typing import Array, Keys, Queries
from sepjax.attention import mosaic_gpu_kernels as kernels
from sepjax.attention.mosaic_gpu_kernels import KeyTiles, Shape, Tiles
from sepjax.attention.packing import packed_index, unpack, unserved, vary_alike, with_positive_scale, with_room
from sepjax.attention.target import target
from sepjax.layout import SeparatorLayout

_H100_SMS = 132  # where the device does not tell
_PACK_ROWS, _PACK_COLUMNS = 32, 1024  # of a block that packs keys: two of 64 KiB fit its shared memory


def unsupported(q: Queries) -> str | None:
    """Why the kernels cannot serve a call on the device that is traced for, or None when they can."""
    device = target()
    if device.capability != "9.0":
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), the device is {device}"
    return unserved(q, (jnp.bfloat16, jnp.float16))


@functools.partial(jax.jit, static_argnames="scale")
def attend(
    q: Queries, k: Keys, v: Keys, layout: SeparatorLayout, *, scale: float
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`separator_attention` and its log-sum-exp; the arguments are checked there and by `unsupported`."""
    q, scale = with_positive_scale(q, scale)
    q, k, v, layout = vary_alike((q, k, v, layout))
    if jax.typeof(q).mat.varying:
        raise NotImplementedError(
            "the Hopper kernels run inside jax.shard_map only without its check of varying axes, which Mosaic GPU does "
            "not know; pass check_vma=False to jax.shard_map"
        )
    return with_room(layout, lambda layout: _attend(*_aligned((q, k, v), layout), scale, q.shape[1]))


def _aligned(arrays, layout):
    """Rows of tokens filled up to a multiple of kernels.ALIGNMENT, packed keys to one of _PACK_ROWS."""
    extra = -layout.length % kernels.ALIGNMENT
    if extra:
        arrays = [jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in arrays]
    room = max(layout.capacity, 1)
    return *arrays, layout.with_capacity(room + -room % _PACK_ROWS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, layout, scale, length):
    return _attend_forward(q, k, v, layout, scale, length)[0]


def _attend_forward(q, k, v, layout, scale, length):
    shape = _shape(q, k, layout, scale)
    far_k, far_v = _pack(shape, k, v, layout)
    out, lse = kernels.forward(shape, _forward_tiles(shape))(q, k, v, far_k, far_v, _ranges(layout, shape.padded))
    natural = jnp.where(jnp.isinf(lse), -jnp.inf, lse * math.log(2))[:, :, :length].swapaxes(1, 2)
    return (out[:, :length], natural), (q, k, v, far_k, far_v, layout, out, lse)


def _attend_backward(scale, length, residuals, cotangents):
    q, k, v, far_k, far_v, layout, out, lse = residuals
    shape = _shape(q, k, layout, scale)
    d_out, d_lse = cotangents
    d_out = jnp.pad(d_out, ((0, 0), (0, shape.T - length), (0, 0), (0, 0)))
    d_lse = jnp.pad(d_lse.swapaxes(1, 2), ((0, 0), (0, 0), (0, shape.padded - length)))
    if not shape.roomy:
        sums = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        d_lse -= jnp.pad(sums, ((0, 0), (0, 0), (0, shape.padded - shape.T)))
    inputs = q, k, v, far_k, far_v, _ranges(layout, shape.padded), d_out
    dq, delta = kernels.query_gradient(shape, _query_gradient_tiles(shape))(*inputs, out, lse, d_lse)
    tiles = _key_gradient_tiles(shape)
    visitors = _visitors(layout, shape, tiles.keys)
    far_dk, far_dv, dk, dv = kernels.key_gradients(shape, tiles)(*inputs, lse, delta, *visitors)

    def combine(far, near):
        far = unpack(far, layout, axis=1).reshape(shape.B, length, shape.K, tiles.splits, shape.H)
        return (near[:, :length].astype(jnp.float32) + jnp.sum(far.astype(jnp.float32), axis=3)).astype(near.dtype)

    pad = ((0, 0), (0, shape.T - length), (0, 0), (0, 0))
    return dq, jnp.pad(combine(far_dk, dk), pad), jnp.pad(combine(far_dv, dv), pad), None


_attend.defvjp(_attend_forward, _attend_backward)


def _shape(q, k, layout, scale):
    B, T, N, H = q.shape
    return Shape(B, T, N, k.shape[2], H, layout.capacity, q.dtype, scale, target().num_cores or _H100_SMS)


def _heads(shape: Shape) -> int:
    return max(heads for heads in (1, 2, 4) if shape.group % heads == 0)


def _forward_tiles(shape: Shape) -> Tiles:
    keys, stages = {64: (128, 4), 128: (128, 2), 256: (64, 2)}[shape.H]
    return Tiles(keys, stages, _heads(shape))


def _query_gradient_tiles(shape: Shape) -> Tiles:
    keys, stages = {64: (64, 4), 128: (64, 2), 256: (64, 1)}[shape.H]
    return Tiles(keys, stages, _heads(shape))


def _key_gradient_tiles(shape: Shape) -> KeyTiles:
    ways = [s for s in range(1, shape.group + 1) if shape.group % s == 0]
    splits = next((s for s in ways if shape.B * shape.K * s >= 8), shape.group)
    return KeyTiles(splits, stages={64: 4, 128: 2, 256: 1}[shape.H], shared=shape.H == 256)


def _pack(shape, k, v, layout):
    heads = max(h for h in range(1, shape.K + 1) if shape.K % h == 0 and h * shape.H <= max(_PACK_COLUMNS, shape.H))
    return kernels.pack(shape, _PACK_ROWS, heads)(k, v, packed_index(layout), layout.num_global)


def _ranges(layout: SeparatorLayout, padded: int) -> jax.Array:
    """int32 [B, 4, padded]: far start and end, near start and end; tokens beyond T see nothing."""
    i = jnp.arange(padded, dtype=jnp.int32)
    last = layout.num_global[:, None]

    def pad(x, beyond):
        x = jnp.pad(x, ((0, 0), (0, padded - layout.length)))
        return jnp.where(i < layout.length, x, beyond)

    near_end = jnp.broadcast_to(i + 1, (last.shape[0], padded))
    return jnp.stack(
        [pad(layout.far_start, last), pad(layout.far_end, last), pad(layout.near_start, i + 1), near_end], axis=1
    )


def _visitors(layout: SeparatorLayout, shape: Shape, keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each block of packed keys and of tokens the queries [first, last) that see some of it, int32 [B, 2, blocks].

    Ranges never decrease along a row, so counting is searching. A packed block without global keys has last = -1; the
    third result, int32 [1], counts the packed blocks that have some, in the row that has most.
    """

    def count(condition):
        return jnp.sum(condition, axis=2, dtype=jnp.int32)

    first_key = jnp.arange(-(-shape.S // keys), dtype=jnp.int32)[:, None] * keys
    far_first = count(layout.far_end[:, None] <= first_key)
    far_last = count(layout.far_start[:, None] < first_key + keys)
    far_last = jnp.where(first_key[:, 0] < layout.num_global[:, None], far_last, -1)
    first_key = jnp.arange(-(-shape.T // keys), dtype=jnp.int32)[:, None] * keys
    near_last = count(layout.near_start[:, None] < first_key + keys)
    near_first = jnp.broadcast_to(first_key[:, 0], near_last.shape)
    far_blocks = -(-jnp.max(layout.num_global, keepdims=True) // keys)
    return jnp.stack([far_first, far_last], axis=1), jnp.stack([near_first, near_last], axis=1), far_blocks
