"""Generator: one model, one tokenizer, one pattern, everything prepared once.

    engine = sepjax.Generator(model, tokenizer)
    engine.generate(["The function", "A list"], max_new_tokens=64)     whole answers, all prompts in one batch
    engine.stream("Once")                                              text as it comes, an event a token
    engine.slots(8)                                                    requests that come and go

All three drive the same compiled steps (`sepjax.generation.device_loop`) and give the same tokens. A row of a batch is
what it would be alone: padding, neighbours and growing caches change none of its tokens.
"""

import os
from collections.abc import Callable, Mapping, Sequence

import jax

from sepjax.clocks import Clocks
from sepjax.config import AttentionConfig, ConfigError
from sepjax.config.checks import check_type
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation import saved
from sepjax.generation.batch import Generation, answer_all
from sepjax.generation.cache.sizes import bucket
from sepjax.generation.prepared import Prepared, laid_out, pattern_of
from sepjax.generation.prompts import Prompt, encode_prompts, grouped, row_keys
from sepjax.generation.readers import BoundedReader, GrowingReader, Reader
from sepjax.generation.row import RowSettings
from sepjax.generation.sampling import Sampling
from sepjax.generation.slots import Slots
from sepjax.generation.stream import Stream
from sepjax.model.transformer import Transformer
from sepjax.promotion import methods_as_usual
from sepjax.separators import warn_of_few_among

_STEPS_BETWEEN_STOP_CHECKS = 32
_MOST_ENGINES = 16  # of one model, kept for `engine_of`: they share its weights


