"""The host's side of a row: its text from tokens as they come, and why it ends.

Text comes in whole characters only, and holds nothing of a stop string.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sepjax.array_typing import Int32
from sepjax.config import ConfigError, whole_number
from sepjax.data.tokenizer import IncrementalDecoder, Tokenizer
from sepjax.generation.cache.sizes import bucket
from sepjax.generation.lost import LOST

_FEW_ENDS = 16  # end tokens for which all programs are the same
_MOST_TOP = 20  # as many as the device finds


# This and the next are made for every token of every row, and a frozen dataclass takes five times as long.
class CacheUse(NamedTuple):
    """What a row's cache holds: entries and bytes."""

    held: int  # tokens in the cache
    seen: int  # tokens that have passed through it
    bytes: int  # of this row, in all arrays of the cache
    kept: int | None = None  # of those held, between sinks and recent window; None: not counted (only slots do)

    @property
    def kv_kept(self) -> float:
        """Share of the tokens seen that is still held; 1 before the first."""
        return self.held / self.seen if self.seen else 1.0


class StreamEvent(NamedTuple):
    """One new token, or several that came at once (`Row.take_all`)."""

    text: str  # the text that is now certain: whole characters, nothing of a stop string; may be empty
    token_ids: tuple[int, ...]
    # None: goes on; "stop": a stop string or token; "eos": the model's end token; "length"; "repetition"; "full": the
    # cache of `keep_all_separators` has no room for another separator (of slots; without a token if a prompt fills it);
    # "error": the model's scores are no numbers (of slots, without a token; all else raises `lost.NotNumbers`)
    finish_reason: str | None
    cache: CacheUse
    # log-probability of the token by the model's own logits, before bias, penalties, temperature; None: not requested
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None  # (id, log-probability), the best first


@dataclasses.dataclass(frozen=True)
class Ends:
    """The tokens that end a row, by the reason they give. Made by `create`."""

    eos: frozenset[int]
    stop: frozenset[int]

    @classmethod
    def create(cls, tokenizer: Tokenizer, stop_at_eos: bool, stop_token_ids: Any) -> "Ends":
        """The model's own end tokens, if they are to end a row, and those that the user asks for.

        Raises:
          TypeError: no token ids.
          ConfigError: ids outside the vocabulary.
        """
        if isinstance(stop_token_ids, (str, bytes)) or not isinstance(stop_token_ids, (Sequence, set, np.ndarray)):
            raise TypeError(f"stop_token_ids must be a list of token ids, got {stop_token_ids!r}")
        stop = frozenset(whole_number("an id of stop_token_ids", i, -(2**31)) for i in stop_token_ids)
        outside = sorted(i for i in stop if not 0 <= i < tokenizer.vocab_size)
        if outside:
            raise ConfigError(
                f"stop_token_ids has {outside[0]}, which is outside the vocabulary of {tokenizer.vocab_size} tokens"
            )
        return cls(frozenset(tokenizer.end_ids if stop_at_eos else ()), stop)

    def array(self) -> Int32[np.ndarray, "E"]:
        """All of them for the device, filled up with -1: other sets of up to 16 are no other program."""
        ids = sorted(self.eos | self.stop)
        size = _FEW_ENDS if len(ids) <= _FEW_ENDS else bucket(len(ids))
        return np.array(ids + [-1] * (size - len(ids)), np.int32)

    def reason(self, token: int) -> str | None:
        """Why the row ends after this token; None: it does not."""
        return "eos" if token in self.eos else "stop" if token in self.stop else None


