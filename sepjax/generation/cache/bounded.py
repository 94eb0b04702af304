"""StreamingCache: a bounded cache for streams without end (METHOD section 4), in fixed shapes.

A row holds, in this logical order, its sinks, the newest s separators that left the window, and all tokens since:

    logical    initial (a) | separators (<= s) | past window | local window (w)          at most c entries
    slots      0 ... a-1   | a ... a+s-1       | a+s ................. a+s+R-1           C = a + s + R
               in order    | ring              | ring, R >= c + 1 - a

When more than c entries are held, the row *compacts*: of the past window only separators stay, which move to theirs.
With the patterns "watched" and "gated" the second zone holds other tokens, by other rules: `watched.py`, `gated.py`.
Between two compactions a row only grows, so all tokens up to the next one run in one pass (`bounded_pass.py`).

Entry k has position k and the query after L entries position L: a key would have to be rotated anew whenever entries
before it go. But within a zone distances never change. So a key is rotated once, by a position of its zone's own
(which slot it lies in modulo the ring's size), and the query is turned to fit each zone instead:

    zone         a key's own position                     the query's, at L entries
    sinks        k = 0, 1, ...                            L
    separators   n = 0, 1, ... as they were moved there   L - a + (n of the oldest kept)
    recent       p = 0, 1, ... as they came               p of the query, whose distance is that in the text

These differences are those of the slot numbers, and so are the scores. A key is rotated again only where it moves to
the separators, and when a position passes `rotation_limit`: all of its zone are then turned back by a multiple of the
ring's size, once in thousands of tokens. Codes of 8 bits would be rounded again then: their keys are rotated by the
number of their slot within its zone, in place of n and p, and a query fits the slots of each lap of a ring
(`turning.py`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32, SeparatorTable, Tokens
from sepjax.attention.decode import Looks
from sepjax.config import AttentionConfig, ConfigError, ModelConfig
from sepjax.generation.cache import rows as rows_of
from sepjax.generation.cache.bounded_pass import stream_pass
from sepjax.generation.cache.bounded_run import unsupported
from sepjax.generation.cache.newest import keep_newest
from sepjax.generation.cache.shown import Shown
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.cache.stored import Layers, Quantised, Vectors, in_each_layer, of_few_layers
from sepjax.generation.cache.turning import last_at, start_again, turn_table
from sepjax.generation.cache.watched import keep_best, scores_after
from sepjax.model.layers import once
from sepjax.model.rope import Table

# A compaction takes a sixteenth of the rows at a time, and no more than these: all that it takes cost the same, full or
# not, and of a large batch few are full in the same step. Of few rows, which a run may have filled, it takes all.
_SHARE, _AT_ONCE, _FEW = 16, 8, 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class StreamingCache(Shown):
    """Keys and values of all layers, and where each row's zones begin and end. Made by `create`."""

    k: Layers  # [L, B, K, C, H] or of each layer: keys, each rotated by its position in its zone; codes by their slots
    v: Layers
    is_separator: Bool[jax.Array, "B R"]  # of the token in each slot of the ring
    num_sinks: Int32[jax.Array, "B"]  # entries of the initial zone
    num_separators: Int32[jax.Array, "B"]  # entries of the separator zone
    num_recent: Int32[jax.Array, "B"]  # entries of the past and local window
    next_separator: Int32[jax.Array, "B"]  # n of the next token that moves to the separators
    next_recent: Int32[jax.Array, "B"]  # p of the next token
    dropped: Int32[jax.Array, "B"]  # separators that made room for newer ones, up to 2^30; 0 where s = 0
    seen_low: Int32[jax.Array, "B"]  # tokens seen, modulo sizes.count_wrap
    seen_high: Int32[jax.Array, "B"]  # and how many times that
    clock: Int32[jax.Array, "B"]  # time of the next token, for scores
    scores: Float[jax.Array, "G B N S"] | None  # of the second zone and the ring, where the best stay
    kept_at: Int32[jax.Array, "G B N s"]  # where in the text, modulo sizes.count_wrap, entries of the second zone stand
    sizes: StreamSizes = dataclasses.field(metadata={"static": True})
    # Of rows that are read where they lie: their numbers among those of k and v. None: they are all of them, in order.
    through: Int32[jax.Array, "B"] | None = None

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True

    @classmethod
    def create(
        cls, config: ModelConfig, batch_size: int, sizes: StreamSizes, *, by_layer: bool = False
    ) -> "StreamingCache":
        """An empty cache for `batch_size` rows; `by_layer`: with an array for each layer."""
        shape = (batch_size, config.num_kv_heads, sizes.slots, config.head_dim)

        def zeros() -> Layers:
            if by_layer:
                return tuple(rows_of.empty(config, shape, sizes.cache_dtype) for _ in range(config.num_layers))
            return rows_of.empty(config, (config.num_layers, *shape), sizes.cache_dtype)

        none = (jnp.zeros(batch_size, jnp.int32) for _ in range(9))  # one array each: a donated one must not be two
        best = sizes.keeps_best
        scores = best and best.scores(config, batch_size, sizes.max_separators + sizes.ring)
        sets = (1, batch_size, 1) if scores is None else scores.shape[:3]
        kept_at = jnp.zeros((*sets, sizes.max_separators), jnp.int32)
        flags = jnp.zeros((batch_size, sizes.ring), bool)
        return cls(zeros(), zeros(), flags, *none, scores=scores, kept_at=kept_at, sizes=sizes)

    @property
    def head_dim(self) -> int:
        """H."""
        return self.k[0].shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def held(self) -> Int32[jax.Array, "B"]:
        """L: entries that each row holds."""
        return self.num_sinks + self.num_separators + self.num_recent

    def room(self, most: int) -> Int32[jax.Array, "B"]:
        """How many tokens, up to `most`, the next pass may take up: to the row's next compaction, which it completes.

        Where there are no separators to be moved, evicting ends no pass once the sinks are there.
        """
        if self.sizes.keeps_best:  # what moves is not lost, so it moves as soon as the ring is full
            sinks = self.sizes.num_sinks - self.num_sinks
            return jnp.minimum(sinks + self.sizes.ring_limit - self.num_recent, most)
        room = jnp.minimum(self.sizes.cache_size + 1 - self.held(), most)
        if self.sizes.max_separators:
            return room
        return jnp.where(self.num_sinks < self.sizes.num_sinks, room, most)

    def is_full(self) -> Bool[jax.Array, "B"]:
        """Rows that have no room for another token."""
        if self.sizes.keeps_best:
            return self.num_recent >= self.sizes.ring_limit
        return self.held() > self.sizes.cache_size

    def full_rows(self) -> Int32[jax.Array, "M"]:
        """Numbers of full rows, as many as one compaction takes; where there are fewer, numbers of no row."""
        B = len(self.num_sinks)
        takes_all = B <= _FEW and not self.sizes.keeps_best
        return rows_of.first_of(self.is_full(), B if takes_all else min(-(-B // _SHARE), _AT_ONCE))

    def of_rows(self, rows: Int32[Array, "M"]) -> "StreamingCache":
        """The bookkeeping of these rows alone, without keys and values; numbers of no row give any one's."""
        return self.bare().whole_rows(rows)

    def bare(self) -> "StreamingCache":
        """The bookkeeping alone, without keys and values."""
        return dataclasses.replace(self, k=(), v=(), through=None)

    def with_entries_of(self, other: "StreamingCache") -> "StreamingCache":
        """This bookkeeping with the keys and values of another."""
        return dataclasses.replace(self, k=other.k, v=other.v)

    @property
    def entries(self) -> tuple[Any, ...]:
        """Arrays of every layer's keys, then of values, of a cache that has some for each; or their shapes."""
        return tuple(jax.tree.leaves((self.k, self.v)))

    def with_entries(self, entries: Sequence[Any]) -> "StreamingCache":
        """This bookkeeping with other `entries`."""
        if self.sizes.cache_dtype != "model":
            entries = [Quantised(*pair) for pair in zip(entries[::2], entries[1::2], strict=True)]
        half = len(entries) // 2
        return dataclasses.replace(self, k=tuple(entries[:half]), v=tuple(entries[half:]))

    @property
    def main(self) -> "StreamingCache":
        """Itself: of caches with several sizes (`sepjax.generation.cache.mixed`), the part to look at."""
        return self

    def with_rows(self, rows: Int32[Array, "M"], **new: jax.Array | int) -> "StreamingCache":
        """The same with other bookkeeping of these rows, by field, as `of_rows` has it; numbers of no row are none."""

        def put(name: str, x: jax.Array) -> jax.Array:
            at = (slice(None), rows) if name in rows_of.BY_SET else rows
            return x.at[at].set(new[name], mode="drop", unique_indices=True)

        return dataclasses.replace(self, **{name: put(name, getattr(self, name)) for name in new})

    @property
    def ends_when_stuck(self) -> bool:
        """See `Cache`: with `keep_all_separators`."""
        return not self.sizes.drops_separators

    def is_stuck(self) -> Bool[jax.Array, "B"]:
        """Rows that have lost a separator though none is to be lost (`keep_all_separators`)."""
        return (self.dropped > 0) & self.ends_when_stuck

    def make_room(self) -> "StreamingCache":
        """Raises ConfigError: the settings bound it."""
        raise ConfigError(
            f"the cache has no room for another separator: with keep_all_separators, cache_size="
            f"{self.sizes.cache_size} holds {self.sizes.max_separators}; raise it or let the oldest go"
        )

    def take_up(
        self, model: Any, tokens: Tokens, counts: Int32[Array, "B"], table: SeparatorTable, attention: AttentionConfig
    ) -> tuple[Float[jax.Array, "B T D"], "StreamingCache"]:
        """See `sepjax.generation.cache.protocol.Cache.take_up` and `stream_pass`."""
        return stream_pass(model, self, tokens, counts, table, attention)

    def row(self, i: Int32[Array, ""]) -> "StreamingCache":
        """Row i as a cache of its own."""
        return rows_of.one(self, i)

    def with_row(self, i: Int32[Array, ""], row: "StreamingCache") -> "StreamingCache":
        """The same with row i as `row`, a cache of one row, has it."""
        return rows_of.with_one(self, i, row)

    def whole_rows(self, rows: Int32[Array, "M"]) -> "StreamingCache":
        """These rows as a cache of their own; numbers of no row give any one's."""
        return rows_of.some(self, rows)

    def with_whole_rows(self, rows: Int32[Array, "M"], few: "StreamingCache") -> "StreamingCache":
        """The same with these rows as `few` has them; numbers of no row are none."""
        if few.through is None:
            return rows_of.with_some(self, rows, few)
        return rows_of.with_some(self.bare(), rows, few.bare()).with_entries_of(few)

    def where_they_lie(self, rows: Int32[Array, "M"], attention: AttentionConfig) -> "StreamingCache":
        """As `whole_rows`, for a run of tokens; without a copy of keys and values where its attention can find them."""
        if self.layer_axis or self.sizes.cache_dtype != "model" or unsupported(self, attention.implementation):
            return self.whole_rows(rows)
        return dataclasses.replace(self.of_rows(rows), k=self.k, v=self.v, through=jnp.asarray(rows))

    @property
    def is_in_place(self) -> bool:
        """Whether these rows are read where they lie among others."""
        return self.through is not None

    def places(self, rows: Int32[jax.Array, "*M"]) -> Int32[jax.Array, "*M"]:
        """In which rows of k and v these rows' entries lie; of numbers of no row, numbers of no row."""
        if self.through is None:
            return rows
        return self.through.at[rows].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max)

    def reset(self, rows: Bool[Array, "B"]) -> "StreamingCache":
        """The same with `rows` empty, as for a new document: their counts begin at 0, all else stays unseen."""
        arrays = vars(self).items()  # those of one axis, [B], count, but for which rows they are of
        counts = {name: x for name, x in arrays if name != "through" and getattr(x, "ndim", 0) == 1}
        return dataclasses.replace(self, **{name: jnp.where(rows, 0, x) for name, x in counts.items()})

    @property
    def layer_axis(self) -> tuple[slice, ...]:
        """What stands before the batch in an index of keys or values."""
        return () if isinstance(self.k, tuple) else (slice(None),)

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

    def distances(self, num_tokens: int) -> Int32[jax.Array, "B T C"]:
        """How many positions each of the next tokens is behind what lies in every slot, as the rotation has it."""
        sinks, separators, recent = self.query_positions(num_tokens)[..., None]
        kept = last_at(jnp.arange(self.sizes.max_separators), self.next_separator[:, None], self.sizes.max_separators)
        zones = sinks - jnp.arange(self.sizes.num_sinks), separators - kept[:, None]
        return jnp.concatenate([*zones, recent - self.recent_positions()[:, None]], axis=-1)

    def recent_turn(self) -> tuple[jax.Array, jax.Array] | None:
        """Cosine and sine, [(Z,) B, A, R/2], that turn the keys of sink and separator slots to fit recent queries.

        For the next pass, in which the three positions of a query differ by constants. That needs separators (`room`);
        None: the keys fit as they are.
        """
        if not self.sizes.turns_in_place:
            return None
        sinks, separators, recent = self.query_positions(1)[:, :, 0]
        zones = zip(
            (recent - sinks, recent - separators), (self.sizes.num_sinks, self.sizes.max_separators), strict=True
        )
        by = jnp.concatenate([jnp.repeat(shift[:, None], size, axis=1) for shift, size in zones], axis=1)
        return self.angles(by)

    def place_in_text(self, p: Int32[jax.Array, "*B"]) -> Int32[jax.Array, "*B"]:
        """Where in the text, modulo `sizes.count_wrap`, the tokens of these positions p of the ring stand."""
        first = self.seen_low - self.next_recent
        return (first.reshape(-1, *(1 for _ in p.shape[1:])) + p) % self.sizes.count_wrap

    # -- what changes ---------------------------------------------------------------------------------------------

    def append(
        self,
        k: Float[Array, "L B T K H"] | Quantised | tuple[()],
        v: Float[Array, "L B T K H"] | Quantised | tuple[()],
        is_separator: Bool[Array, "B T"],
        counts: Int32[Array, "B"],
        looks: Float[Array, "L B K S"] | Looks | None = None,
        gate_scores: Float[Array, "B T"] | None = None,
        in_place: rows_of.InPlace | None = None,
    ) -> "StreamingCache":
        """Takes up the next tokens of every row. `compact` the rows before their next.

        Args:
          k: their keys in every layer, rotated by `turning.own_positions`; of a `bare` cache none.
          v: their values.
          is_separator: which of them are separators.
          counts: how many of the T tokens each row takes up, 0 to `room(T)`.
          looks: of watched tokens, of `looks_of_many` in every layer; of one token at its slots, as they were found.
          gate_scores: of a gate, of the tokens.
          in_place: what kernels have written already.
        """
        sizes, T, in_place = self.sizes, is_separator.shape[1], in_place or rows_of.InPlace()
        i = jnp.arange(T, dtype=jnp.int32)
        rows = jnp.arange(len(counts))[:, None]
        is_sink, slot, to = rows_of.next_slots(self, T)
        lasts = i >= counts[:, None] - sizes.ring  # what is older would be overwritten at once
        taken = (i < counts[:, None]) & (is_sink | lasts)
        mode = "promise_in_bounds"  # for one token: the slot of the next is free, so a row may write and not take it up
        if T > 1:
            mode, to = "drop", jnp.where(taken, to, sizes.slots + i)  # beyond the end: nowhere

        lead, at = self.layer_axis, self.places(rows)

        def put(x: jax.Array, new: Array) -> jax.Array:
            return rows_of.written(x, jnp.asarray(new), lead, at, to, mode)

        new_sinks = jnp.minimum(counts, sizes.num_sinks - self.num_sinks)
        low = self.seen_low + counts
        held = jnp.take_along_axis(self.held_before(T + 1), counts[:, None], axis=1)[:, 0]
        in_ring = jnp.where(taken & ~is_sink, slot, sizes.ring + i)
        flags = self.is_separator.at[rows, in_ring]
        scores = scores_after(self, looks, gate_scores, counts, in_ring)
        return dataclasses.replace(
            self,
            k=in_place.mended(0, in_each_layer(put, self.k, k)),
            v=in_place.mended(1, in_each_layer(put, self.v, v)),
            is_separator=flags.set(is_separator, mode="drop", unique_indices=True),
            num_sinks=self.num_sinks + new_sinks,
            num_recent=held - self.num_separators - self.num_sinks - new_sinks,
            next_recent=self.next_recent + counts,
            seen_low=low % sizes.count_wrap,
            seen_high=self.seen_high + low // sizes.count_wrap,
            clock=self.clock + counts,
            scores=scores,
        )

    def compact(self) -> "StreamingCache":
        """Compacts the rows that are due; the others stay as they are, and are not even read."""

        # Loops that run once or never: unlike a `cond`, they change the cache in place. A step waits for one, not two.
        if not self.sizes.max_separators:
            return start_again(self)
        move = keep_best if self.sizes.keeps_best else keep_newest

        def settled(cache: "StreamingCache") -> "StreamingCache":
            return start_again(jax.lax.while_loop(lambda cache: jnp.any(cache.is_full()), move, cache))

        is_due = lambda cache: jnp.any(cache.is_full() | cache.turns())  # noqa: E731
        return jax.lax.while_loop(is_due, settled, self) if self.sizes.turns_in_place else settled(self)

    def turns(self) -> jax.Array:
        """Rows whose positions have grown so far that they start again."""
        if self.sizes.absolute:
            return jnp.zeros_like(self.num_sinks, bool)
        limit = self.sizes.rotation_limit
        return (self.next_recent >= limit) | (self.next_separator >= limit)

    def turned(self, f: Callable[[Any, Table], Vectors], by: jax.Array) -> Layers:
        """`f` of keys and the cosine and sine, [(L,) ..., R/2], that turn them by so many positions more."""
        (cos, sin), kinds = once(self.angles(by)), self.sizes.layer_ropes
        if kinds and self.layer_axis:
            return f(self.k, (cos[jnp.array(kinds)], sin[jnp.array(kinds)]))
        return of_few_layers(lambda k, i, t: f(k, (t[0][kinds[i]], t[1][kinds[i]]) if kinds else t), self.k, (cos, sin))

    def angles(self, by: jax.Array) -> Table:
        """`turn_table` of this cache's layers."""
        return turn_table(by, self.sizes.ropes, self.head_dim)
