"""Separators in a bounded cache: a compaction keeps those of the past window, and the newest s of all.

`sepjax.generation.cache.bounded` says which zones a row has, and that a key turns where it moves to another.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sepjax.generation.cache.stored import in_each_layer
from sepjax.generation.cache.turning import turned
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

    def move(x: jax.Array, table: Table | None = None) -> jax.Array:
        at = cache.places(full)[:, None]
        found = x.at[*cache.layer_axis, at, :, a + s + source % R].get(mode="clip")  # [M, s, (L,) K, (H)]
        found = found if table is None else turned(found, table)
        return x.at[*cache.layer_axis, at, :, to].set(found, mode="drop", unique_indices=True)

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
        k=cache.turned(move, n - source) if cache.sizes.turns_in_place else in_each_layer(move, cache.k),
        v=in_each_layer(move, cache.v),
    )