def check_stop(stop: Any) -> tuple[str, ...]:
    """Stop strings as a tuple; raises TypeError for other things than text, ConfigError for an empty one."""
    given = (stop,) if isinstance(stop, str) else stop
    if isinstance(given, bytes) or not isinstance(given, (Sequence, set)) or not all(isinstance(s, str) for s in given):
        raise TypeError(f"stop must be a text or a list of texts, got {stop!r}")
    stop = tuple(given)
    if "" in stop:
        raise ConfigError("a stop string is empty: it would end every text before its first token")
    return stop


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What the host wants of a row. Made by `create`."""

    stop: tuple[str, ...]
    ends: Ends
    max_new_tokens: int | None  # None: without end
    max_repeats: int  # see `RepetitionGuard`
    logprobs: bool
    top_logprobs: int  # as many of the most probable tokens; with their log-probabilities, and the token's
    min_new_tokens: int  # tokens before which neither an end token comes nor a stop string ends it

    @classmethod
    def create(
        cls,
        tokenizer: Tokenizer,
        *,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        stop_at_eos: bool = True,
        max_new_tokens: int | None = None,
        max_repeats: int = 0,
        logprobs: bool = False,
        top_logprobs: int = 0,
        min_new_tokens: int = 0,
    ) -> "RowSettings":
        """See `Generator.generate` for the arguments and errors."""
        if max_new_tokens is not None:
            max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
        min_new_tokens = whole_number("min_new_tokens", min_new_tokens, about=" (none)")
        if max_new_tokens is not None and min_new_tokens > max_new_tokens:
            raise ConfigError(f"min_new_tokens={min_new_tokens} must be at most max_new_tokens={max_new_tokens}")
        max_repeats = whole_number("max_repeats", max_repeats, about=" (as often as it likes)")
        most = min(_MOST_TOP, tokenizer.vocab_size)
        top_logprobs = whole_number("top_logprobs", top_logprobs, 0, most, about=" (none)")
        ends = Ends.create(tokenizer, stop_at_eos, stop_token_ids)
        asks = logprobs or top_logprobs > 0, top_logprobs
        return cls(check_stop(stop), ends, max_new_tokens, max_repeats, *asks, min_new_tokens)


class Row:
    """One text as it comes: what of it is certain, how long it may still get, and why it has ended.

    Attributes:
      seen: tokens that the cache has taken up.
      finish_reason: None while the text goes on.
      wants_logprobs, wants_top: whether anyone asks for the tokens' log-probabilities, for the most probable tokens.
      joins: whether `take_all` may be asked: no token need be looked at by itself.
    """

    LAST_POSITION = 2**31 - 1  # where positions are those of the text: they are int32

    def __init__(
        self, tokenizer: Tokenizer, settings: RowSettings, *, continues: bool, seen: int = 0, has_end: bool = False
    ):
        """Begins a text.

        Args:
          tokenizer: the model's.
          settings: when it ends.
          continues: whether text stands before it (`Tokenizer.decode`).
          seen: tokens that the cache has taken up so far.
          has_end: whether the text ends with the positions that int32 has.
        """
        self._text = TextUntilStop(tokenizer, settings.stop, continues=continues)
        self._guard = RepetitionGuard(settings.max_repeats)
        self._settings, self._has_end = settings, has_end
        self._left, self._early = self._limit(), settings.min_new_tokens
        self.wants_logprobs, self.wants_top = settings.logprobs, settings.top_logprobs > 0
        self.joins = not (settings.logprobs or settings.stop or settings.max_repeats)
        self.seen = seen
        self.finish_reason: str | None = None
        self._restored: tuple[int, str | None] = (-1, None)  # tokens seen then, and why it had ended

    @property
    def left(self) -> int:
        """Tokens that it may still get; below 0: without end."""
        return self._left

    @property
    def is_early(self) -> bool:
        """Whether its next token comes before it may end by one (`min_new_tokens`): the device must draw no such."""
        return self._early > 0

    def _limit(self) -> int:
        return -1 if self._settings.max_new_tokens is None else self._settings.max_new_tokens

    def take(
        self,
        token: int,
        *,
        taken: int,
        held: int,
        nbytes: int,
        logprob: float = 0.0,
        top: tuple[Any, Any] = ((), ()),
        kept: int | None = None,
        is_full: bool = False,
    ) -> StreamEvent:
        """The event of one more token.

        Args:
          token: which.
          taken: tokens that the cache has taken up since the last one.
          held: tokens that it holds now.
          nbytes: of the row's part of it.
          logprob: of the token.
          top: the most probable tokens and their log-probabilities, as many as anyone asks for or more.
          kept: of those that it holds, as `CacheUse` has it.
          is_full: whether the row must end here, whatever else: its cache has no room.
        """
        if token == LOST:
            return self.end_without("error", taken=taken, held=held, nbytes=nbytes, kept=kept)
        self.seen += taken
        self._left -= 1
        ends = self._settings.ends.reason(token)
        # A stop token is no part of the text.
        text = "" if ends == "stop" else self._text.feed(token, may_stop=not self.is_early)
        repeats = self._guard.feed(token)  # also its last token: a text that has come to its length may be gone on with
        self._early -= 1
        if self._text.stopped:
            self.finish_reason = "stop"
        elif ends:
            self.finish_reason = ends
        elif not self._left or not self._positions_left():
            self.finish_reason = "length"
        elif repeats:
            self.finish_reason = "repetition"
        elif is_full:
            self.finish_reason = "full"
        if self.finish_reason is not None and not self._text.stopped:
            text += self._text.flush()
        use = CacheUse(held, self.seen, nbytes, kept)
        if not self._settings.logprobs:
            return StreamEvent(text, (token,), self.finish_reason, use)
        n = self._settings.top_logprobs
        best = tuple((int(i), float(x)) for i, x in zip(top[0][:n], top[1][:n], strict=True)) if n else None
        return StreamEvent(text, (token,), self.finish_reason, use, logprob, best)

    def up_to_end(self, tokens: list[int]) -> list[int]:
        """Those of the next tokens that belong to the row: up to its end by one of them, or by its length."""
        ends = self._settings.ends
        if not (ends.eos.isdisjoint(tokens) and ends.stop.isdisjoint(tokens)):
            tokens = tokens[: next(i for i, token in enumerate(tokens, 1) if ends.reason(token))]
        tokens = tokens if self._left < 0 else tokens[: self._left]
        return tokens[: self._positions_left()]

    def _positions_left(self) -> int:
        """Tokens that may still come before the text has no more positions."""
        return max(0, self.LAST_POSITION - 1 - self.seen) if self._has_end else self.LAST_POSITION

    def take_all(self, tokens: list[int], *, held: int, nbytes: int, kept: int | None = None) -> StreamEvent:
        """One event of tokens that came at once, as `take` gives many; of rows that may (`joins`).

        Args:
          tokens: one at least, `up_to_end`; the cache has taken up as many.
          held, nbytes, kept: as `take` has them, after the last one.
        """
        self.seen += len(tokens)
        self._left -= len(tokens)
        self._early -= len(tokens)
        self.finish_reason = self._settings.ends.reason(tokens[-1])
        text = self._text.feed_all(tokens[:-1] if self.finish_reason == "stop" else tokens)
        if self.finish_reason is None and not (self._left and self._positions_left()):
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._text.flush()
        return StreamEvent(text, tuple(tokens), self.finish_reason, CacheUse(held, self.seen, nbytes, kept))

    def end_without(self, reason: str, *, taken: int, held: int, nbytes: int, kept: int | None) -> StreamEvent:
        """The event of an end without a token: "full" (no room for the rest of what is to be read), "error"."""
        self.seen += taken
        self.finish_reason = reason
        return StreamEvent(self._text.flush(), (), self.finish_reason, CacheUse(held, self.seen, nbytes, kept))

    def state(self) -> dict[str, Any]:
        """Where it stands, for `restore`: plain JSON; what was restored and got no token since is as it was."""
        seen, ended = self._restored
        return {
            "seen": self.seen,
            "finish_reason": ended if self.seen == seen and self.finish_reason is None else self.finish_reason,
            "text": self._text.state(),
            "guard": self._guard.state(),
        }

    def end_of(self, state: dict[str, Any]) -> str | None:
        """Why a text that goes on where `state` was taken has ended: not by the number of its tokens, which is counted
        anew (but for the last that there are positions for), nor by repetition that these settings allow.
        """
        is_last = self._has_end and state["seen"] + 1 >= self.LAST_POSITION
        is_over = {"length": is_last, "repetition": self._settings.max_repeats > 0}
        return state["finish_reason"] if is_over.get(state["finish_reason"], True) else None

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, for as many more tokens as these settings say."""
        self.seen, self.finish_reason, self._left = state["seen"], self.end_of(state), self._limit()
        self._restored = state["seen"], state["finish_reason"]
        self._early = self._settings.min_new_tokens
        self._text.restore(state["text"])
        self._guard.restore(state["guard"])


