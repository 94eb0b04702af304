"""What slots do on the device: a few programs for all requests, each compiled once.

Every program costs its host and its device a while, whatever it does, so what several rows need is done in one. The
pool holds rows that have ended and may go on.

    exchange  some rows leave for the pool, then some begin: with an empty cache or one of the pool; what they want
    place   a row begins with one that is saved elsewhere
    fetch   a copy of a row of the pool
    read    a few rows take up their next tokens, up to their next compaction; after the last, a first token is drawn
    steps   some tokens of every row that is generating
    take    a copy of a row, to be kept; as it was before the last step, if the host wants it so
    look    what a row's cache holds, without keys and values; likewise

The host asks for steps before it has seen what the last ones drew, and may find that a row had ended with those. So a
step can be taken back. It writes keys and values where nothing lay, and what else it changes is small and kept
(`sepjax.generation.slot_rows.Before`). Only a compaction could not be undone: it comes at the beginning of the next
step, not at the end. Of several steps only the last can be taken back: rows whose ends the host finds make no other one
than that. (The last, not the first: a row that has made its step may be full, and has no room for what later steps
write into idle rows.)

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

from sepjax.array_typing import Array, Bool, Int32, UInt8
from sepjax.config import AttentionConfig
from sepjax.generation.cache.ahead import after_compaction, kept_of
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.mixed import BoundedCache
from sepjax.generation.cache.rows import chosen
from sepjax.generation.cache.view import bookkeeping
from sepjax.generation.device_loop import MOST_TOP, DecodeState, draw
from sepjax.generation.graphs import compiler_options
from sepjax.generation.packed import Bytes, Form, Packed
from sepjax.generation.penalties import after_reading
from sepjax.generation.slot_mesh import kept_there
from sepjax.generation.slot_rows import Arrival, Before, Exchange, Record, Rows, Wishes, rows_of, with_rows
from sepjax.generation.step import take_up_one, take_up_run
from sepjax.model.transformer import Params


@dataclasses.dataclass(frozen=True)
class SlotPrograms:
    """Compiled for one model, pattern and kind of row; what goes in is used up, but for `take`, `fetch`, `look`."""

    exchange: Callable[[Rows, DecodeState, Array], tuple[Rows, DecodeState]]
    fetch: Callable[[DecodeState, Array], Packed]
    place: Callable[[Rows, Array, Packed, Array], Rows]
    read: Callable[[Params, Rows, Array, Array, int], tuple[Rows, Record]]
    steps: Callable[[Params, Rows, Array, Array], tuple[Rows, Record]]
    take: Callable[[Rows, Array, Array, Array], Packed]
    look: Callable[[Rows, Array, Array], StreamingCache]


@functools.cache
def slot_programs(
    graph: nnx.GraphDef, attention: AttentionConfig, form: Form, arrivals: Bytes, most_steps: int
) -> SlotPrograms:
    """The programs of one model and pattern; `most_steps`: that `steps` makes."""
    options = compiler_options()
    return SlotPrograms(
        exchange=jax.jit(functools.partial(_exchange, arrivals), donate_argnums=(0, 1), compiler_options=options),
        fetch=jax.jit(functools.partial(_fetch, form)),
        place=jax.jit(functools.partial(_place, form, arrivals), donate_argnums=0),
        read=jax.jit(
            functools.partial(_read, graph, attention), donate_argnums=1, static_argnums=4, compiler_options=options
        ),
        steps=jax.jit(
            functools.partial(_steps, graph, attention, most_steps), donate_argnums=1, compiler_options=options
        ),
        take=jax.jit(functools.partial(_take, form)),
        look=jax.jit(_look),
    )


def _exchange(
    arrivals: Bytes, rows: Rows, pool: DecodeState, sent: UInt8[Array, "M _"]
) -> tuple[Rows, DecodeState]:  # fmt: skip
    """First some leave, then others come: into the rows of those, or from where those are now.

    `sent`: an `Exchange`.
    """
    which = Exchange.received(sent)
    pool = with_rows(pool, which.to, _leaving(rows.some(which.leaving), which.back, which.undrawn))
    is_empty = which.source < 0
    source = rows_of(pool, jnp.maximum(which.source, 0))
    data = dataclasses.replace(source, key=jax.random.key_data(source.key))
    cache: Any = data.cache
    nothing = jax.tree.map(jnp.zeros_like, cache)
    state = jax.tree.map(
        lambda x: jnp.where(is_empty.reshape(-1, *(1 for _ in x.shape[1:])), jnp.zeros_like(x), x),
        dataclasses.replace(data, cache=None),
    )
    state = dataclasses.replace(state, cache=chosen(is_empty, nothing, cache), key=jax.random.wrap_key_data(state.key))
    told = jax.tree.map(lambda x: x[:, 0], jax.vmap(arrivals.tree)(which.told))
    return kept_there((rows.with_states(which.coming, *_begun(state, told)), pool))


def _fetch(form: Form, pool: DecodeState, place: Int32[Array, ""]) -> Packed:
    return form.pack(rows_of(pool, place[None]))


def _place(
    form: Form, arrivals: Bytes, rows: Rows, i: Int32[Array, ""], saved: Packed, arrival: UInt8[Array, "_"]
) -> Rows:
    """What `max_new_tokens` and the like count of the row begins here; a row that goes on has drawn before."""
    return kept_there(rows.with_row(i, *_begun(form.unpack(saved), arrivals.tree(arrival))))


def _begun(state: DecodeState, told: Arrival) -> tuple[DecodeState, Wishes]:
    """Rows that begin with what was saved, as they are told."""
    first = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(told.seed)  # `row_keys` of one row
    key, count = jnp.where(told.has_seed, first, state.key), jnp.where(told.has_seed, 0, state.count)
    most, least = told.wishes.max_new_tokens, told.wishes.min_new_tokens
    most, least = jnp.where(most < 0, most, most + count), jnp.where(least > 0, least + count, 0)
    wishes = dataclasses.replace(told.wishes, max_new_tokens=most, min_new_tokens=least)
    return dataclasses.replace(state, key=key, count=count, done=told.done), wishes


def _read(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    params: Params,
    rows: Rows,
    sent: Int32[Array, "M _"],
    table: Bool[Array, "_"],
    most: int,
) -> tuple[Rows, Record]:
    """Rows take up some of `left` of their tokens[M, T], `most` in all; after all, if they are their last, they draw.

    `sent` has, for each, its number, `left`, whether they are its last, how many tokens it must have seen (`Read`), and
    the tokens. Where there are fewer than M, the others have numbers of no row.
    """
    which, left, is_last, after, tokens = sent[:, 0], sent[:, 1], sent[:, 2] != 0, sent[:, 3], sent[:, 4:]
    few = rows.to_read(which, attention)
    row, wishes = few.state, few.wishes
    cache: Any = row.cache
    fits = (after < 0) | (cache.main.seen_low == after)
    left, scan = jnp.where(fits, left, 0), not cache.is_in_place
    logits, cache, counts = take_up_run(graph, params, cache, tokens, left, table, attention, scan=scan, most=most)
    draws = is_last & fits & (counts == left)
    uses = after_reading(row.uses, tokens, counts)
    state = dataclasses.replace(row, cache=cache.compact(), done=~draws, uses=uses)
    state, drawn = draw(logits, state, wishes.request(table))
    now: Any = state.cache
    record = Record.of(jnp.where(draws, drawn.token, -1), now.held(), drawn, now.is_stuck(), counts, kept_of(now))
    return kept_there(rows.with_states(which, state)), record


def _steps(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    most: int,
    params: Params,
    rows: Rows,
    sent: Int32[Array, "_"],
    table: Bool[Array, "_"],
) -> tuple[Rows, Record]:
    """Up to `count` steps, `most` at most; those in which no row takes part are left out.

    `sent` has, for each row, the number of the step from which it takes part, -1 if the host has ended it since the
    last; and behind them `count`.
    """
    ended, first, count = sent[:-1] < 0, sent[:-1], sent[-1]
    request, B = rows.wishes.request(table), len(ended)

    def one(carry: tuple[jax.Array, DecodeState, Before, Record]) -> tuple[jax.Array, DecodeState, Before, Record]:
        i, state, _, record = carry
        cache: Any = state.cache
        state = dataclasses.replace(state, cache=cache.compact())
        active = ~state.done & (i >= first)
        logits, now = take_up_one(graph, params, state.cache, state.token, table, attention, active)
        new, drawn = draw(logits, dataclasses.replace(state, cache=now, done=~active), request)
        new = dataclasses.replace(new, done=jnp.where(active, new.done, state.done))
        held, stuck, kept = after_compaction(cast_cache(now))
        mine = Record.of(
            jnp.where(active, drawn.token, -1), held, drawn, stuck & active, active.astype(jnp.int32), kept
        )
        record = jax.tree.map(lambda x, y: x.at[i].set(y.astype(x.dtype)), record, mine)
        return jnp.maximum(i + 1, next_of(new)), new, Before.of(state, new.token, active), record

    def next_of(state: DecodeState) -> jax.Array:
        return jnp.min(jnp.where(state.done, count, first))

    state = dataclasses.replace(rows.state, done=rows.state.done | ended)
    top = jnp.zeros((most, B, min(MOST_TOP, len(table))), jnp.int32)
    nothing = Record(jnp.full((most, 6, B), -1, jnp.int32), top, top.astype(jnp.float32))
    before = dataclasses.replace(rows.before, stepped=jnp.zeros(B, bool))
    carry = next_of(state), state, before, nothing
    _, state, before, record = jax.lax.while_loop(lambda carry: carry[0] < count, one, carry)
    return kept_there(dataclasses.replace(rows, state=state, before=before)), record


def cast_cache(cache: Any) -> BoundedCache:
    """The cache of slots is of this kind."""
    return cache


def _leaving(rows: Rows, back: Bool[Array, "B"], undrawn: Bool[Array, "B"]) -> DecodeState:
    """`back`: as they were before the last step; `undrawn`: as of `_take`."""
    state = rows.before.back(rows.state, back)
    less = jnp.where(undrawn, jnp.uint16(2**16 - 1), jnp.uint16(0))
    uses = state.uses.at[jnp.arange(len(less)), state.token].add(less, unique_indices=True)
    return dataclasses.replace(state, cache=cast_cache(state.cache).compact(), uses=uses)


def _take(form: Form, rows: Rows, i: Int32[Array, ""], back: Bool[Array, ""], undrawn: Bool[Array, ""]) -> Packed:
    """`undrawn`: without one use of the token that was drawn last (`sepjax.generation.penalties`)."""
    return form.pack(_leaving(rows.row(i), back[None], undrawn[None]))


def _look(rows: Rows, i: Int32[Array, ""], back: Bool[Array, ""]) -> StreamingCache:
    return bookkeeping(cast_cache(_leaving(rows.row(i), back[None], jnp.zeros(1, bool)).cache))
