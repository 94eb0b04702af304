"""StreamingCache: a bounded cache for streams without end (METHOD section 4), in fixed shapes.

A row holds, in this logical order, its sinks, the newest s separators that left the window, and all tokens since:

    logical    initial (a) | separators (<= s) | past window | local window (w)          at most c entries
    slots      0 ... a-1   | a ... a+s-1       | a+s ................. a+s+R-1           C = a + s + R
               in order    | ring              | ring, R >= c + 1 - a

When more than c entries are held, the row *compacts*: of the past window only separators stay, which move to theirs.
Between two compactions a row only grows, so all tokens up to the next one run in one pass (`sepjax.streaming.forward`).

Entry k has position k and the query after L entries position L: a key would have to be rotated anew whenever entries
before it go. But within a zone distances never change. So a key is rotated once, by a position of its zone's own
(which slot it lies in modulo the ring's size), and the query is turned to fit each zone instead:

    zone         a key's own position                     the query's, at L entries
    sinks        k = 0, 1, ...                            L
    separators   n = 0, 1, ... as they were moved there   L - a + (n of the oldest kept)
    recent       p = 0, 1, ... as they came               p of the query, whose distance is that in the text

These differences are those of the slot numbers, and so are the scores. A key is rotated again only where it moves to
the separators, and when a position passes `rotation_limit`: all of its zone are then turned back by a multiple of the
ring's size, once in thousands of tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.config import ModelConfig
from sepjax.model.rope import rope_frequencies, rotate
from sepjax.streaming.sizes import StreamSizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamingCache:
    """Keys and values of all layers, and where each row's zones begin and end. Made by `create`."""

    k: Float[jax.Array, "L B K C H"]  # keys, each rotated by its position in its zone
    v: Float[jax.Array, "L B K C H"]
    is_separator: Bool[jax.Array, "B R"]  # of the token in each slot of the ring
    num_sinks: Int32[jax.Array, "B"]  # entries of the initial zone
    num_separators: Int32[jax.Array, "B"]  # entries of the separator zone
    num_recent: Int32[jax.Array, "B"]  # entries of the past and local window
    next_separator: Int32[jax.Array, "B"]  # n of the next token that moves to the separators
    next_recent: Int32[jax.Array, "B"]  # p of the next token
    dropped: Int32[jax.Array, "B"]  # separators that made room for newer ones, up to 2^30; 0 where s = 0
    seen_low: Int32[jax.Array, "B"]  # tokens seen, modulo sizes.count_wrap
    seen_high: Int32[jax.Array, "B"]  # and how many times that
    sizes: StreamSizes = dataclasses.field(metadata={"static": True})

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True

    @classmethod
    def create(cls, config: ModelConfig, batch_size: int, sizes: StreamSizes) -> "StreamingCache":
        """An empty cache for `batch_size` rows."""
        shape = (config.num_layers, batch_size, config.num_kv_heads, sizes.slots, config.head_dim)
        zeros = (jnp.zeros(batch_size, jnp.int32) for _ in range(8))  # one array each: a donated one must not be two
        ring = jnp.zeros((batch_size, sizes.ring), bool)
        return cls(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), ring, *zeros, sizes=sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def held(self) -> Int32[jax.Array, "B"]:
        """L: entries that each row holds."""
        return self.num_sinks + self.num_separators + self.num_recent

    def seen(self) -> list[int]:
        """Tokens that each row has seen, as Python numbers: they may pass 2^31."""
        low, high = jax.device_get((self.seen_low, self.seen_high))
        return [int(h) * self.sizes.count_wrap + int(l) for l, h in zip(low, high, strict=True)]

    def room(self, most: int) -> Int32[jax.Array, "B"]:
        """How many tokens, up to `most`, the next pass may take up: to the row's next compaction, which it completes.

        Where there are no separators to be moved, evicting ends no pass once the sinks are there.
        """
        room = jnp.minimum(self.sizes.cache_size + 1 - self.held(), most)
        if self.sizes.max_separators:
            return room
        return jnp.where(self.num_sinks < self.sizes.num_sinks, room, most)

    def is_due(self) -> Bool[jax.Array, "B"]:
        """Rows that must be compacted before their next token."""
        return (self.held() > self.sizes.cache_size) | self._turns()

    def reset(self, rows: Bool[Array, "B"]) -> "StreamingCache":
        """The same with `rows` empty, as for a new document. Keys and values stay, where nothing sees them."""
        names = [field.name for field in dataclasses.fields(self)][3:-1]
        return dataclasses.replace(self, **{name: jnp.where(rows, 0, getattr(self, name)) for name in names})

    # -- who sees what --------------------------------------------------------------------------------------------

    def held_before(self, num_tokens: int) -> Int32[jax.Array, "B T"]:
        """L of each of the next `num_tokens` tokens of a pass: entries held when it comes."""
        sizes, held = self.sizes, self.held()[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
        if sizes.max_separators:
            return held
        kept = sizes.num_sinks + sizes.window_size  # left by an eviction, then it grows again
        over = held - sizes.cache_size - 1
        return jnp.where(over < 0, held, kept + over % (sizes.cache_size + 1 - kept))

    def query_positions(self, num_tokens: int) -> Int32[jax.Array, "Z B T"]:
        """Positions of the next tokens as queries: towards sinks, separators and recent entries.

        Their keys have the last of these.
        """
        recent = self.next_recent[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
        if self.sizes.absolute:
            return jnp.stack([recent, recent, recent])
        held = self.held_before(num_tokens)
        separators = held - self.num_sinks[:, None] + (self.next_separator - self.num_separators)[:, None]
        return jnp.stack([held, separators, recent])

    def first_recent(self, num_tokens: int) -> Int32[jax.Array, "B T"]:
        """p of the oldest recent entry that each of the next tokens sees."""
        held = self.held_before(num_tokens) - (self.num_sinks + self.num_separators)[:, None]
        return self.next_recent[:, None] + jnp.arange(num_tokens, dtype=jnp.int32) - held

    def visible_old(self) -> Bool[jax.Array, "B A"]:
        """The sink and separator slots, a + s of them, that hold an entry. All tokens of a pass see them."""
        sinks = jnp.arange(self.sizes.num_sinks) < self.num_sinks[:, None]
        n = last_at(jnp.arange(self.sizes.max_separators), self.next_separator[:, None], self.sizes.max_separators)
        return jnp.concatenate([sinks, n >= (self.next_separator - self.num_separators)[:, None]], axis=1)

    def recent_positions(self) -> Int32[jax.Array, "B R"]:
        """p of what lies in each slot of the ring, whether it is still an entry or not."""
        return last_at(jnp.arange(self.sizes.ring), self.next_recent[:, None], self.sizes.ring)

    # -- what changes ---------------------------------------------------------------------------------------------

    def append(
        self,
        k: Float[Array, "L B T K H"],
        v: Float[Array, "L B T K H"],
        is_separator: Bool[Array, "B T"],
        counts: Int32[Array, "B"],
    ) -> "StreamingCache":
        """Takes up the next tokens of every row. Rows that are then due (`is_due`) must be compacted next.

        Args:
          k: their keys in every layer, rotated by the last of `query_positions`.
          v: their values.
          is_separator: which of them are separators.
          counts: how many of the T tokens each row takes up, 0 to `room(T)`.
        """
        sizes, T = self.sizes, is_separator.shape[1]
        i = jnp.arange(T, dtype=jnp.int32)
        rows = jnp.arange(len(counts))[:, None]
        sink = self.num_sinks[:, None] + i
        slot = (self.next_recent[:, None] + i) % sizes.ring
        is_sink = sink < sizes.num_sinks
        lasts = i >= counts[:, None] - sizes.ring  # what is older would be overwritten at once
        taken = (i < counts[:, None]) & (is_sink | lasts)
        to = jnp.where(is_sink, sink, sizes.num_sinks + sizes.max_separators + slot)
        to = jnp.where(taken, to, sizes.slots + i)  # beyond the end: nowhere

        def put(x: jax.Array, new: Array) -> jax.Array:  # indexed axes come first: [B, T, L, K, H]
            new = jnp.moveaxis(jnp.asarray(new), 0, 2)
            return x.at[:, rows, :, to].set(new, mode="drop", unique_indices=True)

        new_sinks = jnp.minimum(counts, sizes.num_sinks - self.num_sinks)
        low = self.seen_low + counts
        held = jnp.take_along_axis(self.held_before(T + 1), counts[:, None], axis=1)[:, 0]
        flags = self.is_separator.at[rows, jnp.where(taken & ~is_sink, slot, sizes.ring + i)]
        return dataclasses.replace(
            self,
            k=put(self.k, k),
            v=put(self.v, v),
            is_separator=flags.set(is_separator, mode="drop", unique_indices=True),
            num_sinks=self.num_sinks + new_sinks,
            num_recent=held - self.num_separators - self.num_sinks - new_sinks,
            next_recent=self.next_recent + counts,
            seen_low=low % sizes.count_wrap,
            seen_high=self.seen_high + low // sizes.count_wrap,
        )

    def compact(self) -> "StreamingCache":
        """Compacts the rows that hold more than c entries; the others stay as they are. Cheap, but not for nothing."""
        cache = self._move_separators() if self.sizes.max_separators else self
        if self.sizes.absolute:
            return cache
        return jax.lax.cond(jnp.any(cache._turns()), StreamingCache._turn_back, lambda cache: cache, cache)

    def _move_separators(self) -> "StreamingCache":
        a, s, w, R = self.sizes.num_sinks, self.sizes.max_separators, self.sizes.window_size, self.sizes.ring
        full = self.held() > self.sizes.cache_size
        past = jnp.where(full, self.num_recent - w, 0)[:, None]
        first = (self.next_recent - self.num_recent)[:, None]  # p of the oldest
        p = first + jnp.arange(R, dtype=jnp.int32)
        moves = jnp.take_along_axis(self.is_separator, p % R, axis=1) & (p < first + past)
        rank = jnp.cumsum(moves, axis=1, dtype=jnp.int32)
        found = rank[:, -1]
        # The newest s of them, oldest first; the others are dropped on the way.
        place = jnp.where(moves, rank - 1 - jnp.maximum(found - s, 0)[:, None], -1)
        rows = jnp.arange(len(found))[:, None]
        source = jnp.zeros((len(found), s), jnp.int32).at[rows, jnp.where(place < 0, s, place)].set(p, mode="drop")
        j = jnp.arange(s, dtype=jnp.int32)
        n = (self.next_separator + jnp.maximum(found - s, 0))[:, None] + j
        moved = j < jnp.minimum(found, s)[:, None]
        to = jnp.where(moved, a + n % s, self.sizes.slots + j)
        k, v = (x[:, rows, :, a + s + source % R] for x in (self.k, self.v))  # [B, s, L, K, H]
        if not self.sizes.absolute:
            k = self._turn(k, n - source, axis=2)
        kept = self.num_separators + found
        return dataclasses.replace(
            self,
            k=self.k.at[:, rows, :, to].set(k, mode="drop", unique_indices=True),
            v=self.v.at[:, rows, :, to].set(v, mode="drop", unique_indices=True),
            num_separators=jnp.minimum(kept, s),
            num_recent=jnp.where(full, w, self.num_recent),
            next_separator=self.next_separator + found,
            dropped=jnp.minimum(self.dropped + jnp.maximum(kept - s, 0), 2**30),
        )

    def _turns(self) -> jax.Array:
        """Rows whose positions have grown so far that they start again."""
        if self.sizes.absolute:
            return jnp.zeros_like(self.num_sinks, bool)
        limit = self.sizes.rotation_limit
        return (self.next_recent >= limit) | (self.next_separator >= limit)

    def _turn_back(self) -> "StreamingCache":
        """Turns the keys of both rings back by multiples of their sizes, so that every one stays in its slot."""
        a, s, R, limit = self.sizes.num_sinks, self.sizes.max_separators, self.sizes.ring, self.sizes.rotation_limit
        recent = jnp.where(self.next_recent >= limit, self.next_recent // R * R, 0)
        separators = jnp.where(self.next_separator >= limit, self.next_separator // max(s, 1) * s, 0)
        by = [jnp.zeros((len(recent), a), jnp.int32)]
        by += [jnp.repeat(-x[:, None], size, axis=1) for x, size in ((separators, s), (recent, R))]
        k = self._turn(jnp.moveaxis(self.k, 2, 3), jnp.concatenate(by, axis=1), axis=0)
        return dataclasses.replace(
            self,
            k=jnp.moveaxis(k, 3, 2),
            next_recent=self.next_recent - recent,
            next_separator=self.next_separator - separators,
        )

    def _turn(self, k: jax.Array, by: jax.Array, *, axis: int) -> jax.Array:
        """Rotates keys by so many positions more; `by` lacks their axis of layers. A rotation by 0 changes no bit."""
        frequencies, _ = rope_frequencies(self.sizes.rope, k.shape[-1])  # the factor of YaRN is in them already
        angles = jnp.expand_dims(by.astype(jnp.float32)[..., None] * frequencies, axis)
        return rotate(k, (jnp.cos(angles), jnp.sin(angles)))


def last_at(slot: jax.Array, end: jax.Array, size: int) -> jax.Array:
    """The largest number below `end` that is `slot` modulo `size`: what a ring that has been filled so far holds there.

    Negative where nothing has been put there yet.
    """
    last = end - 1
    return last - (last - slot) % max(size, 1)


def used_bytes(cache: StreamingCache) -> int:
    """Bytes of keys and values that one row's entries take up, as measured from the arrays; for reports."""
    per_slot = (cache.k.nbytes + cache.v.nbytes) / np.prod(cache.k.shape[1:4:2])
    return int(per_slot * float(jnp.max(cache.held())))
