"""Keys that are turned: rotated by so many positions more, with the rotations of their layers."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sepjax.config import RopeConfig
from sepjax.model.rope import Table, rope_tables, rotate


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
