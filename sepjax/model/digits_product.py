"""Products of digits and codes on Hopper GPUs: int8 tensor cores, both digits of a row in one block, scales at the end.

    y[b, o] = (256 high[b] . codes[o] + low[b] . codes[o]) units[b] scales[o]

XLA makes a matrix product of the digits of all rows side by side, which writes its sums, 8 bytes for each result, and
reads them again. Here a thread block has the sums of both digits of its rows in registers, and writes 2 bytes.

    block    128 rows (or 64) x 128 outputs; two warpgroups share the rows (or the outputs)
    copies   128 features of the rows' digits and of the outputs' codes at a time, `stages` ahead, by a third one
    splits   of few rows and outputs there are not enough blocks: several share the features, and their sums are added
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

DEPTH = 128  # features of a step: as many bytes as shared memory is swizzled by
OUTPUTS = 128  # of a block
ROWS = 64  # of a product of a warpgroup
_LEAST_STEPS = 4  # of a block
_MANY = 1024  # rows from which on a block has two warpgroups' of them
_SHARED = 200 * 1024  # bytes for copies
_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut."""

    rows: int  # of a block: 64 or 128
    stages: int
    splits: int  # blocks that share the features of the same rows and outputs
    tasks: int  # of blocks
    blocks: int  # that run, at most one on each SM

    @classmethod
    def of(cls, rows: int, inputs: int, outputs: int, sms: int) -> "Tiling":
        """For a product of so many rows, filled up to a multiple of `ROWS`, features and outputs (of 128)."""
        rows += -rows % ROWS
        tall = 2 * ROWS if rows >= _MANY and rows % (2 * ROWS) == 0 else ROWS
        tiles, steps = (rows // tall) * (outputs // OUTPUTS), inputs // DEPTH
        splits = max(n for n in range(1, max(1, min(sms // tiles, steps // _LEAST_STEPS)) + 1) if steps % n == 0)
        stages = _SHARED // ((2 * tall + OUTPUTS) * DEPTH)
        return cls(tall, min(stages, steps // splits), splits, tiles * splits, min(sms, tiles * splits))


def serves(inputs: int, outputs: int) -> bool:
    """Whether there is a kernel for matrices of this size."""
    return inputs % DEPTH == 0 and outputs % OUTPUTS == 0


@functools.partial(jax.jit, static_argnames=("dtype", "tiling"))
def product(
    high: jax.Array, low: jax.Array, units: jax.Array, codes: jax.Array, scales: jax.Array, dtype: DTypeLike,
    tiling: Tiling,
) -> jax.Array:  # fmt: skip
    """The results [B, O] in `dtype`.

    Args:
      high, low: int8[B, I], digits of a multiple of `ROWS` rows.
      units: float32[B].
      codes: int8[O, I].
      scales: float32[O].
      dtype: of the results.
      tiling: of the product.
    """
    split = tiling.splits > 1
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling),
        out_type=jax.ShapeDtypeStruct((tiling.splits, len(high), len(codes)), jnp.float32 if split else dtype),
        grid=(tiling.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=False),
    )
    found = kernel(high, low, units, codes, scales)
    return jnp.sum(found, axis=0).astype(dtype) if split else found[0]


def _spec(rows: int) -> Any:
    """Of rows of digits or codes, a step at a time; products that end in the next step still read them."""
    tiles = plgpu.TilingTransform((8, DEPTH))  # pyright: ignore[reportAbstractUsage]
    cut = (tiles, plgpu.SwizzleTransform(DEPTH))  # pyright: ignore[reportAbstractUsage]
    place = {"transforms": cut, "memory_space": plgpu.SMEM, "delay_release": 1}
    return plgpu.BlockSpec((rows, DEPTH), lambda k: (0, k), **place)


def _store(place: Any, value: Any) -> None:
    """Into device memory; half of a sector at a time, in 16 bits, which JAX 0.12 does not do unless it is told to."""
    if hasattr(plgpu, "store"):
        plgpu.store(place, value, optimized=False)
    else:
        place[...] = value


def _kernel(high: Any, low: Any, units: Any, codes: Any, scales: Any, out: Any, *, tiling: Tiling) -> None:
    t = tiling
    tall = t.rows > ROWS
    mine = (ROWS, OUTPUTS if tall else OUTPUTS // 2)  # rows and outputs of a warpgroup
    inputs = high.shape[1] // t.splits

    def pipeline(body: Any, around: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            body, grid=(inputs // DEPTH,), in_specs=[_spec(t.rows), _spec(t.rows), _spec(OUTPUTS)],
            memory_registers=40, wg_axis="warpgroup", num_compute_wgs=2, max_concurrent_steps=t.stages,
            compute_context=around,
        )  # fmt: skip

    nothing = lambda *_, **__: None  # noqa: E731

    def with_memory(memory: Any) -> None:
        group = lax.axis_index("warpgroup")
        row_tiles = high.shape[0] // t.rows

        @plgpu.nd_loop((t.tasks,), collective_axes="block")
        def _each(loop: Any) -> None:
            # Blocks side by side share codes, which are more than digits.
            (number,) = loop.index
            tile, split = number // t.splits, number % t.splits
            row, output = tile % row_tiles * t.rows, tile // row_tiles * OUTPUTS
            first = (group * ROWS, 0) if tall else (0, group * mine[1])

            def around(run: Any) -> None:
                def scope(sums: Any, others: Any) -> None:
                    run((sums, others))
                    place = pl.ds(row + first[0], mine[0]), pl.ds(output + first[1], mine[1])
                    layout = plgpu.Layout.WGMMA
                    unit = plgpu.load(units.at[place[0]], layout=layout.reduce(1), optimized=False)
                    scale = plgpu.load(scales.at[place[1]], layout=layout.reduce(0), optimized=False)
                    factor = lax.broadcast_in_dim(unit, mine, (0,)) * lax.broadcast_in_dim(scale, mine, (1,))
                    both = sums[...].astype(jnp.float32) * 256.0 + others[...].astype(jnp.float32)
                    _store(out.at[split, *place], (both * factor).astype(out.dtype))

                pl.run_scoped(scope, _ACC(mine, jnp.int32), _ACC(mine, jnp.int32))

            def multiply(_: Any, high_tile: Any, low_tile: Any, codes_tile: Any, carry: Any) -> Any:
                rows, outputs = pl.ds(first[0], mine[0]), pl.ds(first[1], mine[1])
                right = codes_tile.at[outputs].transpose((1, 0))
                for sums, digit in zip(carry, (high_tile, low_tile), strict=True):
                    plgpu.wgmma(sums, digit.at[rows], right)
                plgpu.wgmma_wait(2)  # all but the two of this step
                return carry

            features = pl.ds(split * inputs, inputs)
            digits = pl.ds(row, t.rows), features
            pipeline(multiply, around)(
                high.at[digits], low.at[digits], codes.at[pl.ds(output, OUTPUTS), features], allocations=memory
            )

    allocations = pipeline(nothing, nothing).get_allocations(high, low, codes)
    pl.run_scoped(with_memory, memory=allocations, collective_axes="warpgroup")
