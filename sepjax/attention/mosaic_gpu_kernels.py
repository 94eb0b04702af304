r"""The arithmetic of the Hopper kernels: forward, dQ, and dK with dV, in Pallas Mosaic GPU. Plumbing: mosaic_gpu.py.

A block of queries visits one list of keys, the *virtual* keys u = 0, 1, 2, ...: first the hull of its queries' far
ranges, from the packed global keys, then the hull of their near ranges, from all keys:

    packed   . . . [f f f f f f f) . .          tokens   . . . . . . [n n n n n n n n) .
                  far_lo                                             near_lo
    virtual        f f f f f f f - n n n n n n n n -                 -: filled up to chunks of 32
    tiles         |       |       |       |       |                  of 64 or 128 keys

A tile may hold both kinds, so only the last one is filled up. A query sees the virtual keys [far_from, far_to) and
[near_from, near_to); tiles that every query of the block sees whole are not masked. One warpgroup loads (TMA, `stages`
tiles ahead), the others compute (wgmma), 64 rows each: two of them, or three where heads are of 64. Rows are tokens of
one head or, where query heads share a key head, fewer tokens of several heads: the hull of a short run of tokens wastes
less.

For dK and dV the roles change: a block of keys, packed or not, visits the tiles of 64 queries that see some of it.

A layout with short windows makes many small blocks, so every kernel is persistent: each SM takes block after block, and
the loading warpgroup is in the next block while the others finish this one.

    loads     Q K V K V K V Q K V K V ...
    computes      s s s store s s ...            s: a step, one tile

Scores are in units of log2: exp2(score * scale * log2(e) - ...), as the hardware has it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
ROWS = 64  # of a warpgroup's tile: what one wgmma computes
CHUNK = 32  # keys that one copy loads; divides a tile
ALIGNMENT = 8  # rows of the swizzled tiles of shared memory: copies start at multiples of it
_LOWEST = -1e30  # below every score; finite, so that a masked row gives exp2(-inf - _LOWEST) = 0 and not NaN

_REGISTERS = {2: (240, 24), 3: (160, 32)}  # of a thread that computes, by warpgroups that do, and of one that loads

FAR_START, FAR_END, NEAR_START, NEAR_END = range(4)  # rows of the `ranges` that the kernels take


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for; T, S and `near` are multiples of ALIGNMENT."""

    B: int
    T: int  # queries of a row
    N: int
    K: int
    H: int
    S: int
    near: int  # near keys of a row: its own tokens, as a rule as many as T
    dtype: Any
    scale: float
    num_sms: int  # of the GPU
    unit: int = 2 * ROWS  # tokens that `ranges`, lse and delta are filled up to a multiple of

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.N // self.K

    @property
    def roomy(self) -> bool:
        """Whether shared memory has room for a block's output, and for O in dQ, beside its queries."""
        return self.H <= 128

    @property
    def padded(self) -> int:
        """Tokens of `ranges`, lse and delta: whole blocks of every kernel, which has no more than `unit` of them."""
        return pl.cdiv(self.T, self.unit) * self.unit


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of a kernel whose blocks are queries."""

    keys: int  # of a tile of virtual keys
    stages: int  # tiles in shared memory
    heads: int  # query heads of a block: they share a key head
    warpgroups: int = 2  # that compute, ROWS rows of a block each
    turns: bool = True  # whether two warpgroups of the forward kernel take turns
    halves: bool = False  # whether it computes only half of a block's last tile where no row sees the rest

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.warpgroups * ROWS // self.heads

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes, and of one that loads: an SM has 65,536."""
        return _REGISTERS[self.warpgroups]

    @property
    def rereads(self) -> bool:
        """Whether each mask reads the rows' ranges again, for want of registers that would hold them."""
        return self.warpgroups == 3

    @property
    def segments(self) -> int:
        """Runs of tokens that are the rows of one warpgroup."""
        return max(1, ROWS // self.tokens)


def _smem(*shape: int, dtype: Any) -> Any:
    """Shared memory in the order that wgmma reads."""
    # The checker takes the two for abstract classes, whose methods are made elsewhere.
    tiling = plgpu.TilingTransform((ALIGNMENT, 64))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def _accumulator(rows: int, columns: int) -> Any:
    return _ACC((rows, columns), jnp.float32)


def accumulate(products: Callable[..., None], *sums: Any) -> tuple[Any, ...]:
    """Registers to which `products`, given an accumulator for each, adds by wgmma."""
    return pl.run_state(lambda accumulators: products(*accumulators))(tuple(_ACC.init(x) for x in sums))


def _registers(shape: tuple[int, ...], fill: float, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


_PER_ROW, _PER_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def _along_rows(x: Any, shape: tuple[int, ...]) -> Any:
    return lax.broadcast_in_dim(x, shape, [0])


def _along_columns(x: Any, shape: tuple[int, ...]) -> Any:
    return lax.broadcast_in_dim(x, shape, [1])


def _masked(
    s: Any, axis: int, lo: Callable[[], Any], hi: Callable[[], Any], need_lo: Any, need_hi: Any, short: bool
) -> Any:
    """Scores, -inf where the index along `axis` is not in [lo(), hi()), vectors along the other axis.

    need_lo, need_hi: whether some lo is above 0, some hi below the length. Comparisons cost as much as the softmax, and
    most tiles need one or none; their vectors are made where they are needed, for they take registers. `short` is the
    form with one case of comparisons in place of three, for kernels that have no registers left.
    """
    along = (_along_columns, _along_rows)[axis]

    def check(lo, hi, s):
        i = plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=plgpu.Layout.WGMMA)
        seen = [i >= along(x(), s.shape) for x in lo] + [i < along(x(), s.shape) for x in hi]
        return jnp.where(functools.reduce(lambda x, y: x & y, seen), s, -jnp.inf)

    if short:
        return lax.cond(need_lo | need_hi, functools.partial(check, [lo], [hi]), lambda s: s, s)
    kinds = [lambda s: s, *(functools.partial(check, *x) for x in (([], [hi]), ([lo], []), ([lo], [hi])))]
    return lax.switch(2 * need_lo.astype(jnp.int32) + need_hi.astype(jnp.int32), kinds, s)


def _not(x: Any) -> Any:
    return x ^ True  # "not" has no form for code that one warp runs


def _aligned(x: Any) -> Any:
    """The multiple of ALIGNMENT at or below x, and where x is one, the proof of it that the compiler asks for."""
    return lax.bitwise_and(x, -ALIGNMENT)


def _each_task(
    num_sms: int, total: Any, prepare: Callable[[Any], Any], run: Callable[[Any, Any, Any], Any], state: Any
) -> Any:
    """Folds `run(round, prepare(task), state)` over the tasks of this SM, whose scalars are read a task ahead.

    Tasks go to the SMs there and back, so that each gets heavy and light ones where their weight falls steadily:

        SM      0 1 2 3
        tasks   0 1 2 3     first round
                7 6 5 4     second
                8 9
    """
    sm = lax.axis_index("sm")

    def task(i):
        back = lax.rem(i, 2) == 1
        return jnp.minimum(i * num_sms + jnp.where(back, num_sms - 1 - sm, sm), total - 1)

    whole, rest = lax.div(total, num_sms), lax.rem(total, num_sms)
    place = jnp.where(lax.rem(whole, 2) == 1, num_sms - 1 - sm, sm)
    rounds = whole + jnp.where(place < rest, 1, 0)

    def body(i, carry):
        ready, state = carry
        ahead = prepare(task(i + 1))
        return ahead, run(i, ready, state)

    return lax.fori_loop(0, rounds, body, (prepare(task(0)), state))[1]


def _launch(
    kernel: Callable[..., None], out: Any, scratch: tuple[Any, ...], num_sms: int, warpgroups: int = 3
) -> Callable[..., Any]:
    """`kernel(refs, scratch)` on one block of so many warpgroups for each SM."""

    def entry(*refs):
        pl.run_scoped(lambda *scratch: kernel(refs, scratch), *scratch, collective_axes="wg")

    return plgpu.kernel(
        entry,
        out_type=out,
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


class _QueryBlock(NamedTuple):
    """A block of queries and its virtual keys: int32 scalars."""

    b: Any
    head: Any  # the first of Tiles.heads
    token: Any  # the first
    far_lo: Any
    near_lo: Any
    far_chunks: Any
    steps: Any  # tiles of virtual keys

    @property
    def shift(self) -> Any:
        """Of a token's position, to its number as a virtual key."""
        return self.far_chunks * CHUNK - self.near_lo


class _Rows(NamedTuple):
    """What the rows of one warpgroup see: int32 scalars."""

    far_from: Any  # virtual keys that all rows see
    far_to: Any
    near_from: Any
    near_to: Any
    steps: Any  # tiles up to the last that a row sees
    end: Any  # virtual keys up to the last that a row sees


class _QueryBlocks:
    """All blocks of queries. Heavy ones, late in their rows, come first."""

    numbers = 4  # that a query has: its ranges

    def __init__(self, shape: Shape, tiles: Tiles, ranges: Any):
        self.shape, self.tiles, self.ranges = shape, tiles, ranges
        self.groups = shape.N // tiles.heads
        self.per_row = shape.padded // tiles.tokens  # beyond T too, so that all of lse is written
        self.total = self.per_row * shape.B * self.groups

    @classmethod
    def of_inputs(cls, shape: Shape, tiles: Tiles, *inputs: Any) -> tuple["_QueryBlocks", Any, Any]:
        """The blocks, and near and far keys and values, of what `forward` is given after q."""
        k, v, far_k, far_v, ranges = inputs
        return cls(shape, tiles, ranges), (k, v), (far_k, far_v)

    @staticmethod
    def copies(keys: int) -> tuple[int, int]:
        """How many copies bring a tile of keys, and one of values."""
        return keys // CHUNK, keys // CHUNK

    @staticmethod
    def beside_keys(stages: int, keys: int) -> tuple[Any, ...]:
        """Shared memory for what comes with the tiles of keys and goes to the mask."""
        return ()

    def block(self, task: Any) -> _QueryBlock:
        """Reads the scalars of a block."""
        group, rest = lax.rem(task, self.groups), lax.div(task, self.groups)
        b = lax.rem(rest, self.shape.B)
        token = (self.per_row - 1 - lax.div(rest, self.shape.B)) * self.tiles.tokens
        last = token + self.tiles.tokens - 1
        far_lo = _aligned(self.ranges[b, FAR_START, token])
        near_lo = _aligned(self.ranges[b, NEAR_START, token])
        far_chunks = pl.cdiv(self.ranges[b, FAR_END, last] - far_lo, CHUNK)
        chunks = far_chunks + pl.cdiv(self.ranges[b, NEAR_END, last] - near_lo, CHUNK)
        # At least one, masked whole where the block sees nothing: the warpgroups take turns step by step, and one that
        # waits for its turn at the end of a block is waiting for the other's next step.
        steps = jnp.maximum(pl.cdiv(chunks * CHUNK, self.tiles.keys), 1)
        return _QueryBlock(b, group * self.tiles.heads, token, far_lo, near_lo, far_chunks, steps)

    def block_of(self, task: Any, wg: Any) -> tuple[_QueryBlock, _Rows]:
        """The same, and what the rows of a warpgroup see."""
        block = self.block(task)
        _, token, _ = self.segments(block, wg)[0]
        last = token + min(ROWS, self.tiles.tokens) - 1
        at = lambda row, i: self.ranges[block.b, row, i]  # noqa: E731
        far = at(FAR_START, last) - block.far_lo, at(FAR_END, token) - block.far_lo
        near = at(NEAR_START, last) + block.shift, at(NEAR_END, token) + block.shift
        steps = block.steps
        end = jnp.maximum(at(NEAR_END, last) + block.shift, block.far_chunks * CHUNK)
        if self.tiles.tokens > ROWS:  # otherwise both warpgroups have the same tokens
            steps = jnp.minimum(jnp.maximum(pl.cdiv(end, self.tiles.keys), 1), steps)
        return block, _Rows(*far, *near, steps, end)

    def segments(self, block: Any, wg: Any) -> list[tuple[Any, Any, Any]]:
        """(rows, first token, head) of the runs of tokens that are the rows of a warpgroup."""
        length = min(ROWS, self.tiles.tokens)
        token = _aligned(block.token + lax.rem(wg * ROWS, self.tiles.tokens))
        head = block.head + lax.div(wg * ROWS, self.tiles.tokens)
        return [(pl.ds(s * length, length), token, head + s) for s in range(self.tiles.segments)]

    def load_tile(self, block: _QueryBlock, near: Any, far: Any, tile: Any, ready: Any, step: Any) -> None:
        """Starts the copies of one tile of virtual keys from device memory: near [B, near, K, H], far [B, S, K, H].

        A tile of one kind is one copy. Each kind of tile arrives as often as it has chunks.
        """
        kv_head, chunks = lax.div(block.head, self.shape.group), self.tiles.keys // CHUNK
        u0 = step * chunks

        def copy(source, first, rows, count):
            keys = pl.ds(_aligned(first), count)
            plgpu.copy_gmem_to_smem(source.at[block.b, keys, kv_head], tile.at[pl.ds(rows, count)], ready)

        def copy_far(c, count):
            copy(far, block.far_lo + (u0 + c) * CHUNK, c * CHUNK, count)

        def copy_near(c, count):
            copy(near, block.near_lo + (u0 + c - block.far_chunks) * CHUNK, c * CHUNK, count)

        def whole(copy):
            copy(0, self.tiles.keys)
            for _ in range(chunks - 1):
                plgpu.barrier_arrive(ready)

        def mixed():
            for c in range(chunks):
                pl.when(u0 + c < block.far_chunks)(lambda c=c: copy_far(c, CHUNK))
                pl.when(u0 + c >= block.far_chunks)(lambda c=c: copy_near(c, CHUNK))

        is_far, is_near = u0 + chunks <= block.far_chunks, u0 >= block.far_chunks
        pl.when(is_far)(lambda: whole(copy_far))
        pl.when(is_near)(lambda: whole(copy_near))
        pl.when(_not(is_far | is_near))(mixed)

    def load_rows(self, block: Any, wg: Any, per_head: list, per_row: list, mine: Any, ready: Any) -> None:
        """Starts the copies of a warpgroup's rows from [B, T, N, H], from [B, N, padded], and of their ranges."""
        for rows, token, head in self.segments(block, wg):
            tokens = pl.ds(token, rows.size)
            copies = [(x.at[block.b, tokens, head], tile.at[rows]) for x, tile in per_head]
            copies += [(x.at[block.b, head, tokens], row.at[rows]) for x, row in per_row]
            copies += [(self.ranges.at[block.b, x, tokens], mine.at[x, rows]) for x in range(self.numbers)]
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, ready)

    def store_rows(self, block: Any, wg: Any, per_head: tuple, per_row: tuple) -> None:
        """Starts the copies of a warpgroup's rows: (tile, target [B, T, N, H]) and (row, target [B, N, padded])."""
        copies = []
        for rows, token, head in self.segments(block, wg):
            tokens = pl.ds(token, rows.size)
            copies += [(per_head[0].at[rows], per_head[1].at[block.b, tokens, head])]
            copies += [(per_row[0].at[rows], per_row[1].at[block.b, head, tokens])]
        _store(copies)

    def row_copies(self, per_head: int, per_row: int) -> int:
        """How many copies `load_rows` starts."""
        return self.tiles.segments * (per_head + per_row + self.numbers)

    def mask(self, block: _QueryBlock, rows: _Rows, mine: Any, short: bool = False) -> Callable[[Any, Any], Any]:
        """The function (scores, first virtual key) -> scores, -inf where a row does not see a key.

        `mine` has the rows' ranges, int32 [4, ROWS] in shared memory. `short` is the form with one case in place of
        nine, for kernels that have no registers left.
        """

        def number(row):
            x = plgpu.load(mine.at[row], layout=_PER_ROW)
            return x - block.far_lo if row in (FAR_START, FAR_END) else x + block.shift

        read = number if self.tiles.rereads else [number(row) for row in range(self.numbers)].__getitem__
        far_keys = block.far_chunks * CHUNK

        def both(s, u0):
            u = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA) + u0
            lo, hi, near_lo, near_hi = (_along_rows(read(row), s.shape) for row in range(self.numbers))
            return jnp.where(((u >= lo) & (u < hi)) | ((u >= near_lo) & (u < near_hi)), s, -jnp.inf)

        def one(s, u0, is_far):
            lo, hi = (FAR_START, FAR_END) if is_far else (NEAR_START, NEAR_END)
            some_lo, some_hi = (rows.far_from, rows.far_to) if is_far else (rows.near_from, rows.near_to)
            return _masked(
                s, 1, lambda: read(lo) - u0, lambda: read(hi) - u0, some_lo > u0, some_hi < u0 + s.shape[1], False
            )

        def mask(s, u0):
            # 0: far keys alone, 1: near ones alone, 2: the tile where one kind follows the other.
            kind = jnp.where(u0 >= far_keys, 1, jnp.where(u0 + s.shape[1] <= far_keys, 0, 2))
            return lax.switch(kind, [lambda s: one(s, u0, True), lambda s: one(s, u0, False), lambda s: both(s, u0)], s)

        def short_mask(s, u0):
            end = u0 + s.shape[1]
            is_far = (u0 >= rows.far_from) & (end <= rows.far_to)
            is_near = (u0 >= rows.near_from) & (end <= rows.near_to)
            return lax.cond(is_far | is_near, lambda s: s, lambda s: both(s, u0), s)

        return short_mask if short else mask

    def loader(
        self, near: tuple, far: tuple, tiles: tuple, ready: tuple, free: tuple, load_rows: Callable, rows_free: Any
    ) -> None:
        """What the loading warp does: the rows of every block, and its tiles of keys and of values.

        The first tile is asked for before the rows, whose shared memory is in use until the block before is done.
        """
        stages = self.tiles.stages

        def run(i, block, state):
            def rows():
                for w in range(self.tiles.warpgroups):
                    pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(rows_free.at[w]))
                    load_rows(block, w)

            def step(step, t):
                slot = lax.rem(t, stages)
                for x in range(2):
                    pl.when(t >= stages)(lambda x=x: plgpu.barrier_wait(free[x].at[slot]))
                    self.load_tile(block, near[x], far[x], tiles[x].at[slot], ready[x].at[slot], step)
                    if x == 0:
                        pl.when(step == 0)(rows)
                return t + 1

            return i + 1, lax.fori_loop(0, block.steps, step, state[1])

        done, t = _each_task(self.shape.num_sms, self.total, self.block, run, (jnp.int32(0), jnp.int32(0)))
        for w in range(self.tiles.warpgroups):
            pl.when(done > 0)(lambda w=w: plgpu.barrier_wait(rows_free.at[w]))
        for x in free:
            _await_each(x, stages, t)