@methods_as_usual("__init__", "generate", "stream", "slots")
class Generator:
    """Generates text with one model, tokenizer and attention pattern: whole answers, streams, continuous batching.

    It holds no reference to the model: after `del model` one copy of the weights remains.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        attention: AttentionConfig | None = None,
        *,
        consume: bool = False,
    ):
        """Prepares weights and tables (once per model), and checks settings.

        Args:
          model: from `sepjax.load`.
          tokenizer: the model's.
          attention: the pattern of all caches. None: growing caches use the pattern of training, bounded caches the one
            stored with the model (`Transformer.kept`) if there is one, resumed streams the one they were saved with.
          consume: if the layers take a gigabyte or more, delete the model's arrays while they are converted to the
            layout of generation, so that at most one kind of matrix is in memory twice. After that the model can only
            generate.

        Raises:
          ConfigError: a setting of the pattern is out of range, or the tokenizer does not fit the model.
        """
        self._of = Prepared.create(model, tokenizer, attention, consume=consume)
        self._is_told = attention is not None
        self._bounded_of = None if self._is_told or model.kept is None else self._of.under(model.kept)

    def __repr__(self) -> str:
        kept = f"; bounded: {self.kept.in_words()}" if self.kept != self.attention else ""
        return f"Generator({self._of.config.in_words()}; {self.attention.in_words()}{kept})"

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._of.tokenizer

    @property
    def attention(self) -> AttentionConfig:
        """The pattern of growing caches."""
        return self._of.attention

    @property
    def kept(self) -> AttentionConfig:
        """The pattern of bounded caches."""
        return self.prepared.attention

    @property
    def prepared(self) -> Prepared:
        """The prepared model of bounded caches, as streams and slots use it."""
        return self._bounded_of or self._of

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | Sequence[Sampling] | None = None,
        seed: int | Sequence[int] | jax.Array = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        stop_at_eos: bool = True,
        control_tokens: bool = True,
        bounded: bool | None = None,
        max_repeats: int = 0,
        min_new_tokens: int = 0,
        logprobs: bool = False,
        top_logprobs: int = 0,
        batch_size: int | None = None,
        answered: Callable[[Mapping[int, Generation]], object] | None = None,
    ) -> list[Generation]:
        """Generates one answer per prompt, in their order: all in one batch, or `batch_size` at a time.

        Args:
          prompts: one text, or a list of texts (with BOS in front if the model's own tokenizer adds it, never twice)
            or of lists of token ids.
          max_new_tokens: maximum tokens of an answer.
          sampling: settings for all prompts, or one per prompt (`Sampling.create`); None: greedy.
          seed: seed of sampling; one per prompt, or a typed key, makes an answer independent of its place in the list.
          stop, stop_token_ids: texts and tokens (control tokens too) that end an answer and are left out of its text.
          stop_at_eos: whether the model's own end tokens (`Tokenizer.end_ids`) end an answer.
          control_tokens: read names of control tokens in the prompts as control tokens; False: as plain text.
          bounded: whether caches have a fixed size, `kept.cache_size`; None: only if the pattern needs it ("watched").
          max_repeats: end an answer ("repetition") that repeats a sequence of tokens more often in a row; 0: never.
          min_new_tokens: minimum tokens before an end token is sampled or a stop text ends the answer.
          logprobs: return the tokens' log-probabilities by the model's logits (before bias, penalties, temperature).
          top_logprobs: also return those of this many most probable tokens at each step, at most 20.
          batch_size: maximum prompts per batch, grouped by length, longest first. None: all in one.
          answered: called after each batch with its answers, keyed by the index of their prompts.

        Returns:
          A `Generation` per prompt: text, token_ids, finish_reason, cache use and log-probabilities.

        Raises:
          ConfigError: settings out of range or incompatible, or caches larger than the memory.
          PromptError, TypeError: a prompt is empty, has ids outside the vocabulary, or is neither text nor ids.
          NotNumbers: the model's scores are NaN or infinite.
        """
        if max_new_tokens is None:
            raise ConfigError("generate needs max_new_tokens, got None; give a number, or use stream for no end")
        settings = RowSettings.create(
            self.tokenizer, stop=stop, stop_token_ids=stop_token_ids, stop_at_eos=stop_at_eos,
            max_new_tokens=max_new_tokens, max_repeats=max_repeats, logprobs=logprobs,
            top_logprobs=top_logprobs, min_new_tokens=min_new_tokens,
        )  # fmt: skip
        ids = encode_prompts(self.tokenizer, prompts, control_tokens=control_tokens)
        of, reader = self._caches(self.attention.pattern == "watched" if bounded is None else bounded)
        warn_of_few_among(ids, of.table, of.attention)
        sampling, keys = self._checked(sampling, len(ids)), row_keys(seed, len(ids))
        num_steps = _STEPS_BETWEEN_STOP_CHECKS if settings.stop or max_repeats else bucket(max_new_tokens)
        groups = grouped(ids, batch_size)
        return answer_all(of, reader, ids, settings, sampling, keys, num_steps, groups, answered)

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        stop_at_eos: bool = True,
        control_tokens: bool = True,
        bounded: bool | None = None,
        max_repeats: int = 0,
        min_new_tokens: int = 0,
        logprobs: bool = False,
        top_logprobs: int = 0,
        resume: str | os.PathLike[str] | None = None,
    ) -> Stream:
        """Generates from one prompt, one event per token.

        With `max_new_tokens`, the texts of all events join to the answer of `generate`. Without it the stream has no
        limit (with `stop_at_eos=False` it does not even stop at an end token) and uses a bounded cache: at most
        `kept.cache_size` entries, whatever the length of prompt and text (docs/streaming.md).

        All other arguments are as in `generate`.

        Args:
          prompt: a text or token ids; None: nothing yet, for a stream that is resumed or fed later.
          max_new_tokens: maximum tokens of a turn; None: no limit.
          bounded: whether to use a bounded cache; None: if there is no `max_new_tokens`, or the pattern needs it.
          resume: folder of a saved stream, which continues token for token with the pattern that it was saved with. If
            the generator was given another pattern, it is refused.

        Returns:
          A `Stream`, an iterator of `StreamEvent`. `feed` gives it further input, `save` writes it to disk.

        Raises:
          ConfigError, PromptError, TypeError: as `generate`, from this call, not from the first event.
          StreamStateError: as `Stream.restore`.
        """
        settings = RowSettings.create(
            self.tokenizer, stop=stop, stop_token_ids=stop_token_ids, stop_at_eos=stop_at_eos,
            max_new_tokens=max_new_tokens, max_repeats=max_repeats, logprobs=logprobs,
            top_logprobs=top_logprobs, min_new_tokens=min_new_tokens,
        )  # fmt: skip
        needs_bound = max_new_tokens is None or self.attention.pattern == "watched"
        of, reader = self._caches(needs_bound if bounded is None else bounded, resume)
        sampling = _one("sampling", sampling).check(self.tokenizer.vocab_size)
        events = Stream(of, reader, settings, sampling, seed=seed, control_tokens=control_tokens)
        if resume is not None:
            events.restore(resume)
        if prompt is not None:
            events.feed(prompt)
        return events

    def slots(
        self, rows: int, *, steps: int = 1, clocks: Clocks | None = None, pool: int = 0, ahead: int = 0
    ) -> Slots:  # fmt: skip
        """Continuous batching over bounded caches: requests that come and go in the rows of one compiled step.

        Args:
          rows: requests that generate at the same time.
          steps: decode steps per launch, before the host looks at the tokens. More steps mean less waiting for the
            host, and a longer time to first token.
          clocks: where to count the time of each phase.
          pool: additional rows of device memory for finished requests that were saved; they continue without a copy.
          ahead: additional rows whose prompts are prefilled while others generate; each starts when another request
            reaches its length. Worth the memory if `steps` is large.

        Raises:
          ConfigError: a pattern that a bounded cache does not support, or more rows than fit into memory.
        """
        return Slots(self.prepared, BoundedReader(self.prepared), rows, steps, clocks, pool=pool, ahead=ahead)

    def _checked(self, sampling: Sampling | Sequence[Sampling] | None, rows: int) -> Sampling:
        if isinstance(sampling, Sequence):
            each = [_one("one of sampling", x).check(self.tokenizer.vocab_size) for x in sampling]
            sampling = Sampling.of_rows(each, rows)
        return _one("sampling", sampling).check(self.tokenizer.vocab_size, rows)

    def _caches(self, bounded: bool, resume: str | os.PathLike[str] | None = None) -> tuple[Prepared, Reader]:
        """What a text's cache is of, and the way into it."""
        of = self.prepared if bounded else self._of
        if resume is not None and not self._is_told:
            attention = saved.attention_of(resume, self.attention, self.kept)
            of = of if attention == of.attention else of.under(attention)
        return of, BoundedReader(of) if bounded else GrowingReader(of)


def _one(name: str, sampling: Sampling | None) -> Sampling:
    if sampling is None:
        return Sampling.create()
    check_type(name, sampling, Sampling)
    return sampling


def engine_of(model: Transformer, tokenizer: Tokenizer, attention: AttentionConfig | None = None) -> Generator:
    """The Generator of these, the same at every call for as long as the model lives and keeps its parameters."""
    # A Generator holds its tokenizer, so the number is of no other one as long as the entry is there.
    key = id(tokenizer), pattern_of(model, tokenizer, attention), attention is None and (model.kept,)
    weights = laid_out(model)
    with weights.lock:
        made = weights.made
        engine = made.pop(key, None) or Generator(model, tokenizer, attention)
        made[key] = engine  # now the newest
        while len(made) > _MOST_ENGINES:
            del made[next(iter(made))]
    return engine
