"""What clients read: whole answers and chunks of them, in the forms of chats and of completions."""

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from sepjax.generation.row import CacheUse, StreamEvent
from sepjax.hub.tool_calls import CallFinder
from sepjax.serve.errors import ApiError
from sepjax.serve.jobs import Begun, Failed, Item
from sepjax.serve.protocol import Wanted
from sepjax.serve.served import Served

DONE = b"data: [DONE]\n\n"
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "repetition": "stop", "full": "length"}


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _json(body) + b"\n\n"


def _json(body: Any) -> bytes:
    return _ENCODE(body).encode()


@dataclasses.dataclass
class _Choice:
    """One answer as it comes."""

    prompt_tokens: int
    cached: int = 0
    num_tokens: int = 0
    finish_reason: str | None = None
    is_begun: bool = False
    offset: int = 0  # characters of the tokens so far, for the completions' text_offset
    text: str = ""  # of an answer in one piece
    finder: CallFinder | None = None
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # found so far
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Answer:
    """The answer to one request, of one choice or several.

    Attributes:
      id: of the response.
      choices: where each stands.
    """

    def __init__(
        self, id: str, served: Served, wanted: Wanted, *, is_chat: bool, prompt_tokens: Sequence[int],
        finds_calls: bool = False,
    ):  # fmt: skip
        """`prompt_tokens`: of each choice; `finds_calls`: whether calls of tools are looked for in what they say."""
        self.id, self._served, self._wanted, self._is_chat = id, served, wanted, is_chat
        self.choices = [_Choice(tokens, finder=CallFinder() if finds_calls else None) for tokens in prompt_tokens]
        self._stop_token_ids = served.ends(wanted, is_chat=is_chat)["stop_token_ids"]
        self._created = int(time.time())
        head = self._head("chat.completion.chunk" if is_chat else "text_completion")
        self._begin = b"data: " + _json(head)[:-1] + b","  # of every chunk: what is always the same is written once

    @property
    def is_done(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    # -- in one piece -----------------------------------------------------------------------------------------------

    def add(self, items: Sequence[tuple[int, Item]]) -> None:
        """Takes up what has come. Raises the ApiError of a choice that failed."""
        for number, item in items:
            choice = self.choices[number]
            choice.logprobs += self._take(choice, item)
            if isinstance(item, StreamEvent):
                choice.text += self._said(choice, item.text)[0]

    def whole(self) -> dict[str, Any]:
        """The JSON of an answer that is done."""
        choices = [self._whole_choice(number, choice) for number, choice in enumerate(self.choices)]
        return self._head("chat.completion" if self._is_chat else "text_completion") | {
            "choices": choices,
            "usage": self.usage(),
        }

    def _whole_choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        said: dict[str, Any] = {"text": choice.text}
        if self._is_chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            said = {"message": message}
        logprobs = self._logprobs(choice.logprobs) if self._wanted.logprobs is not None else None
        return {"index": number, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    # -- in chunks --------------------------------------------------------------------------------------------------

    def chunks(self, items: Sequence[tuple[int, Item]]) -> list[bytes]:
        """Events of what has come: one a choice at most, however many tokens. Raises as `add`."""
        found: dict[int, list[Item]] = {}
        for number, item in items:
            found.setdefault(number, []).append(item)
        chunks = [self._chunk(number, its) for number, its in found.items()]
        if self.is_done and self._wanted.include_usage:
            chunks.append({"choices": [], "usage": self.usage()})
        written = [self._begin + _json(chunk)[1:] + b"\n\n" for chunk in chunks if chunk is not None]
        return written + ([DONE] if self.is_done else [])

    def _chunk(self, number: int, items: list[Item]) -> dict[str, Any] | None:
        choice, is_first = self.choices[number], not self.choices[number].is_begun
        logprobs = [token for item in items for token in self._take(choice, item)]
        events = [item for item in items if isinstance(item, StreamEvent)]
        text, calls = self._said(choice, "".join(item.text for item in events))
        wants_cache = self._wanted.include_cache and bool(events)
        if not (text or calls or logprobs or choice.finish_reason or wants_cache or (is_first and self._is_chat)):
            return None
        choice.is_begun = True
        said: dict[str, Any] = {"text": text}
        if self._is_chat:
            delta = ({"role": "assistant"} if is_first else {}) | ({"content": text} if text or is_first else {})
            numbers = range(len(choice.calls) - len(calls), len(choice.calls))
            called = [{"index": i} | call for i, call in zip(numbers, calls, strict=True)]
            said = {"delta": delta | ({"tool_calls": called} if called else {})}
        listed = self._logprobs(logprobs) if self._wanted.logprobs is not None else None
        said = {"index": number, **said, "logprobs": listed, "finish_reason": choice.finish_reason}
        chunk: dict[str, Any] = {"choices": [said]}
        if self._wanted.continuous_usage_stats:
            chunk["usage"] = self.usage()
        elif self._wanted.include_usage:
            chunk["usage"] = None
        return chunk | ({"cache": _cache(events[-1].cache, self._served)} if wants_cache else {})

    # -- both -------------------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices so far; a prompt of several choices counts once, as far as it was read for all."""
        per_prompt = self.choices[:: self._wanted.n]
        prompt, new = sum(c.prompt_tokens for c in per_prompt), sum(c.num_tokens for c in self.choices)
        cached = sum(choice.cached for choice in per_prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._served.name,
            "system_fingerprint": f"fp_{self._served.fingerprint[:12]}",
        }

    def _take(self, choice: _Choice, item: Item) -> list[dict[str, Any]]:
        """Counts an item; returns the log-probabilities of its tokens, but for a token that ends the answer."""
        if isinstance(item, Failed):
            raise item.error
        if isinstance(item, Begun):
            choice.cached = item.cached
        if not isinstance(item, StreamEvent):
            return []
        choice.num_tokens += len(item.token_ids)
        if item.finish_reason is not None:
            choice.finish_reason = _REASONS[item.finish_reason]
        by_token = item.finish_reason == "stop" and any(i in self._stop_token_ids for i in item.token_ids)
        ends = item.finish_reason == "eos" or by_token
        if self._wanted.logprobs is None or ends:
            return []
        return [self._logprob(choice, token, item) for token in item.token_ids]

    def _said(self, choice: _Choice, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What of this text and of what was held back before it is content, and new calls in it."""
        if choice.finder is None:
            return text, []
        text, found = choice.finder.take(text, ends=choice.finish_reason is not None)
        calls = [{"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": x._asdict()} for x in found]
        choice.calls += calls
        if choice.calls and choice.finish_reason == "stop":
            choice.finish_reason = "tool_calls"
        return text, calls

    def _logprob(self, choice: _Choice, token: int, item: StreamEvent) -> dict[str, Any]:
        tops = [self._one(top, logprob) for top, logprob in item.top_logprobs or ()]
        found = self._one(token, item.logprob) | {"offset": choice.offset, "top_logprobs": tops}
        choice.offset += len(found["token"])
        return found

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._served.tokenizer.token_bytes(token)
        return {"token": self._served.token_text(token), "logprob": logprob, "bytes": list(data)}

    def _logprobs(self, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        """In the form of chats or of completions."""
        if self._is_chat:
            names = ("token", "logprob", "bytes", "top_logprobs")
            return {"content": [{name: token[name] for name in names} for token in tokens], "refusal": None}
        tops = [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens]
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": tops if self._wanted.logprobs else None,
            "text_offset": [token["offset"] for token in tokens],
        }


def _cache(use: CacheUse, served: Served) -> dict[str, Any]:
    """What the row's cache holds, for a gauge."""
    zones = served.zones(use)._asdict()
    return {"held": use.held, "size": served.cache_size, "bytes": use.bytes, "seen": use.seen, **zones}


def error_event(error: ApiError) -> bytes:
    """An error behind the beginning of a stream: the status has gone out already."""
    return event(error.body())
