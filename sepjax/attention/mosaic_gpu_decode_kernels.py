r"""One query token a row over the slots of a cache, on Hopper GPUs: the kernel, in Pallas Mosaic GPU.

A block of threads takes one key head of one row, or a share of its slots where rows are few. It visits the row's *live*
parts, those in which some slot is visible, so a row costs what it holds; a tile is of as many parts, from anywhere, as
a product takes. The products are turned round: slots are the 64 rows that wgmma computes at least, and the query heads
of the key head, filled up to 8, its columns.

    S^T [slots, queries] = K_tile . Q^T          O^T [H, queries] += V_tile^T . P^T

So keys and values pass through shared memory once and nothing is computed for rows that are not there. The token's own
key and value are where the softmax begins: its score is the first maximum, its value the first sum.

    zones     slots  0 .. ends[0] | .. ends[1] | .. C       each with a query of its own, turned to fit its keys;
                                                            a tile that touches more than the last selects by slot

One warpgroup does everything: it asks for the tile `stages` ahead as soon as a tile's place is free. Several blocks
share an SM, and one loads while another computes. Scores are in units of log2.

*Looks*, where they are asked for: the largest weight of a key head's queries at each slot. Weights are known when all
tiles are, so a block keeps its scores in shared memory and makes one number a slot of them at its end. Where blocks
share a row none knows the weights; scores are then written as they are. Both lie in the order of the live parts, and
who reads them finds them by their places (`decode.Seen.in_slots`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sepjax.attention import mosaic_gpu_kernels as kernels

_AT_ONCE = 4  # tiles of which looks are made side by side: each waits for its scores, and for others of its row
_LOWEST = -1e30  # below every score; finite, so that what sees nothing gives exp2(-inf - _LOWEST) = 0 and not NaN


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for."""

    B: int
    K: int
    G: int  # query heads of a key head
    H: int
    C: int  # slots
    ends: tuple[int, ...]  # of all zones but the last, each with a query of its own
    dtype: Any
    scale: float
    tile: int  # slots of a tile, a multiple of 64 that divides C
    part: int  # slots that are read at a time, a multiple of 8 that divides a tile
    stages: int  # tiles in shared memory
    splits: int  # blocks of threads that share the slots of a row
    looks: bool  # whether the largest weights are asked for, too
    turns: bool  # whether queries and the token's own key are turned here
    writes: bool  # whether the token is written into the cache, too

    @property
    def columns(self) -> int:
        """Queries of a key head, filled up to what wgmma takes."""
        return pl.cdiv(self.G, 8) * 8

    @property
    def packed(self) -> bool:
        """Whether the token's own key and value are columns of the last zone's queries, after them.

        Few rows wait for each kernel: one makes all three then. Weights of these columns are nobody's.
        """
        return self.splits > 1 and self.columns - self.G >= 2

    @property
    def turns_key(self) -> bool:
        """Whether the token's own key is turned here, too: in the column behind its queries, where there is one."""
        return self.turns and self.G % 8 > 0

    @property
    def written(self) -> int:
        """Queries of the input and the result: G, or where copies of 8 rows do not end there, `columns`."""
        return self.G if self.G < 8 else self.columns

    @property
    def zones(self) -> int:
        """Z."""
        return len(self.ends) + 1

    @property
    def tiles(self) -> int:
        """Tiles of a row."""
        return self.C // self.tile

    @property
    def parts(self) -> int:
        """Parts of a tile."""
        return self.tile // self.part


def _tiled(*shape: int, dtype: Any) -> Any:
    """Shared memory in the order that wgmma reads."""
    # The checker takes the two for abstract classes, whose methods are made elsewhere.
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _wgmma_layout(x: Any) -> Any:
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def _along_rows(x: Any, shape: tuple[int, ...]) -> Any:
    return _wgmma_layout(lax.broadcast_in_dim(x, shape, [0]))


def _along_columns(x: Any, shape: tuple[int, ...]) -> Any:
    return _wgmma_layout(lax.broadcast_in_dim(x, shape, [1]))


