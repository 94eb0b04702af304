"""A load of conversations on a server of OpenAI's protocol, and what its clients saw. Needs no JAX.

    conversations begin     as a Poisson stream of so many a second, or one as soon as another has ended
    a turn                  the earlier ones and a new message, answered as a stream; then a pause, and the next turn
    lengths                 lognormal: of messages and answers in tokens; turns are geometric

Texts are stretches of the language reference that every Python ships. An answer has the length that was drawn: all its
tokens are one word (`logit_bias`), so that a client's copy of it has the same ids and turns can continue their cache,
whatever the model. `sepjax bench serve` runs this as a process of its own: it and the server share no thread.
"""

import asyncio
import dataclasses
import json
import random
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

WARM = 0.25  # of the time: rows fill and conversations get older; not counted
_LOOK = 0.5  # seconds between two looks at /metrics
_PATIENCE = 300.0  # seconds for an answer to go on
# A line of /metrics whose number is of the whole server: with no label, or no other than the model's name.
_NUMBER = re.compile(r'sepjax:(\w+)(?:\{model_name="(?:[^"\\]|\\.)*"\})? (\S+)')


@dataclasses.dataclass(frozen=True)
class Plan:
    """One load."""

    url: str  # of the server, without a path
    seconds: float  # in which conversations begin; running turns then end
    rate: float  # conversations a second; 0: `users` at any time, without pauses
    users: int = 0
    prompt_median: float = 60.0  # tokens of a message
    prompt_sigma: float = 0.8  # of their logarithm
    answer_median: float = 120.0
    answer_sigma: float = 0.6
    turns: float = 4.0  # mean
    pause: float = 1.0  # seconds between an answer and the next turn, mean
    seed: int = 0
    api_key: str = ""


@dataclasses.dataclass
class Turn:
    """One request, by the client's clock, in seconds since the load began."""

    sent: float
    first: float | None = None  # when text came first
    last: float = 0.0
    tokens: int = 0
    begun: int = 1  # of these, those that came with the first text
    prompt_tokens: int = 0
    cached: int = 0
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds between two tokens, as a mean over those that came after the first text."""
        later = self.tokens - self.begun
        return None if self.first is None or later < 1 else (self.last - self.first) / later


class LoadError(Exception):
    """A server that cannot be measured, or an answer that is none."""


_FAILURES = (LoadError, OSError, ValueError, asyncio.IncompleteReadError, TimeoutError)  # of one request


# -- HTTP ----------------------------------------------------------------------------------------------------------


class Server:
    """One request a connection: a load has many clients."""

    def __init__(self, plan: Plan):
        parts = re.fullmatch(r"http://(\[[0-9a-fA-F:]+\]|[\w.-]+)(?::(\d{1,5}))?/?", plan.url)
        if parts is None:
            raise LoadError(f"the address must be like http://127.0.0.1:8000, got {plan.url!r}")
        self._host, self._port = parts[1].strip("[]"), int(parts[2] or 80)
        self._name = plan.url.removeprefix("http://").rstrip("/")
        self._key = f"Authorization: Bearer {plan.api_key}\r\n" if plan.api_key else ""

    async def pieces(self, path: str, body: Any = None) -> AsyncIterator[bytes]:
        """The body of an answer as it comes. Raises LoadError, OSError."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            data = b"" if body is None else json.dumps(body).encode()
            method = "GET" if body is None else "POST"
            head = f"{method} {path} HTTP/1.1\r\nHost: {self._name}\r\nConnection: close\r\n{self._key}"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            status = int((await _line(reader)).split()[1])
            headers: dict[bytes, bytes] = {}
            while line := (await _line(reader)).strip():
                name, _, value = line.partition(b":")
                headers[name.strip().lower()] = value.strip()
            if status != 200:
                said = await reader.read(500)
                raise LoadError(f"{status}: {said.decode(errors='replace')[:200]}")
            async for piece in _body(reader, headers):
                yield piece
        finally:
            writer.close()

    async def whole(self, path: str, body: Any = None) -> bytes:
        """The same in one piece."""
        return b"".join([piece async for piece in self.pieces(path, body)])

    async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
        """The JSON of server-sent events, until their end."""
        rest = b""
        async for piece in self.pieces(path, body):
            *parts, rest = (rest + piece).split(b"\n\n")
            for part in parts:
                data = part.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                yield json.loads(data)
        raise LoadError("an answer broke off")


