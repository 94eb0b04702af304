"""Text from a model: `generate` for whole answers, `stream` for text as it comes.

    model, tokenizer = sepjax.load("runs/tiny")
    sepjax.generate(model, tokenizer, ["The function", "A list"], max_new_tokens=64)[0].text

On a command line: `sepjax generate` and `sepjax chat` (`sepjax.programs`).

Both drive the same compiled steps (`sepjax.generation.loop`) and give the same tokens. A row of a batch is what it
would be alone: padding, neighbours and growing caches change none of its tokens.
"""

import dataclasses
import os
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

from sepjax.cache import bucket
from sepjax.config import AttentionConfig, ConfigError
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.driver import CacheUse, Job, StreamEvent, run
from sepjax.generation.endless import EndlessStream
from sepjax.generation.prompts import Prompt, choose_sampling
from sepjax.model.transformer import Transformer

_STEPS_BETWEEN_STOP_CHECKS = 32


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt."""

    text: str  # after the prompt, up to the stop string
    token_ids: tuple[int, ...]  # all that were drawn: the end-of-text token or those of the stop string included
    finish_reason: str  # "stop" | "eos" | "length"
    prompt_tokens: int  # BOS included
    cache: CacheUse  # at the last token

    @property
    def kv_kept(self) -> float:
        """Share of the tokens seen that the cache still held at the end."""
        return self.cache.kv_kept


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    sampling_defaults: bool = False,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    control_tokens: bool = True,
    attention: AttentionConfig | None = None,
) -> list[Generation]:
    """Continues prompts, all in one batch; returns an answer to each.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      prompts: one text, or a list whose items are texts (BOS goes in front where the model's own tokenizer puts it,
        unless the text begins with it) or token ids.
      max_new_tokens: tokens after which an answer ends.
      temperature: 0, the default, always takes the best token; above, `top_k`, `top_p` and `min_p` say what to draw
        from (`sepjax.sampling`).
      top_k: the k best tokens; 0, the default: all.
      top_p: the fewest tokens that together reach this probability; default: 1, all.
      min_p: tokens at least so many times as probable as the best; default: 0, all.
      sampling_defaults: whether those of the four that are not given are as in the model's generation_config.json.
      seed: of the draws; one a prompt makes each answer independent of its place in the list.
      stop: texts that end an answer, and are no part of it.
      stop_token_ids: tokens that end an answer, and are no part of its text; control tokens too.
      stop_at_eos: whether the model's own end tokens (`Tokenizer.end_ids`) end an answer.
      control_tokens: whether names of control tokens in the prompts' texts are these tokens; False: plain text.
      attention: another pattern than the model was trained with.

    Raises:
      ConfigError: settings out of range or impossible together.
      PromptError: a prompt without tokens, or with ids that are none.
      TypeError: prompts or stop strings that are no text.
    """
    job = Job.create(
        model, tokenizer, prompts, max_new_tokens,
        choose_sampling(
            tokenizer, sampling_defaults, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        ),
        seed, stop, stop_at_eos, attention, stop_token_ids, control_tokens,
    )  # fmt: skip
    answers: list[list[StreamEvent]] = [[] for _ in job.prompts]
    for row, event in run(job, _STEPS_BETWEEN_STOP_CHECKS if job.stop else bucket(max_new_tokens)):
        answers[row].append(event)
    return [_join(ids, events) for ids, events in zip(job.prompts, answers, strict=True)]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Prompt | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    sampling_defaults: bool = False,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    control_tokens: bool = True,
    attention: AttentionConfig | None = None,
    bounded: bool | None = None,
    max_repeats: int = 0,
    resume: str | os.PathLike[str] | None = None,
) -> Iterator[StreamEvent]:
    """Continues one prompt, an event a token.

    With `max_new_tokens` the texts of all events join to what `generate` answers. Without, the stream has no end (with
    `stop_at_eos=False` not even at an end of text) and runs over a bounded cache: at most `attention.cache_size`
    entries, whatever the length of prompt and text (docs/streaming.md).

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      prompt: a text or token ids; None: nothing yet, for a bounded stream that is resumed or fed later.
      bounded: whether to use the bounded cache; None: where there is no `max_new_tokens`. A bounded stream is an
        `EndlessStream`: it takes further input with `feed` and goes to disk with `save`.
      max_repeats: ends a bounded stream ("repetition") once it has repeated the same run of tokens more often in a
        row; 0: never.
      resume: folder of a bounded stream that was saved; it goes on there, token for token.

    The other arguments and errors are those of `generate`; errors come from this call, not from the first event.
    """
    sampling = choose_sampling(
        tokenizer, sampling_defaults, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    if not (max_new_tokens is None if bounded is None else bounded):
        if prompt is None or max_repeats or resume is not None:
            raise ConfigError("a missing prompt, max_repeats and resume are for bounded streams; add bounded=True")
        job = Job.create(
            model, tokenizer, [prompt], max_new_tokens, sampling, seed, stop, stop_at_eos, attention, stop_token_ids,
            control_tokens,
        )  # fmt: skip
        return (event for _, event in run(job, 1))
    events = EndlessStream(
        model, tokenizer, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop,
        stop_at_eos=stop_at_eos, stop_token_ids=stop_token_ids, control_tokens=control_tokens,
        max_repeats=max_repeats, attention=attention,
    )  # fmt: skip
    if resume is not None:
        events.restore(resume)
    if prompt is not None:
        events.feed(prompt)
    return events


def _join(prompt: Sequence[int], events: Sequence[StreamEvent]) -> Generation:
    last = events[-1]
    assert last.finish_reason is not None  # `run` ends when every row has
    token_ids = tuple(i for event in events for i in event.token_ids)
    text = "".join(event.text for event in events)
    return Generation(text, token_ids, last.finish_reason, len(prompt), last.cache)


class _CallableModule(types.ModuleType):
    """Makes `sepjax.generate(...)` work: Python binds this module to that name once anything has imported it."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Generation]:
        """See `generate`."""
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
