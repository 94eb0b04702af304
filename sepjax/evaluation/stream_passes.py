"""Passes over documents that lie in lanes, each lane through a bounded cache: the device's part of `streaming`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Float, Int32
from sepjax.config import AttentionConfig
from sepjax.evaluation.documents import Lanes
from sepjax.evaluation.token_loss import token_nll
from sepjax.generation.cache.mixed import BoundedCache
from sepjax.generation.slot_mesh import kept_there
from sepjax.model.transformer import Transformer
from sepjax.model.unrolled import Layerwise, runner


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where every lane stands."""

    cache: BoundedCache
    at: Int32[jax.Array, "B"]  # in the lane
    start: Int32[jax.Array, "B"]  # of the document, in the lane
    document: Int32[jax.Array, "B"]  # its number in the lane
    nll: Float[jax.Array, "B N"]  # of the lane's tokens so far, in nats

    __no_type_check__ = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What some passes add up to."""

    held: Float[jax.Array, ""]  # entries that tokens met, summed over tokens
    most: Int32[jax.Array, ""]
    kept: Float[jax.Array, ""]  # entries over tokens seen, summed over the documents that ended
    ended: Int32[jax.Array, ""]  # documents
    stuck: Int32[jax.Array, ""]  # rows that have lost a separator though none was to be lost, summed over passes

    __no_type_check__ = True

    @classmethod
    def zeros(cls) -> "Sums":
        """Of no passes."""
        zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
        return cls(zero, none, zero, none, none)


def passes(
    graph: Any,
    attention: AttentionConfig,
    chunk: int,
    params: Any,
    state: State,
    lanes: Lanes,
    table: jax.Array,
    limit: jax.Array,
    *,
    scan: bool = False,
) -> tuple[State, Sums]:
    """Up to `limit` passes, fewer when all lanes are through. `scan`: see `Layerwise`; `table`: or flags of `lanes`."""
    model = runner(graph, params, scan=scan)

    def body(carry: tuple[jax.Array, State, Sums]) -> tuple[jax.Array, State, Sums]:
        i, state, sums = carry
        return i + 1, *_one_pass(model, attention, chunk, state, sums, lanes, table)

    def goes_on(carry: tuple[jax.Array, State, Sums]) -> jax.Array:
        return (carry[0] < limit) & jnp.any(carry[1].at < lanes.ends[:, -1])

    _, state, sums = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, Sums.zeros()))
    return kept_there(state), sums


def _one_pass(
    model: Transformer | Layerwise,
    attention: AttentionConfig,
    chunk: int,
    state: State,
    sums: Sums,
    lanes: Lanes,
    table: jax.Array,
) -> tuple[State, Sums]:
    """Takes every lane to its next compaction, the end of its document or `chunk` tokens on."""
    rows = jnp.arange(len(state.at))
    end = lanes.ends[rows, state.document]
    counts = jnp.minimum(state.cache.room(chunk), end - state.at)
    i = jnp.arange(chunk, dtype=jnp.int32)
    index = jnp.minimum(state.at[:, None] + i, lanes.inputs.shape[1] - 1)
    tokens, targets = (jnp.take_along_axis(x, index, axis=1) for x in (lanes.inputs, lanes.targets))
    if table.ndim > 1:  # what is flagged, token by token
        table = jnp.take_along_axis(table, index, axis=1)
    held = state.cache.held_before(chunk)
    hidden, cache = state.cache.take_up(model, tokens, counts, table, attention)
    scored = i < counts[:, None]
    place = jnp.where(scored, index, lanes.inputs.shape[1])  # beyond the end: dropped
    losses = token_nll(hidden, model.output_embedding(), targets, model.config)
    nll = state.nll.at[rows[:, None], place].set(losses, mode="drop")
    cache = cache.compact()
    at = state.at + counts
    ended = (at == end) & (counts > 0)
    kept = jnp.where(ended, cache.held() / jnp.maximum(at - state.start, 1), 0.0)
    sums = Sums(
        held=sums.held + jnp.sum(jnp.where(scored, held, 0), dtype=jnp.float32),
        most=jnp.maximum(sums.most, jnp.max(jnp.where(scored, held, 0)).astype(jnp.int32)),
        kept=sums.kept + jnp.sum(kept),
        ended=sums.ended + jnp.sum(ended),
        stuck=sums.stuck + jnp.sum(cache.is_stuck(), dtype=jnp.int32),
    )
    last = lanes.ends.shape[1] - 1
    document = jnp.where(ended, jnp.minimum(state.document + 1, last), state.document)
    return State(cache.reset(ended), at, jnp.where(ended, at, state.start), document, nll), sums
