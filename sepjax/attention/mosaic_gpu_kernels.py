r"""The arithmetic of the Hopper kernels: forward, dQ, and dK with dV, in Pallas Mosaic GPU. Plumbing: mosaic_gpu.py.

A block of queries visits one list of keys, the *virtual* keys u = 0, 1, 2, ...: first the hull of its queries' far
ranges, from the packed global keys, then the hull of their near ranges, from all keys:

    packed   . . . [f f f f f f f) . .          tokens   . . . . . . [n n n n n n n n) .
                  far_lo                                             near_lo
    virtual        f f f f f f f - n n n n n n n n -                 -: filled up to chunks of 32
    tiles         |       |       |       |       |                  of 64 or 128 keys

A tile may hold both kinds, so only the last one is filled up. A query sees the virtual keys [far_from, far_to) and
[near_from, near_to); tiles that every query of the block sees whole are not masked. One warpgroup loads (TMA, `stages`
tiles ahead), the others compute (wgmma), 64 rows each. Rows are tokens of one head or, where query heads share a key
head, fewer tokens of several heads: the hull of a short run of tokens wastes less.

For dK and dV the roles change: a block of keys, packed or not, visits the tiles of 64 queries that see some of it.
Scores are in units of log2: exp2(score * scale * log2(e) - ...), as the hardware has it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
ROWS = 64  # of a warpgroup's tile: what one wgmma computes
CHUNK = 32  # keys that one copy loads; divides a tile
KEYS = 2 * ROWS  # of a block of dK and dV
ALIGNMENT = 8  # rows of the swizzled tiles of shared memory: copies start at multiples of it
_LOWEST = -1e30  # below every score; finite, so that a masked row gives exp2(-inf - _LOWEST) = 0 and not NaN

FAR_START, FAR_END, NEAR_START, NEAR_END = range(4)  # rows of the `ranges` that the kernels take


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for; T and S are multiples of ALIGNMENT."""

    B: int
    T: int
    N: int
    K: int
    H: int
    S: int
    dtype: Any
    scale: float

    @property
    def group(self) -> int:
        return self.N // self.K

    @property
    def padded(self) -> int:
        """Tokens of `ranges`, lse and delta: whole blocks of every kernel."""
        return pl.cdiv(self.T, 2 * ROWS) * 2 * ROWS


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel's tiles."""

    keys: int  # of a tile of virtual keys
    stages: int  # tiles in shared memory
    heads: int  # query heads of a block: they share a key head

    @property
    def tokens(self) -> int:
        return 2 * ROWS // self.heads


