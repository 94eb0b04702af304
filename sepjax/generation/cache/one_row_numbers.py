"""What a token changes in a cache of one row besides keys and values, number by number: so it can be one kernel.

`Bounded` and `Growing` are of a token after which nothing else is due: no compaction, no position that starts again, no
token that must be moved out of the ring. Then they give what `append` gives.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.config import AttentionConfig, with_own_window
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.growing_pass import is_global_token
from sepjax.generation.cache.one_row_pass import (
    hidden_of_one_row,
    next_slot,
    shape_of_one_row,
    shape_of_one_token,
    told_of_one_token,
)
from sepjax.generation.cache.protocol import Cache
from sepjax.generation.cache.rows import next_slots
from sepjax.model import one_row
from sepjax.model.one_row.shape import Shape
from sepjax.separators import flag_separators

type Numbers = dict[str, jax.Array]  # int32 or bool, [1] or [1, ...], by name; "in_cache": entries held


@dataclasses.dataclass(frozen=True)
class Bounded:
    """Of a `StreamingCache`."""

    shape: Shape
    model: Any
    attention: AttentionConfig

    _FIELDS = ("num_sinks", "num_recent", "next_recent", "seen_low", "seen_high", "clock", "is_separator")

    def numbers(self, cache: StreamingCache) -> Numbers:
        """Those that a token changes."""
        return {"in_cache": cache.held(), **{name: getattr(cache, name) for name in self._FIELDS}}

    def cache(self, cache: StreamingCache, numbers: Numbers) -> StreamingCache:
        """`cache` with these numbers; its keys and values are those of before."""
        return dataclasses.replace(cache, **{name: numbers[name] for name in self._FIELDS})

    def entries(self, cache: StreamingCache) -> tuple[jax.Array, ...]:
        """Keys and values."""
        return cache.entries

    def with_entries(self, cache: StreamingCache, entries: tuple[jax.Array, ...]) -> StreamingCache:
        """`cache` with other keys and values."""
        return cache.with_entries(entries)

    def step(
        self, cache: StreamingCache, token: Int32[Array, "1"], entries: tuple[jax.Array, ...]
    ) -> tuple[Float[jax.Array, "1 1 D"], tuple[jax.Array, ...]]:
        """Hidden states of the next token, and `entries` with its own."""
        read = self.with_entries(cache, entries)
        return hidden_of_one_row(self.shape, self.model, read, token[:, None], jnp.ones(1, bool))

    def after(
        self, cache: StreamingCache, token: Int32[Array, "1"], table: Bool[Array, "_"], held: Int32[Array, "1"]
    ) -> Numbers:
        """The numbers once the next token is taken up. `held`: "in_cache" before."""
        del held
        flag = flag_separators(token, cache.seen_low, table, self.attention)
        return self.numbers(self._after(cache, flag))

    def is_all(self, cache: StreamingCache) -> Bool[jax.Array, "1"]:
        """Whether that is all that the next token asks for."""
        after = self._after(cache, jnp.zeros(1, bool))
        return ~(after.is_full() | after.turns())

    def _after(self, cache: StreamingCache, is_separator: Bool[jax.Array, "1"]) -> StreamingCache:
        sizes = cache.sizes
        is_sink, slot, _ = (x[:, 0] for x in next_slots(cache, 1))
        sinks, low = cache.num_sinks + is_sink, cache.seen_low + 1
        is_there = (jnp.arange(sizes.ring) == slot[:, None]) & ~is_sink[:, None]
        return dataclasses.replace(
            cache,
            is_separator=jnp.where(is_there, is_separator[:, None], cache.is_separator),
            num_sinks=sinks,
            num_recent=cache.held_before(2)[:, 1] - cache.num_separators - sinks,
            next_recent=cache.next_recent + 1,
            seen_low=low % sizes.count_wrap,
            seen_high=cache.seen_high + low // sizes.count_wrap,
            clock=cache.clock + 1,
        )


@dataclasses.dataclass(frozen=True)
class Growing:
    """The same of a `SeparatorCache`."""

    shape: Shape
    model: Any
    attention: AttentionConfig

    _FIELDS = ("length", "position", "is_global")

    def numbers(self, cache: SeparatorCache) -> Numbers:
        """See `Bounded`."""
        return {"in_cache": cache.held(), **{name: getattr(cache, name) for name in self._FIELDS}}

    def cache(self, cache: SeparatorCache, numbers: Numbers) -> SeparatorCache:
        """See `Bounded`."""
        return dataclasses.replace(cache, **{name: numbers[name] for name in self._FIELDS})

    def entries(self, cache: SeparatorCache) -> tuple[jax.Array, ...]:
        """See `Bounded`."""
        return jnp.asarray(cache.k), jnp.asarray(cache.v)

    def with_entries(self, cache: SeparatorCache, entries: tuple[jax.Array, ...]) -> SeparatorCache:
        """See `Bounded`."""
        return dataclasses.replace(cache, k=entries[0], v=entries[1])

    def step(
        self, cache: SeparatorCache, token: Int32[Array, "1"], entries: tuple[jax.Array, ...]
    ) -> tuple[Float[jax.Array, "1 1 D"], tuple[jax.Array, ...]]:
        """See `Bounded`."""
        told = told_of_one_token(self.shape, self.model, cache, self.attention)
        x = self.model.embedded(token[:, None], cache.length[:, None])
        hidden, k, v = one_row.step(self.shape, self.model.by_output, x, told, *entries)
        return hidden, (k, v)

    def after(
        self, cache: SeparatorCache, token: Int32[Array, "1"], table: Bool[Array, "_"], held: Int32[Array, "1"]
    ) -> Numbers:
        """See `Bounded`."""
        slot = next_slot(cache)
        is_there = jnp.arange(cache.position.shape[1]) == slot[:, None]
        is_global = is_global_token(token, cache.length, table, self.attention)
        return {
            "in_cache": jnp.asarray(held) + (cache.position[0, slot] < 0),
            "length": cache.length + 1,
            "position": jnp.where(is_there, cache.length[:, None], cache.position),
            "is_global": jnp.where(is_there, is_global[:, None], cache.is_global),
        }

    def is_all(self, cache: SeparatorCache) -> Bool[jax.Array, "1"]:
        """See `Bounded`."""
        return ~cache.is_global[0, next_slot(cache)]


def numbers_of_one_row(model: Any, cache: Cache, attention: AttentionConfig) -> Bounded | Growing | None:
    """Of a cache whose steps the kernel of all layers serves; else None."""
    if isinstance(cache, StreamingCache) and len(cache.num_sinks) == 1:
        shape = shape_of_one_row(model, cache, attention)
        return None if shape is None else Bounded(shape, model, attention)
    if isinstance(cache, SeparatorCache) and len(cache.length) == 1:
        attention = with_own_window(attention, model.config)
        shape = shape_of_one_token(model, cache, attention)
        return None if shape is None else Growing(shape, model, attention)
    return None
