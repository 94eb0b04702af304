"""Keys that are turned: rotated by so many positions more, with the rotations of their layers."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sepjax.config import RopeConfig
from sepjax.generation.cache.rows import first_of
from sepjax.model.rope import Table, rope_tables, rotate

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache

_ROWS = 8  # whose positions start again at a time: all their keys are read and written, and few are due at once


def turn_table(by: jax.Array, ropes: Sequence[RopeConfig | None], head_dim: int) -> Table:
    """Cosine and sine of a turn by so many positions, [..., R/2]; where layers differ, [Z, ..., R/2] of each kind.

    A turn by 0 changes no bit. The factor of YaRN is in the keys already.
    """
    tables = rope_tables(by, [rope and dataclasses.replace(rope, attention_factor=1.0) for rope in ropes], head_dim)
    assert tables is not None  # `StreamSizes.create` refuses learned positions
    return tables


def turned(k: jax.Array, table: Table) -> jax.Array:
    """Keys [B, S, (L,) K, H] turned by a table [(L,) B, S, R/2]."""
    if table[0].ndim == 4:
        return rotate(k, (jnp.moveaxis(table[0], 0, 2), jnp.moveaxis(table[1], 0, 2)))
    cos, sin = (t.reshape(*t.shape[:2], *(1 for _ in k.shape[2:-2]), -1) for t in table)
    return rotate(k, (cos, sin))


def last_at(slot: jax.Array, end: jax.Array, size: int) -> jax.Array:
    """The largest number below `end` that is `slot` modulo `size`: what a ring that has been filled so far holds there.

    Negative where nothing has been put there yet.
    """
    last = end - 1
    return last - (last - slot) % max(size, 1)


def turn_back(cache: "StreamingCache") -> "StreamingCache":
    """Turns the keys of both rings back by multiples of their sizes, in some rows that are due: every one stays in its
    slot.
    """
    sizes = cache.sizes
    a, s, R, limit = sizes.num_sinks, sizes.max_separators, sizes.ring, sizes.rotation_limit
    due = first_of(cache.turns(), _ROWS)
    few, at = cache.of_rows(due), cache.places(due)
    recent = jnp.where(few.next_recent >= limit, few.next_recent // R * R, 0)
    separators = jnp.where(few.next_separator >= limit, few.next_separator // max(s, 1) * s, 0)
    by = [jnp.zeros((len(due), a), jnp.int32)]
    by += [jnp.repeat(-x[:, None], size, axis=1) for x, size in ((separators, s), (recent, R))]

    def turn(k: jax.Array, table: Table) -> jax.Array:  # [(L,) B, K, C, H]
        cos, sin = (t[..., None, :, :] for t in table)
        found = k.at[*cache.layer_axis, at].get(mode="clip")
        found = rotate(found[..., None, :], (cos, sin))[..., 0, :]
        return k.at[*cache.layer_axis, at].set(found, mode="drop", unique_indices=True)

    return dataclasses.replace(
        cache.with_rows(due, next_recent=few.next_recent - recent, next_separator=few.next_separator - separators),
        k=cache.turned(turn, jnp.concatenate(by, axis=1)) if sizes.turns_in_place else cache.k,
    )
