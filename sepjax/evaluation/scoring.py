"""Log-probabilities of continuations after contexts, many at a time, under any attention pattern.

Requests of any lengths are packed side by side into rows of one length, each a document of its own (`segment_ids`), so
that one compiled program scores a whole benchmark and nothing is spent on padding. Requests that share their input
(the answers of a multiple choice, when they are one token) are computed once.

    row        | request 7          | request 2    | request 4   |pad|
    scored              ^^                      ^^^            ^^        tokens of continuations, given what is before
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig, UserError, validate_attention, with_own_window
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.passes import rows_of_pass
from sepjax.generation import lost
from sepjax.generation.cache.sizes import bucket
from sepjax.generation.prepared import to_read_rows
from sepjax.generation.prompts import check_vocabulary
from sepjax.layout import SeparatorLayout
from sepjax.model.attend import layer_layouts, run_rows
from sepjax.model.transformer import Transformer, split
from sepjax.model.unrolled import runner
from sepjax.progress import counted
from sepjax.separators import configured_table, flag_separators

_CHUNK = 512  # scored tokens whose logits exist at once


class ScoringError(UserError, ValueError):
    """Requests that cannot be scored."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a model takes a continuation."""

    logprob: float  # natural logarithm, summed over its tokens
    is_greedy: bool  # whether every token is the best one
    held: float  # keys that the input's last token sees, averaged over layers
    seen: int  # tokens of the input
    computed: int  # of these, those that were run for this request: 0 where another request has the same input


@dataclasses.dataclass(frozen=True)
class _Input:
    """A text that is run once, and the tokens that are scored in it."""

    ids: tuple[int, ...]
    scored: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # request, position, target