class _Together:
    """Arrays whose parts of the same number belong together."""

    def __init__(self, *arrays: Any):
        self._arrays = arrays
        self.at = self

    def __getitem__(self, i: Any) -> tuple[Any, ...]:
        return tuple(x.at[i] for x in self._arrays)


def _await_each(free: Any, stages: int, loaded: Any) -> None:
    """Waits until the last tiles that were loaded are done with: no barrier is left with an arrival unseen."""
    for slot in range(stages):
        pl.when(loaded > slot)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))


def _in_one_warp(load: Callable[[], None]) -> None:
    """Copies start from one warp: a whole warpgroup would synchronise before each."""
    plgpu.warp_map(lambda warp: pl.when(warp == 0)(load))


def _store(copies: list[tuple[Any, Any]]) -> None:
    """Starts the copies of what was written to shared memory, as one group."""
    plgpu.commit_smem()
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target, commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def _wait_until_stored(last: bool = False) -> None:
    """Waits until shared memory is free again; at the end, until the copies have arrived."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=not last)


def forward(shape: Shape, tiles: Tiles, kind: type[_QueryBlocks] = _QueryBlocks) -> Callable[..., Any]:
    """q, k, v, packed k and v, ranges -> out [B, T, N, H], lse float32[B, N, padded].

    ranges: int32 [B, 4, padded]; lse: log2 of the sum of exp2(score), +inf for a row that sees nothing. Another `kind`
    of blocks has other inputs than those after q.
    """
    H, keys, stages, computing = shape.H, tiles.keys, tiles.stages, tiles.warpgroups
    scale, turns = shape.scale * LOG2E, computing == 2 and tiles.turns

    def compute(blocks, refs, scratch, wg):
        *_, o_ref, lse_ref = refs
        q, out, lse, mine = (x.at[wg] for x in scratch[:4])
        k_smem, v_smem, q_ready, k_ready, v_ready, q_free, k_free, v_free, order, *beside = scratch[4:]
        out = out if shape.roomy else q

        def take_turns():
            # While one warpgroup has the tensor cores, the other does its softmax. Three find their turns themselves.
            if turns:
                plgpu.barrier_arrive(order)
                plgpu.barrier_wait(order)

        def run(i, ready, t):
            block, rows = ready
            plgpu.barrier_wait(q_ready.at[wg])
            mask = blocks.mask(block, rows, mine, short=H > 64)

            def step(keys_seen, step, state):
                t, acc, top, total = state
                slot = lax.rem(t, stages)
                k_tile, v_tile = (x.at[slot].at[pl.ds(0, keys_seen)] for x in (k_smem, v_smem))

                def scores(acc):
                    plgpu.wgmma(acc, q, k_tile.transpose((1, 0)))
                    take_turns()
                    return acc[...]

                s = pl.run_scoped(scores, _accumulator(ROWS, keys_seen))

                def done():
                    plgpu.barrier_arrive(k_free.at[slot])
                    if shape.roomy:
                        pl.when(step == rows.steps - 1)(lambda: plgpu.barrier_arrive(q_free.at[wg]))

                mask_reads = beside or tiles.rereads  # what the loader may write when it is done with
                if not mask_reads:
                    done()
                s = mask(s, step * keys, *(x.at[slot] for x in beside))
                if mask_reads:
                    done()
                new_top = jnp.maximum(top, s.max(axis=1) * scale)
                shrink = jnp.exp2(top - new_top)
                p = jnp.exp2(s * scale - _along_rows(new_top, s.shape))
                acc *= _along_rows(shrink, acc.shape)
                total = total * shrink + p.sum(axis=1)
                p = p.astype(shape.dtype)
                acc, total, top, p = lax.optimization_barrier((acc, total, new_top, p))
                if turns:
                    plgpu.barrier_arrive(order)
                plgpu.barrier_wait(v_ready.at[slot])
                if turns:
                    plgpu.barrier_wait(order)

                def weigh(acc):
                    plgpu.wgmma(acc, p, v_tile)
                    ahead = lax.rem(t + 1, stages)
                    pl.when(step + 1 < rows.steps)(lambda: plgpu.barrier_wait(k_ready.at[ahead]))

                (acc,) = accumulate(weigh, acc)
                plgpu.barrier_arrive(v_free.at[slot])
                return t + 1, acc, top, total

            def pass_by(_, t):
                # A tile that only the other warpgroup's rows see.
                slot = lax.rem(t, stages)
                plgpu.barrier_wait(k_ready.at[slot])
                take_turns()
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])
                take_turns()
                plgpu.barrier_arrive(v_free.at[slot])
                return t + 1

            plgpu.barrier_wait(k_ready.at[lax.rem(t, stages)])
            acc = _registers((ROWS, H), 0.0, plgpu.Layout.WGMMA)
            top, total = (_registers((ROWS,), x, _PER_ROW) for x in (_LOWEST, 0.0))
            whole, state = functools.partial(step, keys), (t, acc, top, total)
            if tiles.halves:
                last = rows.steps - 1
                is_half = rows.end <= last * keys + keys // 2
                state = lax.fori_loop(0, jnp.where(is_half, last, rows.steps), whole, state)
                half = functools.partial(step, keys // 2, last)
                t, acc, top, total = lax.cond(is_half, half, lambda state: state, state)
            else:
                t, acc, top, total = lax.fori_loop(0, rows.steps, whole, state)
            if tiles.tokens > ROWS:
                t = lax.fori_loop(rows.steps, block.steps, pass_by, t)

            total_or_one = jnp.where(total > 0, total, 1.0)
            _wait_until_stored()
            out[...] = (acc * _along_rows(1 / total_or_one, acc.shape)).astype(shape.dtype)
            lse[...] = jnp.where(total > 0, top + jnp.log2(total_or_one), jnp.inf)
            blocks.store_rows(block, wg, (out, o_ref), (lse, lse_ref))
            if not shape.roomy:
                _wait_until_stored()
                plgpu.barrier_arrive(q_free.at[wg])
            return t

        pl.when(wg == 1)(take_turns)
        _each_task(shape.num_sms, blocks.total, lambda task: blocks.block_of(task, wg), run, jnp.int32(0))
        pl.when(wg == 0)(take_turns)
        _wait_until_stored(last=True)

    def kernel(refs, scratch):
        q_ref, *inputs = refs[:-2]
        q_smem, _, _, range_smem, k_smem, v_smem, q_ready, k_ready, v_ready, q_free, k_free, v_free, _ = scratch[:13]
        beside = scratch[13:]
        wg = lax.axis_index("wg")
        blocks, near, far = kind.of_inputs(shape, tiles, *inputs)

        many, few = (232, 40) if computing == 2 and H == 64 else tiles.registers

        @pl.when(wg < computing)
        def _():
            plgpu.set_max_registers(many, action="increase")
            compute(blocks, refs, scratch, wg)

        @pl.when(wg == computing)
        def _():
            plgpu.set_max_registers(few, action="decrease")

            def load_rows(block, w):
                blocks.load_rows(block, w, [(q_ref, q_smem.at[w])], [], range_smem.at[w], q_ready.at[w])

            key_tiles = _Together(k_smem, *beside) if beside else k_smem
            tiles, ready, free = (key_tiles, v_smem), (k_ready, v_ready), (k_free, v_free)
            _in_one_warp(lambda: blocks.loader(near, far, tiles, ready, free, load_rows, q_free))

    blocks = kind(shape, tiles, None)
    of_keys, of_values = kind.copies(keys)
    scratch = (
        _smem(computing, ROWS, H, dtype=shape.dtype),
        _smem(computing, ROWS if shape.roomy else ALIGNMENT, H, dtype=shape.dtype),
        plgpu.SMEM((computing, ROWS), jnp.float32),
        plgpu.SMEM((computing, kind.numbers, ROWS), jnp.int32),
        _smem(stages, keys, H, dtype=shape.dtype),
        _smem(stages, keys, H, dtype=shape.dtype),
        plgpu.Barrier(num_arrivals=blocks.row_copies(1, 0), num_barriers=computing),
        plgpu.Barrier(num_arrivals=of_keys, num_barriers=stages),
        plgpu.Barrier(num_arrivals=of_values, num_barriers=stages),
        plgpu.Barrier(num_barriers=computing),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
        *kind.beside_keys(stages, keys),
    )
    out = (
        jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, H), shape.dtype),
        jax.ShapeDtypeStruct((shape.B, shape.N, shape.padded), jnp.float32),
    )
    return _launch(kernel, out, scratch, shape.num_sms, computing + 1)


def query_gradient(shape: Shape, tiles: Tiles) -> Callable[..., Any]:
    """q, k, v, packed k and v, ranges, d_out, out, lse, d_lse -> dq [B, T, N, H], and delta for `key_gradients`.

    lse, d_lse, delta: float32[B, N, padded]. dS = P * (dP - delta), where delta = sum(O * dO) - d_lse. Without room for
    O in shared memory (`Shape.roomy`) `d_lse` must have sum(O * dO) subtracted.
    """
    H, keys, stages, computing = shape.H, tiles.keys, tiles.stages, tiles.warpgroups

    def compute(blocks, refs, scratch, wg):
        dq_ref, delta_ref = refs[-2:]
        q, do, o, out, per_row, mine, delta_smem = (x.at[wg] for x in scratch[:7])
        k_smem, v_smem, q_ready, k_ready, v_ready, q_free, k_free, v_free = scratch[7:]
        out = out if shape.roomy else q

        def run(i, ready, t):
            block, rows = ready
            plgpu.barrier_wait(q_ready.at[wg])
            mask = blocks.mask(block, rows, mine)
            lse, d_lse = (plgpu.load(per_row.at[x], layout=_PER_ROW) for x in range(2))
            delta = -d_lse
            if shape.roomy:
                products = [plgpu.load(x, layout=plgpu.Layout.WGMMA).astype(jnp.float32) for x in (o, do)]
                delta = (products[0] * products[1]).sum(axis=1) - d_lse

            def step(step, state):
                t, dq = state
                slot = lax.rem(t, stages)
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])

                def products(s, dp):
                    plgpu.wgmma(s, q, k_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp, do, v_smem.at[slot].transpose((1, 0)))
                    s = mask(plgpu.wgmma_accumulator_load(s, wait_n=1), step * keys)
                    p = jnp.exp2(s * (shape.scale * LOG2E) - _along_rows(lse, s.shape))
                    return p * (dp[...] - _along_rows(delta, s.shape))

                ds = pl.run_scoped(products, *[_accumulator(ROWS, keys)] * 2)
                plgpu.barrier_arrive(v_free.at[slot])
                if shape.roomy:
                    pl.when(step == rows.steps - 1)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
                ds = ds.astype(shape.dtype)
                (dq,) = accumulate(lambda dq: plgpu.wgmma(dq, ds, k_smem.at[slot]), dq)
                plgpu.barrier_arrive(k_free.at[slot])
                return t + 1, dq

            def pass_by(_, t):
                # A tile that only the other warpgroup's rows see.
                slot = lax.rem(t, stages)
                for ready, free in ((k_ready, k_free), (v_ready, v_free)):
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.barrier_arrive(free.at[slot])
                return t + 1

            t, dq = lax.fori_loop(0, rows.steps, step, (t, _registers((ROWS, H), 0.0, plgpu.Layout.WGMMA)))
            if tiles.tokens > ROWS:
                t = lax.fori_loop(rows.steps, block.steps, pass_by, t)
            _wait_until_stored()
            out[...] = (dq * shape.scale).astype(shape.dtype)
            delta_smem[...] = delta
            blocks.store_rows(block, wg, (out, dq_ref), (delta_smem, delta_ref))
            if not shape.roomy:
                _wait_until_stored()
                plgpu.barrier_arrive(q_free.at[wg])
            return t

        _each_task(shape.num_sms, blocks.total, lambda task: blocks.block_of(task, wg), run, jnp.int32(0))
        _wait_until_stored(last=True)

    def kernel(refs, scratch):
        q_ref, k_ref, v_ref, far_k_ref, far_v_ref, ranges_ref, do_ref, o_ref, lse_ref, d_lse_ref = refs[:10]
        q_smem, do_smem, o_smem, _, row_smem, range_smem, _ = scratch[:7]
        k_smem, v_smem, q_ready, k_ready, v_ready, q_free, k_free, v_free = scratch[7:]
        wg = lax.axis_index("wg")
        blocks = _QueryBlocks(shape, tiles, ranges_ref)

        many, few = tiles.registers

        @pl.when(wg < computing)
        def _():
            plgpu.set_max_registers(many, action="increase")
            compute(blocks, refs, scratch, wg)

        @pl.when(wg == computing)
        def _():
            plgpu.set_max_registers(few, action="decrease")

            def load_rows(block, w):
                per_head = [(q_ref, q_smem.at[w]), (do_ref, do_smem.at[w])]
                per_head += [(o_ref, o_smem.at[w])] if shape.roomy else []
                per_row = [(lse_ref, row_smem.at[w, 0]), (d_lse_ref, row_smem.at[w, 1])]
                blocks.load_rows(block, w, per_head, per_row, range_smem.at[w], q_ready.at[w])

            tiles, ready, free = (k_smem, v_smem), (k_ready, v_ready), (k_free, v_free)
            near, far = (k_ref, v_ref), (far_k_ref, far_v_ref)
            _in_one_warp(lambda: blocks.loader(near, far, tiles, ready, free, load_rows, q_free))

    blocks = _QueryBlocks(shape, tiles, None)
    extra = ROWS if shape.roomy else ALIGNMENT
    scratch = (
        _smem(computing, ROWS, H, dtype=shape.dtype),
        _smem(computing, ROWS, H, dtype=shape.dtype),
        _smem(computing, extra, H, dtype=shape.dtype),
        _smem(computing, extra, H, dtype=shape.dtype),
        plgpu.SMEM((computing, 2, ROWS), jnp.float32),
        plgpu.SMEM((computing, 4, ROWS), jnp.int32),
        plgpu.SMEM((computing, ROWS), jnp.float32),
        _smem(stages, keys, H, dtype=shape.dtype),
        _smem(stages, keys, H, dtype=shape.dtype),
        plgpu.Barrier(num_arrivals=blocks.row_copies(3 if shape.roomy else 2, 2), num_barriers=computing),
        plgpu.Barrier(num_arrivals=keys // CHUNK, num_barriers=stages),
        plgpu.Barrier(num_arrivals=keys // CHUNK, num_barriers=stages),
        plgpu.Barrier(num_barriers=computing),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
    )
    out = (
        jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, H), shape.dtype),
        jax.ShapeDtypeStruct((shape.B, shape.N, shape.padded), jnp.float32),
    )
    return _launch(kernel, out, scratch, shape.num_sms, computing + 1)


class _KeyBlock(NamedTuple):
    """A block of keys, packed (far) or not, and the queries that it visits: int32 scalars, and is_far."""

    is_far: Any
    b: Any
    block: Any
    head: Any  # of the result: key head, and the part of its query heads
    kv_head: Any
    first_head: Any  # of the queries
    first: Any  # tile of queries
    tiles: Any
    steps: Any
    is_live: Any  # whether the block holds a key


@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """Sizes of the tiles of the kernel whose blocks are keys.

    Attributes:
      splits: groups that the query heads of a packed block are cut into, each with a result of its own. A packed block
        is seen by up to T queries; with few key heads it would keep a few SMs busy and the others waiting.
      stages: tiles of 64 queries in shared memory.
      shared: two warpgroups share 64 keys, and one computes dV, the other dK; otherwise 64 keys each, and both.
      warpgroups: that compute.
    """

    splits: int
    stages: int
    shared: bool
    warpgroups: int = 2

    @property
    def keys(self) -> int:
        """Keys of a block."""
        return ROWS if self.shared else self.warpgroups * ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes, and of one that loads."""
        return _REGISTERS[self.warpgroups]


