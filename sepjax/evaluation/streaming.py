"""Perplexity of whole books, streamed through a bounded cache: by position, slots counted and bytes measured.

Every token but BOS is scored, given what the cache holds when it comes. Rows of a batch are lanes with one document
after the other (`documents.Lanes`), each into an emptied cache; a pass takes every row to its next compaction, which
gives what token by token would give (`sepjax.streaming`). The whole of it runs on the device.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Float, Int32
from sepjax.compilations import counted_compilations
from sepjax.config import AttentionConfig
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.documents import Document, Lanes, StreamError
from sepjax.generation.layerwise import Layerwise, by_layer, runner
from sepjax.generation.weights import working_copy
from sepjax.model.transformer import Transformer, split
from sepjax.separators import configured_table
from sepjax.streaming.cache import StreamingCache
from sepjax.streaming.forward import stream_pass
from sepjax.streaming.sizes import StreamSizes

_LOGITS = 2**28  # held at a time: 1 GiB in float32
_SHORT = 64  # tokens of a row in a pass, up to which layers are not scanned
_PASSES = 64  # on the device between two looks of the host
# Half octaves of the number of tokens before the one that is scored.
EDGES = tuple(sorted({1, *(round(2 ** (i / 2)) for i in range(8, 42))}))


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


def score_streams(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    attentions: Iterable[AttentionConfig],
    *,
    rows: int = 32,
    chunk: int = 0,
) -> list[StreamScore]:
    """Streams the same documents through the bounded cache of each attention config.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      documents: from `documents_of` or `whole_documents`.
      attentions: patterns and sizes to compare.
      rows: at most so many documents at a time; fewer where the longest one would outlast them.
      chunk: tokens of a row in a pass; 0: what fits between two compactions; 1: token by token.

    Raises:
      StreamError: there is no text to score.
      ConfigError: sizes that no bounded cache can have.
    """
    if not documents:
        raise StreamError("no text to score: every document is empty")
    lanes = Lanes.create(documents, rows)
    num_bytes = sum(len(tokenizer.token_bytes(int(i))) * n for i, n in _counted(documents))
    return [_score(model, tokenizer, lanes, attention, chunk, num_bytes) for attention in attentions]


def _counted(documents: Sequence[Document]) -> Iterator[tuple[int, int]]:
    ids, counts = np.unique(np.concatenate([document.targets for document in documents]), return_counts=True)
    return zip(ids.tolist(), counts.tolist(), strict=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where every lane stands."""

    cache: StreamingCache
    at: Int32[jax.Array, "B"]  # in the lane
    start: Int32[jax.Array, "B"]  # of the document, in the lane
    document: Int32[jax.Array, "B"]  # its number in the lane

    __no_type_check__ = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
    """What some passes add up to."""

    nll: Float[jax.Array, "P"]  # of each bucket
    tokens: Int32[jax.Array, "P"]
    held: Float[jax.Array, ""]  # entries that tokens met, summed over tokens
    most: Int32[jax.Array, ""]
    kept: Float[jax.Array, ""]  # entries over tokens seen, summed over the documents that ended
    ended: Int32[jax.Array, ""]  # documents

    __no_type_check__ = True

    @classmethod
    def zeros(cls) -> "_Sums":
        zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
        return cls(jnp.zeros(len(EDGES)), jnp.zeros(len(EDGES), jnp.int32), zero, none, zero, none)


def _score(
    model: Transformer,
    tokenizer: Tokenizer,
    lanes: Lanes,
    attention: AttentionConfig,
    chunk: int,
    num_bytes: int,
) -> StreamScore:
    sizes = StreamSizes.create(model.config, attention)
    chunk = chunk or min(sizes.chunk, lanes.inputs.shape[1])
    table = jnp.asarray(configured_table(tokenizer, attention))
    graph, params = split(model)
    # Short passes wait for memory and for each other, as single steps do; long ones for arithmetic.
    short = chunk <= _SHORT
    params = (by_layer if short else working_copy)(params, model.config)
    run = jax.jit(functools.partial(_passes, graph, attention, chunk), donate_argnums=1)
    on_device = jax.device_put(lanes)

    def start() -> _State:
        cache = StreamingCache.create(model.config, len(lanes.inputs), sizes, by_layer=short)
        return _State(cache, *(jnp.zeros(len(lanes.inputs), jnp.int32) for _ in range(3)))

    jax.block_until_ready(run(params, start(), on_device, table, jnp.int32(1)))  # compiles outside the timing
    state, total = start(), None
    cache_bytes = state.cache.nbytes // len(lanes.inputs)
    began = time.perf_counter()
    with counted_compilations() as compiled:
        at, ends = np.zeros(len(lanes.inputs), np.int32), lanes.ends[:, -1]
        while (at < ends).any():
            state, sums = run(params, state, on_device, table, jnp.int32(_PASSES))
            at, sums = jax.device_get((state.at, sums))
            total = sums if total is None else _add(total, sums)
    seconds = time.perf_counter() - began
    assert total is not None  # there is a document
    tokens = int(total.tokens.sum())
    return StreamScore(
        pattern=attention.pattern,
        num_sinks=sizes.num_sinks,
        max_separators=sizes.max_separators,
        window_size=sizes.window_size,
        cache_size=sizes.cache_size,
        perplexity=_perplexity(total.nll.sum(), tokens),
        bits_per_byte=float(total.nll.sum()) / math.log(2) / max(num_bytes, 1),
        buckets=_buckets(total),
        tokens=tokens,
        bytes=num_bytes,
        slots_held=float(total.held) / tokens,
        slots_most=int(total.most),
        cache_bytes=cache_bytes,
        kv_kept=float(total.kept) / int(total.ended),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        rows=len(lanes.inputs),
        chunk=chunk,
        compilations=len(compiled),
    )