def score_continuations(
    model: Transformer,
    tokenizer: Tokenizer,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    attention: AttentionConfig | None = None,
    *,
    max_length: int = 0,
    batch_tokens: int = 65_536,
) -> list[Continuation]:
    """Scores the tokens of each continuation given its context and the continuation's tokens before.

    Args:
      model: from `sepjax.load`, also if a `Generator` was given it up.
      tokenizer: the model's.
      requests: (context, continuation) token ids, of one token each at least.
      attention: the pattern; None: the model's own.
      max_length: of context and continuation; longer ones lose the beginning of the context. 0: the model's positions.
      batch_tokens: tokens of a forward pass.

    Raises:
      ScoringError: an empty context or continuation, or a continuation that alone is too long.
      ConfigError: settings that do not fit the model.
      NotNumbers: the model's scores are NaN or infinite.
    """
    attention = with_own_window(attention or model.attention, model.config)
    validate_attention(attention, model.config.num_layers)
    check_vocabulary(model.config, tokenizer)
    inputs = _inputs(requests, max_length or model.config.max_positions)
    if not inputs:
        return []
    length = _row_length([len(x.ids) for x in inputs], batch_tokens)
    packed = _pack(inputs, length)
    rows = rows_of_pass(len(packed), max(1, batch_tokens // length))
    table = configured_table(tokenizer, attention)
    step, params = _make_step(split(model)[0], attention), to_read_rows(model)
    logprob, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    held: list[float] = [0.0] * len(requests)
    batches, passes = _batches(packed, length, rows, table, attention), -(-len(packed) // rows)
    for batch in counted(batches, f"scoring {attention.pattern}", passes, "passes"):
        values, best, kept = (np.asarray(x) for x in step(params, *batch.arrays))
        lost.check_scores(values[: len(batch.request)], f"scoring with attention.pattern={attention.pattern!r}")
        np.add.at(logprob, batch.request, values[: len(batch.request)].astype(np.float64))
        np.logical_and.at(greedy, batch.request, best[: len(batch.request)])
        for request, row, last in batch.places:
            held[request] = float(kept[row, last])
    seen = {request: len(x.ids) for x in inputs for request, _, _ in x.scored}
    computed = {x.scored[0][0]: len(x.ids) for x in inputs}
    return [
        Continuation(float(logprob[i]), bool(greedy[i]), held[i], seen[i], computed.get(i, 0))
        for i in range(len(requests))
    ]


def _row_length(sizes: Sequence[int], batch_tokens: int) -> int:
    """Room for two of the longest inputs, so that little of a row is left empty; less where all of them are less."""
    longest, total = max(sizes), sum(sizes)
    return min(max(bucket(2 * longest), 256), max(bucket(longest), batch_tokens), bucket(total))


def _inputs(requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[_Input]:
    """The distinct inputs. The last token of a continuation is predicted, not read."""
    found: dict[tuple[int, ...], _Input] = {}
    for number, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise ScoringError(f"request {number} has an empty {'context' if len(continuation) else 'continuation'}")
        if len(continuation) > max_length:
            raise ScoringError(
                f"request {number}: a continuation of {len(continuation)} tokens exceeds the {max_length} positions"
            )
        ids = tuple([*context, *continuation][-max_length - 1 : -1])
        start = len(ids) - len(continuation)  # the position that predicts the first token of the continuation
        x = found.setdefault(ids, _Input(ids))
        x.scored.extend((number, start + i, int(target)) for i, target in enumerate(continuation))
    return list(found.values())


def _pack(inputs: Sequence[_Input], length: int) -> list[list[_Input]]:
    """Rows of inputs that fit side by side: the longest first, each into the fullest row that has room."""
    rows: list[list[_Input]] = []
    room: list[int] = []
    for x in sorted(inputs, key=lambda x: -len(x.ids)):
        fits = [i for i in range(max(0, len(rows) - 64), len(rows)) if room[i] >= len(x.ids)]
        i = min(fits, key=lambda i: room[i]) if fits else len(rows)
        if i == len(rows):
            rows.append([])
            room.append(length)
        rows[i].append(x)
        room[i] -= len(x.ids)
    return rows


@dataclasses.dataclass(frozen=True)
class _Batch:
    arrays: tuple[np.ndarray, ...]  # of `_score_rows`, behind the parameters
    request: np.ndarray  # of each scored token
    places: list[tuple[int, int, int]]  # request, row, position of its input's last token


def _batches(
    packed: Sequence[Sequence[_Input]], length: int, rows: int, table: np.ndarray, attention: AttentionConfig
) -> Iterator[_Batch]:
    for first in range(0, len(packed), rows):
        tokens, positions, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
        scored: list[tuple[int, int, int, int]] = []  # request, row, position, target
        places = []
        for row, inputs in enumerate(packed[first : first + rows]):
            at = 0
            for number, x in enumerate(inputs, 1):
                end = at + len(x.ids)
                tokens[row, at:end], positions[row, at:end] = x.ids, np.arange(len(x.ids))
                segments[row, at:end] = number
                scored += [(request, row, at + i, target) for request, i, target in x.scored]
                places += [(request, row, end - 1) for request in {request for request, _, _ in x.scored}]
                at = end
        is_separator = flag_separators(tokens, positions, table, attention) & (segments > 0)
        entries = np.zeros((-(-len(scored) // _CHUNK) * _CHUNK, 4), np.int32)
        entries[: len(scored)] = scored
        entries = np.pad(entries, ((0, bucket(len(entries)) - len(entries)), (0, 0)))
        where = entries[:, 1:].reshape(-1, min(_CHUNK, len(entries)), 3)
        arrays = (tokens, positions, segments, is_separator, where)
        yield _Batch(arrays, entries[: len(scored), 0], places)


@functools.cache
def _make_step(graph: Any, attention: AttentionConfig) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """`_score_rows` compiled for one model and pattern: tasks with rows of one length share the program."""
    return jax.jit(functools.partial(_score_rows, graph, attention))


def _score_rows(
    graph: Any,
    attention: AttentionConfig,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    is_separator: jax.Array,
    where: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32[E] log-probabilities, bool[E] whether the target is the best token, float32[B, T] keys that are seen."""
    model = runner(graph, params, scan=True)
    T = tokens.shape[1]
    seen = _without_other_documents(attention, T)
    rows = run_rows(model, tokens, positions, is_separator, segment_ids, seen)

    def chunk(entries: jax.Array) -> tuple[jax.Array, jax.Array]:
        row, at, target = entries.T
        logits = model.logits(rows.hidden[row, at])
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        value = jnp.take_along_axis(logprobs, target[:, None], axis=-1)[:, 0]
        return value, jnp.argmax(logits, axis=-1) == target

    values, best = jax.lax.map(chunk, where)
    layouts: list[tuple[SeparatorLayout, float]] = layer_layouts(
        rows.is_separator, segment_ids, seen, model.config.num_layers
    )
    keys = jnp.zeros(tokens.shape, jnp.float32)
    for layout, share in layouts:
        keys += jnp.asarray(layout.keys_per_query()) * share
    return values.reshape(-1), best.reshape(-1), keys


def _without_other_documents(attention: AttentionConfig, length: int) -> AttentionConfig:
    """The pattern for packed rows. Dense attention as a layout, whose blocks of other documents are skipped."""
    changes: dict[str, Any] = {"document_mask": True}
    if attention.pattern == "dense":
        changes |= {"pattern": "sink_window", "num_sinks": 0, "layer_windows": (), "cache_size": 0}
        changes |= {"window_size": length}
    return dataclasses.replace(attention, **changes)