def key_gradients(shape: Shape, tiles: KeyTiles) -> Callable[..., Any]:
    """q, k, v, packed k and v, ranges, d_out, lse, delta, far_queries, near_queries, far_blocks -> dk, dv of each.

    far_queries, near_queries: int32 [B, 2, blocks of keys]: first query that sees the block, and one past the last, -1
    for a block without keys; far_blocks: int32 [1], packed blocks that hold keys in some row.
    Returns packed dk, dv [B, S, K * splits, H], the parts of a head side by side, and near dk, dv
    [B, near, K, H].
    Heavy blocks, early in the packed array, come first.
    """
    H, KEYS, stages, splits = shape.H, tiles.keys, tiles.stages, tiles.splits
    near_tasks = pl.cdiv(shape.near, KEYS) * shape.B * shape.K
    outputs = ("dk",), ("dv",)
    computing, (many, few) = tiles.warpgroups, tiles.registers

    def prepare_with(far_q_ref, near_q_ref, far_tasks):
        def prepare(task):
            is_far = task < far_tasks
            task = jnp.where(is_far, task, task - far_tasks)
            ways = jnp.where(is_far, splits, 1)
            head, rest = lax.rem(task, shape.K * ways), lax.div(task, shape.K * ways)
            b, block = lax.rem(rest, shape.B), lax.div(rest, shape.B)
            span = [
                lax.cond(is_far, lambda x=x: far_q_ref[b, x, block], lambda x=x: near_q_ref[b, x, block])
                for x in range(2)
            ]
            first, heads = lax.div(span[0], ROWS), lax.div(shape.group, ways)
            count = jnp.maximum(pl.cdiv(span[1], ROWS) - first, 0)
            is_live = span[1] >= 0
            kv_head, first_head = lax.div(head, ways), head * heads
            return _KeyBlock(is_far, b, block, head, kv_head, first_head, first, count, count * heads, is_live)

        return prepare

    def compute(prepare, total, refs, scratch, wg, results):
        out_refs = refs[12:]
        which = 0 if tiles.shared else wg
        k_smem, v_smem, q_smem, do_smem, dk_smem, dv_smem, row_smem, range_smem = scratch[:8]
        k_ready, k_free, ready, free = scratch[8:]
        k, v, staged = k_smem.at[which], v_smem.at[which], (dk_smem.at[which], dv_smem.at[which])

        def run(i, block, t):
            key = _aligned(block.block * KEYS + which * ROWS)
            plgpu.barrier_wait(k_ready)

            def add_tile(slot, sums):
                q, do, per_row, mine = (x.at[slot] for x in (q_smem, do_smem, row_smem, range_smem))

                def weights(s):
                    lo, hi = (lambda x=x: plgpu.load(mine.at[x], layout=_PER_COLUMN) - key for x in range(2))
                    s = _masked(s, 0, lo, hi, mine[0, ROWS - 1] > key, mine[1, 0] < key + ROWS, H > 64)
                    lse = plgpu.load(per_row.at[0], layout=_PER_COLUMN)
                    return jnp.exp2(s * (shape.scale * LOG2E) - _along_columns(lse, s.shape))

                def products(s, dp):
                    plgpu.wgmma(s, k, q.transpose((1, 0)))
                    plgpu.wgmma(dp, v, do.transpose((1, 0)))
                    p = weights(plgpu.wgmma_accumulator_load(s, wait_n=1))
                    delta = plgpu.load(per_row.at[1], layout=_PER_COLUMN)
                    ds = (p * (dp[...] - _along_columns(delta, s.shape))).astype(shape.dtype)
                    return (ds, p.astype(shape.dtype)) if "dv" in results else (ds,)

                def weights_only(s):
                    plgpu.wgmma(s, k, q.transpose((1, 0)))
                    return (weights(s[...]).astype(shape.dtype),)

                if "dk" in results:
                    factors = pl.run_scoped(products, *[_accumulator(ROWS, ROWS)] * 2)
                else:
                    factors = pl.run_scoped(weights_only, _accumulator(ROWS, ROWS))
                others = [x for name, x in (("dk", q), ("dv", do)) if name in results]

                def add(*sums):
                    for total, factor, other in reversed(list(zip(sums, factors, others, strict=True))):
                        plgpu.wgmma(total, factor, other)

                return accumulate(add, *sums)

            def step(_, state):
                t, sums = state
                slot = lax.rem(t, stages)
                plgpu.barrier_wait(ready.at[slot])
                mine = range_smem.at[slot]
                unseen = (mine[1, ROWS - 1] <= key) | (mine[0, 0] >= key + ROWS)
                sums = lax.cond(unseen, lambda sums: sums, lambda sums: add_tile(slot, sums), sums)
                plgpu.barrier_arrive(free.at[slot])
                return t + 1, sums

            zeros = tuple(_registers((ROWS, H), 0.0, plgpu.Layout.WGMMA) for _ in results)
            t, sums = lax.fori_loop(0, block.steps, step, (t, zeros))
            plgpu.barrier_arrive(k_free)
            _wait_until_stored()
            names = ("dk", "dv")
            for name, x in zip(results, sums, strict=True):
                x = x * shape.scale if name == "dk" else x
                staged[names.index(name)][...] = x.astype(shape.dtype)

            def store(targets):
                keys = pl.ds(key, ROWS)
                _store(
                    [(staged[names.index(r)], targets[names.index(r)].at[block.b, keys, block.head]) for r in results]
                )

            pl.when(block.is_far & block.is_live)(lambda: store(out_refs[:2]))
            pl.when(_not(block.is_far))(lambda: store(out_refs[2:]))
            return t

        _each_task(shape.num_sms, total, prepare, run, jnp.int32(0))
        _wait_until_stored(last=True)

    def load(prepare, total, refs, scratch):
        q_ref, k_ref, v_ref, far_k_ref, far_v_ref, ranges_ref, do_ref, lse_ref, delta_ref = refs[:9]
        k_smem, v_smem, q_smem, do_smem, _, _, row_smem, range_smem = scratch[:8]
        k_ready, k_free, ready, free = scratch[8:]

        def load_keys(i, block):
            pl.when(i > 0)(lambda: plgpu.barrier_wait(k_free))

            def copy(*sources):
                for source, target in zip(sources, (k_smem, v_smem), strict=True):
                    for w in range(KEYS // ROWS):
                        keys = pl.ds(block.block * KEYS + w * ROWS, ROWS)
                        plgpu.copy_gmem_to_smem(source.at[block.b, keys, block.kv_head], target.at[w], k_ready)

            pl.when(block.is_far)(lambda: copy(far_k_ref, far_v_ref))
            pl.when(_not(block.is_far))(lambda: copy(k_ref, v_ref))

        def run(i, block, state):
            start_row = jnp.where(block.is_far, FAR_START, NEAR_START)
            pl.when(block.steps == 0)(lambda: load_keys(i, block))

            def step(step, t):
                slot = lax.rem(t, stages)
                head = block.first_head + lax.div(step, block.tiles)
                tokens = pl.ds((block.first + lax.rem(step, block.tiles)) * ROWS, ROWS)
                pl.when(t >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                per_head = [(q_ref, q_smem), (do_ref, do_smem)]
                copies = [(x.at[block.b, tokens, head], tile.at[slot]) for x, tile in per_head]
                copies += [
                    (x.at[block.b, head, tokens], row_smem.at[slot, r]) for r, x in enumerate((lse_ref, delta_ref))
                ]
                copies += [(ranges_ref.at[block.b, start_row + r, tokens], range_smem.at[slot, r]) for r in range(2)]
                for source, target in copies:
                    plgpu.copy_gmem_to_smem(source, target, ready.at[slot])
                pl.when(step == 0)(lambda: load_keys(i, block))
                return t + 1

            return i + 1, lax.fori_loop(0, block.steps, step, state[1])

        done, t = _each_task(shape.num_sms, total, prepare, run, (jnp.int32(0), jnp.int32(0)))
        pl.when(done > 0)(lambda: plgpu.barrier_wait(k_free))
        _await_each(free, stages, t)

    def kernel(refs, scratch):
        far_q_ref, near_q_ref, far_blocks_ref = refs[9:12]
        wg = lax.axis_index("wg")
        far_tasks = far_blocks_ref[0] * (shape.B * shape.K * splits)
        prepare, total = prepare_with(far_q_ref, near_q_ref, far_tasks), far_tasks + near_tasks

        for first, results in zip((0, 1), outputs if tiles.shared else (("dk", "dv"),), strict=False):

            @pl.when((wg == first) if tiles.shared else (wg < computing))
            def _(results=results):
                plgpu.set_max_registers(many, action="increase")
                compute(prepare, total, refs, scratch, wg, results)

        @pl.when(wg == computing)
        def _():
            plgpu.set_max_registers(few, action="decrease")
            _in_one_warp(lambda: load(prepare, total, refs, scratch))

    parts = KEYS // ROWS
    scratch = (
        *[_smem(parts, ROWS, H, dtype=shape.dtype)] * 2,
        *[_smem(stages, ROWS, H, dtype=shape.dtype)] * 2,
        *[_smem(parts, ROWS, H, dtype=shape.dtype)] * 2,
        plgpu.SMEM((stages, 2, ROWS), jnp.float32),
        plgpu.SMEM((stages, 2, ROWS), jnp.int32),
        plgpu.Barrier(num_arrivals=2 * parts),
        plgpu.Barrier(num_arrivals=computing),
        plgpu.Barrier(num_arrivals=6, num_barriers=stages),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
    )
    far = jax.ShapeDtypeStruct((shape.B, shape.S, shape.K * splits, H), shape.dtype)
    near = jax.ShapeDtypeStruct((shape.B, shape.near, shape.K, H), shape.dtype)
    return _launch(kernel, (far, far, near, near), scratch, shape.num_sms, computing + 1)


def pack(shape: Shape, rows: int, heads: int) -> Callable[..., Any]:
    """k, v [B, T, K, H], index [B, S] of tokens, num_global [B] -> packed k, v [B, S, K, H]; S is a multiple of `rows`.

    `rows` packed keys of `heads` heads pass through a block's shared memory, each by a copy of its own. After the last
    global key come at least CHUNK rows of whatever `index` says, which no query sees; the rest is left unwritten. A
    copy of all heads at once is one run of bytes to the compiler, without bounds: hence whole blocks and valid tokens.
    """
    H, groups, blocks = shape.H, shape.K // heads, shape.S // rows

    def kernel(k_ref, v_ref, index_ref, count_ref, far_k_ref, far_v_ref, k_smem, v_smem, ready):
        task = lax.axis_index("task")
        group, rest = lax.rem(task, groups), lax.div(task, groups)
        b, first = lax.rem(rest, shape.B), lax.div(rest, shape.B) * rows
        head = pl.ds(group * heads, heads)

        @pl.when(first < count_ref[b] + CHUNK)  # the last chunk of a far hull may reach as far
        def _():
            def load():
                for row in range(rows):
                    token = index_ref[b, first + row]
                    plgpu.copy_gmem_to_smem(k_ref.at[b, token, head], k_smem.at[row], ready)
                    plgpu.copy_gmem_to_smem(v_ref.at[b, token, head], v_smem.at[row], ready)

            _in_one_warp(load)
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
