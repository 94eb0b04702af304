"""Separators in a bounded cache: a compaction keeps those of the past window, and the newest s of all.

`sepjax.generation.cache.bounded` says which zones a row has, and that a key turns where it moves to another.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sepjax.generation.cache.stored import Vectors, changed, in_each_array, of_each_layer
from sepjax.generation.cache.turning import turn_of_moves, turned
from sepjax.model.rope import Table

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache


def keep_newest(cache: "StreamingCache") -> "StreamingCache":
    """Compacts as many full rows as `full_rows` gives: of the past window separators stay, the newest s of all."""
    a, s, w, R = cache.sizes.num_sinks, cache.sizes.max_separators, cache.sizes.window_size, cache.sizes.ring
    full = cache.full_rows()
    few = cache.of_rows(full)
    past = (few.num_recent - w)[:, None]
    first = (few.next_recent - few.num_recent)[:, None]  # p of the oldest
    p = first + jnp.arange(R, dtype=jnp.int32)
    moves = jnp.take_along_axis(few.is_separator, p % R, axis=1) & (p < first + past)
    rank = jnp.cumsum(moves, axis=1, dtype=jnp.int32)
    found = rank[:, -1]
    # The newest s of them, oldest first; the others are dropped on the way.
    place = jnp.where(moves, rank - 1 - jnp.maximum(found - s, 0)[:, None], -1)
    rows = jnp.arange(len(found))[:, None]
    source = jnp.zeros((len(found), s), jnp.int32).at[rows, jnp.where(place < 0, s, place)].set(p, mode="drop")
    j = jnp.arange(s, dtype=jnp.int32)
    n = (few.next_separator + jnp.maximum(found - s, 0))[:, None] + j
    moved = j < jnp.minimum(found, s)[:, None]
    to = jnp.where(moved, a + n % s, cache.sizes.slots + j)

    def taken(x: jax.Array) -> jax.Array:  # [M, s, (L,) K, (H)]
        return x.at[*cache.layer_axis, cache.places(full)[:, None], :, a + s + source % R].get(mode="clip")

    def put(x: jax.Array, found: jax.Array) -> jax.Array:
        at = cache.places(full)[:, None]
        return x.at[*cache.layer_axis, at, :, to].set(found, mode="drop", unique_indices=True)

    def move(x: Vectors, table: Table | None = None) -> Vectors:
        found = in_each_array(taken, x)
        return in_each_array(put, x, found if table is None else changed(lambda k: turned(k, table), found))

    turn = turn_of_moves(cache, n, source)
    kept = few.num_separators + found
    kept_at = cache.kept_at.at[0, full[:, None], 0, jnp.where(moved, n % s, s + j)]
    return dataclasses.replace(
        cache.with_rows(
            full,
            num_separators=jnp.minimum(kept, s),
            num_recent=w,
            next_separator=few.next_separator + found,
            dropped=jnp.minimum(few.dropped + jnp.maximum(kept - s, 0), 2**30),
        ),
        kept_at=kept_at.set(few.place_in_text(source), mode="drop", unique_indices=True),
        k=of_each_layer(move, cache.k) if turn is None else cache.turned(move, turn),
        v=of_each_layer(move, cache.v),
    )
