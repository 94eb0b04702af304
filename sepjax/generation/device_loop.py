"""The loop over decode steps on the device: what to do, where every row stands, and what happened."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.config import AttentionConfig
from sepjax.generation.cache.growing_pass import decode_step, prefill, stream_step
from sepjax.model.transformer import Params
from sepjax.model.unrolled import runner
from sepjax.sampling import Sampling, sample
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.bounded_pass import stream_pass

COUNT_WRAP = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted of every row. All are arrays: other values are no other program."""

    table: Bool[jax.Array, "_"]  # separators among the tokenizer's ids; ids that it does not reach are never drawn
    sampling: Sampling
    end_tokens: Int32[jax.Array, "E"]  # the row ends after any of them; filled up with -1, which is no token
    max_new_tokens: Int32[jax.Array, ""]  # the row ends after so many; -1: never

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where every row stands between two steps."""

    cache: SeparatorCache | StreamingCache  # of all tokens but the last drawn
    token: Int32[jax.Array, "B"]  # drawn last
    count: Int32[jax.Array, "B"]  # tokens drawn; see `_draw` for streams that outlast the counter
    done: Bool[jax.Array, "B"]  # ended; the row and its cache change no more
    key: jax.Array  # typed PRNG keys, [B]; the draw number `count` uses fold_in(key, count)

    __no_type_check__ = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """A record of M steps, one column a step, for the host."""

    token: Int32[jax.Array, "B M"]  # drawn; -1 where the row had ended or no step was made
    held: Int32[jax.Array, "B M"]  # tokens in the row's cache at that step
    is_full: Bool[jax.Array, ""]  # the steps stopped because the cache has no room for another separator

    __no_type_check__ = True


@functools.partial(jax.jit, static_argnames=("graph", "attention", "window_size", "capacity"))
def start(
    graph: nnx.GraphDef,
    params: Params,
    tokens: Tokens,
    lengths: Int32[Array, "B"],
    keys: jax.Array,
    request: Request,
    attention: AttentionConfig,
    *,
    window_size: int,
    capacity: int,
) -> tuple[DecodeState, Steps]:
    """Prefills prompts (see `prefill`) and draws the first token of every row with its key of `keys`."""
    logits, cache = prefill(
        graph, params, tokens, lengths, request.table, attention, window_size=window_size, capacity=capacity
    )
    zeros = jnp.zeros_like(lengths)
    state = _draw(logits, DecodeState(cache, zeros, zeros, zeros > 0, keys), request)
    return state, Steps(state.token[:, None], cache.held()[:, None], _is_full(state))


@functools.cache
def make_advance(
    graph: nnx.GraphDef, attention: AttentionConfig, num_steps: int
) -> Callable[[Params, DecodeState, Array, Request], tuple[DecodeState, Steps]]:
    """`advance` compiled for one model and pattern, its state donated: the arrays of the argument are used up.

    Fetched once a job: to hash a graph for every call takes longer than a step of a small model.
    """
    return jax.jit(functools.partial(advance, graph, attention, num_steps), donate_argnums=1)


def advance(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    num_steps: int,
    params: Params,
    state: DecodeState,
    ended: Bool[Array, "B"],
    request: Request,
) -> tuple[DecodeState, Steps]:
    """Decodes and draws up to `num_steps` tokens a row; fewer when all rows have ended or the cache must grow.

    `ended` are rows that the host has ended since.
    """

    def body(carry: tuple[jax.Array, DecodeState, Steps]) -> tuple[jax.Array, DecodeState, Steps]:
        i, state, steps = carry
        active = ~state.done
        inputs = state.token, request.table, attention, active
        if isinstance(state.cache, StreamingCache):
            logits, cache = stream_step(graph, params, state.cache, *inputs)
        else:
            logits, cache = decode_step(graph, params, state.cache, *inputs)
        state = _draw(logits, dataclasses.replace(state, cache=cache), request)
        steps = Steps(
            token=steps.token.at[:, i].set(jnp.where(active, state.token, -1)),
            held=steps.held.at[:, i].set(cache.held()),
            is_full=_is_full(state),
        )
        return i + 1, state, steps

    def goes_on(carry: tuple[jax.Array, DecodeState, Steps]) -> jax.Array:
        i, state, steps = carry
        return (i < num_steps) & ~jnp.all(state.done) & ~steps.is_full

    state = dataclasses.replace(state, done=state.done | ended)
    none = jnp.full((len(ended), num_steps), -1, jnp.int32)
    carry = (jnp.int32(0), state, Steps(none, none, _is_full(state)))
    _, state, steps = jax.lax.while_loop(goes_on, body, carry)
    return state, steps


@functools.cache
def make_consume(
    graph: nnx.GraphDef, attention: AttentionConfig
) -> Callable[..., tuple[StreamingCache, jax.Array, jax.Array]]:
    """`consume` compiled for one model and pattern, its cache donated."""
    return jax.jit(functools.partial(consume, graph, attention), donate_argnums=1)


def consume(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    params: Params,
    cache: StreamingCache,
    logits: Float[Array, "B V"],
    tokens: Tokens,
    left: Int32[Array, "B"],
    table: Bool[Array, "_"],
) -> tuple[StreamingCache, Float[jax.Array, "B V"], Int32[jax.Array, "B"]]:
    """Takes up some of the next tokens of every row: to its next compaction, at most T.

    Args:
      graph: from `sepjax.model.transformer.split`, with `params`.
      attention: the pattern.
      params: the parameters.
      cache: no row of it is due.
      logits: of each row's last token so far.
      tokens: int32[B, T], the next ones.
      left: how many of them there are, 0 to T.
      table: separators among the tokenizer's ids.

    Returns:
      The cache, the scores after each row's last token now, and how many it took up.
    """
    model = runner(graph, params, scan=True)
    counts = jnp.minimum(cache.room(tokens.shape[1]), left)
    hidden, cache = stream_pass(model, cache, tokens, counts, table, attention)
    last = hidden[jnp.arange(len(left)), jnp.maximum(counts - 1, 0)]
    return cache.compact(), jnp.where(counts[:, None] > 0, model.logits(last), logits), counts


@jax.jit
def begin(
    cache: StreamingCache,
    logits: Float[jax.Array, "B V"],
    count: Int32[jax.Array, "B"],
    key: jax.Array,
    request: Request,
) -> tuple[DecodeState, Steps]:
    """The state, and its record, after drawing every row's next token from the scores of a text taken up before."""
    zeros = jnp.zeros_like(count)
    state = _draw(logits, DecodeState(cache.by_layer(), zeros, count, zeros > 0, key), request)
    return state, Steps(state.token[:, None], cache.held()[:, None], _is_full(state))


