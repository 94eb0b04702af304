"""Answers to prompts, all in one batch: driven on the device until every row has ended."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sepjax.generation.device_loop import Request, Steps, make_advance
from sepjax.generation.prepared import Prepared
from sepjax.generation.readers import Reader
from sepjax.generation.row import CacheUse, Row, RowSettings, StreamEvent
from sepjax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt."""

    text: str  # after the prompt, up to the stop string
    token_ids: tuple[int, ...]  # all that were drawn: the end-of-text token or those of the stop string included
    finish_reason: str  # "stop" | "eos" | "length" | "repetition"
    prompt_tokens: int  # BOS included
    cache: CacheUse  # at the last token
    logprobs: tuple[float, ...] | None = None  # of the tokens; None: nobody asked
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None  # see `StreamEvent`; None: nobody asked

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
    state, steps = reader.read(reader.empty(keys), prompts, request, 0, settings.max_new_tokens)
    advance = make_advance(of.graph, of.attention, num_steps)
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


def _events(rows: Sequence[Row], taken: Sequence[int], steps: Steps, nbytes: int) -> Iterator[tuple[int, StreamEvent]]:
    """An event a token; of all its tokens for a row that may (`Row.joins`)."""
    record: Any = steps  # as NumPy arrays
    tokens, held, logprobs = record.token.tolist(), record.held.tolist(), record.logprob.tolist()
    for b, row in enumerate(rows):
        if row.finish_reason is not None:
            continue
        found = [token for token in tokens[b] if token >= 0]
        if found and row.joins and taken[b] == 1:
            found = row.up_to_end(found)
            yield b, row.take_all(found, held=held[b][len(found) - 1], nbytes=nbytes)
            continue
        for i, token in enumerate(found):
            told = {"logprob": logprobs[b][i], "top": (record.top_tokens[b, i], record.top_logprobs[b, i])}
            yield b, row.take(token, taken=taken[b], held=held[b][i], nbytes=nbytes, **told)
            if row.finish_reason is not None:
                break
