"""What slots do on the device: a few programs for all requests, each compiled once.

    begin   a row begins with an empty cache; what the request wants
    place   likewise with a saved one
    read    a few rows take up their next tokens, up to their next compaction; after the last, a first token is drawn
    steps   some tokens of every row that is generating
    take    a copy of a row, to be kept; as it was before the last step, if the host wants it so
    look    what a row's cache holds, without keys and values; likewise

The host asks for steps before it has seen what the last ones drew, and may find that a row had ended with those. So a
step can be taken back. It writes keys and values where nothing lay, and what else it changes is small and kept
(`Before`). Only a compaction could not be undone: it comes at the beginning of the next step, not at the end. Of
several steps only the last can be taken back: rows whose ends the host finds make no other one than that. (The last,
not the first: a row that has made its step may be full, and has no room for what later steps write into idle rows.)

A row that is free or still reading is `done`: steps leave it as it is. Which row it is, is data: nothing is compiled
again while requests come and go. No result of a row depends on another row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens, UInt8, UInt16, UInt32
from sepjax.config import AttentionConfig
from sepjax.generation.cache.ahead import after_compaction
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.mixed import BoundedCache
from sepjax.generation.cache.view import bookkeeping
from sepjax.generation.device_loop import MOST_TOP, DecodeState, Drawn, Request, draw
from sepjax.generation.packed import Bytes, Form, Packed
from sepjax.generation.penalties import after_reading
from sepjax.generation.sampling import Sampling
from sepjax.generation.step import take_up_one
from sepjax.model.transformer import Params
from sepjax.model.unrolled import runner


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the device must know of each row's request: a `Request` without what all share."""

    sampling: Sampling
    end_tokens: Int32[jax.Array, "B E"]
    max_new_tokens: Int32[jax.Array, "B"]
    logprobs: Bool[jax.Array, "B"]
    top_logprobs: Bool[jax.Array, "B"]

    __no_type_check__ = True

    def request(self, table: Bool[Array, "_"]) -> Request:
        """The rows' `Request`."""
        asks = self.logprobs, self.top_logprobs
        return Request(jnp.asarray(table), self.sampling, self.end_tokens, self.max_new_tokens, *asks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Before:
    """What the last step changed, as it was before."""

    cache: BoundedCache  # without keys and values
    token: Int32[jax.Array, "B"]
    count: Int32[jax.Array, "B"]
    key: jax.Array
    use: UInt16[jax.Array, "B"]  # of the token that it drew
    stepped: Bool[jax.Array, "B"]  # rows that took part; the others' numbers mean nothing

    __no_type_check__ = True

    @classmethod
    def of(cls, state: DecodeState, drawn: Int32[Array, "B"], stepped: Bool[Array, "B"]) -> "Before":
        """Before a step from `state` that drew these tokens."""
        cache: Any = state.cache
        use = state.uses[jnp.arange(len(drawn)), drawn]
        return cls(cache.bare(), state.token, state.count, state.key, use, jnp.asarray(stepped))

    def back(self, state: DecodeState, wanted: Bool[Array, ""]) -> DecodeState:
        """A state of one row, and if that is `wanted` as it was before its last step."""
        now: Any = state.cache
        cache = self.cache.with_entries_of(now)
        uses = state.uses.at[0, state.token[0]].set(self.use[0])
        then = DecodeState(cache, self.token, self.count, jnp.zeros_like(state.done), self.key, uses)
        takes_back = jnp.asarray(wanted) & self.stepped[0]
        return jax.tree.map(lambda x, y: x if x is y else jnp.where(takes_back, x, y), then, state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where all rows stand: of n rows, or of the one that comes or goes."""

    state: DecodeState
    wishes: Wishes
    before: Before

    __no_type_check__ = True

    def row(self, i: Int32[Array, ""]) -> "Rows":
        """Row i alone."""
        others = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), self._others())
        return others._with_caches(*(cache.row(i) for cache in self._caches()))

    def with_row(self, i: Int32[Array, ""], state: DecodeState, wishes: Wishes) -> "Rows":
        """The same with another row i, which has made no step."""
        row = dataclasses.replace(self, state=dataclasses.replace(state, cache=None), wishes=wishes)
        others, cache = self._others(), self._caches()[0]

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new, i, axis=0)

        new = dataclasses.replace(
            self, state=jax.tree.map(put, others.state, row.state), wishes=jax.tree.map(put, self.wishes, wishes)
        )
        return dataclasses.replace(
            new, state=dataclasses.replace(new.state, cache=cache.with_row(i, state.cache))
        )  # fmt: skip

    def states(self, rows: Int32[Array, "M"]) -> tuple[DecodeState, Wishes]:
        """These rows; numbers of no row give any one's."""
        found = jax.tree.map(lambda x: jnp.take(x, rows, 0, mode="clip"), self._others())
        return dataclasses.replace(found.state, cache=self._caches()[0].whole_rows(rows)), found.wishes

    def with_states(self, rows: Int32[Array, "M"], state: DecodeState) -> "Rows":
        """The same with other states of these rows; numbers of no row are none."""
        bare, cache = dataclasses.replace(state, cache=None), self._caches()[0]

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return x.at[rows].set(new, mode="drop", unique_indices=True)

        new = jax.tree.map(put, self._others().state, bare)
        new = dataclasses.replace(new, cache=cache.with_whole_rows(rows, state.cache))
        return dataclasses.replace(self, state=new)

    def _caches(self) -> tuple[Any, Any]:
        return self.state.cache, self.before.cache

    def _others(self) -> "Rows":
        return self._with_caches(None, None)

    def _with_caches(self, now: Any, before: Any) -> "Rows":
        state = dataclasses.replace(self.state, cache=now)
        return Rows(state, self.wishes, dataclasses.replace(self.before, cache=before))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrival:
    """What a row that begins is told, on the host."""

    wishes: Wishes
    seed: UInt32[Array, "1"]
    has_seed: Bool[Array, "1"]  # else the draws of the saved row go on
    done: Bool[Array, "1"]  # whether it has something to read first

    __no_type_check__ = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """For the host: what each of S steps came to in every row, or a read in its own (B of them, without S)."""

    # token, -1: none was drawn; entries held; bits of the log-probability; whether the cache is stuck; tokens taken up
    numbers: Int32[jax.Array, "*S 5 B"]
    top_tokens: Int32[jax.Array, "*S B E"]
    top_logprobs: Float[jax.Array, "*S B E"]

    __no_type_check__ = True

    @classmethod
    def of(cls, token: jax.Array, held: jax.Array, drawn: Drawn, stuck: jax.Array, taken: jax.Array) -> "Record":
        """Puts the numbers together, [B] each."""
        logprob = jax.lax.bitcast_convert_type(drawn.logprob.astype(jnp.float32), jnp.int32)
        numbers = jnp.stack([token, held, logprob, stuck.astype(jnp.int32), taken])
        return cls(numbers, drawn.top_tokens, drawn.top_logprobs)


@dataclasses.dataclass(frozen=True)
class SlotPrograms:
    """Compiled for one model, pattern and kind of row; state that goes in is used up, but for `take` and `look`."""

    begin: Callable[[Rows, Array, Array], Rows]
    place: Callable[[Rows, Array, Packed, Array], Rows]
    read: Callable[[Params, Rows, Array, Array, Array, Array, Array], tuple[Rows, Record]]
    steps: Callable[[Params, Rows, Array, Array, Array, Array], tuple[Rows, Record]]
    take: Callable[[Rows, Array, Array, Array], Packed]
    look: Callable[[Rows, Array, Array], StreamingCache]


@functools.cache
def slot_programs(
    graph: nnx.GraphDef, attention: AttentionConfig, form: Form, arrivals: Bytes, most_steps: int
) -> SlotPrograms:
    """The programs of one model and pattern; `most_steps`: that `steps` makes."""
    return SlotPrograms(
        begin=jax.jit(functools.partial(_begin, form, arrivals), donate_argnums=0),
        place=jax.jit(functools.partial(_place, form, arrivals), donate_argnums=0),
        read=jax.jit(functools.partial(_read, graph, attention), donate_argnums=1),
        steps=jax.jit(functools.partial(_steps, graph, attention, most_steps), donate_argnums=1),
        take=jax.jit(functools.partial(_take, form)),
        look=jax.jit(_look),
    )


def _begin(form: Form, arrivals: Bytes, rows: Rows, i: Int32[Array, ""], arrival: UInt8[Array, "_"]) -> Rows:
    """Row i is empty."""
    return _place(form, arrivals, rows, i, form.empty(), arrival)


def _place(
    form: Form, arrivals: Bytes, rows: Rows, i: Int32[Array, ""], saved: Packed, arrival: UInt8[Array, "_"]
) -> Rows:
    """`max_new_tokens` of the row that comes counts from here; a row that goes on has drawn before."""
    state, told = form.unpack(saved), arrivals.tree(arrival)
    first = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(told.seed)  # `row_keys` of one row
    key, count = jnp.where(told.has_seed, first, state.key), jnp.where(told.has_seed, 0, state.count)
    new = told.wishes.max_new_tokens
    wishes = dataclasses.replace(told.wishes, max_new_tokens=jnp.where(new < 0, new, new + count))
    return rows.with_row(i, dataclasses.replace(state, key=key, count=count, done=told.done), wishes)


def _read(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    params: Params,
    rows: Rows,
    which: Int32[Array, "M"],
    tokens: Tokens,
    left: Int32[Array, "M"],
    is_last: Bool[Array, "M"],
    table: Bool[Array, "_"],
) -> tuple[Rows, Record]:
    """Rows take up some of `left` of their tokens[M, T]; after all of them, if they are their last, they draw.

    Where there are fewer than M, the others have numbers of no row.
    """
    model, (row, wishes) = runner(graph, params, scan=True), rows.states(which)
    cache: Any = row.cache
    counts = jnp.minimum(cache.room(tokens.shape[1]), left)
    hidden, cache = cache.take_up(model, tokens, counts, table, attention)
    logits = model.logits(hidden[jnp.arange(len(counts)), jnp.maximum(counts - 1, 0)])
    draws = is_last & (counts == left)
    uses = after_reading(row.uses, tokens, counts)
    state = dataclasses.replace(row, cache=cache.compact(), done=~draws, uses=uses)
    state, drawn = draw(logits, state, wishes.request(table))
    now: Any = state.cache
    record = Record.of(jnp.where(draws, state.token, -1), now.held(), drawn, now.is_stuck(), counts)
    return rows.with_states(which, state), record


def _steps(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    most: int,
    params: Params,
    rows: Rows,
    ended: Bool[Array, "B"],
    first: Int32[Array, "B"],
    count: Int32[Array, ""],
    table: Bool[Array, "_"],
) -> tuple[Rows, Record]:
    """Up to `count` steps, `most` at most; those in which no row takes part are left out.

    `ended`: by the host, since the last. `first`: number of the step from which a row takes part.
    """
    request, B = rows.wishes.request(table), len(ended)

    def one(carry: tuple[jax.Array, DecodeState, Before, Record]) -> tuple[jax.Array, DecodeState, Before, Record]:
        i, state, _, record = carry
        cache: Any = state.cache
        state = dataclasses.replace(state, cache=cache.compact())
        active = ~state.done & (i >= first)
        logits, now = take_up_one(graph, params, state.cache, state.token, table, attention, active)
        new, drawn = draw(logits, dataclasses.replace(state, cache=now, done=~active), request)
        new = dataclasses.replace(new, done=jnp.where(active, new.done, state.done))
        held, stuck = after_compaction(cast_cache(now))
        mine = Record.of(jnp.where(active, new.token, -1), held, drawn, stuck & active, active.astype(jnp.int32))
        record = jax.tree.map(lambda x, y: x.at[i].set(y.astype(x.dtype)), record, mine)
        return jnp.maximum(i + 1, next_of(new)), new, Before.of(state, new.token, active), record

    def next_of(state: DecodeState) -> jax.Array:
        return jnp.min(jnp.where(state.done, count, first))

    state = dataclasses.replace(rows.state, done=rows.state.done | ended)
    top = jnp.zeros((most, B, min(MOST_TOP, len(table))), jnp.int32)
    nothing = Record(jnp.full((most, 5, B), -1, jnp.int32), top, top.astype(jnp.float32))
    before = dataclasses.replace(rows.before, stepped=jnp.zeros(B, bool))
    carry = next_of(state), state, before, nothing
    _, state, before, record = jax.lax.while_loop(lambda carry: carry[0] < count, one, carry)
    return dataclasses.replace(rows, state=state, before=before), record


def cast_cache(cache: Any) -> BoundedCache:
    """The cache of slots is of this kind."""
    return cache


def _copied(rows: Rows, i: Int32[Array, ""], back: Bool[Array, ""]) -> DecodeState:
    row = rows.row(i)
    state = row.before.back(row.state, back)
    return dataclasses.replace(state, cache=cast_cache(state.cache).compact())


def _take(form: Form, rows: Rows, i: Int32[Array, ""], back: Bool[Array, ""], undrawn: Bool[Array, ""]) -> Packed:
    """`undrawn`: without one use of the token that was drawn last (`sepjax.generation.penalties`)."""
    state = _copied(rows, i, back)
    less = jnp.where(undrawn, jnp.uint16(2**16 - 1), jnp.uint16(0))
    return form.pack(dataclasses.replace(state, uses=state.uses.at[0, state.token[0]].add(less)))


def _look(rows: Rows, i: Int32[Array, ""], back: Bool[Array, ""]) -> StreamingCache:
    return bookkeeping(cast_cache(_copied(rows, i, back).cache))
