"""The line that the user writes in `sepjax chat`, by prompt_toolkit: editing, history, pasting, completion, status."""

import atexit
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, override

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from sepjax.generation.commands import NAMES
from sepjax.generation.terminal import PROMPT, Lines, PressedTwice, visible

_MOST_HISTORY = 2**20  # bytes; then the older half goes


class Editor(Lines):
    """A terminal in which lines are edited. See `sepjax.generation.terminal.Screen`."""

    def __init__(self, history: Path | None):
        """`history`: the file in which lines are kept; None: they are forgotten."""
        if history is not None:
            _prepare(history)
        atexit.register(self._mark_pastes, False)
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else FileHistory(history),
            completer=_Commands(),
            complete_while_typing=False,
            enable_history_search=True,
            key_bindings=_keys(),
        )

    @override
    def read(self, prompt: str, status: str) -> str:
        options: dict[str, Any] = {"bottom_toolbar": visible(status), "handle_sigint": False}
        try:
            if prompt != PROMPT:  # the answer to a question is not a turn, which history is of
                return PromptSession[str](key_bindings=_keys()).prompt(prompt, **options)
            return self._session.prompt(prompt, prompt_continuation="... ", **options)
        finally:
            self._mark_pastes(True)

    def _mark_pastes(self, marked: bool) -> None:
        """Has the terminal say where a paste begins and ends while no line is read, too: what is pasted into an answer
        is one turn, as soon as there is a line again, not a turn a line.
        """
        output = self._session.output
        (output.enable_bracketed_paste if marked else output.disable_bracketed_paste)()
        output.flush()


class _Commands(Completer):
    """Names of commands after a slash, folders after /save."""

    def __init__(self) -> None:
        self._folders = PathCompleter(only_directories=True, expanduser=True)

    @override
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/save "):
            yield from self._folders.get_completions(Document(text[6:], len(text) - 6), complete_event)
        elif text.startswith("/") and " " not in text:
            yield from (Completion(name, start_position=-len(text)) for name in NAMES if name.startswith(text))


def _keys() -> KeyBindings:
    """Ctrl-C clears a line, and is the user's where there is none; Alt-Enter begins another line."""
    keys = KeyBindings()

    @keys.add("c-c")
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=PressedTwice if event.is_repeat else KeyboardInterrupt)

    @keys.add("escape", "enter")
    def _line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _prepare(history: Path) -> None:
    """Makes the file, for this user's eyes alone, and drops its older half where it has become large."""
    with contextlib.suppress(OSError):
        os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
        if history.stat().st_size > _MOST_HISTORY:
            kept = history.read_bytes()[-_MOST_HISTORY // 2 :]
            history.write_bytes(kept[kept.find(b"\n# ") + 1 :])  # entries begin with a comment
