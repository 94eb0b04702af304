"""Ctrl-C in a program: one line and exit code 130, whatever is going on.

Python raises KeyboardInterrupt wherever it is: in the middle of imports (forty lines of traceback), in a callback of a
library (swallowed), or not before a compilation of minutes has ended. So a thread hears of it too, and ends the program
where the exception has not done so in a few seconds. This comes before all else, so it imports little, and late.
"""

import _signal  # pyright: ignore[reportMissingImports]  (what `signal` wraps, without its 35 microseconds)
import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import FrameType, TracebackType
    from typing import Any

BEGAN = time.monotonic()  # of the program, but for what Python itself takes: whatever imports this does it first
_SIGINT = int(signal.SIGINT)
EXIT_CODE = 130  # 128 + SIGINT, as shells have it
_PATIENCE = 3.0  # seconds for the exception to end the program: half-written files are removed, readers ended
_state = {"presses": 0, "said": 0}
_unfinished: "list[Callable[[], bool]]" = []  # each says whether work of a thread is done


def end_in_one_line() -> None:
    """From here on Ctrl-C ends the program with a line. Does nothing where Ctrl-C is ignored or handled already."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell's background job ignores it
        return
    signal.signal(signal.SIGINT, _at_once)
    import threading

    uncaught, ignored = sys.excepthook, sys.unraisablehook

    def hook(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
        if issubclass(kind, KeyboardInterrupt) or is_pressed():
            sys.stdout.flush()  # only here: in the thread below it could wait for a lock that nobody gives up
            end()
        uncaught(kind, error, trace)
        end_unless_done(1)

    def unraisable(what: "Any") -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            ignored(what)

    sys.excepthook, sys.unraisablehook = hook, unraisable
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forked)
    threading.Thread(target=_watch, args=(reader,), name="interrupt", daemon=True).start()
    signal.signal(signal.SIGINT, _note)


def caught() -> "AbstractContextManager[object]":
    """Inside, Ctrl-C is a KeyboardInterrupt that the code around will catch: the program goes on after it."""
    import contextlib

    stack = contextlib.ExitStack()
    if signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGINT, _note)
    return stack


class Deferred:
    """Inside, Ctrl-C waits until the end: what belongs together is done whole. A second one does not wait.

    Only where it is Python's own KeyboardInterrupt, as in notebooks and scripts: our programs see to it themselves.

    Attributes:
      pressed: whether it has come, so that long work may end sooner.
    """

    pressed = False
    _is_ours = False

    def __enter__(self) -> "Deferred":
        if _signal.getsignal(_SIGINT) is signal.default_int_handler:
            try:
                _signal.signal(_SIGINT, self._press)
            except ValueError:  # not in the main thread, where nothing interrupts
                return self
            self._is_ours = True
        return self

    def _press(self, number: int, frame: "FrameType | None") -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        if self._is_ours:
            _signal.signal(_SIGINT, signal.default_int_handler)
            if self.pressed and kind is None:
                raise KeyboardInterrupt


def check(what: str, is_stepping: bool, error: type[Exception]) -> None:
    """Raises an `error` where a step has begun and has not ended: what it was to change is half changed."""
    if is_stepping:
        raise error(
            f"a step of {what} has not ended: another thread is within it (one at a time may step), or an exception "
            "from elsewhere interrupted it, and its cache is lost; begin anew, or resume what was saved"
        )


def is_pressed() -> bool:
    """Whether Ctrl-C has come: whatever error follows is its work. Libraries in C++ make another one of it."""
    return _state["presses"] > 0


def say() -> None:
    """The line, once."""
    _state["said"] += 1
    if _state["said"] > 1:
        return
    try:  # noqa: SIM105  (contextlib is not imported yet)
        os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    except OSError:  # nobody listens
        pass


def end() -> None:
    """Says so and ends the program at once."""
    say()
    _leave(EXIT_CODE)


def need_not_wait_for(is_done: "Callable[[], bool]") -> None:
    """Tells of work of a thread that an error's end of the program need not wait for: of a compiler, for minutes."""
    _unfinished[:] = [*(x for x in _unfinished if not x()), is_done]


def end_unless_done(code: int) -> None:
    """Ends the program at once, with `code`, where such work goes on: Python would wait for its thread."""
    if not all(is_done() for is_done in _unfinished):
        sys.stdout.flush()
        sys.stderr.flush()
        _leave(code)


def _leave(code: int) -> None:
    if "multiprocessing" in sys.modules:  # readers of data would outlive this process
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()
    os._exit(code)


def _at_once(number: int, frame: "FrameType | None") -> None:
    say()
    os._exit(EXIT_CODE)


def _note(number: int, frame: "FrameType | None") -> None:
    _state["presses"] += 1
    if _state["presses"] > 1:
        end()
    if "logging" in sys.modules:  # a library that swallows the exception would log it with its traceback
        sys.modules["logging"].disable()
    raise KeyboardInterrupt


def _watch(reader: int) -> None:
    """Ends the program some seconds after a Ctrl-C that nobody else has taken up (`interrupt_flag`, `StopNotice`)."""
    import threading

    while True:
        received = os.read(reader, 64)
        if signal.SIGINT in received and signal.getsignal(signal.SIGINT) is _note:
            threading.Event().wait(_PATIENCE)
            end()


def leave_to_parent(*_: int) -> None:
    """For a reader of data: Ctrl-C in a terminal reaches it too, and the run needs it until its work is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _forked() -> None:
    """In a process that was forked: it dies of a Ctrl-C without a word, and does not write into our pipe."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # forked from a thread, where signals cannot be set
        pass
