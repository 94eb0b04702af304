"""Perplexity of whole books, streamed through a bounded cache: by position, slots counted and bytes measured.

Every token but BOS is scored, given what the cache holds when it comes. Rows of a batch are lanes with one document
after the other (`documents.Lanes`), each into an emptied cache; a pass takes every row to its next compaction, which
gives what token by token would give (`sepjax.generation.cache`). The whole of it runs on the device, which hands back
the loss of every token; `sepjax.evaluation.slices` tells what these were told from.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax import interrupt
from sepjax.config import AttentionConfig, ConfigError
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.arms import Arm, distances, plain_arms
from sepjax.evaluation.compare import baseline_index, references
from sepjax.evaluation.documents import Document, Lanes, Rule, StreamError
from sepjax.evaluation.slices import EDGES, ScoredTokens, Slice, by_position, sliced
from sepjax.evaluation.stream_passes import State, Sums, passes
from sepjax.generation.cache.bounded_run import unsupported
from sepjax.generation.cache.mixed import BoundedSizes, MixedSizes, bounded_sizes, empty_cache
from sepjax.generation.graphs import compiler_options
from sepjax.generation.limits import check_cache
from sepjax.generation.prepared import laid_out
from sepjax.generation.slot_mesh import spread, spread_shapes
from sepjax.measure import counted_compilations
from sepjax.model.transformer import Transformer, split
from sepjax.model.unrolled import working_copy
from sepjax.progress import working
from sepjax.separators import configured_table, has_separators, warn_of_few_in
from sepjax.sharding import placed_like, shapes_placed_like

_SHORT = 64  # tokens of a row in a pass, up to which layers are not scanned
_CORES = 4  # for each program that is compiled beside others
_PASSES = 64  # on the device between two looks of the host


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The tokens with `start` to `end` - 1 tokens of their document before them."""

    start: int
    end: int
    perplexity: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class StreamScore:
    """How well one bounded cache predicts a set of documents."""

    pattern: str
    num_sinks: int
    max_separators: int
    window_size: int
    cache_size: int
    perplexity: float  # per token
    bits_per_byte: float
    buckets: tuple[Bucket, ...]
    tokens: int  # scored
    bytes: int  # of their text
    slots_held: float  # entries in the cache when a token comes, counted, averaged over tokens
    slots_most: int  # and the most of any
    cache_bytes: int  # of one row's part of all arrays, measured
    kv_kept: float  # entries over tokens seen, averaged over the ends of the documents
    seconds: float
    tokens_per_second: float  # after compilation
    rows: int
    chunk: int  # tokens of a row in a pass
    compilations: int  # while the clock ran
    compile_seconds: float = 0.0  # before it, of the programs of all streams together
    tokenise_seconds: float = 0.0  # before that: of reading and tokenising all texts
    cache_dtype: str = "model"  # see `AttentionConfig`
    arm: str = ""
    baseline: str = ""  # the arm that differences are from
    near: int = 0  # tokens: see `sepjax.evaluation.slices`; the row is the document
    far: int = 0
    slices: tuple[Slice, ...] = ()
    positions: tuple[Slice, ...] = ()


