r"""`mosaic_gpu_decode_kernels` over caches of 8 bits: codes come from device memory, and only codes.

    key      codes -> registers, converted [, turned]  ->  S^T = K_tile . Q^T     times the key's scale
    value    codes -> registers, converted -> shared memory
    weight   times the value's scale                   ->  O^T += V_tile^T . P^T

A code is exact in bfloat16 and float16, and a scale is one number a row of a product, so scales never meet codes.

The keys of most bounded caches lie un-rotated. What a slot's key is to be turned by is its number, up to a constant of
its zone, so a block turns a key by its place in its tile, for which registers hold the cosines and sines throughout,
and the queries, a few columns, by the rest, once for every zone that a tile touches:

    slot i = 64 t + r, zone z     key by r           query by (its distance from slot i in z, plus i) - 64 t

Zones end where the row's rings do, which is data. The queries of the next tile are made before the barrier at which the
values of this one are waited for, in a second place; those of further zones of a tile, which few have, when it is read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sepjax.attention import mosaic_gpu_decode_kernels as plain
from sepjax.attention import mosaic_gpu_kernels as kernels


@dataclasses.dataclass(frozen=True)
class Shape(plain.Shape):
    """What the kernel is compiled for; `ends` is empty: zones are data."""

    num_zones: int  # 0: keys lie turned


def _codes(*shape: int) -> Any:
    """Shared memory for codes; its rows, of heads of 64, are shorter than a swizzle of 128 bytes."""
    width = min(shape[-1], 128)
    tiling = plgpu.TilingTransform((8, width))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, jnp.int8, transforms=(tiling, swizzle))


def _turned(x: Any, cos: Any, sin: Any) -> Any:
    """Keys [tile, H] in registers by cosines and sines [tile, H / 2], all in the same type."""
    half = x.shape[1] // 2
    first, second = x[:, :half], x[:, half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def attend(shape: Shape) -> Callable[..., Any]:
    """q, k, v, codes and scales of k and of v, bias, live tiles [, turns] -> as `mosaic_gpu_decode_kernels.attend`.

    q: [B, K, columns, H]; k and v: [B, K, H], the token's own; codes: int8[B, K, C, H]; scales: bfloat16[B, K, C];
    bias: float32[B, C]; live: int32[B, 1 + tiles]. With `looks` as there.

    Turns, where keys lie un-rotated (`num_zones`): q is [B, K, 2, H, columns], un-rotated and a quarter of a turn on; k
    is float32, un-rotated, times the factor of a rotation, twice (YaRN's). Then there are, cosines before sines,
    of_keys [2, tile, H / 2] in q's type, of_tiles float32[tiles, 2, H], of_zones float32[B, Z, 2, H], and where zones
    end, int32[B, Z - 1].
    """
    H, M, tile, stages, scale = shape.H, shape.columns, shape.tile, shape.stages, shape.scale * kernels.LOG2E
    whole, turns, dtype = shape.splits == 1, shape.num_zones > 0, shape.dtype
    num_ins, num_outs = (13 if turns else 9), len(plain._outs(shape))

    def kernel(*refs):
        ins, outs, scratch = refs[:num_ins], refs[num_ins : num_ins + num_outs], refs[num_ins + num_outs :]
        q_ref, key_ref, value_ref, k_ref, k_scales_ref, v_ref, v_scales_ref, bias_ref, live_ref, *turn_refs = ins
        q_smem, k_smem, k_scales, v_smem, v_scales, wide_smem, bias_smem, p_smem, *rest = scratch
        kept_smem, rest = (rest[0], rest[1:]) if shape.looks and whole else (None, rest)
        o_smem, rest = (rest[:1], rest[1:]) if whole else (rest[:3], rest[3:])
        turn_smem, (ready, k_ready, v_ready) = rest[:-3], rest[-3:]
        task = lax.axis_index("task")
        split, task = lax.rem(task, shape.splits), lax.div(task, shape.splits)
        head, b = lax.rem(task, shape.K), lax.div(task, shape.K)
        most = pl.cdiv(live_ref[b, 0], shape.splits)
        first = split * most
        count = jnp.clip(live_ref[b, 0] - first, 0, most)
        is_first = jnp.where(split == 0, 1.0, 0.0)
        if turns:
            of_keys_ref, of_tiles_ref, of_zones_ref, ends_ref = turn_refs
            given_smem, zones_smem = turn_smem
            ends = [ends_ref[b, z] for z in range(shape.num_zones - 1)]

        def tile_of(i):
            return live_ref[b, jnp.minimum(1 + first + i, shape.tiles)]  # of none beyond the last: any

        def load(i):
            slot, slots = lax.rem(i, stages), pl.ds(tile_of(i) * tile, tile)
            plgpu.copy_gmem_to_smem(k_ref.at[b, head, slots], k_smem.at[slot], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(k_scales_ref.at[b, head, slots], k_scales.at[slot], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(bias_ref.at[b, slots], bias_smem.at[slot], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[b, head, slots], v_smem.at[slot], v_ready.at[slot])
            plgpu.copy_gmem_to_smem(v_scales_ref.at[b, head, slots], v_scales.at[slot], v_ready.at[slot])

        def start():
            if turns:
                plgpu.copy_gmem_to_smem(q_ref.at[b, head], given_smem, ready)
                plgpu.copy_gmem_to_smem(of_zones_ref.at[b], zones_smem, ready)
            else:
                plgpu.copy_gmem_to_smem(q_ref.at[b, head], q_smem.at[0], ready)
            for i in range(stages):
                pl.when(i < count)(lambda i=i: load(jnp.int32(i)))

        def of_tile(number):
            """Cosines and sines of its first slot, from device memory long before they are needed."""
            return [plgpu.load(of_tiles_ref.at[number, x], layout=kernels._PER_ROW, optimized=False) for x in range(2)]

        def first_zone(number):
            return sum(jnp.where(end <= number * tile, 1, 0) for end in ends)

        def make_queries(z, cosine_and_sine, to):
            """Those for slots of zone z in a tile."""
            cos_t, sin_t = cosine_and_sine
            cos_z, sin_z = (plgpu.load(zones_smem.at[z, x], layout=kernels._PER_ROW) for x in range(2))
            cos, sin = cos_z * cos_t + sin_z * sin_t, sin_z * cos_t - cos_z * sin_t
            straight, across = (
                plgpu.load(given_smem.at[x], layout=plgpu.Layout.WGMMA).astype(jnp.float32) for x in range(2)
            )
            q = straight * plain._along_rows(cos, (H, M)) + across * plain._along_rows(sin, (H, M))
            q_smem.at[to].transpose((1, 0))[...] = plain._wgmma_layout(q.astype(dtype))

        def product(keys, place):
            def multiply(acc):
                plgpu.wgmma(acc, keys, q_smem.at[place].transpose((1, 0)))

            return kernels.accumulate(multiply, kernels._registers((tile, M), 0.0, plgpu.Layout.WGMMA))[0]

        def scores(slot, number, place, cosine_and_sine):
            keys = plgpu.load(k_smem.at[slot], layout=plgpu.Layout.WGMMA, optimized=False).astype(dtype)
            if not turns:
                return product(keys, place)
            keys, at = _turned(keys, *key_turns), number * tile
            i = plgpu.broadcasted_iota(jnp.int32, (tile, M), 0, layout=plgpu.Layout.WGMMA) + at

            def one(z, s):
                plgpu.commit_smem()  # all warps have read the queries of the zone before
                make_queries(z, cosine_and_sine, place)
                plgpu.commit_smem()
                begin = jnp.int32(0)
                for other, end in enumerate(ends, 1):
                    begin = jnp.where(z == other, end, begin)
                return jnp.where(i >= begin, product(keys, place), s)

            lowest = first_zone(number)
            highest = sum(jnp.where(end < at + tile, 1, 0) for end in ends)
            return lax.fori_loop(lowest + 1, highest + 1, one, plain._wgmma_layout(product(keys, place)))

        def step(i, state):
            acc, top, total, *of_this = state
            slot, number = lax.rem(i, stages), tile_of(i)
            place = lax.rem(i, 2) if turns else 0
            of_next = of_tile(tile_of(i + 1)) if turns else []
            plgpu.barrier_wait(k_ready.at[slot])
            bias = plgpu.load(bias_smem.at[slot], layout=kernels._PER_ROW)
            of_keys = plgpu.load(k_scales.at[slot], layout=kernels._PER_ROW).astype(jnp.float32) * scale
            s = plain._wgmma_layout(scores(slot, number, place, of_this))
            s = s * plain._along_rows(of_keys, s.shape) + plain._along_rows(bias, s.shape)
            new_top = jnp.maximum(top, s.max(axis=0))
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(s - plain._along_columns(new_top, s.shape))
            total = total * plain._along_columns(shrink, s.shape) + p
            acc *= plain._along_columns(shrink, acc.shape)
            plgpu.barrier_wait(v_ready.at[slot])
            of_values = plgpu.load(v_scales.at[slot], layout=kernels._PER_ROW).astype(jnp.float32)
            p *= plain._along_rows(of_values, p.shape)
            p_smem.transpose((1, 0))[...] = plain._wgmma_layout(p.astype(dtype))
            if shape.looks:
                scores_to = outs[-1].at[b, head, pl.ds(number * tile, tile)] if kept_smem is None else kept_smem.at[i]
                scores_to[...] = s
            wide = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
            wide_smem[...] = wide.astype(dtype)
            if turns:  # read last by the product before this one, since when all warps have met
                make_queries(first_zone(tile_of(i + 1)), of_next, 1 - place)
            plgpu.commit_smem()
            kernels._in_one_warp(lambda: pl.when(i + stages < count)(lambda: load(i + stages)))

            def weigh(acc):
                plgpu.wgmma(acc, wide_smem.transpose((1, 0)), p_smem.transpose((1, 0)))

            (acc,) = kernels.accumulate(weigh, acc)
            return acc, new_top, total, *of_next

        kernels._in_one_warp(start)
        of_first = of_tile(tile_of(0)) if turns else []
        if turns:
            key_turns = [plgpu.load(of_keys_ref.at[x], layout=plgpu.Layout.WGMMA, optimized=False) for x in range(2)]
        key, value = plain._own_vectors([x.at[b, head] for x in (key_ref, value_ref)])
        plgpu.barrier_wait(ready)
        if turns:
            make_queries(first_zone(tile_of(0)), of_first, 0)
            plgpu.commit_smem()
        queries = given_smem.at[0] if turns else q_smem.at[0].transpose((1, 0))
        own = plain._own_scores(queries, key) * scale
        top = own * is_first + plain._LOWEST * (1.0 - is_first)
        acc = plain._along_rows(value * is_first, (H, M))
        total = kernels._registers((tile, M), 0.0, plgpu.Layout.WGMMA)
        acc, top, total, *_ = lax.fori_loop(0, count, step, (acc, top, total, *of_first))
        total = total.sum(axis=0) + jnp.exp2(jnp.minimum(own - top, 0.0)) * is_first
        if kept_smem is not None:
            place = lambda i: outs[-1].at[b, head, pl.ds(tile_of(i) * tile, tile)]  # noqa: E731
            plain._store_looks(shape, kept_smem, (total, top), count, place)
        plain._store(whole, (acc, total, top), tuple(o_smem), outs, (b, head, split), dtype)

    return plgpu.kernel(
        kernel,
        out_type=plain._outs(shape),
        grid=(shape.B * shape.K * shape.splits,),
        grid_names=("task",),
        scratch_types=_scratch(shape),
        # Between two writes to the same place, and between a read and the copy that takes its place, every tile has
        # barriers of its own: a maximum over warps and two `commit_smem`.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )


def _scratch(shape: Shape) -> tuple[Any, ...]:
    """What `attend` has in shared memory, in its order."""
    H, M, tile, stages, dtype = shape.H, shape.columns, shape.tile, shape.stages, shape.dtype
    turns = int(shape.num_zones > 0)
    return (
        plain._tiled(1 + turns, M, H, dtype=dtype),
        _codes(stages, tile, H),
        plgpu.SMEM((stages, tile), jnp.bfloat16),
        _codes(stages, tile, H),
        plgpu.SMEM((stages, tile), jnp.bfloat16),
        plain._tiled(tile, H, dtype=dtype),
        plgpu.SMEM((stages, tile), jnp.float32),
        plain._tiled(M, tile, dtype=dtype),
        *plain._kept(shape),
        *plain._out_scratch(shape),
        *([plgpu.SMEM((2, H, M), dtype), plgpu.SMEM((shape.num_zones, 2, H), jnp.float32)] if turns else []),
        plgpu.Barrier(num_arrivals=1 + turns),
        plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )


def run(
    shape: Shape, queries: Any, k: Any, v: Any, codes: Any, bias: Any, live: Any, lying: Any
) -> tuple[jax.Array, jax.Array | None]:
    """`sepjax.attention.decode.attend` for codes and scales of k and of v, and looks: around the kernel.

    queries: [B, K, G, H], as they fit `k`; lying: see there.
    """
    more: tuple[Any, ...] = ()
    if lying is not None:
        queries, k, turns = lying
        k = k.astype(jnp.float32) * turns.of_keys[0, 0, 0] ** 2  # a cosine of 0 times the factor
        first, second = jnp.split(queries, 2, axis=-1)
        across = jnp.concatenate([-second, first], axis=-1)
        queries = jnp.swapaxes(jnp.stack([queries, across], axis=2), 3, 4)
        more = turns.of_keys.astype(shape.dtype), turns.of_tiles, turns.of_zones, turns.ends
    fill = shape.columns - shape.G
    at = 4 if lying is not None else 2
    queries = jnp.pad(queries, [(0, fill if axis == at else 0) for axis in range(queries.ndim)])
    out = attend(shape)(queries, k, v, *codes[0], *codes[1], bias, live, *more)
    return plain._joined(shape, bias, *out)
