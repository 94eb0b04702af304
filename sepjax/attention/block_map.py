"""Which tiles of keys a block of queries visits, and the transpose: which blocks visit a tile.

Keys lie in one array, near ones (all tokens of the row) before far ones (its packed global keys). On a mesh whose axis
`context` splits rows, both are those that a device was sent, and it has fewer queries than keys (`ranges.Ranges`):

    tile            0   1   2   3   4   5 | 6   7   8         6 tiles of near keys, then 3 of far keys
    block 3         .   .   n   n   .   . | f   f   .         n: from the smallest near_start to the largest near_end
    block 4         .   .   .   n   n   . | f   f   .         f: from the smallest far_start to the largest far_end

A kernel walks over a list of visits, (row, block, tile) packed into one int32 each, so that its grid has exactly as
many steps as there are tiles to compute, whatever the layout. The list sorted by block serves the output and dQ, the
one sorted by tile serves dK and dV. All of it is O(blocks * tiles) work in XLA; nothing of size T x T or T x S appears.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from sepjax.array_typing import Array
from sepjax.attention.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes, all static: how queries and keys are cut, and how a visit is packed into an int32.

    Attributes:
      rows: B.
      blocks: query blocks of a row.
      near_tiles: tiles of the near keys, at least one; they come first.
      far_tiles: tiles of the packed global keys.
      block: queries of a block.
      tile: keys of a tile.
      is_whole: the ranges are those of whole rows (`ranges.whole_rows`), which have fewer visits than others may have.
    """

    rows: int
    blocks: int
    near_tiles: int
    far_tiles: int
    block: int
    tile: int
    is_whole: bool

    @property
    def tiles(self) -> int:
        """Tiles of a row, near and far."""
        return self.near_tiles + self.far_tiles

    @property
    def widths(self) -> tuple[int, int, int]:
        """Bits of row, block and tile in a packed visit; two more say that it is the first or last of its group."""
        return (self.rows - 1).bit_length(), (self.blocks - 1).bit_length(), (self.tiles - 1).bit_length()

    @property
    def most_query_visits(self) -> int:
        """No ranges have more visits than this in a row.

        Any block of a part of a row may see every key: in a dense layer the late chunk of a device does. In a whole
        row, query i's window hides keys above x = i - n only. With e the last query of a block, its far keys are at
        most the e - n + 1 packed ones up to there, its near keys begin no earlier than block - 1 below that: together
        they span e + block keys, in tiles that two cuts may split.
        """
        if not self.is_whole:
            return self.blocks * self.tiles
        slack = 2 + -(-(self.block - 1) // self.tile)
        last = (((i + 1) * self.block - 1) // self.tile for i in range(self.blocks))
        return sum(min(e + slack, self.tiles) for e in last)

    @property
    def most_key_visits(self) -> int:
        """Every tile once more, where nobody sees it, and a block between two that see a tile which it does not.

        No pair of the two is visited twice.
        """
        if not self.is_whole:
            return self.blocks * self.tiles
        return self.most_query_visits + self.blocks + self.tiles

    def pack(self, row: jax.Array, block: jax.Array, tile: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
        """int32, from the high bits down: row, block, tile, first, last."""
        _, block_bits, tile_bits = self.widths
        word = (((row << block_bits) | block) << tile_bits) | tile
        return (word << 2) | (first.astype(jnp.int32) << 1) | last.astype(jnp.int32)

    def unpack(self, word: jax.Array) -> "Visit":
        """The inverse of `pack`. Shifts and masks: it runs in a kernel's index maps."""
        _, block_bits, tile_bits = self.widths

        def field(shift: int, bits: int) -> jax.Array:
            return (word >> shift) & ((1 << bits) - 1)

        row, block, tile = word >> (2 + tile_bits + block_bits), field(2 + tile_bits, block_bits), field(2, tile_bits)
        return Visit(row, block, tile, field(1, 1) != 0, field(0, 1) != 0)


class Visit(NamedTuple):
    """One step of a kernel: int32 scalars, or arrays of many visits."""

    row: jax.Array
    block: jax.Array
    tile: jax.Array
    first: jax.Array  # bool: the first visit of its block (of its tile, in the transpose)
    last: jax.Array


class Visits(NamedTuple):
    """A list of visits; entries from `count` on mean nothing."""

    words: Int32[Array, "most"]  # `Tiling.pack`
    count: Int32[Array, ""]


class BlockMap(NamedTuple):
    """Tiles [first, stop) that each query block visits; empty where first = stop."""

    near_first: Int32[Array, "B blocks"]
    near_stop: Int32[Array, "B blocks"]
    far_first: Int32[Array, "B blocks"]
    far_stop: Int32[Array, "B blocks"]
    used_stop: Int32[Array, "B"]  # far tiles from here on hold no key at all


def block_map(seen: Ranges, tiling: Tiling) -> BlockMap:
    """The tiles between the first and the last key that some query of a block sees, far ones numbered after near ones.

    A block that sees no near key (padding) gets its own near tile, or the last where there are fewer tiles than
    blocks, so that every block has a visit to write its output.
    """
    near_first, near_stop = _tile_range(seen.near_start, seen.near_end, tiling)
    far_first, far_stop = (x + tiling.near_tiles for x in _tile_range(seen.far_start, seen.far_end, tiling))
    own = jnp.arange(tiling.blocks, dtype=jnp.int32) * tiling.block // tiling.tile
    own = jnp.minimum(own, tiling.near_tiles - 1)
    empty = near_first == near_stop
    near_first, near_stop = jnp.where(empty, own, near_first), jnp.where(empty, own + 1, near_stop)
    held = jnp.minimum(seen.num_far, tiling.far_tiles * tiling.tile)
    return BlockMap(near_first, near_stop, far_first, far_stop, tiling.near_tiles - (-held // tiling.tile))


def query_visits(map: BlockMap, tiling: Tiling) -> Visits:
    """Visits sorted by row and block, far tiles first."""
    row, block = jnp.indices((tiling.rows, tiling.blocks), dtype=jnp.int32)
    row, block = (jnp.stack([x, x], axis=-1) for x in (row, block))
    first = jnp.stack([map.far_first, map.near_first], axis=-1)
    stop = jnp.stack([map.far_stop, map.near_stop], axis=-1)
    group = row * tiling.blocks + block
    (row, block, group), tile, count = _spread((row, block, group), first, stop, tiling.rows * tiling.most_query_visits)
    return Visits(tiling.pack(row, block, tile, *_ends(group, count)), count)


def key_visits(map: BlockMap, tiling: Tiling) -> Visits:
    """Visits sorted by row and tile. A tile that holds keys has at least one, so that its gradient is written."""
    row, tile = jnp.indices((tiling.rows, tiling.tiles), dtype=jnp.int32)
    block = jnp.arange(tiling.blocks, dtype=jnp.int32)[:, None]
    near_first, near_stop, far_first, far_stop = (x[:, :, None] for x in map[:4])
    sees = ((near_first <= tile[:, None]) & (tile[:, None] < near_stop)) | (
        (far_first <= tile[:, None]) & (tile[:, None] < far_stop)
    )
    first = jnp.min(jnp.where(sees, block, tiling.blocks), axis=1)
    stop = jnp.max(jnp.where(sees, block + 1, 0), axis=1)
    unseen = stop == 0
    first, stop = jnp.where(unseen, 0, first), jnp.where(unseen, 1, stop)
    stop = jnp.where(tile < jnp.maximum(map.used_stop, tiling.near_tiles)[:, None], stop, first)
    group = row * tiling.tiles + tile
    (row, tile, group), block, count = _spread((row, tile, group), first, stop, tiling.rows * tiling.most_key_visits)
    return Visits(tiling.pack(row, block, tile, *_ends(group, count)), count)


def _tile_range(start: Array, end: Array, tiling: Tiling) -> tuple[jax.Array, jax.Array]:
    """First and last + 1 tile of the hull of every block's ranges [start, end); equal where all are empty."""
    room = tiling.blocks * tiling.block - start.shape[1]
    start, end = (
        jnp.pad(jnp.asarray(x), ((0, 0), (0, room))).reshape(-1, tiling.blocks, tiling.block) for x in (start, end)
    )
    some = start < end
    stop = jnp.max(jnp.where(some, end, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(some, start, jnp.iinfo(jnp.int32).max), axis=-1), stop)
    empty = first == stop
    return jnp.where(empty, 0, first // tiling.tile), jnp.where(empty, 0, -(-stop // tiling.tile))


def _spread(
    labels: tuple[jax.Array, ...], first: jax.Array, stop: jax.Array, most: int
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Lists the members of many ranges, one range after the other.

        ranges [3, 5) [7, 7) [1, 4), labels a b c   ->   members 3 4 1 2 3, labels a a c c c, count 5

    Returns:
      The range's labels at each of `most` places, the members there, and the number of places in use.
    """
    first, stop = first.ravel(), stop.ravel()
    offset = jnp.cumsum(stop - first) - (stop - first)

    place = jnp.arange(most, dtype=jnp.int32)
    begun = offset <= place[:, None]  # a comparison and a sum: XLA's scatters serve a TPU badly, and some crash it

    def at_places(x: jax.Array) -> jax.Array:
        """x of the range that holds each place, from its differences between the ranges that have begun there."""
        return jnp.sum(jnp.where(begun, jnp.diff(x, prepend=0), 0), axis=1, dtype=jnp.int32)

    members = place + at_places(first - offset)
    return [at_places(x.ravel()) for x in labels], members, offset[-1] + stop[-1] - first[-1]


def _ends(group: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which visits are the first and the last of their group."""
    changes = group[1:] != group[:-1]
    place = jnp.arange(group.size, dtype=jnp.int32)
    return jnp.pad(changes, (1, 0), constant_values=True), jnp.pad(changes, (0, 1)) | (place == count - 1)