def score_streams(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    attentions: Sequence[AttentionConfig | Arm],
    *,
    rows: int = 32,
    chunk: int = 0,
    baseline: str = "",
    near: int = 0,
    far: int = 0,
    consume: bool = False,
    keep: Mapping[str, Rule] | None = None,
) -> list[StreamScore]:
    """Streams the same documents through the bounded cache of each attention config or arm.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      documents: from `documents_of` or `whole_documents`.
      attentions: patterns and sizes to compare.
      rows: at most so many documents at a time; fewer where the longest one would outlast them.
      chunk: tokens of a row in a pass; 0: what fits between two compactions; 1: token by token.
      baseline: the arm that differences are from; "": the first.
      near: tokens, the end of the slice `near`; 0: the smallest window.
      far: tokens, where the slice `far` begins; 0: the size of the largest cache.
      consume: whether the model is given up, as `Generator` has it, where any pass runs layers one by one.
      keep: rules of your own, by arm: a function from a document's token ids, int32[N] with BOS, to bool[N], which of
        them the arm keeps in place of its separators. It sees the whole document, so it may know what comes later.

    Raises:
      StreamError: there is no text to score, or a rule gives no bool for each token.
      ConfigError: sizes that no bounded cache can have, near exceeds far, `keep_all_separators` has no room for all, or
        a rule is for no arm, or for one without separators.
    """
    if not documents:
        raise StreamError("no text to score: every document is empty")
    arms = _arms(attentions)
    rules = _checked_rules(keep or {}, arms)
    sizes = _checked_sizes(model, arms)
    far = far or max(x.cache_size for x in sizes)
    near, far = distances([arm.attention for arm in arms], model.config.num_layers, near=near, far=far)
    first = baseline_index([arm.name for arm in arms], baseline)
    lanes = Lanes.create(documents, rows)
    num_bytes = sum(len(tokenizer.token_bytes(int(i))) * n for i, n in _counted(documents))
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(_told, documents)  # sorting, beside what the device does
        made = functools.partial(_Stream.create, model, tokenizer, lanes, chunk)
        streams = [made(arm, each, rules.get(arm.name)) for arm, each in zip(arms, sizes, strict=True)]
        scored = _scored(model, streams, lanes, num_bytes, consume)
        tokens = told.result()
    return _with_slices(scored, arms, tokens, first, near, far)


def _with_slices(
    scored: Sequence[tuple[StreamScore, np.ndarray]], arms: Sequence[Arm], tokens: ScoredTokens, first: int, near: int,
    far: int,
) -> list[StreamScore]:  # fmt: skip
    """The scores with their arms' losses by slice and position, beside those of the arm `first`."""
    losses = [nll for _, nll in scored]
    refer = references(arms, [score.slots_held for score, _ in scored], first)
    beside = {"baseline": arms[first].name, "near": near, "far": far}
    return [
        dataclasses.replace(
            score,
            buckets=_buckets(tokens, losses[i]),
            arm=arms[i].name,
            slices=sliced(tokens, losses, i, refer[i], near, far),
            positions=by_position(tokens, losses, i, refer[i]),
            **beside,
        )
        for i, (score, _) in enumerate(scored)
    ]


def _told(documents: Sequence[Document]) -> ScoredTokens:
    return ScoredTokens.create([x.inputs for x in documents], [x.targets for x in documents])


def _checked_sizes(model: Transformer, arms: Sequence[Arm]) -> list[BoundedSizes]:
    sizes = [bounded_sizes(model.config, arm.attention) for arm in arms]
    for s in sizes:
        check_cache(model.config, 1, s.slots, s.cache_dtype, f"cache_size={s.cache_size}")
    return sizes


def _checked_rules(keep: Mapping[str, Rule], arms: Sequence[Arm]) -> Mapping[str, Rule]:
    patterns = {arm.name: arm.attention for arm in arms}
    for name in keep:
        if name not in patterns:
            raise ConfigError(f"keep has a rule for {name!r}, and arms are {', '.join(map(repr, patterns))}")
        if not has_separators(patterns[name]):
            raise ConfigError(
                f"keep[{name!r}] does nothing for pattern={patterns[name].pattern!r}, which has no separators: a "
                'rule takes their place in pattern="separator" (or in "watched" with separators_first)'
            )
    return keep


def _arms(attentions: Sequence[AttentionConfig | Arm]) -> list[Arm]:
    plain = iter(plain_arms([x for x in attentions if isinstance(x, AttentionConfig)]))
    return [x if isinstance(x, Arm) else next(plain) for x in attentions]


def _counted(documents: Sequence[Document]) -> Iterator[tuple[int, int]]:
    ids, counts = np.unique(np.concatenate([document.targets for document in documents]), return_counts=True)
    return zip(ids.tolist(), counts.tolist(), strict=True)


