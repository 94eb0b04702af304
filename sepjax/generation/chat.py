"""Conversations: turns in the form that a model was trained on, and the loop over a terminal.

A conversation is one stream over a bounded cache (`sepjax.generation.endless`): each turn adds its own tokens, nothing
is read twice, and it may go on for ever.
"""

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sepjax import interrupt
from sepjax.config import UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.driver import CacheUse
from sepjax.generation.endless import EndlessStream

HELP = "/save FOLDER keeps the conversation, /quit or Ctrl-D ends it, Ctrl-C cuts an answer short"


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """Token ids around the turns of a conversation."""

    name: str
    begin: tuple[int, ...]  # of the conversation
    user: tuple[tuple[int, ...], tuple[int, ...]]  # before and after what the user says
    system: tuple[tuple[int, ...], tuple[int, ...]]
    answer: tuple[int, ...]  # before an answer
    end: tuple[int, ...]  # after an answer; its first token is the one a model ends it with, if it has such a token
    stop: tuple[str, ...]  # texts that end an answer

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatFormat":
        """ChatML (SmolLM2, Qwen) or Llama 3's, whichever's control tokens the vocabulary has; else plain names."""
        for form in (_chatml, _llama3):
            found = form(tokenizer)
            if found is not None:
                return found
        return _plain(tokenizer)

    def turn(self, tokenizer: Tokenizer, text: str, *, before: int | None, system: str = "") -> list[int]:
        """The ids of a user's turn, up to where the answer begins.

        Args:
          tokenizer: the model's.
          text: what the user says. Control tokens in it are left out: they must not end the turn.
          before: the last token of the answer before; None: this is the first turn.
          system: instructions that stand in front of the first turn.
        """
        ids = list(self.begin if before is None else self.end[1:] if self.end[:1] == (before,) else self.end)
        if before is None and system:
            ids += [*self.system[0], *_as_text(tokenizer, system), *self.system[1]]
        return [*ids, *self.user[0], *_as_text(tokenizer, text), *self.user[1], *self.answer]


def _as_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text without control tokens."""
    return [i for i in tokenizer.encode(text) if tokenizer.token_bytes(i)]


def _chatml(tokenizer: Tokenizer) -> ChatFormat | None:
    start, end = (tokenizer.control_id(f"<|im_{name}|>") for name in ("start", "end"))
    if start is None or end is None:
        return None
    newline = tuple(tokenizer.encode("\n"))

    def said_by(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (start, *tokenizer.encode(f"{name}\n")), (end, *newline)

    return ChatFormat("ChatML", (), said_by("user"), said_by("system"), said_by("assistant")[0], (end, *newline), ())


def _llama3(tokenizer: Tokenizer) -> ChatFormat | None:
    names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
    ids = [tokenizer.control_id(f"<|{name}|>") for name in names]
    if any(i is None for i in ids):
        return None
    begin, start, end, eot = (i for i in ids if i is not None)

    def said_by(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (start, *tokenizer.encode(name), end, *tokenizer.encode("\n\n")), (eot,)

    return ChatFormat("Llama 3", (begin,), said_by("user"), said_by("system"), said_by("assistant")[0], (eot,), ())


def _plain(tokenizer: Tokenizer) -> ChatFormat:
    begin = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    newline = tuple(tokenizer.encode("\n"))
    user, answer = (tuple(tokenizer.encode(f"{name}:")) for name in ("User", "Assistant"))
    return ChatFormat("plain", begin, (user, newline), ((), newline), answer, newline, ("\nUser:",))


def gauge(cache: CacheUse, most: int, tokens: int, seconds: float) -> str:
    """One line on what the cache holds and how fast the answer came."""
    speed = f", {tokens / seconds:.1f} tokens/s" if tokens and seconds > 0 else ""
    return f"[cache {cache.held}/{most} slots, {cache.seen:,} tokens seen, {cache.bytes:,} bytes{speed}]"


def chat(
    events: EndlessStream,
    tokenizer: Tokenizer,
    *,
    system: str = "",
    read: Callable[[], str] = lambda: input(">>> "),
    write: Callable[[str], Any] = lambda text: print(text, end="", flush=True),
    report: Callable[[str], Any] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Talks until `read` raises EOFError or the user says /quit. Ctrl-C ends an answer, not the conversation.

    Args:
      events: a stream that nothing was fed to, or one that was restored.
      tokenizer: the model's.
      system: instructions in front of the first turn.
      read: returns what the user says.
      write: gets the answers, piece by piece.
      report: gets the gauge after each answer, and what else there is to say.
    """
    form = ChatFormat.of(tokenizer)
    report(f"{form.name} conversation; {HELP}")
    while True:
        try:
            with interrupt.caught():
                text = read()
        except (EOFError, KeyboardInterrupt):
            break
        command, _, argument = text.strip().partition(" ")
        if command == "/quit":
            break
        if command == "/save":
            report(_save(events, argument.strip()))
        elif text.strip():
            events.feed(form.turn(tokenizer, text, before=events.last_token, system=system))
            _answer(events, write, report)


def _save(events: EndlessStream, folder: str) -> str:
    if not folder:
        return "where to? /save FOLDER"
    try:
        events.save(folder)
    except (UserError, OSError) as error:
        return f"not saved: {error}"
    return f"saved in {folder}; --resume={folder} goes on from here"


def _answer(events: EndlessStream, write: Callable[[str], Any], report: Callable[[str], Any]) -> None:
    """Writes the answer up to its end or Ctrl-C, then reports the gauge."""
    times = []
    with interrupt_flag() as interrupted:
        for event in events:
            write(event.text)
            times.append(time.perf_counter())
            if interrupted:
                break
    write("\n")
    if events.finish_reason == "repetition":
        report("(the answer had begun to repeat itself)")
    # The first token waits for the turn to be read, the second, once in a program's life, for a compilation.
    tokens = max(len(times) - 2, 0)
    report(gauge(events.cache, events.cache_size, tokens, times[-1] - times[1] if tokens else 0.0))


@contextmanager
def interrupt_flag() -> Iterator[list[bool]]:
    """A list that is no longer empty once Ctrl-C was pressed inside; pressed again, it interrupts as usual.

    An exception could come between a step on the device and the moment its state is ours; the stream would be lost.
    """
    pressed: list[bool] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: nobody can press Ctrl-C here
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
