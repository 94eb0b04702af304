"""The loop over decode steps on the device: what to do, where every row stands, and what happened.

And how programs, of the loop and of what comes before it, are compiled: side by side, before the first of them runs.
"""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sepjax import interrupt
from sepjax.array_typing import Array, Bool, Float, InShapes, Int32, Tokens, UInt16
from sepjax.config import AttentionConfig
from sepjax.generation.cache.one_row_numbers import numbers_of_one_row
from sepjax.generation.cache.protocol import Cache
from sepjax.generation.graphs import compiler_options
from sepjax.generation.lost import LOST, is_lost
from sepjax.generation.one_row_steps import MOST_ENDS, RowSteps
from sepjax.generation.penalties import after_drawing, after_reading, biased, no_uses, penalised, without
from sepjax.generation.sampling import Sampling, best_of, sample
from sepjax.generation.step import decode_step, prefill, take_up_run
from sepjax.model.transformer import Params
from sepjax.model.unrolled import runner
from sepjax.sharding import whole

log = logging.getLogger("sepjax.slots")

COUNT_WRAP = 2**30
MOST_TOP = 20  # tokens whose log-probabilities a request may ask for at each step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted, of all rows alike or of each. All are arrays: other values are no other program."""

    table: Bool[jax.Array, "_"]  # separators among the tokenizer's ids; ids that it does not reach are never drawn
    sampling: Sampling
    end_tokens: Int32[jax.Array, "*B E"]  # the row ends after any of them; filled up with -1, which is no token
    max_new_tokens: Int32[jax.Array, "*B"]  # the row ends after so many; -1: never
    logprobs: Bool[jax.Array, "*B"] | bool = False  # whether anyone asks how probable the tokens were
    top_logprobs: Bool[jax.Array, "*B"] | bool = False  # whether anyone asks for the most probable ones
    min_new_tokens: Int32[jax.Array, "*B"] | int = 0  # no end token is drawn before so many

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class DecodeState(InShapes):
    """Where every row stands between two steps."""

    cache: Cache  # of all tokens but the last drawn
    token: Int32[jax.Array, "B"]  # drawn last
    count: Int32[jax.Array, "B"]  # tokens drawn; see `_draw` for streams that outlast the counter
    done: Bool[jax.Array, "B"]  # ended; the row and its cache change no more
    key: jax.Array  # typed PRNG keys, [B]; the draw number `count` uses fold_in(key, count)
    uses: UInt16[jax.Array, "B V"]  # of every token in the text so far (`sepjax.generation.penalties`)

    __no_type_check__ = True

    @classmethod
    def create(cls, cache: Cache, keys: jax.Array, vocab_size: int) -> "DecodeState":
        """Before anything was read or drawn, a row a key."""
        rows = len(keys)
        token, count = (jnp.zeros(rows, jnp.int32) for _ in range(2))
        return cls(cache, token, count, jnp.zeros(rows, bool), keys, no_uses(rows, vocab_size))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Steps(InShapes):
    """A record of M steps, one column a step, for the host."""

    token: Int32[jax.Array, "B M"]  # drawn; -1 where the row had ended or no step was made; see also `LOST`
    held: Int32[jax.Array, "B M"]  # tokens in the row's cache at that step
    logprob: Float[jax.Array, "B M"]  # of the token, before temperature and the like; 0 where nobody asks
    top_tokens: Int32[jax.Array, "B M E"]  # the most probable ones; 0 where nobody asks
    top_logprobs: Float[jax.Array, "B M E"]  # of these
    is_stuck: Bool[jax.Array, "B"]  # the steps stopped because the row's cache has no room for another separator

    __no_type_check__ = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one draw came to, and how probable it was by the model's scores, before bias, penalties and all."""

    token: Int32[jax.Array, "B"]  # `LOST` where the scores are no numbers; of rows that had ended it means nothing
    logprob: Float[jax.Array, "B"]
    top_tokens: Int32[jax.Array, "B E"]
    top_logprobs: Float[jax.Array, "B E"]

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
    state = DecodeState.create(cache, keys, len(request.table))
    return _first(dataclasses.replace(state, uses=after_reading(state.uses, tokens, lengths)), logits, request)