def _add(total: Any, sums: Any) -> Any:
    """Sums over all passes so far, in float64."""
    added = jax.tree.map(lambda x, y: np.asarray(x, np.float64) + y, total, sums)
    return dataclasses.replace(added, most=max(total.most, sums.most))


def _perplexity(nll: Any, tokens: int) -> float:
    return math.exp(min(float(nll) / max(tokens, 1), 700.0))


def _buckets(total: Any) -> tuple[Bucket, ...]:
    ends = [*EDGES[1:], 2**31]
    rows = zip(EDGES, ends, total.nll.tolist(), total.tokens.tolist(), strict=True)
    return tuple(Bucket(start, end, _perplexity(nll, int(n)), int(n)) for start, end, nll, n in rows if n)


def _passes(
    graph: Any,
    attention: AttentionConfig,
    chunk: int,
    params: Any,
    state: _State,
    lanes: Lanes,
    table: jax.Array,
    limit: jax.Array,
) -> tuple[_State, _Sums]:
    """Up to `limit` passes, fewer when all lanes are through."""
    model = runner(graph, params)

    def body(carry: tuple[jax.Array, _State, _Sums]) -> tuple[jax.Array, _State, _Sums]:
        i, state, sums = carry
        return i + 1, *_one_pass(model, attention, chunk, state, sums, lanes, table)

    def goes_on(carry: tuple[jax.Array, _State, _Sums]) -> jax.Array:
        return (carry[0] < limit) & jnp.any(carry[1].at < lanes.ends[:, -1])

    _, state, sums = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, _Sums.zeros()))
    return state, sums


def _one_pass(
    model: Transformer | Layerwise,
    attention: AttentionConfig,
    chunk: int,
    state: _State,
    sums: _Sums,
    lanes: Lanes,
    table: jax.Array,
) -> tuple[_State, _Sums]:
    """Takes every lane to its next compaction, the end of its document or `chunk` tokens on."""
    rows = jnp.arange(len(state.at))
    end = lanes.ends[rows, state.document]
    counts = jnp.minimum(state.cache.room(chunk), end - state.at)
    i = jnp.arange(chunk, dtype=jnp.int32)
    index = jnp.minimum(state.at[:, None] + i, lanes.inputs.shape[1] - 1)
    tokens, targets = (jnp.take_along_axis(x, index, axis=1) for x in (lanes.inputs, lanes.targets))
    held = state.cache.held_before(chunk)
    hidden, cache = stream_pass(model, state.cache, tokens, counts, table, attention)
    scored = i < counts[:, None]
    nll = jnp.where(scored, token_nll(hidden, model.output_embedding(), targets), 0.0)
    before = (state.at - state.start)[:, None] + i + 1
    bucket = jnp.searchsorted(jnp.array(EDGES, jnp.int32), before, side="right") - 1
    member = jnp.where(scored, bucket, -1)[..., None] == jnp.arange(len(EDGES))
    cache = cache.compact()
    at = state.at + counts
    ended = (at == end) & (counts > 0)
    kept = jnp.where(ended, cache.held() / jnp.maximum(at - state.start, 1), 0.0)
    sums = _Sums(
        nll=sums.nll + jnp.sum(jnp.where(member, nll[..., None], 0.0), axis=(0, 1)),
        tokens=sums.tokens + jnp.sum(member, axis=(0, 1)),
        held=sums.held + jnp.sum(jnp.where(scored, held, 0), dtype=jnp.float32),
        most=jnp.maximum(sums.most, jnp.max(jnp.where(scored, held, 0))),
        kept=sums.kept + jnp.sum(kept),
        ended=sums.ended + jnp.sum(ended),
    )
    last = lanes.ends.shape[1] - 1
    document = jnp.where(ended, jnp.minimum(state.document + 1, last), state.document)
    return _State(cache.reset(ended), at, jnp.where(ended, at, state.start), document), sums


def token_nll(
    hidden: Float[jax.Array, "B T D"], head: Float[jax.Array, "V D"], targets: Int32[Array, "B T"]
) -> Float[jax.Array, "B T"]:
    """-log p of each target in nats, float32; the logits of all tokens never exist at once."""
    tokens, V = targets.size, head.shape[0]
    least = max(1, -(-tokens * V // _LOGITS))
    chunks = next(n for n in range(min(least, tokens), tokens + 1) if tokens % n == 0)
    head = head.astype(hidden.dtype)

    def part(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, target = inputs
        logits = jnp.einsum("td,vd->tv", h, head, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]

    parts = hidden.reshape(chunks, -1, hidden.shape[-1]), jnp.asarray(targets).reshape(chunks, -1)
    return jax.lax.map(part, parts).reshape(targets.shape)
