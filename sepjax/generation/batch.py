"""The host's side of generation: a checked job, driven on the device until every row has ended."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sepjax.generation.cache.growing import SeparatorCache, bucket
from sepjax.config import AttentionConfig, validate_attention, with_own_window
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.limits import check_cache
from sepjax.generation.device_loop import Request, Steps, make_advance, start
from sepjax.generation.prompts import (
    Ends,
    cache_sizes,
    check_length,
    check_stop,
    check_vocabulary,
    encode_prompts,
    pad_prompts,
    row_keys,
)
from sepjax.generation.row import TextUntilStop
from sepjax.model.transformer import Params, Transformer, split
from sepjax.model.unrolled import by_layer
from sepjax.sampling import Sampling
from sepjax.separators import configured_table, warn_of_few_in


@dataclasses.dataclass(frozen=True)
class CacheUse:
    """What a row's cache holds, counted and measured."""

    held: int  # tokens in the cache
    seen: int  # tokens that have passed through it
    bytes: int  # of this row's part of all arrays

    @property
    def kv_kept(self) -> float:
        """Share of the tokens seen that is still held."""
        return self.held / self.seen


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """One new token."""

    text: str  # what is now certain to follow: whole characters, nothing of a stop string; may be empty
    token_ids: tuple[int, ...]
    finish_reason: str | None  # None: goes on; "stop": a stop string or token; "eos": the model's end token; "length"
    cache: CacheUse


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked request, ready for the device."""

    graph: nnx.GraphDef
    params: Params  # the model's own, for prompts
    step_params: Params  # laid out for single steps
    tokenizer: Tokenizer
    attention: AttentionConfig
    prompts: list[list[int]]
    request: Request
    keys: jax.Array
    sizes: dict[str, int]  # of the cache
    stop: tuple[str, ...]
    ends: Ends

    @classmethod
    def create(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        prompts: Any,
        max_new_tokens: int | None,
        sampling: Sampling,
        seed: int | Sequence[int],
        stop: str | Sequence[str],
        stop_at_eos: bool,
        attention: AttentionConfig | None,
        stop_token_ids: Sequence[int] = (),
        control_tokens: bool = True,
    ) -> "Job":
        """Checks everything that can be wrong. See `sepjax.generate` for the arguments and errors."""
        attention = with_own_window(attention or model.attention, model.config)
        validate_attention(attention, model.config.num_layers)
        check_vocabulary(model, tokenizer)
        ids = encode_prompts(tokenizer, prompts, control_tokens=control_tokens)
        check_length(model, ids, max_new_tokens, attention)
        table = configured_table(tokenizer, attention)
        for number, prompt in enumerate(ids):
            warn_of_few_in(prompt, table, attention, f"prompt {number}")
        ends = Ends.create(tokenizer, stop_at_eos, stop_token_ids)
        limit = -1 if max_new_tokens is None else max_new_tokens
        sizes = cache_sizes(ids, max_new_tokens, table, attention, model.config.num_layers)
        wanted = f"{max(map(len, ids))} tokens of prompt with max_new_tokens={max_new_tokens}"
        check_cache(model.config, len(ids), sum(sizes.values()), wanted)
        graph, params = split(model)
        return cls(
            graph=graph,
            params=params,
            step_params=by_layer(params, model.config),
            tokenizer=tokenizer,
            attention=attention,
            prompts=ids,
            request=Request(jnp.asarray(table), sampling, jnp.asarray(ends.array()), jnp.int32(limit)),
            keys=row_keys(seed, len(ids)),
            sizes=sizes,
            stop=check_stop(stop),
            ends=ends,
        )


_LAST_POSITION = 2**31 - 1  # positions are int32: a stream over the growing cache ends there


class _Row:
    """The host's side of one row: its text and whether it has ended."""

    def __init__(self, job: Job, ids: Sequence[int]):
        continues = any(job.tokenizer.token_bytes(i) for i in ids)
        self._text = TextUntilStop(job.tokenizer, job.stop, continues=continues)
        self._ends, self._left = job.ends, int(job.request.max_new_tokens)
        if self._left < 0:
            self._left = _LAST_POSITION - len(ids)
        self._seen = len(ids) - 1
        self.finish_reason: str | None = None

    def take(self, token: int, held: int, nbytes: int) -> StreamEvent:
        """The event of one more token, after which the cache holds so many of all that it has seen."""
        self._left -= 1
        self._seen += 1
        cache = CacheUse(held, self._seen, nbytes)
        ends = self._ends.reason(token)
        text = "" if ends == "stop" else self._text.feed(token)  # a stop token is no part of the text
        if self._text.stopped:
            self.finish_reason = "stop"
        elif ends or not self._left:
            self.finish_reason = ends or "length"
            text += self._text.flush()
        return StreamEvent(text, (token,), self.finish_reason, cache)


def run(job: Job, num_steps: int) -> Iterator[tuple[int, StreamEvent]]:
    """Yields (row, event) for every token of every row, `num_steps` steps at a time on the device."""
    rows = [_Row(job, ids) for ids in job.prompts]
    tokens, lengths = pad_prompts(job.prompts)
    state, steps = start(job.graph, job.params, tokens, lengths, job.keys, job.request, job.attention, **job.sizes)
    advance = make_advance(job.graph, job.attention, num_steps)
    while True:
        steps = jax.device_get(steps)
        yield from _events(rows, steps, state.cache.nbytes // len(rows))
        ended = np.array([row.finish_reason is not None for row in rows])
        if ended.all():
            return
        if steps.is_full:
            state = dataclasses.replace(state, cache=_grow(state.cache, bucket(state.cache.capacity + 1)))
        state, steps = advance(job.step_params, state, ended, job.request)


_grow = jax.jit(SeparatorCache.grow, static_argnums=1)


def _events(rows: Sequence[_Row], steps: Steps, nbytes: int) -> Iterator[tuple[int, StreamEvent]]:
    for i in range(steps.token.shape[1]):
        for b, row in enumerate(rows):
            if row.finish_reason is None and steps.token[b, i] >= 0:
                yield b, row.take(int(steps.token[b, i]), int(steps.held[b, i]), nbytes)
