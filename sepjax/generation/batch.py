"""Answers to prompts, in one batch or several: each is driven on the device until every row has ended."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sepjax.config import ConfigError
from sepjax.generation import lost
from sepjax.generation.device_loop import DecodeState, Request, Steps, make_advance, make_ready
from sepjax.generation.limits import CacheTooLarge
from sepjax.generation.lost import LOST
from sepjax.generation.prepared import Prepared
from sepjax.generation.readers import Reader
from sepjax.generation.row import CacheUse, Row, RowSettings, StreamEvent
from sepjax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    Attributes:
      text: the generated text, up to the stop string.
      token_ids: all sampled tokens, including an end token or the tokens of the stop string.
      finish_reason: "stop" | "eos" | "length" | "repetition".
      prompt_tokens: tokens of the prompt, BOS included.
      cache: entries and bytes of the cache after the last token.
      logprobs: log-probability of each of `token_ids`; None: not requested.
      top_logprobs: for each token the (id, log-probability) of the most probable ones; None: not requested.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cache: CacheUse
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None

    @property
    def kv_kept(self) -> float:
        """Share of the tokens seen that the cache still held at the end."""
        return self.cache.kv_kept

    @classmethod
    def join(cls, prompt: Sequence[int], events: Sequence[StreamEvent]) -> "Generation":
        """What the events of a row, up to its end, come to."""
        last = events[-1]
        assert last.finish_reason is not None  # `run` ends when every row has
        token_ids = tuple(i for event in events for i in event.token_ids)
        logprobs = None if last.logprob is None else tuple(event.logprob or 0.0 for event in events)
        text = "".join(event.text for event in events)
        top = None if last.top_logprobs is None else tuple(event.top_logprobs or () for event in events)
        return cls(text, token_ids, last.finish_reason, len(prompt), last.cache, logprobs, top)


def request_of(of: Prepared, settings: RowSettings, sampling: Sampling, rows: int) -> Request:
    """What the device must know of rows with these settings.

    Of how to draw, each row for itself even if all draw alike: one way and several are the same program.
    """
    limit = -1 if settings.max_new_tokens is None else settings.max_new_tokens
    asks, asks_top = np.bool_(settings.logprobs), np.bool_(settings.top_logprobs > 0)
    sampling = sampling if np.ndim(sampling.temperature) else Sampling.of_rows([sampling] * rows, rows)
    # Biases of many rows are megabytes: there once, not at every call; and all in one go, which each by itself is not.
    told = sampling, settings.ends.array(), np.int32(limit), asks, asks_top, np.int32(settings.min_new_tokens)
    return Request(of.table_on_device, *jax.device_put(told))


def answer_all(
    of: Prepared,
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    settings: RowSettings,
    sampling: Sampling,
    keys: jax.Array,
    num_steps: int,
    groups: Sequence[Sequence[int]],
    answered: Callable[[Mapping[int, Generation]], object] | None = None,
) -> list[Generation]:
    """An answer to each prompt.

    Args:
      of, reader: the model, and the way into its caches.
      prompts: token ids.
      settings: of all rows.
      sampling: one way, or of as many rows as prompts.
      keys: a prompt's own.
      num_steps: see `run`.
      groups: see `grouped`.
      answered: see `Generator.generate`.

    Raises ConfigError for a cache that is too large, before any prompt is read if the lengths tell.
    """
    found: dict[int, Generation] = {}
    try:
        for group in groups:
            reader.check(0, [prompts[i] for i in group], settings.max_new_tokens)
        for group in groups:
            rows = [prompts[i] for i in group]
            ways = (sampling, keys) if len(groups) == 1 else _of_rows(sampling, keys, np.array(group))
            new = dict(zip(group, _answers(rows, run(of, reader, rows, settings, *ways, num_steps)), strict=True))
            found |= new
            if answered is not None:
                answered(new)
    except CacheTooLarge as error:
        if len(groups[0]) == 1:
            raise
        raise ConfigError(f"{error}, or answer fewer than {len(groups[0])} prompts at a time (batch_size)") from None
    return [found[i] for i in range(len(prompts))]


def _of_rows(sampling: Sampling, keys: jax.Array, rows: np.ndarray) -> tuple[Sampling, jax.Array]:
    of_each = np.ndim(sampling.temperature) > 0
    return jax.tree.map(lambda x: np.asarray(x)[rows], sampling) if of_each else sampling, keys[rows]


def _answers(prompts: Sequence[Sequence[int]], events: Iterator[tuple[int, StreamEvent]]) -> list[Generation]:
    """What the events of a batch come to."""
    of_rows: list[list[StreamEvent]] = [[] for _ in prompts]
    for row, event in events:
        lost.check(event.finish_reason, event.cache.seen)
        of_rows[row].append(event)
    return [Generation.join(prompt, of_row) for prompt, of_row in zip(prompts, of_rows, strict=True)]


def run(
    of: Prepared,
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    settings: RowSettings,
    sampling: Sampling,
    keys: jax.Array,
    num_steps: int,
) -> Iterator[tuple[int, StreamEvent]]:
    """Yields (row, event) up to the end of every row, `num_steps` steps at a time on the device."""
    rows = [
        Row(
            of.tokenizer,
            settings,
            continues=any(of.tokenizer.token_bytes(i) for i in ids),
            has_end=reader.ends_with_positions,
        )
        for ids in prompts
    ]
    request, taken = request_of(of, settings, sampling, len(rows)), [len(ids) for ids in prompts]
    advance = make_advance(of.graph, of.attention, num_steps)
    given = reader.empty(keys), prompts, request, 0, settings.max_new_tokens
    going = np.zeros(len(rows), bool)
    if settings.max_new_tokens != 1:  # else the first token is the last
        ready(advance, reader, given, lambda state: {"steps": (advance, of.params, state, going, request)})
    state, steps = reader.read(*given)
    while True:
        steps = jax.device_get(steps)
        yield from _events(rows, taken, steps, state.cache.nbytes // len(rows))
        taken = [1] * len(rows)
        ended = np.array([row.finish_reason is not None for row in rows])
        if ended.all():
            return
        if (steps.is_stuck & ~ended).any():
            state = dataclasses.replace(state, cache=state.cache.make_room())
        state, steps = advance(of.params, state, ended, request)


def ready(
    key: Hashable, reader: Reader, given: tuple[Any, ...], steps: Callable[[DecodeState], dict[str, tuple[Any, ...]]]
) -> None:
    """Compiles what `reader` reads with what it is given, beside the steps that follow: the first token waits for all.

    So nothing waits after it: a text does not stop behind its first token. `steps` are programs by their names, each
    with what it is given where rows stand then; `key` is of all of them.
    """
    of_reading, reading = reader.to_compile(*given)

    def programs() -> dict[str, tuple[Any, ...]]:
        found, state = reading()
        return steps(state) | found

    make_ready((key, of_reading), programs)


def _events(rows: Sequence[Row], taken: Sequence[int], steps: Steps, nbytes: int) -> Iterator[tuple[int, StreamEvent]]:
    """An event a token; of all its tokens for a row that may (`Row.joins`)."""
    record: Any = steps  # as NumPy arrays
    tokens, held, logprobs = record.token.tolist(), record.held.tolist(), record.logprob.tolist()
    for b, row in enumerate(rows):
        if row.finish_reason is not None:
            continue
        found = [token for token in tokens[b] if token != -1]
        if found and row.joins and taken[b] == 1 and LOST not in found:
            found = row.up_to_end(found)
            yield b, row.take_all(found, held=held[b][len(found) - 1], nbytes=nbytes)
            continue
        for i, token in enumerate(found):
            told = {"logprob": logprobs[b][i], "top": (record.top_tokens[b, i], record.top_logprobs[b, i])}
            yield b, row.take(token, taken=taken[b], held=held[b][i], nbytes=nbytes, **told)
            if row.finish_reason is not None:
                break
