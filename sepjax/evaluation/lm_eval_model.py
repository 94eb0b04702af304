"""A model of ours for EleutherAI's lm-eval, which brings prompts and scoring (https://github.com/EleutherAI/lm-evaluation-harness).

Continuations are scored by `sepjax.evaluation.scoring` under the pattern's mask; answers are generated over the real
cache, which evicts what the pattern drops. Of every request the keys that were held and the tokens seen are noted.
Importing this module registers the model as "sepjax": `lm_eval --model sepjax --model_args path=smollm2-135m`, from a
program that has imported it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, override

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

import sepjax
from sepjax.config import PATTERNS, AttentionConfig, ConfigError, UserError, nearest, under, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.gold import Gold
from sepjax.evaluation.passes import rows_of_pass
from sepjax.evaluation.scoring import Continuation, score_continuations
from sepjax.generation.engine import Generator
from sepjax.hub.chat_template import ChatTemplate
from sepjax.model.transformer import Transformer
from sepjax.progress import counted

_MAX_NEW = 256  # tokens of an answer where the task does not say: lm-eval's own default
_IGNORED = {"do_sample", "until", "max_gen_toks", "max_new_tokens", "temperature", "top_k", "top_p", "seed"}


class RequestError(UserError, ValueError):
    """A request of a task that this model cannot serve."""


@dataclasses.dataclass(frozen=True)
class Use:
    """What one request held of what it saw: keys at the last token, averaged over layers, or slots of the cache."""

    held: float
    seen: int
    generated: int  # tokens; 0: none, a continuation was scored


def _timed[**P, R](answer: Callable[P, R]) -> Callable[P, R]:
    """A method of `SepjaxLM` whose time is added to `seconds`."""

    @functools.wraps(answer)
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        lm: Any = args[0]
        began = time.perf_counter()
        result = answer(*args, **kwargs)
        lm.seconds += time.perf_counter() - began
        return result

    return timed


class SepjaxLM(TemplateLM):
    """See this module.

    Attributes:
      uses: a `Use` for each request, by its identity.
      seconds: spent on requests so far: encoding, compilation and the device, but not lm-eval's prompts and statistics.
      computed: tokens that went through the model in that time; an input that requests share counts once.
    """

    def __init__(
        self,
        model: Transformer | None = None,
        tokenizer: Tokenizer | None = None,
        attention: AttentionConfig | None = None,
        *,
        path: str = "",
        pattern: str = "",
        window_size: int = 0,
        batch_size: int | str = 64,
        batch_tokens: int = 65_536,
        chat_template: ChatTemplate | None = None,
        encoded: dict[str, np.ndarray] | None = None,
        consume: bool = False,
        **ignored: Any,
    ):
        """A loaded model, or `path` of one; then `pattern` and `window_size` may change the attention.

        Args:
          model: from `sepjax.load`.
          tokenizer: the model's.
          attention: the pattern; None: the model's own.
          path: what `sepjax.load` reads, instead of model and tokenizer.
          pattern: attention.pattern.
          window_size: attention.window_size.
          batch_size: answers generated at a time.
          batch_tokens: tokens of a forward pass that scores.
          chat_template: the model's, for `--apply_chat_template`.
          encoded: token ids of texts, kept here for the next model that is asked the same.
          consume: whether the model is given up, as `Generator` has it, once answers are asked for; one of `path` is.
          ignored: of lm-eval's command line (device, max_batch_size), which do not apply.
        """
        super().__init__()
        if model is None or tokenizer is None:
            (model, tokenizer), consume = sepjax.load(path), True
        self._model, self._tokenizer, self._chat_template = model, tokenizer, chat_template
        self.attention = _changed(attention or model.attention, pattern, window_size, model.config.num_layers)
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 64
        self._batch_tokens, self._consume = batch_tokens, consume
        self._encoded = {} if encoded is None else encoded
        self.uses: dict[int, Use] = {}
        self.seconds = 0.0
        self.computed = 0

    @property
    @override
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    @property
    @override
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: what did so in training."""
        found = self._tokenizer.document_start
        found = self._tokenizer.bos_id if found is None else found
        if found is None:
            raise RequestError("a task scores text without a context, but the tokenizer has neither BOS nor EOS")
        return found

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self._model.config.max_positions

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # BOS where the model's own tokenizer puts one: Llama's does, byte-level ones do not.
        # Never a second one: a chat template may have written it.
        known = self._encoded.get(string)
        ids = self._tokenizer.encode(string) if known is None else known.tolist()
        return ids if add_special_tokens is False else self._tokenizer.with_bos(ids)

    def _encode_ahead(self, texts: Iterable[str]) -> None:
        """Encodes texts together, on all cores: one by one it takes longer than the model does."""
        new = sorted({text for text in texts if text not in self._encoded})
        ids, lengths = self._tokenizer.encode_flat(new)
        self._encoded.update(zip(new, np.split(ids, np.cumsum(lengths)[:-1]) if new else [], strict=True))

    @override
    @_timed
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        texts = [request.args for request in requests]
        # What `_encode_pair` will ask for.
        self._encode_ahead(text for pair in texts for text in (pair[0].rstrip(), "".join(pair)) if text)
        pairs = [self._pair(*pair) for pair in texts]
        found = self._score(pairs)
        for request, x in zip(requests, found, strict=True):
            if x.seen:
                self.uses[id(request)] = Use(x.held, x.seen, 0)
        return [(x.logprob, x.is_greedy) for x in found]

    @_timed
    def gold(self, answers: Sequence[Gold]) -> tuple[list[float], list[int]]:
        """For each right answer its nats as a whole, and its tokens; empty ones are left out.

        What tasks have not asked for is scored here, under the same mask; it is none of their requests, so `uses`
        does not count it.
        """
        self._encode_ahead(text for x in answers for text in (x.context.rstrip(), x.context + x.continuation) if text)
        pairs = [self._pair(x.context, x.continuation) for x in answers]
        new = iter(self._score([pair for x, pair in zip(answers, pairs, strict=True) if x.logprob is None]))
        known = [next(new).logprob if x.logprob is None else x.logprob for x in answers]
        scored = [(-nats, len(pair[1])) for nats, pair in zip(known, pairs, strict=True) if pair[1]]
        return [nats for nats, _ in scored], [tokens for _, tokens in scored]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            before, ids = self._encode_pair(context, continuation)
            return before or [self.prefix_token_id], ids  # a context of spaces alone goes to the continuation
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if len(ids) > 1 and ids[0] == self.prefix_token_id:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids

    @override
    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found = self._score([(context, continuation) for _, context, continuation in requests])
        return [(x.logprob, x.is_greedy) for x in found]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """The scores; an empty continuation is certain (log-probability 0), and the model is not asked for it."""
        asked = [pair for pair in pairs if pair[1]]
        scored = score_continuations(
            self._model,
            self._tokenizer,
            asked,
            self.attention,
            max_length=self.max_length,
            batch_tokens=self._batch_tokens,
        )
        self.computed += sum(x.computed for x in scored)
        found = iter(scored)
        return [next(found) if pair[1] else Continuation(0.0, True, 0.0, 0, 0) for pair in pairs]

    @override
    @_timed
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Whole texts in windows of the model's positions, each token once, as lm-eval cuts them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids  # the window puts it in front
            windows = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        found = self._score(pairs)
        totals = [0.0] * len(requests)
        for owner, x in zip(owners, found, strict=True):
            totals[owner] += x.logprob
            self.uses[id(requests[owner])] = Use(x.held, x.seen, 0)
        return totals

    @override
    @_timed
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers: list[str] = [""] * len(requests)
        for settings, numbers in _by_settings(requests).items():
            most, stop = settings
            ids = {i: self._prompt(requests[i].args[0], most) for i in numbers}
            # Prompts of like length together: the same few shapes, and little padding.
            ordered = sorted(numbers, key=lambda i: -len(ids[i]))
            rows = rows_of_pass(len(ordered), self._batch_size)
            firsts = range(0, len(ordered), rows)
            for first in counted(firsts, f"answering {len(ordered)} prompts", len(firsts), "passes"):
                batch = ordered[first : first + rows]
                filled = [*batch, *batch[-1:] * (rows - len(batch))]
                found = self._engine.generate(
                    [ids[i] for i in filled], max_new_tokens=most, stop=list(stop)
                )  # fmt: skip
                for i, answer in zip(batch, found, strict=False):
                    answers[i] = answer.text
                    self.uses[id(requests[i])] = Use(float(answer.cache.held), answer.cache.seen, len(answer.token_ids))
                    self.computed += answer.cache.seen
        return answers

    @functools.cached_property
    def _engine(self) -> Generator:
        """Made once, where a task asks for answers: most only score, with the model's weights as they are."""
        return Generator(self._model, self._tokenizer, self.attention, consume=self._consume)

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        """The last tokens of a prompt that leave room for the answer."""
        ids = self.tok_encode(text)
        room = self.max_length - new_tokens
        if room < 1:
            raise RequestError(f"{new_tokens} new tokens leave no room for a prompt in {self.max_length} positions")
        return ids[-room:] if ids else [self.prefix_token_id]

    @property
    @override
    def tokenizer_name(self) -> str:
        return "sepjax"

    @override
    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._template().source

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._template().render(chat_history, add_generation_prompt=add_generation_prompt)

    def _template(self) -> ChatTemplate:
        if self._chat_template is None:
            raise RequestError("the model has no chat template; leave out --apply_chat_template")
        return self._chat_template


register_model("sepjax")(SepjaxLM)


def _changed(attention: AttentionConfig, pattern: str, window_size: int, num_layers: int) -> AttentionConfig:
    if pattern and pattern not in PATTERNS:
        raise ConfigError(f"pattern={pattern!r} is not one of {', '.join(PATTERNS)}{nearest(pattern, PATTERNS)}")
    changes: dict[str, Any] = {}
    if window_size:
        changes |= {"window_size": int(window_size), "layer_windows": ()}
    changes["cache_size"] = 0  # of streams; tasks use the growing cache
    return validate_attention(under(attention, pattern or attention.pattern, **changes), num_layers)


def _by_settings(requests: Sequence[Instance]) -> dict[tuple[int, tuple[str, ...]], list[int]]:
    """Requests that may be answered together, by (new tokens, stop strings)."""
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for number, request in enumerate(requests):
        arguments: Any = request.args
        settings = dict(arguments[1])
        unknown = sorted(set(settings) - _IGNORED)
        if unknown or settings.get("do_sample") or settings.get("temperature"):
            raise RequestError(f"only greedy answers are served, got the generation settings {settings}")
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or _MAX_NEW)
        groups.setdefault((most, tuple(s for s in stop if s)), []).append(number)
    return groups