def _first(state: DecodeState, logits: jax.Array, request: Request) -> tuple[DecodeState, Steps]:
    state, drawn = draw(logits, state, request)
    record = drawn.token, state.cache.held(), drawn.logprob, drawn.top_tokens, drawn.top_logprobs
    return state, Steps(*(x[:, None] for x in record), is_stuck=_is_stuck(state))


@functools.cache
def make_advance(
    graph: nnx.GraphDef, attention: AttentionConfig, num_steps: int
) -> Callable[..., tuple[DecodeState, Steps]]:
    """`advance` compiled for one model and pattern, its state donated: the arrays of the argument are used up.

    Fetched once a job: to hash a graph for every call takes longer than a step of a small model.
    """
    program = functools.partial(advance, graph, attention, num_steps)
    return jax.jit(program, donate_argnums=1, compiler_options=compiler_options())


def advance(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    num_steps: int,
    params: Params,
    state: DecodeState,
    ended: Bool[Array, "B"],
    request: Request,
    first: Int32[Array, ""] | int = 0,
) -> tuple[DecodeState, Steps]:
    """Decodes and draws up to `num_steps` tokens a row; fewer when all rows have ended or the cache must grow.

    `ended` are rows that the host has ended since. Steps are counted from `first` on, and so are their columns of the
    record: `num_steps - first` of them at most, by one program for any number.
    """

    def body(carry: tuple[jax.Array, DecodeState, Steps]) -> tuple[jax.Array, DecodeState, Steps]:
        i, state, steps = carry
        active = ~state.done
        logits, cache = decode_step(graph, params, state.cache, state.token, request.table, attention, active)
        state, drawn = draw(logits, dataclasses.replace(state, cache=cache), request)
        steps = Steps(
            token=steps.token.at[:, i].set(jnp.where(active, drawn.token, -1)),
            held=steps.held.at[:, i].set(cache.held()),
            logprob=steps.logprob.at[:, i].set(drawn.logprob),
            top_tokens=steps.top_tokens.at[:, i].set(drawn.top_tokens),
            top_logprobs=steps.top_logprobs.at[:, i].set(drawn.top_logprobs),
            is_stuck=_is_stuck(state),
        )
        return i + 1, state, steps

    def goes_on(carry: tuple[jax.Array, DecodeState, Steps]) -> jax.Array:
        i, state, steps = carry
        return (i < num_steps) & ~jnp.all(state.done) & ~jnp.any(steps.is_stuck)

    state = dataclasses.replace(state, done=state.done | ended)
    none = jnp.full((len(ended), num_steps), -1, jnp.int32)
    top = jnp.zeros((*none.shape, min(MOST_TOP, len(request.table))), jnp.int32)
    record = Steps(none, none, jnp.zeros(none.shape), top, top.astype(jnp.float32), _is_stuck(state))
    carry = jnp.asarray(first, jnp.int32), state, record
    alone = _steps_of_one_row(graph, attention, params, state, request, num_steps)
    _, state, steps = _looped(goes_on, body, carry, alone)
    return dataclasses.replace(state, uses=whole(state.uses)), steps


type _Carry = tuple[jax.Array, DecodeState, Steps]


def _looped(
    goes_on: Callable[[_Carry], jax.Array], body: Callable[[_Carry], _Carry], carry: _Carry, alone: RowSteps | None
) -> _Carry:
    """`jax.lax.while_loop(goes_on, body, carry)`, of which `alone` makes the steps that it serves."""
    if alone is None:
        return jax.lax.while_loop(goes_on, body, carry)

    def turn(carry: _Carry) -> _Carry:
        i, state, steps = carry
        i, state, tokens, held = alone.run(jnp.where(goes_on(carry), i, alone.most), state, steps.token, steps.held)
        carry = i, state, dataclasses.replace(steps, token=tokens, held=held, is_stuck=_is_stuck(state))
        return jax.lax.while_loop(lambda x: goes_on(x) & ~alone.serves(*x[:2]), body, carry)

    return turn(carry) if alone.most == 1 else jax.lax.while_loop(goes_on, turn, carry)


