"""`sepjax.generate` and `sepjax.stream`: text from a model in one call, over the model's own `Generator`.

model, tokenizer = sepjax.load("runs/tiny")
sepjax.generate(model, tokenizer, ["The function", "A list"], max_new_tokens=64)[0].text
"""

import os
from collections.abc import Callable, Mapping, Sequence

import jax

from sepjax.config import AttentionConfig
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.batch import Generation
from sepjax.generation.engine import engine_of
from sepjax.generation.prompts import Prompt, choose_sampling
from sepjax.generation.stream import Stream
from sepjax.model.transformer import Transformer


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
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    sampling_defaults: bool = False,
    seed: int | Sequence[int] | jax.Array = 0,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    control_tokens: bool = True,
    attention: AttentionConfig | None = None,
    bounded: bool | None = None,
    max_repeats: int = 0,
    min_new_tokens: int = 0,
    logprobs: bool = False,
    top_logprobs: int = 0,
    batch_size: int | None = None,
    answered: Callable[[Mapping[int, Generation]], object] | None = None,
) -> list[Generation]:
    """Generates one answer per prompt, in their order. The first call for a model prepares its weights.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      prompts: one text, or a list of texts (with BOS in front if the model's own tokenizer adds it, never twice) or of
        lists of token ids.
      max_new_tokens: maximum tokens of an answer.
      temperature, top_k, top_p, min_p: sampling (`sepjax.Sampling.create`); default: greedy.
      presence_penalty, frequency_penalty, repetition_penalty, logit_bias: change the logits before sampling.
      sampling_defaults: take those not given from the model's generation_config.json.
      seed: seed of sampling; one per prompt, or a typed key, makes each answer independent of its place in the list.
      stop, stop_token_ids: texts and tokens that end an answer and are left out of its text.
      stop_at_eos: whether the model's own end tokens (`Tokenizer.end_ids`) end an answer.
      control_tokens: read names of control tokens in the prompts as control tokens; False: as plain text.
      attention: the pattern; None: as in training, for bounded caches the one stored with the model (`model.kept`).
      bounded, max_repeats, min_new_tokens, logprobs, top_logprobs, batch_size, answered: see `Generator.generate`.

    Returns a `Generation` per prompt (text, token_ids, finish_reason, kv_kept, ...). Raises as `Generator.generate`.
    """
    sampling = choose_sampling(
        tokenizer, sampling_defaults, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, repetition_penalty=repetition_penalty,
        logit_bias=logit_bias,
    )  # fmt: skip
    return engine_of(model, tokenizer, attention).generate(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop, stop_token_ids=stop_token_ids,
        stop_at_eos=stop_at_eos, control_tokens=control_tokens, bounded=bounded, max_repeats=max_repeats,
        min_new_tokens=min_new_tokens, logprobs=logprobs, top_logprobs=top_logprobs, batch_size=batch_size,
        answered=answered,
    )  # fmt: skip


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
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    sampling_defaults: bool = False,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    control_tokens: bool = True,
    attention: AttentionConfig | None = None,
    bounded: bool | None = None,
    max_repeats: int = 0,
    min_new_tokens: int = 0,
    logprobs: bool = False,
    top_logprobs: int = 0,
    resume: str | os.PathLike[str] | None = None,
) -> Stream:
    """Generates from one prompt, one event per token.

    With `max_new_tokens`, the texts of all events join to the answer of `generate`. Without it the stream has no limit
    (with `stop_at_eos=False` it does not even stop at an end token) and uses a bounded cache: at most
    `attention.cache_size` entries, whatever the length of prompt and text (docs/streaming.md).

    All other arguments are as in `generate`.

    Args:
      prompt: a text or token ids; None: nothing yet, for a stream that is resumed or fed later.
      max_new_tokens: maximum tokens of a turn; None: no limit.
      bounded: whether to use a bounded cache; None: if there is no `max_new_tokens`, or the pattern needs it.
      resume: folder of a saved stream, which continues token for token.

    Returns a `Stream`, an iterator of `StreamEvent`; `feed` gives it further input, `save` writes it to disk. Raises
    as `generate` and `Stream.restore`, from this call, not from the first event.
    """
    sampling = choose_sampling(
        tokenizer, sampling_defaults, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, repetition_penalty=repetition_penalty,
        logit_bias=logit_bias,
    )  # fmt: skip
    return engine_of(model, tokenizer, attention).stream(
        prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop, stop_token_ids=stop_token_ids,
        stop_at_eos=stop_at_eos, control_tokens=control_tokens, bounded=bounded, max_repeats=max_repeats,
        min_new_tokens=min_new_tokens, logprobs=logprobs, top_logprobs=top_logprobs, resume=resume,
    )  # fmt: skip