def _smem(*shape: int, dtype: Any) -> Any:
    """Shared memory in the order that wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((ALIGNMENT, 64)), plgpu.SwizzleTransform(128)))


def _registers(shape: tuple[int, ...], fill: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


_PER_ROW, _PER_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def _along_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def _along_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [1])


def _aligned(x: jax.Array) -> jax.Array:
    return lax.bitwise_and(x, -ALIGNMENT)


class _QueryBlock:
    """A block of queries and its virtual keys. Heavy blocks, late in their rows, come first in the grid."""

    def __init__(self, shape: Shape, tiles: Tiles, ranges: Any):
        groups = shape.N // tiles.heads
        task = lax.axis_index("task")
        group, rest = lax.rem(task, groups), lax.div(task, groups)
        self.shape, self.tiles, self.ranges = shape, tiles, ranges
        self.b, self.head = lax.rem(rest, shape.B), group * tiles.heads
        self.token = (self.blocks(shape, tiles) - 1 - lax.div(rest, shape.B)) * tiles.tokens
        last = self.token + tiles.tokens - 1
        self.far_lo = _aligned(ranges[self.b, FAR_START, self.token])
        self.near_lo = _aligned(ranges[self.b, NEAR_START, self.token])
        self.far_chunks = pl.cdiv(ranges[self.b, FAR_END, last] - self.far_lo, CHUNK)
        near_keys = jnp.minimum(last + 1, shape.T) - self.near_lo
        chunks = self.far_chunks + pl.cdiv(jnp.maximum(near_keys, 0), CHUNK)
        self.steps = pl.cdiv(chunks * CHUNK, tiles.keys)
        self.shift = self.far_chunks * CHUNK - self.near_lo  # token -> virtual key

    @staticmethod
    def blocks(shape: Shape, tiles: Tiles) -> int:
        return pl.cdiv(shape.T, tiles.tokens)

    @staticmethod
    def grid(shape: Shape, tiles: Tiles) -> int:
        return _QueryBlock.blocks(shape, tiles) * shape.B * (shape.N // tiles.heads)

    def segments(self, wg: jax.Array) -> list[tuple[Any, jax.Array, jax.Array]]:
        """(rows, first token, head) of the runs of tokens that are the rows of a warpgroup."""
        length = min(ROWS, self.tiles.tokens)
        token = pl.multiple_of(self.token + lax.rem(wg * ROWS, self.tiles.tokens), length)
        head = self.head + lax.div(wg * ROWS, self.tiles.tokens)
        return [(pl.ds(s * length, length), token, head + s) for s in range(ROWS // length)]

    def load_tiles(self, near: Any, far: Any, tile: Any, ready: Any, slot: jax.Array, step: jax.Array) -> None:
        """Starts the copies of one tile of virtual keys: near and far are [B, T or S, K, H] in device memory."""
        kv_head = lax.div(self.head, self.shape.group)
        for c in range(self.tiles.keys // CHUNK):
            u = step * (self.tiles.keys // CHUNK) + c
            rows = tile.at[slot, pl.ds(c * CHUNK, CHUNK)]

            def copy(source, first, rows=rows):
                keys = pl.ds(pl.multiple_of(first, ALIGNMENT), CHUNK)
                plgpu.copy_gmem_to_smem(source.at[self.b, keys, kv_head], rows, ready.at[slot])

            pl.when(u < self.far_chunks)(lambda u=u, copy=copy: copy(far, self.far_lo + u * CHUNK))
            pl.when(u >= self.far_chunks)(
                lambda u=u, copy=copy: copy(near, self.near_lo + (u - self.far_chunks) * CHUNK)
            )

    def mask(self, wg: jax.Array, mine: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The function (scores, first virtual key) -> scores, -inf where a row does not see a key.

        `mine` has the rows' ranges, int32 [4, ROWS] in shared memory.
        """
        rows, token, _ = self.segments(wg)[0]
        last = token + rows.size - 1
        scalar = lambda row, i: self.ranges[self.b, row, i]  # noqa: E731
        all_far = scalar(FAR_START, last) - self.far_lo, scalar(FAR_END, token) - self.far_lo
        all_near = scalar(NEAR_START, last) + self.shift, scalar(NEAR_END, token) + self.shift
        vector = lambda row: plgpu.load(mine.at[row], layout=_PER_ROW)  # noqa: E731
        far = vector(FAR_START) - self.far_lo, vector(FAR_END) - self.far_lo
        near = vector(NEAR_START) + self.shift, vector(NEAR_END) + self.shift

        def masked(s, u0):
            u = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA) + u0
            lo, hi, near_lo, near_hi = (_along_rows(x, s.shape) for x in (*far, *near))
            return jnp.where(((u >= lo) & (u < hi)) | ((u >= near_lo) & (u < near_hi)), s, -jnp.inf)

        def mask(s, u0):
            end = u0 + s.shape[1]
            whole = ((u0 >= all_far[0]) & (end <= all_far[1])) | ((u0 >= all_near[0]) & (end <= all_near[1]))
            return lax.cond(whole, lambda s: s, lambda s: masked(s, u0), s)

        return mask


