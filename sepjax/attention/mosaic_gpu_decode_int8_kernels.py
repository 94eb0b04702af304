r"""`mosaic_gpu_decode_kernels` over caches of 8 bits: codes come from device memory, and only codes.

    key      codes -> registers, converted [, turned]  ->  S^T = K_tile . Q^T     times the key's scale
    value    codes -> registers, converted -> shared memory
    weight   times the value's scale                   ->  O^T += V_tile^T . P^T

A code is exact in bfloat16 and float16, and a scale is one number a row of a product, so scales never meet codes.

Zones are data here, for the keys of most bounded caches lie rotated by their slots' numbers: a ring is a zone up to
where it has come to, and another from there on. A tile that lies in one zone is multiplied by that one's queries; of
one that touches several, each slot takes its own.
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

    num_zones: int  # Z
    own: int  # the zone whose queries fit the token's own key

    @property
    def packed(self) -> bool:
        """Never: what the token itself is rounded to is made beside its queries."""
        return False


def _codes(*shape: int) -> Any:
    """Shared memory for codes; its rows, of heads of 64, are shorter than a swizzle of 128 bytes."""
    width = min(shape[-1], 128)
    tiling = plgpu.TilingTransform((8, width))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, jnp.int8, transforms=(tiling, swizzle))


def attend(shape: Shape) -> Callable[..., Any]:
    """q, k, v, codes and scales of k and of v, bias, live parts [, ends] -> as `mosaic_gpu_decode_kernels.attend`.

    q: [B, K, Z, written, H]; k and v: [B, K, H], the token's own; codes: int8[B, K, C, H]; scales: bfloat16[B, K, C];
    bias and live: of `decode.Seen`, whose parts are tiles; where zones end, of several: int32[B, Z - 1], each not
    before the one before it. With `looks` as there.
    """
    H, M, tile, stages, scale = shape.H, shape.columns, shape.tile, shape.stages, shape.scale * kernels.LOG2E
    whole, dtype = shape.splits == 1, shape.dtype
    num_ins, num_outs = (10 if shape.num_zones > 1 else 9), len(plain._outs(shape))

    def kernel(*refs):
        ins, outs, scratch = refs[:num_ins], refs[num_ins : num_ins + num_outs], refs[num_ins + num_outs :]
        q_ref, key_ref, value_ref, k_ref, k_scales_ref, v_ref, v_scales_ref, bias_ref, live_ref, *ends_refs = ins
        q_smem, k_smem, k_scales, v_smem, v_scales, wide_smem, bias_smem, p_smem, *rest = scratch
        kept_smem, rest = (rest[0], rest[1:]) if shape.looks and whole else (None, rest)
        *o_smem, ready, k_ready, v_ready = rest
        task = lax.axis_index("task")
        split, task = lax.rem(task, shape.splits), lax.div(task, shape.splits)
        head, b = lax.rem(task, shape.K), lax.div(task, shape.K)
        most = pl.cdiv(live_ref[b, 0], shape.splits)
        first = split * most
        count = jnp.clip(live_ref[b, 0] - first, 0, most)
        is_first = jnp.where(split == 0, 1.0, 0.0)
        ends = [ends_ref[b, z] for ends_ref in ends_refs for z in range(shape.num_zones - 1)]

        def tile_of(i):
            return live_ref[b, 1 + first + i] * tile

        def in_order(i):  # the places of tile i in the order of live ones
            return pl.ds((first + i) * tile, tile)

        def load(i):
            slot, slots = lax.rem(i, stages), pl.ds(tile_of(i), tile)
            plgpu.copy_gmem_to_smem(k_ref.at[b, head, slots], k_smem.at[slot], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(k_scales_ref.at[b, head, slots], k_scales.at[slot], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(bias_ref.at[b, in_order(i)], bias_smem.at[slot], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[b, head, slots], v_smem.at[slot], v_ready.at[slot])
            plgpu.copy_gmem_to_smem(v_scales_ref.at[b, head, slots], v_scales.at[slot], v_ready.at[slot])

        def start():
            for z in range(shape.num_zones):
                plgpu.copy_gmem_to_smem(q_ref.at[b, head, z, plain._all_columns(shape, head)], q_smem.at[z], ready)
            for i in range(stages):
                pl.when(i < count)(lambda i=i: load(jnp.int32(i)))

        def scores(slot, at):
            keys = plgpu.load(k_smem.at[slot], layout=plgpu.Layout.WGMMA, optimized=False).astype(dtype)

            def of_zone(z):
                def multiply(acc):
                    plgpu.wgmma(acc, keys, q_smem.at[z].transpose((1, 0)))

                acc = kernels.accumulate(multiply, kernels._registers((tile, M), 0.0, plgpu.Layout.WGMMA))[0]
                return plain._wgmma_layout(acc)

            if not ends:
                return of_zone(0)
            lowest, highest = (sum(jnp.where(end < x, 1, 0) for end in ends) for x in (at + 1, at + tile))
            i = plgpu.broadcasted_iota(jnp.int32, (tile, M), 0, layout=plgpu.Layout.WGMMA) + at

            def one(z, s):
                begin = jnp.int32(0)
                for number, end in enumerate(ends, 1):
                    begin = jnp.where(z == number, end, begin)
                return jnp.where(i >= begin, of_zone(z), s)

            return lax.fori_loop(lowest + 1, highest + 1, one, of_zone(lowest))

        def step(i, state):
            acc, top, total = state
            slot, at = lax.rem(i, stages), tile_of(i)
            plgpu.barrier_wait(k_ready.at[slot])
            bias = plgpu.load(bias_smem.at[slot], layout=kernels._PER_ROW)
            of_keys = plgpu.load(k_scales.at[slot], layout=kernels._PER_ROW).astype(jnp.float32) * scale
            s = scores(slot, at)
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
                scores_to = outs[-1].at[b, head, in_order(i)] if kept_smem is None else kept_smem.at[i]
                scores_to[...] = s
            wide = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
            wide_smem[...] = wide.astype(dtype)
            plgpu.commit_smem()
            kernels._in_one_warp(lambda: pl.when(i + stages < count)(lambda: load(i + stages)))

            def weigh(acc):
                plgpu.wgmma(acc, wide_smem.transpose((1, 0)), p_smem.transpose((1, 0)))

            (acc,) = kernels.accumulate(weigh, acc)
            return acc, new_top, total

        kernels._in_one_warp(start)
        key, value = plain._own_vectors([x.at[b, head] for x in (key_ref, value_ref)])
        plgpu.barrier_wait(ready)
        own = plain._own_scores(shape, q_smem.at[shape.own].transpose((1, 0)), key)[0] * scale
        top = own * is_first + plain._LOWEST * (1.0 - is_first)
        acc = plain._along_rows(value * is_first, (H, M))
        total = kernels._registers((tile, M), 0.0, plgpu.Layout.WGMMA)
        acc, top, total = lax.fori_loop(0, count, step, (acc, top, total))
        total = total.sum(axis=0) + jnp.exp2(jnp.minimum(own - top, 0.0)) * is_first
        if kept_smem is not None:
            plain._store_looks(shape, kept_smem, (total, top), count, lambda i: outs[-1].at[b, head, in_order(i)])
        plain._store(shape, (acc, total, top), tuple(o_smem), outs, (b, head, split))

    return plgpu.kernel(
        kernel,
        out_type=plain._outs(shape),
        grid=(shape.B * shape.K * shape.splits,),
        grid_names=("task",),
        scratch_types=_scratch(shape),
        # Between two writes to the same place, and between a read and the copy that takes its place, every tile has
        # barriers of its own: a maximum over warps, before which all have waited for the product of the tile before,
        # and a `commit_smem`.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )


def _scratch(shape: Shape) -> tuple[Any, ...]:
    """What `attend` has in shared memory, in its order."""
    H, M, tile, stages, dtype = shape.H, shape.columns, shape.tile, shape.stages, shape.dtype
    return (
        plain._tiled(shape.num_zones, M, H, dtype=dtype),
        _codes(stages, tile, H),
        plgpu.SMEM((stages, tile), jnp.bfloat16),
        _codes(stages, tile, H),
        plgpu.SMEM((stages, tile), jnp.bfloat16),
        plain._tiled(tile, H, dtype=dtype),
        plgpu.SMEM((stages, tile), jnp.float32),
        plain._tiled(M, tile, dtype=dtype),
        *plain._kept(shape),
        *plain._out_scratch(shape),
        plgpu.Barrier(num_arrivals=shape.num_zones),
        plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )


def run(
    shape: Shape, queries: Any, k: Any, v: Any, codes: Any, bias: Any, live: Any, ends: Any
) -> tuple[jax.Array, jax.Array | None]:
    """`sepjax.attention.decode.attend` for codes and scales of k and of v, and looks: around the kernel.

    ends: int32[B, Z - 1], of several zones; None: of one.
    """
    more = () if ends is None else (ends,)
    given = plain.filled(shape, queries), k, v, *codes[0], *codes[1]
    return plain._joined(shape, bias, *attend(shape)(*given, bias, live, *more))
