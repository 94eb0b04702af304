"""The lists of tiles against a brute force over all (query, key) pairs, and how large the lists may get."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.attention.block_map import Tiling, block_map, key_visits, query_visits
from sepjax.attention.ranges import Ranges, whole_rows
from sepjax.attention.tpu_calls import tile_length
from sepjax.layout import build_layout
from tests.attention.common import examples, layouts, ranges, ranges_mask

B, T = 2, 70
# (queries of a block, keys of a tile): equal, as the kernels have them; blocks of many tiles; tiles of many blocks.
SIDES = [(16, 16), (16, 8), (8, 32)]
every_side = pytest.mark.parametrize(("block", "tile"), [*SIDES[:2], pytest.param(*SIDES[2], marks=pytest.mark.soak)])


def make_tiling(layout, block, tile):
    near_tiles, far_tiles = -(-layout.length // tile), -(-layout.capacity // tile)
    return Tiling(
        layout.far_start.shape[0], -(-layout.length // block), near_tiles, far_tiles, block, tile, is_whole=True
    )


@functools.partial(jax.jit, static_argnums=1)
def both_lists(seen, tiling):
    map = block_map(seen, tiling)
    return query_visits(map, tiling), key_visits(map, tiling)


def listed(visits, tiling):
    """The visits in use as rows (row, block, tile, first, last). All are unpacked: any other number is a new shape."""
    visit = jax.tree.map(np.asarray, tiling.unpack(visits.words))
    return np.stack(visit, axis=1)[: int(visits.count)]


def needed(seen, tiling):
    """bool[B, blocks, tiles]: which tiles hold a key that a query of the block sees. By the whole mask."""
    mask = ranges_mask(seen, tiling.near_tiles * tiling.tile, tiling.far_tiles * tiling.tile)
    rows = np.zeros((len(mask), tiling.blocks * tiling.block, tiling.tiles * tiling.tile), bool)
    rows[:, : mask.shape[1]] = mask
    return rows.reshape(len(mask), tiling.blocks, tiling.block, tiling.tiles, tiling.tile).any(axis=(2, 4))


def assert_groups(visits, group):
    """Sorted by group, nothing twice, and the flags at the ends of each group and nowhere else."""
    keys = [tuple(x) for x in visits[:, group]]
    assert keys == sorted(keys)
    assert len(np.unique(visits[:, :3], axis=0)) == len(visits)
    first = [i == 0 or keys[i - 1] != key for i, key in enumerate(keys)]
    last = [i + 1 == len(keys) or keys[i + 1] != key for i, key in enumerate(keys)]
    np.testing.assert_array_equal(visits[:, 3:], np.stack([first, last], axis=1))


def check_rows(layout, block, tile):
    check(whole_rows(layout), make_tiling(layout, block, tile))


def check(seen, tiling):
    by_query, by_key = both_lists(seen, tiling)
    assert int(by_query.count) <= B * tiling.most_query_visits == len(by_query.words)
    assert int(by_key.count) <= B * tiling.most_key_visits == len(by_key.words)

    visits, must = listed(by_query, tiling), needed(seen, tiling)
    assert_groups(visits, [0, 1])
    assert {tuple(x) for x in visits[:, :2]} == set(np.ndindex(B, tiling.blocks)), "every output is written"
    assert must[tuple(visits[:, :3].T)].sum() == must.sum(), "nothing is missed"

    visits = listed(by_key, tiling)
    assert_groups(visits, [0, 2])
    assert must[tuple(visits[:, :3].T)].sum() == must.sum(), "nothing is missed"
    held = np.minimum(seen.num_far, tiling.far_tiles * tiling.tile)
    with_keys = {(b, t) for b in range(B) for t in range(tiling.near_tiles - (-held[b] // tiling.tile))}
    assert {(b, t) for b, _, t in visits[:, :3]} == with_keys, "every gradient is written"


@every_side
@examples(5)
@given(data=st.data())
def test_lists_hold_every_visible_tile_once(block, tile, data):
    check_rows(data.draw(layouts((B, T))), block, tile)


# Queries, near keys, far keys: what a device of a mesh has; more queries than keys; hardly a key.
PARTS = [(40, 64, 50), (70, 20, 7), (33, 1, 1)]
every_part = pytest.mark.parametrize(("sizes", "sides"), list(zip(PARTS, SIDES, strict=True)))


def part_tiling(sizes, sides):
    queries, near, far = sizes
    block, tile = sides
    return Tiling(B, -(-queries // block), -(-near // tile), -(-far // tile), block, tile, is_whole=False)


@every_part
@examples(5)
@given(data=st.data())
def test_lists_of_any_ranges(sizes, sides, data):
    check(data.draw(ranges((B, *sizes))), part_tiling(sizes, sides))


@every_part
def test_every_query_may_see_every_key(sizes, sides):
    """The bound of parts of rows is reached."""
    queries, near, far = sizes
    tiling, start = part_tiling(sizes, sides), np.zeros((B, queries), np.int32)
    seen = Ranges(start, start + far, start, start + near, np.full(B, far, np.int32))
    check(seen, tiling)
    for visits in both_lists(seen, tiling):
        assert int(visits.count) == len(visits.words)


@pytest.mark.parametrize(
    ("block", "tile", "density"),
    [
        (*SIDES[0], 0.3),
        (*SIDES[2], 1),
        *(pytest.param(*x, marks=pytest.mark.soak) for x in ((*SIDES[1], 0.3), (*SIDES[2], 0.3), (*SIDES[1], 0))),
    ],
)
def test_no_window_needs_more_room_than_there_is(block, tile, density):
    """The bounds on the lists' lengths are arithmetic; here is every ninth window of three densities, and all of T."""
    is_separator = np.random.default_rng(0).random((B, T)) < density
    for n in (*range(1, T, 9), T):
        check_rows(build_layout(is_separator, window_size=n, num_sinks=2), block, tile)