class TextUntilStop:
    """The text of one row up to its first stop string, which may run over several tokens.

    Text that may be the beginning of a stop string is held back until that is decided. Of several stop strings the one
    that is complete first counts, so the text does not depend on where tokens begin and end.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, continues: bool):
        """See `Tokenizer.decode` for `continues`. Stop strings are not empty."""
        self._decoder = IncrementalDecoder(tokenizer, continues=continues)
        self._stop = stop
        self._first = {s[0] for s in stop}
        self._held = ""
        self._passed = 0  # characters of what is held in which no stop string may end
        self.stopped = False

    def feed(self, token: int, *, may_stop: bool = True) -> str:
        """The text that is certain after `token`, and `stopped` if it completes a stop string and `may_stop`."""
        text = self._decoder.feed(token)
        if not self._held and self._first.isdisjoint(text):  # nearly all tokens
            return text
        self._held += text
        if not may_stop:
            self._passed = len(self._held)
        places = [(s, self._held.find(s, max(0, self._passed - len(s) + 1))) for s in self._stop]
        found = [(at + len(s), at) for s, at in places if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - max((_overlap(self._held, s) for s in self._stop), default=0))

    def feed_all(self, tokens: Sequence[int]) -> str:
        """The text that is certain after all of these; where there are no stop strings."""
        if self._held:  # by those of another turn
            return "".join(map(self.feed, tokens))
        return self._decoder.feed_all(tokens)

    def flush(self) -> str:
        """The rest of a text that ends without a stop string; an unfinished character becomes U+FFFD."""
        return self._release(len(self._held)) + self._decoder.flush()

    def state(self) -> dict[str, Any]:
        """What is held back, for `restore`: plain JSON."""
        words = {"held": self._held, "passed": self._passed, "stopped": self.stopped}
        return {**words, "decoder": self._decoder.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._held, self.stopped = state["held"], state["stopped"]
        self._passed = state["passed"]
        self._decoder.restore(state["decoder"])

    def _release(self, size: int) -> str:
        text, self._held, self._passed = self._held[:size], self._held[size:], max(0, self._passed - size)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, not the whole of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class RepetitionGuard:
    """Notices when a text has become the same few tokens over and over."""

    LONGEST = 64  # tokens of a run that is found when it repeats
    LEAST = 32  # tokens that must have repeated: a row of dashes is no failure

    def __init__(self, most: int):
        """`most`: how often the same run of tokens may come in a row; 0: as often as it likes."""
        self._most = most
        self._recent: deque[int] = deque(maxlen=self.LONGEST)
        self._matched: dict[int, int] = {}  # for each p: tokens in a row that equal the one p before, if any

    def feed(self, token: int) -> bool:
        """Whether the tokens so far end in more than `most` copies of one run."""
        if not self._most:
            return False
        matched = {}
        if token in self._recent:
            before = self._matched
            for p, other in enumerate(reversed(self._recent), 1):
                if other == token:
                    matched[p] = before.get(p, 0) + 1
        self._matched = matched
        self._recent.append(token)
        return any(n >= self.LEAST and n >= p * self._most for p, n in matched.items())

    def state(self) -> dict[str, Any]:
        """What has come so far, for `restore`: plain JSON."""
        matched = [self._matched.get(p, 0) for p in range(1, self.LONGEST + 1)]
        return {"recent": list(self._recent), "matched": matched}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._recent = deque(state["recent"], maxlen=self.LONGEST)
        self._matched = {p: n for p, n in enumerate(state["matched"], 1) if n}
