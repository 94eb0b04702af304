r"""The backward pass of an RMS norm on Hopper GPUs, each array read and written once. See `sepjax.model.norms`.

    y = x * r * w,  r = (mean(x^2) + epsilon)^-1/2
    dx = r * g * w - x * r^3 * mean(g * w * x) + more        dw = sum over rows of g * x * r

`more` is the gradient that reaches x on other ways: a residual stream goes on beside its norm. A row's two sums need
the whole row, its result needs it again: so a tile of 64 rows is held in registers, a third of the features in each of
three warpgroups, and the sums go from one to the others by shared memory. A fourth one loads (TMA).

    loads     x0 g0 more0 | x1 g1      | more1 ...
    computes       sums0  | dx0, store | sums1 ...         x and g are in registers: their places are filled again
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sepjax.attention import mosaic_gpu_kernels as kernels
from sepjax.attention.mosaic_gpu_kernels import ROWS

PARTS = 3  # warpgroups that compute, each a part of the features
COLUMNS = 64  # of a copy
MOST = 576  # features whose three arrays shared memory holds


def gradients(rows: int, features: int, dtype: Any, epsilon: float, num_sms: int, held: int = 2) -> Callable[..., Any]:
    """x, g, more [rows, features] and w float32[features] -> dx as x, dw float32[num_sms, features] to be summed.

    rows: a multiple of ROWS; features: of PARTS * COLUMNS, up to MOST.
    """
    chunks = features // COLUMNS
    mine = chunks // PARTS
    tiles = rows // ROWS

    def compute(refs, scratch, wg):
        *_, w_ref, dx_ref, dw_ref = refs
        x_smem, g_smem, more_smem, sums, dw_smem, ready, free, exchanged = scratch
        sm = lax.axis_index("sm")
        columns = [wg * mine + c for c in range(mine)]
        part = lambda x, c: x.at[pl.ds(c * COLUMNS, COLUMNS)]  # noqa: E731
        for c in columns:
            part(dw_smem, c)[...] = kernels._registers((COLUMNS,), 0.0, kernels._PER_COLUMN)

        def weights(c):
            return kernels._along_columns(
                plgpu.load(part(w_ref, c), layout=kernels._PER_COLUMN, optimized=False), (ROWS, COLUMNS)
            )

        def loaded(source, number):
            plgpu.barrier_wait(ready.at[number])
            taken = [source[c] for c in columns]
            if number < held:
                plgpu.barrier_arrive(free.at[number])
            return taken

        def tile(i, _):
            row = (sm + i * num_sms) * ROWS
            x, g = loaded(x_smem, 0), loaded(g_smem, 1)
            squares = products = kernels._registers((ROWS,), 0.0, kernels._PER_ROW)
            for c, x_c, g_c in zip(columns, x, g, strict=True):
                wide = x_c.astype(jnp.float32)
                squares += (wide * wide).sum(axis=1)
                products += (g_c.astype(jnp.float32) * weights(c) * wide).sum(axis=1)
            x, g = lax.optimization_barrier(
                (x if held > 0 else [], g if held > 1 else [])
            )  # else they stay as numbers of 32 bits, and spill
            at = sums.at[lax.rem(i, 2)]
            at[wg, 0], at[wg, 1] = squares, products
            plgpu.barrier_arrive(exchanged)
            plgpu.barrier_wait(exchanged)
            of_row = lambda k: sum(  # noqa: E731
                plgpu.load(at.at[p, k], layout=kernels._PER_ROW) for p in range(PARTS)
            )
            r = lax.rsqrt(of_row(0) * (1 / features) + epsilon)
            r_wide = kernels._along_rows(r, (ROWS, COLUMNS))
            turn = kernels._along_rows(of_row(1) * (1 / features) * r * r * r, (ROWS, COLUMNS))
            plgpu.barrier_wait(ready.at[2])
            for k, c in enumerate(columns):
                x_c = x[k] if held > 0 else x_smem[c]
                g_c = g[k] if held > 1 else g_smem[c]
                x_c, g_c = lax.optimization_barrier((x_c, g_c))
                wide, scaled = x_c.astype(jnp.float32), g_c.astype(jnp.float32) * r_wide
                dx = scaled * weights(c) - wide * turn + more_smem[c].astype(jnp.float32)
                more_smem[c] = dx.astype(dtype)
                dw = plgpu.layout_cast((scaled * wide).sum(axis=0), kernels._PER_COLUMN)
                of_part = part(dw_smem, c)
                of_part[...] = plgpu.load(of_part, layout=kernels._PER_COLUMN) + dw
            for number in range(held, 2):
                plgpu.barrier_arrive(free.at[number])
            copies = [(more_smem.at[c], dx_ref.at[pl.ds(row, ROWS), pl.ds(c * COLUMNS, COLUMNS)]) for c in columns]
            kernels._store(copies)
            kernels._wait_until_stored()
            plgpu.barrier_arrive(free.at[2])
            return 0

        lax.fori_loop(0, rounds(sm), tile, 0)
        kernels._store([(part(dw_smem, c), part(dw_ref.at[sm], c)) for c in columns])
        kernels._wait_until_stored(last=True)

    def rounds(sm):
        return lax.div(tiles - sm + num_sms - 1, num_sms)

    def load(refs, scratch):
        sources, smem, (ready, free) = refs[:3], scratch[:3], scratch[5:7]
        sm = lax.axis_index("sm")

        def tile(i, _):
            row = (sm + i * num_sms) * ROWS
            for number, (source, target) in enumerate(zip(sources, smem, strict=True)):
                pl.when(i > 0)(lambda number=number: plgpu.barrier_wait(free.at[number]))
                for c in range(chunks):
                    of_rows = source.at[pl.ds(row, ROWS), pl.ds(c * COLUMNS, COLUMNS)]
                    plgpu.copy_gmem_to_smem(of_rows, target.at[c], ready.at[number])
            return 0

        lax.fori_loop(0, rounds(sm), tile, 0)
        for number in range(3):  # no barrier is left with an arrival unseen
            pl.when(rounds(sm) > 0)(lambda number=number: plgpu.barrier_wait(free.at[number]))

    def entry(*refs):
        def run(*scratch):
            wg = lax.axis_index("wg")

            @pl.when(wg < PARTS)
            def _():
                plgpu.set_max_registers(160, action="increase")
                compute(refs, scratch, wg)

            @pl.when(wg == PARTS)
            def _():
                plgpu.set_max_registers(24, action="decrease")
                kernels._in_one_warp(lambda: load(refs, scratch))

        pl.run_scoped(run, *scratch, collective_axes="wg")

    scratch = (
        *(kernels._smem(chunks, ROWS, COLUMNS, dtype=dtype) for _ in range(3)),
        plgpu.SMEM((2, PARTS, 2, ROWS), jnp.float32),
        plgpu.SMEM((features,), jnp.float32),
        plgpu.Barrier(num_arrivals=chunks, num_barriers=3),
        plgpu.Barrier(num_arrivals=PARTS, num_barriers=3),
        plgpu.Barrier(num_arrivals=PARTS),
    )
    out = (
        jax.ShapeDtypeStruct((rows, features), dtype),
        jax.ShapeDtypeStruct((num_sms, features), jnp.float32),
    )
    return plgpu.kernel(
        entry,
        out_type=out,
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=PARTS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