def _steps_of_one_row(
    graph: nnx.GraphDef, attention: AttentionConfig, params: Params, state: DecodeState, request: Request, most: int
) -> RowSteps | None:
    row = numbers_of_one_row(runner(graph, params), state.cache, attention)
    if row is None or jnp.shape(request.end_tokens)[-1] > MOST_ENDS:
        return None
    return RowSteps(row, request, most, COUNT_WRAP)


@functools.cache
def make_consume(graph: nnx.GraphDef, attention: AttentionConfig) -> Callable[..., tuple[Cache, jax.Array, jax.Array]]:
    """`consume` compiled for one model and pattern, its cache donated."""
    program = functools.partial(consume, graph, attention)
    return jax.jit(program, donate_argnums=1, compiler_options=compiler_options())


def consume(
    graph: nnx.GraphDef,
    attention: AttentionConfig,
    params: Params,
    cache: Cache,
    logits: Float[Array, "B V"],
    tokens: Tokens,
    left: Int32[Array, "B"],
    table: Bool[Array, "_"],
    *,
    scan: bool = True,
) -> tuple[Cache, Float[jax.Array, "B V"], Int32[jax.Array, "B"]]:
    """Takes up some of the next tokens of every row: to its next compaction, at most T.

    Args:
      graph: from `sepjax.model.transformer.split`.
      attention: the pattern.
      params: those of `sepjax.model.unrolled.by_layer`, or the model's own.
      cache: no row of it is due.
      logits: of each row's last token so far.
      tokens: int32[B, T], the next ones.
      left: how many of them there are, 0 to T.
      table: separators among the tokenizer's ids.
      scan: see `take_up_run`.

    Returns:
      The cache, the scores after each row's last token now, and how many it took up.
    """
    found, cache, counts = take_up_run(graph, params, cache, tokens, left, table, attention, scan=scan)
    return cache.compact(), whole(jnp.where(counts[:, None] > 0, found, logits)), counts


@functools.partial(jax.jit, donate_argnums=0)
def begin(state: DecodeState, logits: Float[jax.Array, "B V"], request: Request) -> tuple[DecodeState, Steps]:
    """The state, and its record, after drawing every row's next token from the scores of a text taken up before."""
    return _first(dataclasses.replace(state, done=jnp.zeros_like(state.done)), logits, request)


mark_read = jax.jit(after_reading, donate_argnums=0)


def draw(logits: jax.Array, state: DecodeState, request: Request) -> tuple[DecodeState, Drawn]:
    """Draws the next token of every row that has not ended, and says how probable it was.

    A row without end may draw more often than int32 counts: at 2^30 the count starts again, with another key.
    """
    keys = jax.vmap(jax.random.fold_in)(state.key, state.count)
    logits = logits[:, : len(request.table)]
    active = ~state.done
    sampling = request.sampling.for_rows(len(logits))
    is_early = active & (state.count < request.min_new_tokens)

    def choose() -> jax.Array:
        scores = without(biased(logits, sampling), request.end_tokens, is_early)
        return sample(scores, keys, sampling, active, lambda scores: penalised(scores, state.uses, sampling))

    def likeliest() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    # One branch where nobody asks for anything: a device may have to wait for the host at each.
    asked = jnp.any(active & (~sampling.is_plain() | is_early))

    def told() -> tuple[jax.Array, Drawn]:
        drawn = jax.lax.cond(asked, choose, likeliest)
        return drawn, _probabilities(logits, drawn, request, active)

    def untold() -> tuple[jax.Array, Drawn]:
        return (drawn := likeliest()), _nothing(logits, drawn)

    drawn, probabilities = jax.lax.cond(asked | _asks(request, active), told, untold)
    count = state.count + ~state.done
    lost = is_lost(logits, drawn)
    is_end = lost | jnp.any(drawn[:, None] == request.end_tokens, axis=-1)
    ends = is_end | ((count >= request.max_new_tokens) & (request.max_new_tokens >= 0))
    wraps = count >= COUNT_WRAP
    other = jax.vmap(jax.random.fold_in)(state.key, jnp.full_like(count, COUNT_WRAP))
    new = dataclasses.replace(
        state,
        token=jnp.where(state.done, state.token, drawn),
        count=jnp.where(wraps, 0, count),
        done=state.done | ends,
        key=jnp.where(wraps, other, state.key),
        uses=after_drawing(state.uses, drawn, active),
    )
    return new, dataclasses.replace(probabilities, token=jnp.where(lost, LOST, drawn))