def attend(shape: Shape) -> Callable[..., Any]:
    """q, k, v, k and v of the cache, bias, live parts -> out [B, K, written, H]; of several splits shares.

    Of `shape.turns` q is [B, (G + 2) K, H], queries of all key heads, then the token's keys, then its values, as they
    were projected, and after it come cos and sin, float32[B, Z, H], of halves that change places (`_tables`). Of
    `shape.packed` and `shape.turns_key` k and v are no arguments. Of `shape.writes` k and v of the cache are
    references, and behind live parts come the slots int32[B] that the token is written into.

    q: [B, K, Z, written, H], of `shape.packed` columns in place of written; k and v: [B, K, H], the token's own; the
    cache: [B, K, C, H]; bias and live: of `decode.Seen`.

    Shares: float32 sums [B, K, splits, H, columns], their weights' sum and maximum [B, K, splits, columns]; the first
    split has the token itself.

    With `looks` one more, in the order of live parts: float32[B, K, C], 0 where a slot is not visible; beside shares
    scores [B, K, C, columns]; anything beyond the last tile.
    """
    H, M, tile, stages, scale = shape.H, shape.columns, shape.tile, shape.stages, shape.scale * kernels.LOG2E
    whole = shape.splits == 1

    num_outs = len(_outs(shape))

    def kernel(q_ref, *refs):
        tables, refs = (refs[:2], refs[2:]) if shape.turns else ((), refs)
        own_refs, refs = ([], refs) if shape.packed or shape.turns_key else (refs[:2], refs[2:])
        (k_ref, v_ref, bias_ref, live_ref), refs = refs[:4], refs[4:]
        to_ref, refs = (refs[0], refs[1:]) if shape.writes else (None, refs)
        outs, scratch, (ready, k_ready, v_ready) = refs[:num_outs], refs[num_outs:-3], refs[-3:]
        q_smem, k_smem, v_smem, bias_smem, p_smem, *rest = scratch
        plain_smem, rest = (rest[0], rest[1:]) if shape.turns else (None, rest)
        kept_smem, o_smem = (rest[0], rest[1:]) if shape.looks and whole else (None, rest)
        o_smem = tuple(o_smem) or (p_smem,)  # which is as large, and free by then
        task = lax.axis_index("task")
        split, rest = lax.rem(task, shape.splits), lax.div(task, shape.splits)
        head, b = lax.rem(rest, shape.K), lax.div(rest, shape.K)
        most = pl.cdiv(live_ref[b, 0], shape.splits)
        first = split * most
        count = jnp.clip(live_ref[b, 0] - first, 0, most)

        def begin_of(i, part):  # the first slot of a part of tile i
            return live_ref[b, 1 + (first + i) * shape.parts + part] * shape.part

        def in_order(i):  # the places of tile i in the order of live parts
            return pl.ds((first + i) * tile, tile)

        def begins_of(i):
            return [begin_of(i, part) for part in range(shape.parts)]

        def load_parts(cache_ref, smem, ready, begins):
            for part, begin in enumerate(begins):
                to = smem.at[pl.ds(part * shape.part, shape.part)] if shape.parts > 1 else smem
                plgpu.copy_gmem_to_smem(cache_ref.at[b, head, pl.ds(begin, shape.part)], to, ready)

        def load_keys(i, begins):
            slot = lax.rem(i, stages)
            load_parts(k_ref, k_smem.at[slot], k_ready.at[slot], begins)
            plgpu.copy_gmem_to_smem(bias_ref.at[b, in_order(i)], bias_smem.at[slot], k_ready.at[slot])

        def load_values(i, begins):
            slot = lax.rem(i, stages)
            load_parts(v_ref, v_smem.at[slot], v_ready.at[slot], begins)

        def load_both(i):
            begins = begins_of(i)
            load_keys(i, begins)
            load_values(i, begins)

        def start():
            for rows, place in _projected(shape, plain_smem, head) if shape.turns else ():
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows], place, ready)
            for z in range(0 if shape.turns else shape.zones):
                plgpu.copy_gmem_to_smem(q_ref.at[b, head, z, _all_columns(shape, head)], q_smem.at[z], ready)
            for i in range(stages):
                pl.when(i < count)(lambda i=i: load_both(jnp.int32(i)))

        def ahead(i):
            pl.when(i + stages < count)(lambda: load_keys(i + stages, begins_of(i + stages)))
            pl.when((i > 0) & (i - 1 + stages < count))(lambda: load_values(i - 1 + stages, begins_of(i - 1 + stages)))

        def product(z, slot):
            def scores(acc):
                plgpu.wgmma(acc, k_smem.at[slot], q_smem.at[z].transpose((1, 0)))
                return acc[...]

            return pl.run_scoped(scores, kernels._accumulator(tile, M))

        def by_zone(slot, tile_number):
            begins = [begin - part * shape.part for part, begin in enumerate(begins_of(tile_number))]
            row = plgpu.broadcasted_iota(jnp.int32, (tile, M), 0, layout=plgpu.Layout.WGMMA)
            i = row + begins[-1]
            for part in reversed(range(shape.parts - 1)):
                i = jnp.where(row < (part + 1) * shape.part, row + begins[part], i)
            s = product(shape.zones - 1, slot)
            for z in reversed(range(shape.zones - 1)):
                s = jnp.where(i < shape.ends[z], product(z, slot), s)
            return s

        def scores(slot, i):
            if not shape.ends:
                return product(0, slot)
            of_last = lambda: product(shape.zones - 1, slot)  # noqa: E731
            return lax.cond(begin_of(i, 0) < shape.ends[-1], lambda: by_zone(slot, i), of_last)

        def step(i, state):
            acc, top, total = state
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(k_ready.at[slot])
            bias = plgpu.load(bias_smem.at[slot], layout=kernels._PER_ROW)
            s = _wgmma_layout(scores(slot, i))
            s = s * scale + _along_rows(bias, s.shape)
            new_top = jnp.maximum(top, s.max(axis=0))
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(s - _along_columns(new_top, s.shape))
            total = total * _along_columns(shrink, s.shape) + p
            acc *= _along_columns(shrink, acc.shape)
            p_smem.transpose((1, 0))[...] = _wgmma_layout(p.astype(shape.dtype))
            if shape.looks:
                scores_to = outs[-1].at[b, head, in_order(i)] if kept_smem is None else kept_smem.at[i]
                scores_to[...] = s
            plgpu.commit_smem()
            kernels._in_one_warp(lambda: ahead(i))
            plgpu.barrier_wait(v_ready.at[slot])

            def weigh(acc):
                plgpu.wgmma(acc, v_smem.at[slot].transpose((1, 0)), p_smem.transpose((1, 0)))

            (acc,) = kernels.accumulate(weigh, acc)
            return acc, new_top, total

        kernels._in_one_warp(start)
        own_vectors = [x.at[b, head] for x in own_refs]
        if shape.packed:
            own_vectors = [q_ref.at[b, head, shape.zones - 1, shape.G + i] for i in range(2)]
        if shape.turns_key:
            own_vectors = [q_ref.at[b, shape.K * (shape.G + 1) + head]]
        *key, value = _own_vectors(own_vectors)
        turn = _turn_halves if shape.H >= 128 else _turn_heads
        turning = turn(shape, plain_smem, [x.at[b] for x in tables], q_smem) if shape.turns else None
        plgpu.barrier_wait(ready)
        if turning is not None:
            turning()
        own, key = _own_scores(shape, q_smem.at[shape.zones - 1].transpose((1, 0)), *key)
        own *= scale
        is_first = jnp.where(split == 0, 1.0, 0.0)
        top = own * is_first + _LOWEST * (1.0 - is_first)
        acc = _along_rows(value * is_first, (H, M))
        total = kernels._registers((tile, M), 0.0, plgpu.Layout.WGMMA)
        acc, top, total = lax.fori_loop(0, count, step, (acc, top, total))
        total = total.sum(axis=0) + jnp.exp2(jnp.minimum(own - top, 0.0)) * is_first  # finite where top is _LOWEST
        if kept_smem is not None:
            _store_looks(shape, kept_smem, (total, top), count, lambda i: outs[-1].at[b, head, in_order(i)])
        if to_ref is not None:  # when this block, which has the row's key head to itself, has read all of it
            for ref, own_vector in ((k_ref, key), (v_ref, value)):
                ref.at[b, head, to_ref[b]][...] = own_vector.astype(shape.dtype)
        _store(shape, (acc, total, top), o_smem, outs, (b, head, split))

    scratch = (
        _tiled(shape.zones, M, H, dtype=shape.dtype),
        _tiled(stages, tile, H, dtype=shape.dtype),
        _tiled(stages, tile, H, dtype=shape.dtype),
        plgpu.SMEM((stages, tile), jnp.float32),
        _tiled(M, tile, dtype=shape.dtype),
        *((_projected_scratch(shape),) if shape.turns else ()),
        *_kept(shape),
        *(() if whole and shape.tile == H else _out_scratch(shape)),
        plgpu.Barrier(num_arrivals=len(_projected(shape)) if shape.turns else shape.zones),
        plgpu.Barrier(num_arrivals=shape.parts + 1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=shape.parts, num_barriers=stages),
    )
    return plgpu.kernel(
        kernel,
        out_type=_outs(shape),
        grid=(shape.B * shape.K * shape.splits,),
        grid_names=("task",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _projected_scratch(shape: Shape) -> Any:
    """Shared memory for queries and key as they come, of which `_turn_halves` or `_turn_heads` makes what is turned.

    Heads of 64 lie one behind the other, with a place before and one behind them all, so that each half has one on
    either side.
    """
    return plgpu.SMEM((shape.columns, shape.H) if shape.H >= 128 else ((shape.G + 3) * shape.H,), shape.dtype)


def _projected(shape: Shape, smem: Any = None, head: Any = 0) -> list[tuple[Any, Any]]:
    """Which rows of all that was projected a block copies, and where to: the queries, then the key."""
    key = [shape.K * shape.G + head] if shape.turns_key else []
    if shape.H >= 128:
        rows, places = [pl.ds(head * shape.G, shape.G), *key], [pl.ds(0, shape.G), shape.G]
    else:
        rows = [head * shape.G + i for i in range(shape.G)] + key
        places = [pl.ds((i + 1) * shape.H, shape.H) for i in range(shape.G + 1)]
    return [(row, None if smem is None else smem.at[place]) for row, place in zip(rows, places, strict=False)]


def _turn_halves(shape: Shape, projected: Any, tables: Any, out: Any) -> Callable[[], None]:
    """Queries and key, turned to [Z, columns, H]: asks for tables, and gives what to do when `projected` is there.

    Heads of 128 or more, whose halves are rows of a product.
    """
    half, layout = shape.H // 2, plgpu.Layout.WGMMA
    parts = [pl.ds(i * half, half) for i in range(2)]
    turns = [[_per_row(x.at[z, parts[1]]) for x in tables] for z in range(shape.zones)]

    def turn():
        first, second = (
            plgpu.load(projected.at[:, x].transpose((1, 0)), layout=layout, optimized=False).astype(jnp.float32)
            for x in parts
        )
        for z, of_zone in enumerate(turns):
            cos, sin = (_along_rows(x, first.shape) for x in of_zone)
            for part, turned in zip(parts, (first * cos - second * sin, second * cos + first * sin), strict=True):
                out.at[z, :, part].transpose((1, 0))[...] = _wgmma_layout(turned.astype(shape.dtype))
        plgpu.commit_smem()

    return turn


def _turn_heads(shape: Shape, projected: Any, tables: Any, out: Any) -> Callable[[], None]:
    """The same of heads of 64, one after the other: a half's other half is 32 places before or behind it."""
    H, size, layout = shape.H, (shape.H, shape.columns), plgpu.Layout.WGMMA
    turns = [[_per_row(x.at[z]) for x in tables] for z in range(shape.zones)]

    def turn():
        row, column = (plgpu.broadcasted_iota(jnp.int32, size, axis, layout=layout) for axis in range(2))

        def beside(places: int) -> Any:
            found = kernels._registers(size, 0.0, layout)
            for i in range(shape.G + shape.turns_key):
                begin = (i + 1) * H + places
                vector = plgpu.load(projected.at[pl.ds(begin, H)], layout=kernels._PER_ROW, optimized=False)
                found = jnp.where(column == i, _along_rows(vector.astype(jnp.float32), size), found)
            return found

        plain, other = beside(0), jnp.where(row < H // 2, beside(H // 2), beside(-H // 2))
        for z, (cos, sin) in enumerate(turns):
            turned = plain * _along_rows(cos, size) + other * _along_rows(sin, size)
            out.at[z].transpose((1, 0))[...] = _wgmma_layout(turned.astype(shape.dtype))
        plgpu.commit_smem()

    return turn


def _tables(turn: Any) -> list[jax.Array]:
    """cos and sin of `decode.Turn` by row, float32[B, Z, H]: x cos + (x with its halves changed) sin is x turned."""
    cos, sin = (jnp.swapaxes(x, 0, 1) for x in (turn.cos, turn.sin))
    return [jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)]


def _all_columns(shape: Shape, head: Any) -> Any:
    """What a copy moves of `shape.written` queries or results: beyond the last it reads zeros and writes nothing."""
    return pl.ds(kernels._aligned(lax.rem(head, 8)), shape.columns)  # from 0, but no number that a check would refuse


def _own_vectors(refs: Any) -> list[Any]:
    """The token's own key and value, float32[H]."""
    return [_per_row(x).astype(jnp.float32) for x in refs]


def _per_row(ref: Any) -> Any:
    return plgpu.load(ref, layout=kernels._PER_ROW, optimized=False)


def _own_scores(shape: Shape, queries: Any, key: Any = None) -> tuple[Any, Any]:
    """Products float32[columns] of queries [H, columns] in shared memory with the token's own key; and the key.

    key: float32[H]; None: it is the column behind the queries.
    """
    q = plgpu.load(queries, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
    if key is None:
        column = plgpu.broadcasted_iota(jnp.int32, q.shape, 1, layout=plgpu.Layout.WGMMA)
        key = jnp.where(column == shape.G, q, 0.0).sum(axis=1)
    return (q * _along_rows(key, q.shape)).sum(axis=0), key


def _outs(shape: Shape) -> tuple[Any, ...]:
    """What a kernel gives: the result and its looks, or shares and scores."""

    def numbers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    lead = shape.B, shape.K
    if shape.splits == 1:
        out = jax.ShapeDtypeStruct((*lead, shape.written, shape.H), shape.dtype)
        return (out, numbers(*lead, shape.C)) if shape.looks else (out,)
    stat = numbers(*lead, shape.splits, shape.columns)
    shares = numbers(*lead, shape.splits, shape.H, shape.columns), stat, stat
    return (*shares, numbers(*lead, shape.C, shape.columns)) if shape.looks else shares


def _kept(shape: Shape) -> tuple[Any, ...]:
    """Shared memory for the scores of a row, where looks are made of them."""
    whole = shape.splits == 1
    return (plgpu.SMEM((shape.tiles, shape.tile, shape.columns), jnp.float32),) if shape.looks and whole else ()


def _store_looks(shape: Shape, kept: Any, stats: tuple[Any, Any], count: Any, out: Callable[[Any], Any]) -> None:
    """Writes a row's looks by their scores: out(i) [tile] of tile i, of so many. stats: weights' sum and maximum."""
    size, layout = (shape.tile, shape.columns), plgpu.Layout.WGMMA
    total, top = stats
    # A slot's largest weight is that of its largest score less the query's own: one exponential, not one a column.
    less = _along_columns(top + jnp.log2(total), size)
    less = jnp.where(plgpu.broadcasted_iota(jnp.int32, size, 1, layout=layout) < shape.G, less, -_LOWEST)

    def look(group, _):
        numbers = [jnp.minimum(group * _AT_ONCE + i, count - 1) for i in range(_AT_ONCE)]  # the last again and again
        scores = [plgpu.load(kept.at[i], layout=layout, optimized=False) for i in numbers]
        for i, highest in zip(numbers, [(x - less).max(axis=1) for x in scores], strict=True):
            out(i)[...] = jnp.exp2(highest)

    lax.fori_loop(0, pl.cdiv(count, _AT_ONCE), look, None)


def _out_scratch(shape: Shape) -> tuple[Any, ...]:
    """Shared memory through which `_store` writes."""
    if shape.splits == 1:
        return (_tiled(shape.columns, shape.H, dtype=shape.dtype),)
    stat = plgpu.SMEM((shape.columns,), jnp.float32)
    return plgpu.SMEM((shape.H, shape.columns), jnp.float32), stat, stat


def _store(shape: Shape, found: Any, smem: Any, outs: Any, at: tuple[Any, Any, Any]) -> None:
    """Writes sums [H, columns], their weights' sum and maximum of (row, key head, split), divided where all is one."""
    (acc, total, top), (b, head, split) = found, at
    if shape.splits == 1:
        acc *= _along_columns(1 / total, acc.shape)
        smem[0].transpose((1, 0))[...] = _wgmma_layout(acc.astype(shape.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem[0], outs[0].at[b, head, _all_columns(shape, head)])
    else:
        smem[0][...] = _wgmma_layout(acc)
        for x, stat in zip((total, top), smem[1:], strict=True):
            stat[...] = x
        plgpu.commit_smem()
        for source, target in zip(smem, outs[:3], strict=True):
            plgpu.copy_smem_to_gmem(source, target.at[b, head, split])
    plgpu.wait_smem_to_gmem(0)


def run(
    shape: Shape, given: Any, k_cache: Any, v_cache: Any, told: Any, turn: Any, to: Any = None
) -> tuple[jax.Array, jax.Array | None]:
    """`sepjax.attention.decode.attend` for the arguments of `Seen`: around the kernel, what is small.

    given: queries, the token's own key and value; told: bias and live parts; turn, to: of `shape.turns` and `writes`.
    """
    kernel, (bias, live) = attend(shape), told
    more = (to,) if shape.writes else ()
    queries, k, v = given
    if shape.turns:
        own = () if shape.turns_key else (k, v)
        return _joined(shape, bias, *kernel(turn.flat, *_tables(turn), *own, k_cache, v_cache, bias, live, *more))
    if not shape.packed:
        return _joined(shape, bias, *kernel(filled(shape, queries), k, v, k_cache, v_cache, bias, live, *more))
    own = jnp.pad(jnp.stack([k, v], axis=2)[:, :, None], ((0, 0), (0, 0), (shape.zones - 1, 0), (0, 0), (0, 0)))
    packed = filled(shape, jnp.concatenate([queries, own], axis=3))
    return _joined(shape, bias, *kernel(packed, k_cache, v_cache, bias, live))


def filled(shape: Shape, queries: jax.Array) -> jax.Array:
    """Queries [B, K, Z, G, H], and what is packed with them, with as many columns as the kernel is given."""
    more = (shape.columns if shape.packed else shape.written) - queries.shape[3]
    return jnp.pad(queries, [(0, more if axis == 3 else 0) for axis in range(5)]) if more else queries


def _joined(shape: Shape, bias: jax.Array, sums: jax.Array, *others: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """What a kernel gave as one result, of shares one softmax of each row; and the looks, where they are asked for."""
    if shape.splits == 1:
        return sums[:, :, : shape.G], others[0] if shape.looks else None
    total, top = others[:2]
    highest = jnp.max(top, axis=2, keepdims=True)
    weight = jnp.exp2(top - highest)
    total = jnp.sum(total * weight, axis=2)
    # Turned round before they are added up: XLA makes one kernel of it, and two of a sum that is turned.
    shares, weight = (jnp.moveaxis(x[..., : shape.G], -1, 2) for x in (sums, weight))  # [B, K, G, splits, (H)]
    out = (jnp.sum(shares * weight[..., None], axis=3) / total[:, :, : shape.G, None]).astype(shape.dtype)
    if not shape.looks:
        return out, None
    looks = jnp.max((jnp.exp2(others[2] - highest) / total[:, :, None])[..., : shape.G], axis=-1)
    return out, jnp.where(bias[:, None] == 0, looks, 0.0)
