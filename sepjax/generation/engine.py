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
from sepjax.separators import warn_of_few_among

_STEPS_BETWEEN_STOP_CHECKS = 32
_MOST_ENGINES = 16  # of one model, kept for `engine_of`: they share its weights


class Generator:
    """Generates text. Holds no reference to the model: after `del model` one copy of the weights remains."""

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
          attention: the pattern of all caches. None: growing caches use the trained one, bounded caches what is stored
            with the model (`Transformer.kept`) if anything is, and resumed streams the one they were saved with.
          consume: whether the model is given up: layers of a gigabyte and more are deleted while they are laid out, so
            that at most one kind of their matrices is in memory twice. It can generate still, and nothing else.

        Raises:
          ConfigError: a pattern out of range, or a tokenizer that is not the model's.
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
        """The pattern of caches that grow."""
        return self._of.attention

    @property
    def kept(self) -> AttentionConfig:
        """The pattern of bounded caches."""
        return self.prepared.attention

    @property
    def prepared(self) -> Prepared:
        """What bounded caches use, those of slots among them."""
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
          prompts: one text, or a list of texts (BOS goes in front where the model's own tokenizer puts it, never twice)
            or of token ids.
          max_new_tokens: most tokens of an answer.
          sampling: settings for all prompts, or one per prompt (`Sampling.create`); None: greedy.
          seed: of sampling; one per prompt, or a typed key, makes each answer independent of its place in the list.
          stop, stop_token_ids: texts and tokens (control tokens too) that end an answer and are left out of its text.
          stop_at_eos: whether the model's own end tokens (`Tokenizer.end_ids`) end an answer.
          control_tokens: read names of control tokens in the prompts as control tokens; False: as plain text.
          bounded: whether a row's cache is bounded by `kept.cache_size`, whatever the lengths; None: where the
            pattern asks for it ("watched").
          max_repeats: an answer ends ("repetition") once it repeats one run of tokens more often in a row; 0: never.
          min_new_tokens: before so many no token that would end the answer is drawn, and no stop text ends it.
          logprobs: whether answers tell the log-probabilities of their tokens by the model's own scores, before bias,
            penalties, temperature and the like.
          top_logprobs: the same of as many of the most probable tokens at each step, up to 20, and of the token.
          batch_size: most prompts per batch; prompts of similar length share one, longest first. None: all in one.
          answered: called after each batch with its answers, keyed by the index of their prompts.

        Raises:
          ConfigError: settings out of range or impossible together, or caches larger than the memory.
          PromptError, TypeError: a prompt of no tokens, or with ids that there are not; things that are not text.
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
          max_new_tokens: most tokens of a turn; None: no limit.
          bounded: whether to use the bounded cache; None: where there is no `max_new_tokens`, or the pattern asks for
            it.
          resume: folder of a stream that was saved; it goes on there, token for token, with the settings that it had
            unless the generator was given others, which are refused where they differ.

        Returns:
          A `Stream`: it takes further input with `feed`, and goes to disk with `save`.

        Raises:
          ConfigError, PromptError, TypeError: as `generate`, from this call, not from the first event.
          StreamStateError: what `Stream.restore` raises.
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
          rows: requests that run at the same time.
          steps: tokens of each that the device may make before the host looks at them. With more of them the
            device waits less for the host, and the time to first token is longer.
          clocks: that tell where the time goes.
          pool: rows of memory more, for those that have ended and were saved: they go on from there without a copy.
          ahead: and rows for requests whose prompts are read beside those that are answered, and which take their turn
            from whoever comes to its length. Worth their memory where `steps` are many.

        Raises ConfigError for a pattern that a bounded cache cannot serve, or more rows than memory holds.
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