def forward(shape: Shape, tiles: Tiles) -> Callable[..., Any]:
    """q, k, v, packed k and v, ranges -> out [B, T, N, H], lse float32[B, N, padded].

    ranges: int32 [B, 4, padded]; lse: log2 of the sum of exp2(score), +inf for a row that sees nothing.
    """
    H, keys, stages = shape.H, tiles.keys, tiles.stages
    scale = shape.scale * LOG2E

    def compute(block, refs, scratch, wg):
        q_ref, *_, ranges_ref, o_ref, lse_ref = refs
        q_smem, k_smem, v_smem, lse_smem, range_smem, q_ready, k_ready, v_ready, k_free, v_free, order = scratch
        q, lse, mine = (x.at[wg] for x in (q_smem, lse_smem, range_smem))
        for rows, token, head in block.segments(wg):
            tokens = pl.ds(token, rows.size)
            plgpu.copy_gmem_to_smem(q_ref.at[block.b, tokens, head], q.at[rows], q_ready.at[wg])
            for x in range(4):
                plgpu.copy_gmem_to_smem(ranges_ref.at[block.b, x, tokens], mine.at[x, rows], q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])
        mask = block.mask(wg, mine)

        def take_turns():
            # While one warpgroup has the tensor cores, the other does its softmax.
            plgpu.barrier_arrive(order)
            plgpu.barrier_wait(order)

        def body(step, state):
            acc, top, total = state
            slot = lax.rem(step, stages)

            def scores(acc):
                plgpu.wgmma(acc, q, k_smem.at[slot].transpose((1, 0)))
                take_turns()
                return acc[...]

            s = pl.run_scoped(scores, plgpu.ACC((ROWS, keys), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            s = mask(s, step * keys)
            new_top = jnp.maximum(top, s.max(axis=1) * scale)
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(s * scale - _along_rows(new_top, s.shape))
            acc *= _along_rows(shrink, acc.shape)
            total = total * shrink + p.sum(axis=1)
            p = p.astype(shape.dtype)
            acc, total, top, p = lax.optimization_barrier((acc, total, new_top, p))
            plgpu.barrier_arrive(order)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(order)

            def weigh(acc):
                plgpu.wgmma(acc, p, v_smem.at[slot])
                ahead = lax.rem(step + 1, stages)
                pl.when(step + 1 < block.steps)(lambda: plgpu.barrier_wait(k_ready.at[ahead]))

            acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, top, total

        pl.when(block.steps > 0)(lambda: plgpu.barrier_wait(k_ready.at[0]))
        pl.when(wg == 1)(take_turns)
        state = _registers((ROWS, H), 0, plgpu.Layout.WGMMA), *(_registers((ROWS,), x, _PER_ROW) for x in (_LOWEST, 0))
        acc, top, total = lax.fori_loop(0, block.steps, body, state)
        pl.when(wg == 0)(take_turns)

        total_or_one = jnp.where(total > 0, total, 1.0)
        q[...] = (acc * _along_rows(1 / total_or_one, acc.shape)).astype(shape.dtype)
        lse[...] = jnp.where(total > 0, top + jnp.log2(total_or_one), jnp.inf)
        plgpu.commit_smem()
        for rows, token, head in block.segments(wg):
            tokens = pl.ds(token, rows.size)
            plgpu.copy_smem_to_gmem(q.at[rows], o_ref.at[block.b, tokens, head], commit_group=False)
            plgpu.copy_smem_to_gmem(lse.at[rows], lse_ref.at[block.b, head, tokens], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    def kernel(refs, scratch):
        _, k_ref, v_ref, far_k_ref, far_v_ref, ranges_ref, *_ = refs
        _, k_smem, v_smem, _, _, _, k_ready, v_ready, k_free, v_free, _ = scratch
        wg = lax.axis_index("wg")
        block = _QueryBlock(shape, tiles, ranges_ref)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            compute(block, refs, scratch, wg)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, block.steps)
            def _(step):
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                block.load_tiles(k_ref, far_k_ref, k_smem, k_ready, slot, step)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                block.load_tiles(v_ref, far_v_ref, v_smem, v_ready, slot, step)

    segments = max(1, ROWS // tiles.tokens)
    scratch = (
        _smem(2, ROWS, H, dtype=shape.dtype),
        _smem(stages, keys, H, dtype=shape.dtype),
        _smem(stages, keys, H, dtype=shape.dtype),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.SMEM((2, 4, ROWS), jnp.int32),
        plgpu.Barrier(num_arrivals=5 * segments, num_barriers=2),
        plgpu.Barrier(num_arrivals=keys // CHUNK, num_barriers=stages),
        plgpu.Barrier(num_arrivals=keys // CHUNK, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
    )
    out = (
        jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, H), shape.dtype),
        jax.ShapeDtypeStruct((shape.B, shape.N, shape.padded), jnp.float32),
    )
    return _launch(kernel, out, scratch, _QueryBlock.grid(shape, tiles))


def _launch(kernel: Callable[..., None], out: Any, scratch: tuple[Any, ...], tasks: int) -> Callable[..., Any]:
    """`kernel(refs, scratch)` on `tasks` blocks of three warpgroups."""

    def entry(*refs):
        pl.run_scoped(lambda *scratch: kernel(refs, scratch), *scratch, collective_axes="wg")

    return plgpu.kernel(
        entry,
        out_type=out,
        grid=(tasks,),
        grid_names=("task",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def query_gradient(shape: Shape, tiles: Tiles) -> Callable[..., Any]:
    """q, k, v, packed k and v, ranges, d_out, lse, delta -> dq [B, T, N, H]; lse and delta float32[B, N, padded]."""
    H, keys, stages = shape.H, tiles.keys, tiles.stages

    def compute(block, refs, scratch, wg):
        q_ref, *_, ranges_ref, do_ref, lse_ref, delta_ref, dq_ref = refs
        q_smem, do_smem, k_smem, v_smem, rows_smem, range_smem, q_ready, k_ready, v_ready, k_free, v_free = scratch
        q, do, per_row, mine = (x.at[wg] for x in (q_smem, do_smem, rows_smem, range_smem))
        for rows, token, head in block.segments(wg):
            tokens = pl.ds(token, rows.size)
            copies = [(q_ref.at[block.b, tokens, head], q.at[rows]), (do_ref.at[block.b, tokens, head], do.at[rows])]
            copies += [(x.at[block.b, head, tokens], per_row.at[i, rows]) for i, x in enumerate((lse_ref, delta_ref))]
            copies += [(ranges_ref.at[block.b, x, tokens], mine.at[x, rows]) for x in range(4)]
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])
        mask = block.mask(wg, mine)
        lse, delta = (plgpu.load(per_row.at[i], layout=_PER_ROW) for i in range(2))

        def body(step, dq):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])

            def products(s, dp):
                plgpu.wgmma(s, q, k_smem.at[slot].transpose((1, 0)))
                plgpu.wgmma(dp, do, v_smem.at[slot].transpose((1, 0)))
                s = mask(plgpu.wgmma_accumulator_load(s, wait_n=1), step * keys)
                p = jnp.exp2(s * (shape.scale * LOG2E) - _along_rows(lse, s.shape))
                return p * (dp[...] - _along_rows(delta, s.shape))

            ds = pl.run_scoped(products, *[plgpu.ACC((ROWS, keys), jnp.float32)] * 2)
            plgpu.barrier_arrive(v_free.at[slot])
            dq = pl.run_state(lambda dq: plgpu.wgmma(dq, ds.astype(shape.dtype), k_smem.at[slot]))(plgpu.ACC.init(dq))
            plgpu.barrier_arrive(k_free.at[slot])
            return dq

        dq = lax.fori_loop(0, block.steps, body, _registers((ROWS, H), 0, plgpu.Layout.WGMMA))
        q[...] = (dq * shape.scale).astype(shape.dtype)
        plgpu.commit_smem()
        for rows, token, head in block.segments(wg):
            target = dq_ref.at[block.b, pl.ds(token, rows.size), head]
            plgpu.copy_smem_to_gmem(q.at[rows], target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    def kernel(refs, scratch):
        _, k_ref, v_ref, far_k_ref, far_v_ref, ranges_ref, *_ = refs
        _, _, k_smem, v_smem, _, _, _, k_ready, v_ready, k_free, v_free = scratch
        wg = lax.axis_index("wg")
        block = _QueryBlock(shape, tiles, ranges_ref)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            compute(block, refs, scratch, wg)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, block.steps)
            def _(step):
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                block.load_tiles(k_ref, far_k_ref, k_smem, k_ready, slot, step)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                block.load_tiles(v_ref, far_v_ref, v_smem, v_ready, slot, step)

    segments = max(1, ROWS // tiles.tokens)
    scratch = (
        _smem(2, ROWS, H, dtype=shape.dtype),
        _smem(2, ROWS, H, dtype=shape.dtype),
        _smem(stages, keys, H, dtype=shape.dtype),
        _smem(stages, keys, H, dtype=shape.dtype),
        plgpu.SMEM((2, 2, ROWS), jnp.float32),
        plgpu.SMEM((2, 4, ROWS), jnp.int32),
        plgpu.Barrier(num_arrivals=8 * segments, num_barriers=2),
        plgpu.Barrier(num_arrivals=keys // CHUNK, num_barriers=stages),
        plgpu.Barrier(num_arrivals=keys // CHUNK, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    out = jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, H), shape.dtype)
    return _launch(kernel, out, scratch, _QueryBlock.grid(shape, tiles))


def key_gradients(shape: Shape, splits: int, stages: int) -> Callable[..., Any]:
    """q, k, v, packed k and v, ranges, d_out, lse, delta, far_queries, near_queries -> packed dk, dv, near dk, dv.

    far_queries, near_queries: int32 [B, 2, blocks of KEYS]: first query that sees the block, and one past the last.
    A packed block is seen by up to T queries: its query heads are shared by `splits` blocks of threads, whose results
    come back side by side, [B, S, K * splits, H]. Heavy blocks, early in the packed array, come first in the grid.
    """
    H = shape.H
    far_blocks, near_blocks = pl.cdiv(shape.S, KEYS), pl.cdiv(shape.T, KEYS)
    far_tasks, near_tasks = far_blocks * shape.B * shape.K * splits, near_blocks * shape.B * shape.K

    def kernel(refs, scratch):
        q_ref, k_ref, v_ref, far_k_ref, far_v_ref, ranges_ref, do_ref, lse_ref, delta_ref, far_q_ref, near_q_ref = refs[
            :11
        ]
        far_dk_ref, far_dv_ref, dk_ref, dv_ref = refs[11:]
        k_smem, v_smem, q_smem, do_smem, rows_smem, range_smem, k_ready, ready, free = scratch
        wg, task = lax.axis_index("wg"), lax.axis_index("task")
        is_far = task < far_tasks
        task = jnp.where(is_far, task, task - far_tasks)
        ways = jnp.where(is_far, splits, 1)
        heads = lax.div(shape.group, ways)
        head, rest = lax.rem(task, shape.K * ways), lax.div(task, shape.K * ways)
        b, block = lax.rem(rest, shape.B), lax.div(rest, shape.B)
        kv_head, first_head = lax.div(head, ways), head * heads
        start_row = jnp.where(is_far, FAR_START, NEAR_START)
        span = tuple(
            lax.cond(is_far, lambda i=i: far_q_ref[b, i, block], lambda i=i: near_q_ref[b, i, block]) for i in range(2)
        )
        first = lax.div(span[0], ROWS)
        tiles = jnp.maximum(pl.cdiv(span[1], ROWS) - first, 0)
        steps = tiles * heads
        is_live = span[1] >= 0

        @pl.when((wg < 2) & is_live)
        def _():
            plgpu.set_max_registers(240, action="increase")
            k, v = k_smem.at[wg], v_smem.at[wg]
            key = pl.multiple_of(block * KEYS + wg * ROWS, ROWS)

            def load(*sources):
                for source, target in zip(sources, (k, v), strict=True):
                    plgpu.copy_gmem_to_smem(source.at[b, pl.ds(key, ROWS), kv_head], target, k_ready.at[wg])

            pl.when(is_far)(lambda: load(far_k_ref, far_v_ref))
            pl.when(jnp.logical_not(is_far))(lambda: load(k_ref, v_ref))
            plgpu.barrier_wait(k_ready.at[wg])

            def body(step, state):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(ready.at[slot])
                q, do, per_row, mine = (x.at[slot] for x in (q_smem, do_smem, rows_smem, range_smem))
                whole = (mine[0, ROWS - 1] <= key) & (mine[1, 0] >= key + ROWS)

                def masked(s):
                    keys = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA) + key
                    lo, hi = (_along_columns(plgpu.load(mine.at[i], layout=_PER_COLUMN), s.shape) for i in range(2))
                    return jnp.where((keys >= lo) & (keys < hi), s, -jnp.inf)

                def products(s, dp):
                    plgpu.wgmma(s, k, q.transpose((1, 0)))
                    plgpu.wgmma(dp, v, do.transpose((1, 0)))
                    lse, delta = (plgpu.load(per_row.at[i], layout=_PER_COLUMN) for i in range(2))
                    s = plgpu.wgmma_accumulator_load(s, wait_n=1)
                    s = lax.cond(whole, lambda s: s, masked, s)
                    p = jnp.exp2(s * (shape.scale * LOG2E) - _along_columns(lse, s.shape))
                    return p.astype(shape.dtype), (p * (dp[...] - _along_columns(delta, s.shape))).astype(shape.dtype)

                p, ds = pl.run_scoped(products, *[plgpu.ACC((ROWS, ROWS), jnp.float32)] * 2)

                def accumulate(sums):
                    dk, dv = sums
                    plgpu.wgmma(dv, p, do)
                    plgpu.wgmma(dk, ds, q)

                state = pl.run_state(accumulate)(tuple(plgpu.ACC.init(x) for x in state))
                plgpu.barrier_arrive(free.at[slot])
                return state

            zeros = _registers((ROWS, H), 0, plgpu.Layout.WGMMA)
            dk, dv = lax.fori_loop(0, steps, body, (zeros, zeros))
            k[...] = (dk * shape.scale).astype(shape.dtype)
            v[...] = dv.astype(shape.dtype)
            plgpu.commit_smem()

            def store(*targets):
                for source, target in zip((k, v), targets, strict=True):
                    plgpu.copy_smem_to_gmem(source, target.at[b, pl.ds(key, ROWS), head], commit_group=False)

            pl.when(is_far)(lambda: store(far_dk_ref, far_dv_ref))
            pl.when(jnp.logical_not(is_far))(lambda: store(dk_ref, dv_ref))
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        @pl.when((wg == 2) & is_live)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, stages)
                head = first_head + lax.div(step, tiles)
                tokens = pl.ds(pl.multiple_of((first + lax.rem(step, tiles)) * ROWS, ROWS), ROWS)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                copies = [(q_ref.at[b, tokens, head], q_smem.at[slot]), (do_ref.at[b, tokens, head], do_smem.at[slot])]
                copies += [(x.at[b, head, tokens], rows_smem.at[slot, i]) for i, x in enumerate((lse_ref, delta_ref))]
                copies += [(ranges_ref.at[b, start_row + i, tokens], range_smem.at[slot, i]) for i in range(2)]
                for source, target in copies:
                    plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

    scratch = (
        _smem(2, ROWS, H, dtype=shape.dtype),
        _smem(2, ROWS, H, dtype=shape.dtype),
        _smem(stages, ROWS, H, dtype=shape.dtype),
        _smem(stages, ROWS, H, dtype=shape.dtype),
        plgpu.SMEM((stages, 2, ROWS), jnp.float32),
        plgpu.SMEM((stages, 2, ROWS), jnp.int32),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        plgpu.Barrier(num_arrivals=6, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    far = jax.ShapeDtypeStruct((shape.B, shape.S, shape.K * splits, H), shape.dtype)
    near = jax.ShapeDtypeStruct((shape.B, shape.T, shape.K, H), shape.dtype)
    return _launch(kernel, (far, far, near, near), scratch, far_tasks + near_tasks)


def pack(shape: Shape, rows: int, heads: int) -> Callable[..., Any]:
    """k, v [B, T, K, H], global_index [B, S], num_global [B] -> packed k, v [B, S, K, H].

    `rows` packed keys of `heads` heads pass through a block's shared memory, each by a copy of its own. After the last
    global key come at least CHUNK rows of zeros (their index, T, is out of bounds); what follows is left unwritten.
    """
    H, groups, blocks = shape.H, shape.K // heads, pl.cdiv(shape.S, rows)

    def kernel(k_ref, v_ref, index_ref, count_ref, far_k_ref, far_v_ref, k_smem, v_smem, ready):
        task = lax.axis_index("task")
        group, rest = lax.rem(task, groups), lax.div(task, groups)
        b, first = lax.rem(rest, shape.B), pl.multiple_of(lax.div(rest, shape.B) * rows, rows)
        head = pl.ds(group * heads, heads)

        @pl.when(first < count_ref[b] + CHUNK)  # the last chunk of a far hull may reach as far
        def _():
            for row in range(rows):
                token = index_ref[b, first + row]
                plgpu.copy_gmem_to_smem(k_ref.at[b, token, head], k_smem.at[row], ready)
                plgpu.copy_gmem_to_smem(v_ref.at[b, token, head], v_smem.at[row], ready)
            plgpu.barrier_wait(ready)
            plgpu.copy_smem_to_gmem(k_smem, far_k_ref.at[b, pl.ds(first, rows), head])
            plgpu.copy_smem_to_gmem(v_smem, far_v_ref.at[b, pl.ds(first, rows), head])
            plgpu.wait_smem_to_gmem(0)

    far = jax.ShapeDtypeStruct((shape.B, shape.S, shape.K, H), shape.dtype)
    return plgpu.kernel(
        kernel,
        out_type=(far, far),
        grid=(blocks * shape.B * groups,),
        grid_names=("task",),
        scratch_types=(
            plgpu.SMEM((rows, heads, H), shape.dtype),
            plgpu.SMEM((rows, heads, H), shape.dtype),
            plgpu.Barrier(num_arrivals=2 * rows),
        ),
    )
