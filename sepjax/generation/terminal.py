"""`sepjax chat` in a terminal: the loop over what the user says, and where it is read and written.

With prompt_toolkit lines are edited, kept from one chat to the next, and pasted whole, and a status line tells what the
cache holds. Without it (the extra `chat`) they are the terminal's own.
"""

import contextlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from sepjax.config import UserError
from sepjax.files import cache_folder
from sepjax.generation.chat import gauge, interrupt_flag, read_line
from sepjax.generation.commands import Next, take
from sepjax.generation.row import StreamEvent
from sepjax.generation.talk import Talk
from sepjax.progress import working

PROMPT = ">>> "
_MISSING = "editing, history, pasting and the status line need prompt_toolkit: pip install 'sepjax[chat]'"
_PATIENCE = 0.5  # seconds that an answer may take to begin before something moves
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class PressedTwice(KeyboardInterrupt):
    """Ctrl-C came twice, and nothing between: the user wants to leave."""


@runtime_checkable
class Screen(Protocol):
    """Where the user is."""

    def read(self, prompt: str, status: str) -> str:
        """What the user says, with a line `status` below it where that can be.

        Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C where nothing is written, `PressedTwice`, `LineError`.
        """
        ...

    def write(self, text: str) -> None:
        """A piece of an answer."""
        ...

    def report(self, text: str) -> None:
        """What the program says."""
        ...


def is_terminal() -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def screen_of(*, private: bool) -> Screen:
    """The best that there is here; says what is missing for a better one. `private`: what is typed is not kept."""
    if importlib.util.find_spec("prompt_toolkit") is None:
        print(_MISSING, file=sys.stderr)
        return Lines()
    from sepjax.generation.editor import Editor

    return Editor(None if private else history_file())


def history_file() -> Path | None:
    """Where what the user types is kept; None: there is no folder for it."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user without a home
        return None
    return folder / "chat_history" if os.access(folder, os.W_OK | os.X_OK) else None


class Lines:
    """A terminal that reads plain lines."""

    def read(self, prompt: str, status: str) -> str:
        """See `Screen`."""
        return read_line(prompt)

    def write(self, text: str) -> None:
        """See `Screen`."""
        print(visible(text), end="", flush=True)

    def report(self, text: str) -> None:
        """See `Screen`."""
        print(visible(text), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """The text with what a terminal would obey (escape sequences, bells) as pictures of these characters."""
    return _CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\ufffd", text)


def talk_on(talk: Talk, screen: Screen) -> None:
    """Talks until /quit, Ctrl-D or Ctrl-C twice. Ctrl-C once cuts an answer short or clears the line."""
    screen.report(f"chat format: {talk.form.name}; /help lists what else there is")
    with interrupt_flag() as pressed:  # Ctrl-C since the last line
        try:
            while _one_line(talk, screen, pressed):
                pass
        except PressedTwice:
            _offer(talk, screen)


def _one_line(talk: Talk, screen: Screen, pressed: list[bool]) -> bool:
    """Reads a line and does what it asks for; returns whether there is to be another. Raises `PressedTwice`."""
    try:
        line = _read(talk, screen, pressed)
        pressed.clear()
        then = Next.END if line is None else take(talk, line, screen.report)
        if then is Next.ANSWER:
            _answer(talk, screen, pressed)
    except KeyboardInterrupt as press:
        if talk.is_asked:
            _take_back(talk, screen)
        raise PressedTwice from press
    except UserError as error:
        screen.report(f"{error} (the conversation is as it was before)")
        return True
    return then is not Next.END


def _read(talk: Talk, screen: Screen, pressed: list[bool]) -> str | None:
    """What the user says; None for Ctrl-D. Raises `PressedTwice`."""
    while True:
        try:
            with _interruptible():
                return screen.read(PROMPT, status(talk))
        except EOFError:
            return None
        except KeyboardInterrupt as press:
            if pressed:
                raise PressedTwice from press
            if isinstance(press, PressedTwice):
                raise
            pressed.append(True)
            screen.report("(Ctrl-C once more leaves)")


def _answer(talk: Talk, screen: Screen, pressed: list[bool]) -> None:
    """Writes the answer, up to its end or Ctrl-C. A second Ctrl-C takes the turn back, and goes on."""
    try:
        if not pressed:
            _write_answer(talk, screen, pressed)
    except KeyboardInterrupt:
        _take_back(talk, screen)
        raise
    if pressed and talk.is_asked:  # before anything of the turn was read
        _take_back(talk, screen)
    elif pressed:
        screen.report("(cut short)")
    if talk.events.finish_reason == "repetition":
        screen.report("(the answer had begun to repeat itself)")
    if talk.is_same:
        screen.report("(the same answer: the best token is always taken; --temperature=1 draws)")


def _take_back(talk: Talk, screen: Screen) -> None:
    talk.take_back()
    screen.report("(that turn is taken back)")


def _write_answer(talk: Talk, screen: Screen, pressed: list[bool]) -> None:
    what, first = ("reading and compiling", 2) if talk.turns == 1 else ("reading", 1)
    texts: list[str] = []

    def write(event: StreamEvent) -> None:
        texts.append(event.text)
        screen.write(event.text)

    with contextlib.closing(talk.answer()) as events:
        # The first token waits for the turn to be read, the second, once in a program's life, for a compilation.
        begun: list[StreamEvent] = []
        with working(what, patience=_PATIENCE):
            while len(begun) < first and not pressed and (event := next(events, None)) is not None:
                begun.append(event)
        for event in begun:
            write(event)
        while not pressed and (event := next(events, None)) is not None:
            write(event)
    if not "".join(texts).endswith("\n"):
        screen.write("\n")


def _offer(talk: Talk, screen: Screen) -> None:
    """Offers to save what would be lost."""
    while not talk.is_saved:
        try:
            with _interruptible():
                folder = screen.read("save in which folder? (none: leave without) ", status(talk)).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not folder:
            return
        screen.report(talk.save(folder))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt; and an event loop may take what tells of signals, and leave none."""
    try:
        handler, told = signal.signal(signal.SIGINT, signal.default_int_handler), signal.set_wakeup_fd(-1)
    except ValueError:  # not in the main thread: nobody can press Ctrl-C here
        yield
        return
    try:
        yield
    finally:
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, handler)


def status(talk: Talk, width: int = 12) -> str:
    """One line on what the cache holds: a bar of sinks (#), kept (=) and recent entries (|), and numbers."""
    view, use, most, rate = talk.view(), talk.cache, talk.events.cache_size, talk.measured.rate
    speed = f" | {rate:.1f} tokens/s" if rate else ""
    if view is None or most is None:
        return gauge(use, most, 0, 0.0).strip("[]") + speed
    zones = {"#": view.sinks, "=": view.kept, "|": view.recent}
    bar = "".join(sign * -(-count * width // most) for sign, count in zones.items())[:width]
    return (
        f"[{bar:.<{width}}] {view.sinks} sinks, {view.kept} kept, {view.recent} recent of {most:,} | "
        f"{use.seen:,} tokens seen{speed}"
    )