async def _line(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readline(), _PATIENCE)


async def _body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
    if headers.get(b"transfer-encoding") == b"chunked":
        while size := int((await _line(reader)).strip() or b"0", 16):
            yield (await asyncio.wait_for(reader.readexactly(size + 2), _PATIENCE))[:-2]
    else:
        yield await asyncio.wait_for(reader.read(), _PATIENCE)


# -- the load ------------------------------------------------------------------------------------------------------


class Load:
    """One run of a plan."""

    def __init__(self, plan: Plan):
        self._plan, self._server, self._draws = plan, Server(plan), random.Random(plan.seed)
        self._words, self._per_word, self._bias = _words(), 1.5, {}
        self.turns: list[Turn] = []
        self.conversations = 0
        self.looks: list[dict[str, float]] = []
        self.metrics_error: str | None = None  # of the first look that failed
        self._begin, self._computing = 0.0, 0.0

    @property
    def now(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self._begin

    async def run(self) -> dict[str, Any]:
        """Runs it; returns `summary`. Raises LoadError, OSError where there is no server to begin with."""
        await self._learn()
        self._begin, self._computing, plan = time.perf_counter(), time.process_time(), self._plan
        looking = asyncio.create_task(self._look())
        if plan.rate:
            await self._stream()
        else:
            await asyncio.gather(*(self._user() for _ in range(plan.users)))
        looking.cancel()
        return self.summary()

    async def _learn(self) -> None:
        """How many tokens a word has, and the token that answers are made of."""
        some = " ".join(self._words[:2000])
        self._per_word = (await self._tokenize(some))["count"] / 2000
        self._bias = {str((await self._tokenize("the the the the"))["tokens"][-1]): 100}

    async def _tokenize(self, text: str) -> Any:
        return json.loads(await self._server.whole("/tokenize", {"prompt": text, "add_special_tokens": False}))

    async def _stream(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(self._draws.expovariate(self._plan.rate))
                if self.now > self._plan.seconds:
                    return
                tasks.create_task(self._talk(pause=self._plan.pause))

    async def _user(self) -> None:
        while self.now < self._plan.seconds:
            await self._talk(pause=0.0)

    async def _talk(self, *, pause: float) -> None:
        """One conversation."""
        self.conversations += 1
        messages: list[dict[str, str]] = []
        while True:
            messages.append({"role": "user", "content": self._message()})
            answer = await self._turn(messages)
            # Geometric: each turn is the last one with the same probability.
            if answer is None or self.now > self._plan.seconds or self._draws.random() < 1 / self._plan.turns:
                return
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(self._draws.expovariate(1 / pause) if pause else 0)

    def _message(self) -> str:
        tokens = self._length(self._plan.prompt_median, self._plan.prompt_sigma)
        count = max(1, round(tokens / self._per_word))
        start = self._draws.randrange(max(1, len(self._words) - count))
        return " ".join(self._words[start : start + count])

    def _length(self, median: float, sigma: float) -> int:
        return max(1, min(round(median * self._draws.lognormvariate(0.0, sigma)), 50 * round(median) + 50))

    async def _turn(self, messages: Sequence[dict[str, str]]) -> str | None:
        """Asks once; returns the answer, None where there was an error."""
        body = {
            "messages": messages, "max_tokens": self._length(self._plan.answer_median, self._plan.answer_sigma),
            "ignore_eos": True, "temperature": 0, "logit_bias": self._bias, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        turn, text, begun = Turn(self.now), "", ""
        self.turns.append(turn)
        try:
            async for chunk in self._server.events("/v1/chat/completions", body):
                if "error" in chunk:
                    raise LoadError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content", "")
                    if piece:
                        text, begun, turn.last = text + piece, begun or piece, self.now
                        turn.first = turn.last if turn.first is None else turn.first
                usage = chunk.get("usage")
                if usage:
                    turn.tokens, turn.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
                    turn.cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            if text:  # all tokens are one word
                turn.begun = max(1, round(turn.tokens * len(begun) / len(text)))
        except _FAILURES as error:
            turn.error = f"{type(error).__name__}: {error}"[:200]
            await asyncio.sleep(0.2)  # or a server that refuses would be asked without end
            return None
        return text

    async def _look(self) -> None:
        """Reads /metrics now and then."""
        while True:
            try:
                text = (await self._server.whole("/metrics")).decode()
                self.looks.append(numbers(text) | {"at": self.now})
            except _FAILURES as error:  # another server, say: what clients see is measured all the same
                self.metrics_error = self.metrics_error or f"{type(error).__name__}: {error}"[:200]
            await asyncio.sleep(_LOOK)

    # -- what came of it --------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Figures of the time behind the warm-up and before the last conversation began. Times in seconds."""
        begin, end = WARM * self._plan.seconds, self._plan.seconds
        asked = [turn for turn in self.turns if begin <= turn.sent < end]
        good = [turn for turn in asked if turn.error is None]
        first = [turn.first - turn.sent for turn in good if turn.first is not None]
        each = [x for turn in good if (x := turn.per_token) is not None]
        prompt, looks = sum(turn.prompt_tokens for turn in good), [x for x in self.looks if begin <= x["at"] < end]
        done = [turn for turn in self.turns if turn.error is None and begin <= turn.last < end]
        return {
            "rate": self._plan.rate, "users": self._plan.users, "seconds": self._plan.seconds,
            "conversations": self.conversations, "requests": len(asked), "errors": len(asked) - len(good),
            "metrics_error": self.metrics_error,
            "first_error": next((turn.error for turn in asked if turn.error), None),
            "first_token_p50": _quantile(first, 0.5), "first_token_p99": _quantile(first, 0.99),
            "per_token_p50": _quantile(each, 0.5), "per_token_p99": _quantile(each, 0.99),
            "tokens_per_second": sum(_within(turn, begin, end) for turn in self.turns) / (end - begin),
            "turns_per_second": len(done) / (end - begin),
            "prompt_tokens": prompt, "cached_share": sum(turn.cached for turn in good) / prompt if prompt else 0.0,
            "running": _mean(looks, "num_requests_running"), "waiting": _mean(looks, "num_requests_waiting"),
            "slots_held": _mean(looks, "cache_slots_held"), "launches": _launches(looks),
            "client_busy": (time.process_time() - self._computing) / max(self.now, 1e-9),
            "cache_bytes": max((x.get("cache_bytes", 0.0) for x in looks), default=0.0),
        }  # fmt: skip


def numbers(text: str) -> dict[str, float]:
    """The numbers in the text of /metrics by name, without `sepjax:`; not those of one zone, reason or bucket."""
    return {found[1]: float(found[2]) for line in text.splitlines() if (found := _NUMBER.fullmatch(line))}


def _within(turn: Turn, begin: float, end: float) -> float:
    """Tokens of a turn that came between two moments, as if they had come evenly."""
    if turn.first is None or not turn.tokens:
        return 0.0
    length = max(turn.last - turn.first, 1e-9)
    return turn.tokens * max(0.0, min(end, turn.first + length) - max(begin, turn.first)) / length


def _quantile(values: Sequence[float], q: float) -> float | None:
    """The least value that is not exceeded by a share q of them; None of none."""
    found = sorted(values)
    return found[min(len(found) - 1, int(q * len(found)))] if found else None


def _mean(looks: Sequence[dict[str, float]], name: str) -> float:
    return statistics.fmean(look.get(name, 0.0) for look in looks) if looks else 0.0


def _launches(looks: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """What the server's launches were like between the first of these looks and the last; None: it does not tell."""
    names = ("launches", "launch_steps", "launch_tokens", "launch_rows_to_be_read", "launch_seconds_before_steps",
             "launch_seconds_steps")  # fmt: skip
    if len(looks) < 2 or not all(f"{name}_total" in looks[0] for name in names):
        return None
    first, last = looks[0], looks[-1]
    number, steps, tokens, waiting, before, stepping = (last[f"{x}_total"] - first[f"{x}_total"] for x in names)
    if not number:
        return None
    return {
        "per_second": number / (last["at"] - first["at"]), "steps": steps / number,
        "rows_generating": tokens / steps if steps else 0.0, "rows_to_be_read": waiting / number,
        "milliseconds_before_steps": 1e3 * before / number, "milliseconds_steps": 1e3 * stepping / number,
    }  # fmt: skip


def _words() -> list[str]:
    from pydoc_data.topics import topics

    return " ".join(topics[name] for name in sorted(topics)).split()


def run(plan: Plan) -> dict[str, Any]:
    """One load, in this thread; returns `Load.summary`."""
    return asyncio.run(Load(plan).run())


if __name__ == "__main__":
    try:
        print(json.dumps(run(Plan(**json.load(sys.stdin)))))
    except (LoadError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
