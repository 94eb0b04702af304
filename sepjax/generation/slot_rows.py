"""What the rows of slots are to the programs: where they stand, what they are told, what the host hears of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float, Int32, UInt8, UInt16, UInt32
from sepjax.config import AttentionConfig
from sepjax.generation.cache.mixed import BoundedCache
from sepjax.generation.cache.rows import chosen
from sepjax.generation.device_loop import DecodeState, Drawn, Request
from sepjax.generation.sampling import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the device must know of each row's request: a `Request` without what all share."""

    sampling: Sampling
    end_tokens: Int32[jax.Array, "B E"]
    max_new_tokens: Int32[jax.Array, "B"]
    logprobs: Bool[jax.Array, "B"]
    top_logprobs: Bool[jax.Array, "B"]
    min_new_tokens: Int32[jax.Array, "B"]

    __no_type_check__ = True

    def request(self, table: Bool[Array, "_"]) -> Request:
        """The rows' `Request`."""
        asks = self.logprobs, self.top_logprobs, self.min_new_tokens
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

    def back(self, state: DecodeState, wanted: Bool[Array, "B"]) -> DecodeState:
        """The state, rows that are `wanted` so as they were before their last step."""
        now: Any = state.cache
        takes_back = jnp.asarray(wanted) & self.stepped
        cache: Any = chosen(takes_back, self.cache, now.bare()).with_entries_of(now)
        rows = jnp.arange(len(state.token))
        use = jnp.where(takes_back, self.use, state.uses[rows, state.token])
        uses = state.uses.at[rows, state.token].set(use, unique_indices=True)

        def pick(then: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.where(takes_back, then, x)

        token, count, key = pick(self.token, state.token), pick(self.count, state.count), pick(self.key, state.key)
        return DecodeState(cache, token, count, state.done & ~takes_back, key, uses)


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

    def some(self, rows: Int32[Array, "M"]) -> "Rows":
        """These rows; numbers of no row give any one's."""
        others = jax.tree.map(lambda x: jnp.take(x, rows, 0, mode="clip"), self._others())
        return others._with_caches(*(cache.whole_rows(rows) for cache in self._caches()))

    def to_read(self, rows: Int32[Array, "M"], attention: AttentionConfig) -> "Rows":
        """The same as `some`, their keys and values, where it can be, as they lie among all."""
        cache: Any = self.state.cache
        bare = dataclasses.replace(self, state=dataclasses.replace(self.state, cache=cache.bare())).some(rows)
        few = cache.where_they_lie(rows, attention)
        return dataclasses.replace(bare, state=dataclasses.replace(bare.state, cache=few))

    def with_states(self, rows: Int32[Array, "M"], state: DecodeState, wishes: Wishes | None = None) -> "Rows":
        """The same with other states (and wishes, if given) of these rows; numbers of no row are none."""
        new = self if wishes is None else dataclasses.replace(self, wishes=_put(self.wishes, rows, wishes))
        return dataclasses.replace(new, state=with_rows(self.state, rows, state))

    def _caches(self) -> tuple[Any, Any]:
        return self.state.cache, self.before.cache

    def _others(self) -> "Rows":
        return self._with_caches(None, None)

    def _with_caches(self, now: Any, before: Any) -> "Rows":
        state = dataclasses.replace(self.state, cache=now)
        return Rows(state, self.wishes, dataclasses.replace(self.before, cache=before))


def rows_of(state: DecodeState, rows: Int32[Array, "M"]) -> DecodeState:
    """These rows of a state; numbers of no row give any one's."""
    cache: Any = state.cache
    found = jax.tree.map(lambda x: jnp.take(x, rows, 0, mode="clip"), dataclasses.replace(state, cache=None))
    return dataclasses.replace(found, cache=cache.whole_rows(rows))


def with_rows(state: DecodeState, rows: Int32[Array, "M"], new: DecodeState) -> DecodeState:
    """The state with others of these rows; numbers of no row are none."""
    cache: Any = state.cache
    found = _put(dataclasses.replace(state, cache=None), rows, dataclasses.replace(new, cache=None))
    return dataclasses.replace(found, cache=cache.with_whole_rows(rows, new.cache))


def _put(tree: Any, rows: Int32[Array, "M"], new: Any) -> Any:
    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[rows].set(y, mode="drop", unique_indices=True)

    return jax.tree.map(put, tree, new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchange:
    """M rows that leave for the pool, and M that begin; where there are fewer, the last have numbers of no row."""

    leaving: Int32[Array, "M"]
    to: Int32[Array, "M"]  # places in the pool; of none, numbers of no place
    back: Bool[Array, "M"]  # as they were before the last step
    undrawn: Bool[Array, "M"]  # as of `take`
    coming: Int32[Array, "M"]
    source: Int32[Array, "M"]  # places in the pool; -1: with an empty cache
    told: UInt8[Array, "M _"]  # `Arrival`

    __no_type_check__ = True

    def sent(self) -> UInt8[np.ndarray, "M _"]:
        """All of it in one array: each one that goes to a device costs its host as much as a small program does."""
        numbers = self.leaving, self.to, self.back, self.undrawn, self.coming, self.source
        table = np.stack([np.asarray(x, np.int32) for x in numbers], axis=1)
        return np.concatenate([table.view(np.uint8), self.told], axis=1)

    @classmethod
    def received(cls, sent: UInt8[Array, "M _"]) -> "Exchange":
        """On the device."""
        table = jax.lax.bitcast_convert_type(sent[:, : 4 * 6].reshape(-1, 6, 4), jnp.int32)
        leaving, to, back, undrawn, coming, source = (table[:, i] for i in range(6))
        return cls(leaving, to, back != 0, undrawn != 0, coming, source, sent[:, 4 * 6 :])


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

    # token, -1: none was drawn (see also `LOST`); entries held; bits of the log-probability; whether the cache is
    # stuck; tokens taken up; entries kept between the sinks and the newest
    numbers: Int32[jax.Array, "*S 6 B"]
    top_tokens: Int32[jax.Array, "*S B E"]
    top_logprobs: Float[jax.Array, "*S B E"]

    __no_type_check__ = True

    @classmethod
    def of(
        cls, token: jax.Array, held: jax.Array, drawn: Drawn, stuck: jax.Array, taken: jax.Array, kept: jax.Array
    ) -> "Record":
        """Puts the numbers together, [B] each."""
        logprob = jax.lax.bitcast_convert_type(drawn.logprob.astype(jnp.float32), jnp.int32)
        numbers = jnp.stack([token, held, logprob, stuck.astype(jnp.int32), taken, kept])
        return cls(numbers, drawn.top_tokens, drawn.top_logprobs)