def _asks(request: Request, active: jax.Array) -> jax.Array:
    """Whether an active row asks how probable tokens were."""
    return jnp.any((jnp.asarray(request.logprobs) | jnp.asarray(request.top_logprobs)) & active)


def _nothing(logits: jax.Array, drawn: jax.Array) -> Drawn:
    """What is told where nobody asks."""
    top = jnp.zeros((len(drawn), min(MOST_TOP, logits.shape[1])), jnp.int32)
    return Drawn(drawn, jnp.zeros(drawn.shape, logits.dtype), top, top.astype(logits.dtype))


def _probabilities(logits: jax.Array, drawn: jax.Array, request: Request, active: jax.Array) -> Drawn:
    """What active rows ask for; the most probable tokens only where one asks for them."""
    none = _nothing(logits, drawn)

    def asked() -> Drawn:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        of_drawn = jnp.take_along_axis(logprobs, drawn[:, None], axis=1)[:, 0]
        asks_top = jnp.any(jnp.asarray(request.top_logprobs) & active)
        nothing, number = (none.top_tokens, none.top_logprobs), none.top_tokens.shape[1]
        return Drawn(drawn, of_drawn, *jax.lax.cond(asks_top, lambda: best_of(logprobs, number), lambda: nothing))

    return jax.lax.cond(_asks(request, active), asked, lambda: none)


def _is_stuck(state: DecodeState) -> jax.Array:
    return state.cache.is_stuck() & ~state.done


def compile_all(programs: Mapping[str, tuple[Any, ...]]) -> None:
    """Compiles programs of `jax.jit` side by side, by name, each for what it is given behind it; runs none.

    Those that take longest should come first. `jit` keeps what is compiled so: the first call finds it. The first error
    is raised at once; what compiles beside it is not waited for, nor by the end of the program.
    """
    mesh, begin = jax.sharding.get_mesh(), time.perf_counter()

    def make(name: str, lowered: Any, traced: float) -> None:
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
            lowered.compile()
        log.info("compiled: %s, after %.1f s (traced after %.1f)", name, time.perf_counter() - begin, traced)

    threads = ThreadPoolExecutor(len(programs), "sepjax-compile")
    begun = []
    try:
        for name, (program, *given) in programs.items():
            # One after another: Python traces one at a time, and the first is compiled while the next is traced.
            lowered = program.lower(*given)
            begun.append(threads.submit(make, name, lowered, time.perf_counter() - begin))
            interrupt.need_not_wait_for(begun[-1].done)
        for done in as_completed(begun):
            done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


_ready: set[Hashable] = set()  # keys of what `make_ready` has compiled


def make_ready(key: Hashable, programs: Callable[[], Mapping[str, tuple[Any, ...]]]) -> None:
    """`compile_all` of the programs that a text will need, once for each key: nobody waits for one after the other.

    Over a mesh of several devices nothing is done: programs are compiled when they are called, as ever. A wrong guess
    of what they will be given costs time, and never a result.
    """
    if key in _ready or jax.config.jax_disable_jit or jax.sharding.get_abstract_mesh().size > 1:
        return
    found = {(program, *shapes_of(given)): (name, program, *given) for name, (program, *given) in programs().items()}
    more = {name: tuple(of) for each, (name, *of) in found.items() if each not in _ready}
    if len(more) > 1:  # one by itself its call compiles
        compile_all(more)
    _ready.update(found, [key])


def shapes_of(tree: Any) -> tuple[Any, ...]:
    """Shapes and types of all arrays, for a key."""
    return tuple((np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree))
