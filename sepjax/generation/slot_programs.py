"""What slots do on the device: five programs for all requests, each compiled once.

    place   a row begins: an empty cache or a saved one, and what the request wants
    read    a row takes up its next tokens, up to its next compaction; after the last, its first token is drawn
    step    one token of every row that is generating
    take    a copy of a row, to be kept; as it was before the last step, if the host wants it so
    look    what a row's cache holds, without keys and values; likewise

The host asks for a step before it has seen what the last one drew, and may find that a row had ended with that. So a
step can be taken back. It writes keys and values where nothing lay, and what else it changes is small and kept
(`Before`). Only a compaction could not be undone: it comes at the beginning of the next step, not at the end.

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

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens, UInt16
from sepjax.config import AttentionConfig
from sepjax.generation.cache.ahead import after_compaction
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.mixed import BoundedCache
from sepjax.generation.cache.view import bookkeeping
from sepjax.generation.device_loop import DecodeState, Drawn, Request, draw
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

    def with_row(self, i: Int32[Array, ""], row: "Rows") -> "Rows":
        """The same with another row i."""
        others = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i, axis=0), self._others(), row._others()
        )
        pairs = zip(self._caches(), row._caches(), strict=True)
        return others._with_caches(*(cache.with_row(i, new) for cache, new in pairs))

    def _caches(self) -> tuple[Any, Any]:
        return self.state.cache, self.before.cache

    def _others(self) -> "Rows":
        return self._with_caches(None, None)

    def _with_caches(self, now: Any, before: Any) -> "Rows":
        state = dataclasses.replace(self.state, cache=now)
        return Rows(state, self.wishes, dataclasses.replace(self.before, cache=before))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """For the host: what a step came to in every row, or a read in its own (B is 1)."""

    # token, -1: none was drawn; entries held; bits of the log-probability; whether the cache is stuck; tokens taken up
    numbers: Int32[jax.Array, "5 B"]
    top_tokens: Int32[jax.Array, "B E"]
    top_logprobs: Float[jax.Array, "B E"]

    __no_type_check__ = True

    @classmethod
    def of(cls, token: jax.Array, held: jax.Array, drawn: Drawn, stuck: jax.Array, taken: jax.Array) -> "Record":
        """Puts the numbers together, [B] each."""
        logprob = jax.lax.bitcast_convert_type(drawn.logprob.astype(jnp.float32), jnp.int32)
        numbers = jnp.stack([token, held, logprob, stuck.astype(jnp.int32), taken])
        return cls(numbers, drawn.top_tokens, drawn.top_logprobs)


@dataclasses.dataclass(frozen=True)
class SlotPrograms:
    """Compiled for one model and pattern; state that goes in is used up, but for `take` and `look`."""

    place: Callable[[Rows, Array, Rows], Rows]
    read: Callable[[Params, Rows, Array, Array, Array, Array, Array], tuple[Rows, Record]]
    step: Callable[[Params, Rows, Array, Array], tuple[Rows, Record]]
    take: Callable[[Rows, Array, Array], DecodeState]
    look: Callable[[Rows, Array, Array], StreamingCache]


@functools.cache
def slot_programs(graph: nnx.GraphDef, attention: AttentionConfig) -> SlotPrograms:
    """The programs of one model and pattern."""
    return SlotPrograms(
        place=jax.jit(_place, donate_argnums=0),
        read=jax.jit(functools.partial(_read, graph, attention), donate_argnums=1),
        step=jax.jit(functools.partial(_step, graph, attention), donate_argnums=1),
        take=jax.jit(_take),
        look=jax.jit(_look),
    )


def _place(rows: Rows, i: Int32[Array, ""], row: Rows) -> Rows:
    """`max_new_tokens` of the row that comes counts from here; a row that goes on has drawn before."""
    new = row.wishes.max_new_tokens
    limit = jnp.where(new < 0, new, new + row.state.count)
    return rows.with_row(i, dataclasses.replace(row, wishes=dataclasses.replace(row.wishes, max_new_tokens=limit)))


def _read(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    params: Params,
    rows: Rows,
    i: Int32[Array, ""],
    tokens: Tokens,
    left: Int32[Array, "1"],
    is_last: Bool[Array, ""],
    table: Bool[Array, "_"],
) -> tuple[Rows, Record]:
    """Row i takes up some of `left` tokens of tokens[1, T]; after all of them, if they are its last, it draws."""
    model, row = runner(graph, params, scan=True), rows.row(i)
    cache: Any = row.state.cache
    counts = jnp.minimum(cache.room(tokens.shape[1]), left)
    hidden, cache = cache.take_up(model, tokens, counts, table, attention)
    logits = model.logits(hidden[:, jnp.maximum(counts[0] - 1, 0)])
    draws = is_last & (counts == left)
    uses = after_reading(row.state.uses, tokens, counts)
    state = dataclasses.replace(row.state, cache=cache.compact(), done=~draws, uses=uses)
    state, drawn = draw(logits, state, row.wishes.request(table))
    now: Any = state.cache
    token = jnp.where(draws, state.token, -1)
    record = Record.of(token, now.held(), drawn, now.is_stuck(), counts)
    return rows.with_row(i, dataclasses.replace(row, state=state)), record


def _step(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    params: Params,
    rows: Rows,
    ended: Bool[Array, "B"],
    table: Bool[Array, "_"],
) -> tuple[Rows, Record]:
    """`ended` are rows that the host has ended since."""
    state = dataclasses.replace(rows.state, cache=rows.state.cache.compact(), done=rows.state.done | ended)
    active = ~state.done
    logits, cache = take_up_one(graph, params, state.cache, state.token, table, attention, active)
    new, drawn = draw(logits, dataclasses.replace(state, cache=cache), rows.wishes.request(table))
    now: Any = cache
    held, stuck = after_compaction(now)
    record = Record.of(jnp.where(active, new.token, -1), held, drawn, stuck & active, active.astype(jnp.int32))
    return dataclasses.replace(rows, state=new, before=Before.of(state, new.token, active)), record


def _take(rows: Rows, i: Int32[Array, ""], back: Bool[Array, ""]) -> DecodeState:
    row = rows.row(i)
    state = row.before.back(row.state, back)
    return dataclasses.replace(state, cache=state.cache.compact())


def _look(rows: Rows, i: Int32[Array, ""], back: Bool[Array, ""]) -> StreamingCache:
    cache: Any = _take(rows, i, back).cache
    return bookkeeping(cache)
