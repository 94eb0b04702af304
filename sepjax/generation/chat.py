"""Conversations: the loop over a terminal. Their form is in `sepjax.generation.conversation`.

A conversation is one stream over a bounded cache (`sepjax.generation.stream`): each turn adds its own tokens, nothing
is read twice, and it may go on for ever.
"""

import contextlib
import io
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sepjax import interrupt
from sepjax.config import UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.conversation import Conversation, conversation_of
from sepjax.generation.row import CacheUse
from sepjax.generation.stream import Stream
from sepjax.hub.chat_template import ChatTemplate

_NOT_TEXT = re.compile("[\udc80-\udcff]")  # a byte that is no UTF-8, as `surrogateescape` reads it
HELP = "/save FOLDER keeps the conversation, /quit or Ctrl-D ends it, Ctrl-C cuts an answer short"


class LineError(UserError):
    """A line that is no text."""


def read_line(prompt: str) -> str:
    """A line of standard input. Raises EOFError behind the last one, `LineError` for one that is not UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
        with contextlib.suppress(io.UnsupportedOperation):  # something was read before: it stays as it is
            sys.stdin.reconfigure(errors="surrogateescape")
    line = input(prompt)
    if found := _NOT_TEXT.search(line):
        raise LineError(
            f"the line is not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} behind {line[: found.start()][-20:]!r}; it is "
            "left out"
        )
    return line


def gauge(cache: CacheUse, most: int | None, tokens: int, seconds: float) -> str:
    """One line on what the cache holds (of `most` entries; None: it grows) and how fast the answer came."""
    speed = f", {tokens / seconds:.1f} tokens/s" if tokens and seconds > 0 else ""
    held = f"{cache.held} entries" if most is None else f"{cache.held}/{most} slots"
    return f"[cache {held}, {cache.seen:,} tokens seen, {cache.bytes:,} bytes{speed}]"


def chat(
    events: Stream,
    tokenizer: Tokenizer,
    *,
    system: str = "",
    template_variables: Mapping[str, Any] | None = None,
    conversation: Conversation | None = None,
    read: Callable[[], str] = lambda: read_line(">>> "),
    write: Callable[[str], Any] = lambda text: print(text, end="", flush=True),
    report: Callable[[str], Any] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Talks until `read` raises EOFError or the user says /quit. Ctrl-C ends an answer, not the conversation.

    A turn that cannot be read or written (no text, or the model's template refuses it) is reported and left out.

    Args:
      events: a stream that nothing was fed to, or one that was restored.
      tokenizer: the model's.
      system: instructions in front of the first turn.
      template_variables: what the chat template may name besides (`ChatTemplate.with_variables`).
      conversation: its form, which has both already; None: by the tokenizer's own chat template, if there is one.
      read: returns what the user says.
      write: gets the answers, piece by piece.
      report: gets the gauge after each answer, and what else there is to say.
    """
    if conversation is None:
        settings: dict[str, Any] = {"system": system, "template_variables": template_variables}
        conversation = conversation_of(tokenizer, ChatTemplate.of(tokenizer), **settings)
    report(f"chat format: {conversation.name}; {HELP}")
    while True:
        try:
            with interrupt.caught():
                text = read()
        except (EOFError, KeyboardInterrupt):
            break
        except UserError as error:
            report(_left_out(error))
            continue
        command, _, argument = text.strip().partition(" ")
        if command == "/quit":
            break
        if command == "/save":
            report(_save(events, argument.strip()))
        elif text.strip():
            before = conversation.copy()
            try:
                ids, about = conversation.turn(text, before=events.last_token)
                events.feed(ids)
            except UserError as error:
                conversation = before
                report(_left_out(error))
                continue
            if about:
                report(about)
            conversation.answered(_answer(events, write, report))


def _left_out(error: UserError) -> str:
    return f"{error} (the conversation is as it was before)"


def _save(events: Stream, folder: str) -> str:
    if not folder:
        return "where to? /save FOLDER"
    try:
        events.save(folder)
    except (UserError, OSError) as error:
        return f"not saved: {error}"
    return f"saved in {folder}; --resume={folder} goes on from here"


def _answer(events: Stream, write: Callable[[str], Any], report: Callable[[str], Any]) -> str:
    """Writes the answer up to its end or Ctrl-C, then reports the gauge; returns the answer."""
    times, texts = [], []
    with interrupt_flag() as interrupted:
        for event in events:
            write(event.text)
            texts.append(event.text)
            times.append(time.perf_counter())
            if interrupted:
                break
    write("\n")
    if events.finish_reason == "repetition":
        report("(the answer had begun to repeat itself)")
    # The first token waits for the turn to be read, the second, once in a program's life, for a compilation.
    tokens = max(len(times) - 2, 0)
    report(gauge(events.cache, events.cache_size, tokens, times[-1] - times[1] if tokens else 0.0))
    return "".join(texts)


@contextlib.contextmanager
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
