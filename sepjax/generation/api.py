"""`sepjax.generate` and `sepjax.stream`: text from a model in one call, over the model's own `Generator`.

model, tokenizer = sepjax.load("runs/tiny")
sepjax.generate(model, tokenizer, ["The function", "A list"], max_new_tokens=64)[0].text
"""

import os
from collections.abc import Mapping, Sequence

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
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    stop_at_eos: bool = True,
    control_tokens: bool = True,
    attention: AttentionConfig | None = None,
    bounded: bool | None = None,
    max_repeats: int = 0,
    logprobs: bool = False,
    top_logprobs: int = 0,
) -> list[Generation]:
    """Continues prompts, all in one batch; returns an answer to each.

    The first call for a model lays its weights out (see `sepjax.Generator`); later ones find them.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      prompts: one text, or a list whose items are texts (BOS goes in front where the model's own tokenizer puts it,
        unless the text begins with it) or token ids.
      max_new_tokens: tokens after which an answer ends.
      temperature: 0, the default, always takes the best token; above, `top_k`, `top_p` and `min_p` say what to draw
        from (`sepjax.Sampling`).
      top_k: the k best tokens; 0, the default: all.
      top_p: the fewest tokens that together reach this probability; default: 1, all.
      min_p: tokens at least so many times as probable as the best; default: 0, all.
      presence_penalty: taken off the scores of tokens that were generated in this answer, as OpenAI has it; default: 0.
      frequency_penalty: the same, as many times as they were generated; default: 0.
      repetition_penalty: scores above 0 of all tokens of prompt and answer are divided by it, those below multiplied,
        as Hugging Face has it; default: 1, none.
      logit_bias: added to the scores of up to 300 tokens, by id.
      sampling_defaults: whether what of temperature, top_k, top_p, min_p and repetition_penalty is not given is as in
        the model's generation_config.json.
      seed: of the draws; one a prompt makes each answer independent of its place in the list.
      stop: texts that end an answer and are left out of it.
      stop_token_ids: tokens that end an answer and are left out of its text; control tokens too.
      stop_at_eos: whether the model's own end tokens (`Tokenizer.end_ids`) end an answer.
      control_tokens: whether names of control tokens in the prompts' texts are these tokens; False: plain text.
      attention: another pattern than the model was trained with.
      bounded: whether a row's cache is bounded by `attention.cache_size`, whatever the lengths; None: where the pattern
        asks for it ("watched").
      max_repeats: ends an answer ("repetition") once it has repeated the same run of tokens more often in a row; 0:
        never.
      logprobs: whether answers tell the log-probabilities of their tokens by the model's own scores, before bias,
        penalties, temperature and the like.
      top_logprobs: the same of as many of the most probable tokens at each step, up to 20, and of the token.

    Raises:
      ConfigError: settings out of range or impossible together.
      PromptError: a prompt without tokens, or with ids outside the vocabulary.
      TypeError: prompts or stop strings that are not text.
    """
    sampling = choose_sampling(
        tokenizer, sampling_defaults, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, repetition_penalty=repetition_penalty,
        logit_bias=logit_bias,
    )  # fmt: skip
    return engine_of(model, tokenizer, attention).generate(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop, stop_token_ids=stop_token_ids,
        stop_at_eos=stop_at_eos, control_tokens=control_tokens, bounded=bounded, max_repeats=max_repeats,
        logprobs=logprobs, top_logprobs=top_logprobs,
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
    logprobs: bool = False,
    top_logprobs: int = 0,
    resume: str | os.PathLike[str] | None = None,
) -> Stream:
    """Continues one prompt, an event a token.

    With `max_new_tokens` the texts of all events join to what `generate` answers. Without, the stream has no end (with
    `stop_at_eos=False` not even at an end of text) and runs over a bounded cache: at most `attention.cache_size`
    entries, whatever the length of prompt and text (docs/streaming.md).

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      prompt: a text or token ids; None: nothing yet, for a stream that is resumed or fed later.
      max_new_tokens: tokens after which a turn ends; None: without end.
      temperature: see `generate`, for all that is not explained here.
      top_k: see there.
      top_p: see there.
      min_p: see there.
      presence_penalty: see there.
      frequency_penalty: see there.
      repetition_penalty: see there.
      logit_bias: see there.
      sampling_defaults: see there.
      seed: see there.
      stop: see there.
      stop_token_ids: see there.
      stop_at_eos: see there.
      control_tokens: see there.
      attention: see there.
      bounded: whether to use the bounded cache; None: where there is no `max_new_tokens`, or the pattern asks for it.
      max_repeats: see there.
      logprobs: see there.
      top_logprobs: see there.
      resume: folder of a stream that was saved; it goes on there, token for token.

    Returns:
      A `Stream`: it takes further input with `feed`, and goes to disk with `save`.

    Raises:
      As `generate`, from this call, not from the first event; and what `Stream.restore` raises.
    """
    sampling = choose_sampling(
        tokenizer, sampling_defaults, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, repetition_penalty=repetition_penalty,
        logit_bias=logit_bias,
    )  # fmt: skip
    return engine_of(model, tokenizer, attention).stream(
        prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop, stop_token_ids=stop_token_ids,
        stop_at_eos=stop_at_eos, control_tokens=control_tokens, bounded=bounded, max_repeats=max_repeats,
        logprobs=logprobs, top_logprobs=top_logprobs, resume=resume,
    )  # fmt: skip