@dataclasses.dataclass(frozen=True)
class _Stream:
    """The lanes through one cache."""

    attention: AttentionConfig
    sizes: BoundedSizes
    chunk: int
    one_by_one: bool  # see `_layers_one_by_one`
    table: jax.Array  # over the vocabulary; with a rule, of every token of the lanes
    program: Any  # `stream_passes.passes`, jitted

    @classmethod
    def create(
        cls, model: Transformer, tokenizer: Tokenizer, lanes: Lanes, chunk: int, arm: Arm, sizes: BoundedSizes,
        rule: Rule | None,
    ) -> "_Stream":  # fmt: skip
        """Warns of few separators."""
        attention, chunk = arm.attention, _length(sizes, lanes, chunk)
        table = jnp.asarray(configured_table(tokenizer, attention) if rule is None else lanes.flags(rule, arm.name))
        if rule is None:
            is_token = np.arange(lanes.inputs.shape[1]) < lanes.ends[:, -1, None]
            warn_of_few_in(np.asarray(lanes.inputs)[is_token], table, attention, "the text to stream")
        one_by_one = _layers_one_by_one(model, sizes, attention, chunk)
        run = functools.partial(passes, split(model)[0], attention, chunk, scan=not one_by_one)
        program = jax.jit(run, donate_argnums=1, compiler_options=compiler_options())
        return cls(attention, sizes, chunk, one_by_one, table, program)

    def empty(self, model: Transformer, lanes: Lanes) -> State:
        """No token has come yet."""
        cache = empty_cache(model.config, len(lanes.inputs), self.sizes, by_layer=self.one_by_one)
        at, first, document = (jnp.zeros(len(lanes.inputs), jnp.int32) for _ in range(3))
        return State(cache, at, first, document, jnp.zeros(lanes.inputs.shape))


def _scored(
    model: Transformer, streams: Sequence[_Stream], lanes: Lanes, num_bytes: int, consume: bool
) -> list[tuple[StreamScore, np.ndarray]]:
    """Of each what was measured, and the loss of every token of the documents, one after the other.

    All are compiled side by side, before any of them runs: compilers time kernels on the device. They share one layout
    of the parameters, as layers that are run one by one need it, if any are.
    """
    if any(stream.one_by_one for stream in streams):
        params = laid_out(model, consume=consume).params
    else:
        params = working_copy(split(model)[1], model.config)
    on_device, limit = spread(jax.device_put(lanes)), jnp.int32(_PASSES)
    began = time.perf_counter()
    empty = [jax.eval_shape(lambda x=x: x.empty(model, lanes)) for x in streams]
    empty = [spread_shapes(shapes_placed_like(params, shapes)) for shapes in empty]
    pairs = zip(streams, empty, strict=True)
    lowered = [x.program.lower(params, shapes, on_device, x.table, limit) for x, shapes in pairs]
    compiled = _compile(lowered)
    compiling = time.perf_counter() - began
    scored = []
    for stream, program in zip(streams, compiled, strict=True):

        def run(state: State, program: Any = program, table: jax.Array = stream.table) -> tuple[State, Sums]:
            return program(params, state, on_device, table, limit)

        state = spread(placed_like(params, stream.empty(model, lanes)))
        score, nll = _score(run, state, stream, lanes, num_bytes)
        scored.append((dataclasses.replace(score, compile_seconds=compiling), nll))
    return scored


