"""Keys that are turned: rotated by so many positions more, with the rotations of their layers.

Codes of 8 bits lie rotated by the numbers of their slots within their zones (`StreamSizes.turned_by_slot`), which is
what positions are modulo the zone's size: so they turn where they move to another zone, and at no other time.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sepjax.array_typing import Int32
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


def own_positions(cache: "StreamingCache", num_tokens: int) -> Int32[jax.Array, "B T"]:
    """What the keys of the next tokens are rotated by: the last of `query_positions`, or their slots' numbers."""
    recent = cache.query_positions(num_tokens)[-1]
    return recent % cache.sizes.ring if cache.sizes.turned_by_slot else recent


def turn_of_moves(cache: "StreamingCache", to: jax.Array, source: jax.Array) -> jax.Array | None:
    """By how many positions keys turn that move from p `source` of the ring to n `to` of the second zone."""
    sizes = cache.sizes
    if sizes.turned_by_slot:
        return to % max(sizes.max_separators, 1) - source % sizes.ring
    return None if sizes.absolute else to - source


OWN_ZONE = 3  # of `zones_by_slot`, the one in which the next token's key will lie, or whose rotation it has as a sink


def zones_by_slot(cache: "StreamingCache") -> tuple[Int32[jax.Array, "B 4"], Int32[jax.Array, "5 B 1"]]:
    """Where zones of slots end, all but the last, and the next token's positions as a query towards each.

    Of keys that are rotated by their slots' numbers. A ring's slots before its next one are of this lap, those from it
    on of the lap before; within a lap a query is as far from a slot, plus the slot's number, as from any other.

        slots    sinks | separators, this lap and the last | recent, this lap and the last
    """
    a, s, R = cache.sizes.num_sinks, cache.sizes.max_separators, cache.sizes.ring
    to_sinks, *queries = cache.query_positions(1)
    ends, positions, at = [jnp.full_like(cache.next_recent, a)], [to_sinks], a
    for query, end, size in zip(queries, (cache.next_separator, cache.next_recent), (s, R), strict=True):
        number = end % max(size, 1)
        this_lap = query - (end - number)[:, None]
        ends += [at + number, jnp.full_like(number, at + size)]
        positions += [this_lap, this_lap + size]
        at += size
    return jnp.stack(ends[:-1], axis=1), jnp.stack(positions)


def start_again(cache: "StreamingCache") -> "StreamingCache":
    """Sets positions of rows that are due back by multiples of their rings' sizes: every key stays in its slot."""
    if cache.sizes.absolute:
        return cache
    if cache.sizes.turns_in_place:
        return jax.lax.while_loop(lambda cache: jnp.any(cache.turns()), _turn_back, cache)
    recent, separators = _beyond(cache)
    next_recent, next_separator = cache.next_recent - recent, cache.next_separator - separators
    return dataclasses.replace(cache, next_recent=next_recent, next_separator=next_separator)


def _beyond(cache: "StreamingCache") -> tuple[jax.Array, jax.Array]:
    """By how much the positions of recent entries and of separators are to be set back in each row."""
    s, R, limit = cache.sizes.max_separators, cache.sizes.ring, cache.sizes.rotation_limit
    recent = jnp.where(cache.next_recent >= limit, cache.next_recent // R * R, 0)
    return recent, jnp.where(cache.next_separator >= limit, cache.next_separator // max(s, 1) * s, 0)


def _turn_back(cache: "StreamingCache") -> "StreamingCache":
    """Turns the keys of both rings of some rows that are due."""
    a, s, R = cache.sizes.num_sinks, cache.sizes.max_separators, cache.sizes.ring
    due = first_of(cache.turns(), _ROWS)
    few, at = cache.of_rows(due), cache.places(due)
    recent, separators = _beyond(few)
    by = [jnp.zeros((len(due), a), jnp.int32)]
    by += [jnp.repeat(-x[:, None], size, axis=1) for x, size in ((separators, s), (recent, R))]

    def turn(k: jax.Array, table: Table) -> jax.Array:  # [(L,) B, K, C, H]
        cos, sin = (t[..., None, :, :] for t in table)
        found = k.at[*cache.layer_axis, at].get(mode="clip")
        found = rotate(found[..., None, :], (cos, sin))[..., 0, :]
        return k.at[*cache.layer_axis, at].set(found, mode="drop", unique_indices=True)

    return dataclasses.replace(
        cache.with_rows(due, next_recent=few.next_recent - recent, next_separator=few.next_separator - separators),
        k=cache.turned(turn, jnp.concatenate(by, axis=1)),
    )