def test_too_little_capacity():
    """Far ranges may reach beyond the array: what is there is visited, nothing is written twice or out of bounds."""
    layout = build_layout(np.ones((B, T), bool), window_size=3, num_sinks=0).with_capacity(64)
    tiling = make_tiling(layout, 16, 16)
    visits = listed(both_lists(whole_rows(layout), tiling)[1], tiling)
    assert visits[:, 2].max() < tiling.tiles


def test_lists_are_made_without_gather_or_scatter():
    """libtpu 0.0.50 fails on some of them within a sharded step for v5p, which it moves to the sparse cores."""
    layout = build_layout(np.ones((B, T), bool), window_size=3, num_sinks=0)
    program = str(jax.make_jaxpr(both_lists, static_argnums=1)(whole_rows(layout), make_tiling(layout, 16, 16)))
    assert "cumsum" in program
    assert not re.search(r"= (gather|scatter)", program)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 5, 7, 0), (4, 512, 512, 512), (300, 2, 2, 1)])
def test_a_visit_survives_packing(sizes):
    tiling = Tiling(*sizes, block=256, tile=256, is_whole=False)
    rows, blocks, tiles = tiling.rows, tiling.blocks, tiling.tiles
    ends = [(r, b, t) for r in {0, rows - 1} for b in {0, blocks - 1, blocks // 2} for t in {0, tiles - 1, tiles // 2}]
    for first in (0, 1):
        fields = [jnp.asarray(x, jnp.int32) for x in zip(*((*e, first, 1 - first) for e in ends), strict=True)]
        np.testing.assert_array_equal(np.stack(tiling.unpack(tiling.pack(*fields))), np.stack(fields))


def count_exactly(start, end, tiling):
    """Tiles that the queries of every block see, summed over blocks, from ranges [T]: no hull, no mask."""
    counts = np.zeros((tiling.blocks, -(-int(end.max(initial=1)) // tiling.tile) + 1), int)
    block, some = np.arange(len(start)) // tiling.block, start < end
    np.add.at(counts, (block[some], start[some] // tiling.tile), 1)
    np.add.at(counts, (block[some], (end[some] - 1) // tiling.tile + 1), -1)
    return (counts.cumsum(axis=1) > 0).sum()


@pytest.mark.parametrize(
    ("length", "documents", "n"),
    [
        (2048, True, 64),
        (8192, False, 64),
        *(pytest.param(*x, marks=pytest.mark.soak) for x in ((2048, False, 256), (32768, True, 256))),
    ],
)
def test_hardly_a_tile_is_visited_in_vain(length, documents, n):
    """Within 10 % of the tiles that hold a visible key, for queries and in the transpose."""
    rng = np.random.default_rng(0)
    ids = 1 + np.cumsum(rng.random((1, length)) < 1 / 700, axis=1) if documents else np.ones((1, length))
    layout = build_layout(rng.random((1, length)) < 0.12, window_size=n, num_sinks=4, segment_ids=ids.astype(np.int32))
    side = tile_length(length)
    tiling = make_tiling(layout, side, side)
    near_start, far_start, far_end = (np.asarray(x)[0] for x in (layout.near_start, layout.far_start, layout.far_end))
    exact = count_exactly(near_start, np.arange(1, length + 1), tiling) + count_exactly(far_start, far_end, tiling)
    for visits in both_lists(whole_rows(layout), tiling):
        assert exact <= int(visits.count) <= 1.1 * exact


@pytest.mark.parametrize("length", [1, *(2**i for i in range(7, 18, 2)), 2**16 - 1, 2**17 - 1])
def test_tables_stay_small(length):
    """Below 1 MB up to T = 128k, whatever the layout: scalar memory is no larger."""
    shapes = jax.eval_shape(lambda: build_layout(jnp.zeros((1, length), bool), window_size=256, num_sinks=4))
    side = tile_length(length)
    for visits in jax.eval_shape(lambda x: both_lists(whole_rows(x), make_tiling(x, side, side)), shapes):
        assert visits.words.size * visits.words.dtype.itemsize < 1_000_000