def _compile(programs: Sequence[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
    """Compiles them, some side by side where there are cores for it."""
    with working("compiling", len(programs), "programs") as work:
        pool = ThreadPoolExecutor(max(1, min(len(programs), (os.cpu_count() or 1) // _CORES)))
        begun = [pool.submit(lowered.compile) for lowered in programs]
        for compiled in begun:
            interrupt.need_not_wait_for(compiled.done)
        pool.shutdown(wait=False)
        found = []
        for compiled in begun:
            found.append(compiled.result())
            work.add()
        return found


def _score(
    run: Callable[[State], tuple[State, Sums]],
    state: State,
    stream: _Stream,
    lanes: Lanes,
    num_bytes: int,
) -> tuple[StreamScore, np.ndarray]:
    sizes, began = stream.sizes, time.perf_counter()
    with counted_compilations() as compiled:
        ends, what = np.asarray(lanes.ends[:, -1]), f"streaming through {stream.attention.pattern}"
        state, total = _to_the_end(run, state, ends, what)
    seconds = time.perf_counter() - began
    nll = lanes.of_documents(np.asarray(state.nll))
    tokens, whole = len(nll), float(np.sum(nll, dtype=np.float64))
    score = StreamScore(
        pattern=stream.attention.pattern,
        num_sinks=sizes.num_sinks,
        max_separators=sizes.max_separators,
        window_size=sizes.window_size,
        cache_size=sizes.cache_size,
        perplexity=_perplexity(whole, tokens),
        bits_per_byte=whole / math.log(2) / max(num_bytes, 1),
        buckets=(),
        tokens=tokens,
        bytes=num_bytes,
        slots_held=float(total.held) / tokens,
        slots_most=int(total.most),
        cache_bytes=state.cache.nbytes // len(lanes.inputs),
        kv_kept=float(total.kept) / int(total.ended),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        rows=len(lanes.inputs),
        chunk=stream.chunk,
        compilations=len(compiled),
        cache_dtype=sizes.cache_dtype,
    )
    return score, nll


def _length(sizes: BoundedSizes, lanes: Lanes, chunk: int) -> int:
    """Tokens of a row in a pass."""
    return chunk or min(sizes.chunk, lanes.inputs.shape[1])


def _layers_one_by_one(model: Transformer, sizes: BoundedSizes, attention: AttentionConfig, chunk: int) -> bool:
    """Whether layers have arrays of their own and are not scanned: that takes longer to compile.

    Short passes wait for memory and for each other, as single steps do; long ones for arithmetic. But where a kernel
    does their attention, it is copies of layers' caches that they would wait for.
    """
    if chunk <= _SHORT or isinstance(sizes, MixedSizes):
        return True
    cache = jax.eval_shape(lambda: empty_cache(model.config, 1, sizes, by_layer=True))
    return unsupported(cache, attention.implementation) is None


def _to_the_end(
    run: Callable[[State], tuple[State, Sums]], state: State, ends: np.ndarray, what: str
) -> tuple[State, Any]:
    """Makes passes until every lane is at its end; the last state, and what all passes add up to. `what` they do."""
    at, total = np.zeros(len(ends), np.int32), None
    with working(what, int(ends.sum()), "tokens") as work:
        while (at < ends).any():
            state, sums = run(state)
            at, sums = jax.device_get((state.at, sums))
            if sums.stuck:
                state.cache.make_room()  # says why there is none
            total = sums if total is None else _add(total, sums)
            work.done = int(np.minimum(at, ends).sum())
    return state, total


def _add(total: Any, sums: Any) -> Any:
    """Sums over all passes so far, in float64."""
    added = jax.tree.map(lambda x, y: np.asarray(x, np.float64) + y, total, sums)
    return dataclasses.replace(added, most=max(total.most, sums.most))


def _perplexity(nll: Any, tokens: int) -> float:
    return math.exp(min(float(nll) / max(tokens, 1), 700.0))


def _buckets(tokens: ScoredTokens, nll: np.ndarray) -> tuple[Bucket, ...]:
    bucket = np.searchsorted(EDGES, tokens.before, side="right") - 1
    sums, counts = np.bincount(bucket, weights=nll, minlength=len(EDGES)), np.bincount(bucket, minlength=len(EDGES))
    rows = zip(EDGES, [*EDGES[1:], 2**31], sums.tolist(), counts.tolist(), strict=True)
    return tuple(Bucket(start, end, _perplexity(nll, n), n) for start, end, nll, n in rows if n)
