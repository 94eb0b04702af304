"""What slots do on the device: five programs for all requests, each compiled once.

    place   a row begins: an empty cache or a saved one, and what the request wants
    read    a row takes up its next tokens, up to its next compaction; after the last, its first token is drawn
    step    one token of every row that is generating
    take    a copy of a row, to be kept
    look    what a row's cache holds, without keys and values

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

from sepjax.array_typing import Array, Bool, Int32, Tokens, UInt16
from sepjax.config import AttentionConfig
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.view import bookkeeping
from sepjax.generation.device_loop import DecodeState, Drawn, Request, Steps, advance, draw
from sepjax.generation.penalties import after_reading
from sepjax.generation.sampling import Sampling
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
class Rows:
    """Where all rows stand: of n rows, or of the one that comes or goes."""

    cache: StreamingCache
    token: Int32[jax.Array, "B"]
    count: Int32[jax.Array, "B"]
    done: Bool[jax.Array, "B"]
    key: jax.Array  # typed PRNG keys, [B]
    uses: UInt16[jax.Array, "B V"]
    wishes: Wishes

    __no_type_check__ = True

    @property
    def state(self) -> DecodeState:
        """As the loop has it."""
        return DecodeState(self.cache, self.token, self.count, self.done, self.key, self.uses)

    def at(self, state: DecodeState) -> "Rows":
        """The same requests, standing there."""
        cache: Any = state.cache
        return Rows(cache, state.token, state.count, state.done, state.key, state.uses, self.wishes)

    def row(self, i: Int32[Array, ""]) -> "Rows":
        """Row i alone."""
        others = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), self._others())
        return Rows(self.cache.row(i), *others)

    def with_row(self, i: Int32[Array, ""], row: "Rows") -> "Rows":
        """The same with another row i."""
        others = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i, axis=0), self._others(), row._others()
        )
        return Rows(self.cache.with_row(i, row.cache), *others)

    def _others(self) -> tuple[Any, ...]:
        return self.token, self.count, self.done, self.key, self.uses, self.wishes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
    """What reading came to, for the host."""

    taken: Int32[jax.Array, ""]  # tokens that the row took up
    token: Int32[jax.Array, ""]  # drawn after the last; means nothing before
    drawn: Drawn  # of this one row
    held: Int32[jax.Array, ""]
    is_stuck: Bool[jax.Array, ""]

    __no_type_check__ = True


@dataclasses.dataclass(frozen=True)
class SlotPrograms:
    """Compiled for one model and pattern; state that goes in is used up, but for `take`."""

    place: Callable[[Rows, Array, Rows], Rows]
    read: Callable[[Params, Rows, Array, Array, Array, Array, Array], tuple[Rows, Read]]
    step: Callable[[Params, Rows, Array, Array], tuple[Rows, Steps]]
    take: Callable[[Rows, Array], Rows]
    look: Callable[[Rows, Array], StreamingCache]


@functools.cache
def slot_programs(graph: nnx.GraphDef, attention: AttentionConfig) -> SlotPrograms:
    """The programs of one model and pattern."""
    return SlotPrograms(
        place=jax.jit(Rows.with_row, donate_argnums=0),
        read=jax.jit(functools.partial(_read, graph, attention), donate_argnums=1),
        step=jax.jit(functools.partial(_step, graph, attention), donate_argnums=1),
        take=jax.jit(Rows.row),
        look=jax.jit(lambda rows, i: bookkeeping(rows.cache).row(i)),
    )


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
) -> tuple[Rows, Read]:
    """Row i takes up some of `left` tokens of tokens[1, T]; after all of them, if they are its last, it draws."""
    model, row = runner(graph, params, scan=True), rows.row(i)
    counts = jnp.minimum(row.cache.room(tokens.shape[1]), left)
    hidden, cache = row.cache.take_up(model, tokens, counts, table, attention)
    logits = model.logits(hidden[:, jnp.maximum(counts[0] - 1, 0)])
    draws = is_last & (counts == left)
    uses = after_reading(row.uses, tokens, counts)
    state = dataclasses.replace(row.state, cache=cache.compact(), done=~draws, uses=uses)
    state, drawn = draw(logits, state, row.wishes.request(table))
    stuck = state.cache.is_stuck()
    return rows.with_row(i, row.at(state)), Read(counts[0], state.token[0], drawn, state.cache.held()[0], stuck[0])


def _step(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    params: Params,
    rows: Rows,
    ended: Bool[Array, "B"],
    table: Bool[Array, "_"],
) -> tuple[Rows, Steps]:
    state, steps = advance(graph, attention, 1, params, rows.state, ended, rows.wishes.request(table))
    return rows.at(state), steps