def _draw(logits: jax.Array, state: DecodeState, request: Request) -> DecodeState:
    """Draws the next token of every row that has not ended.

    A row without end may draw more often than int32 counts: at 2^30 the count starts again, with another key.
    """
    keys = jax.vmap(jax.random.fold_in)(state.key, state.count)
    drawn = sample(logits[:, : len(request.table)], keys, request.sampling)
    count = state.count + ~state.done
    is_end = jnp.any(drawn[:, None] == request.end_tokens, axis=-1)
    ends = is_end | ((count >= request.max_new_tokens) & (request.max_new_tokens >= 0))
    wraps = count >= COUNT_WRAP
    other = jax.vmap(jax.random.fold_in)(state.key, jnp.full_like(count, COUNT_WRAP))
    return dataclasses.replace(
        state,
        token=jnp.where(state.done, state.token, drawn),
        count=jnp.where(wraps, 0, count),
        done=state.done | ends,
        key=jnp.where(wraps, other, state.key),
    )


def _is_full(state: DecodeState) -> jax.Array:
    cache = state.cache
    if isinstance(cache, SeparatorCache):
        return jnp.any(cache.is_full() & ~state.done)
    return jnp.any((cache.dropped > 0) & ~state.done) & (not cache.sizes.drops_separators)
