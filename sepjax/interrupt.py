"""Ctrl-C in a program: one line and exit code 130, whatever is going on.

Python raises KeyboardInterrupt wherever it is: in the middle of imports (forty lines of traceback), in a callback of a
library (swallowed), or not before a compilation of minutes has ended. So a thread hears of it too, and ends the program
where the exception has not done so in a few seconds. Only the standard library is imported here: it comes first.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 130  # 128 + SIGINT, as shells have it
_PATIENCE = 3.0  # seconds for the exception to end the program: half-written files are removed, readers ended
_state = {"presses": 0, "said": 0}


def end_in_one_line() -> None:
    """From here on Ctrl-C ends the program with a line. Does nothing where Ctrl-C is ignored or handled already."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell's background job ignores it
        return
    signal.signal(signal.SIGINT, _note)
    uncaught, ignored = sys.excepthook, sys.unraisablehook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            end()
        uncaught(kind, error, trace)

    def unraisable(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            ignored(what)

    sys.excepthook, sys.unraisablehook = hook, unraisable
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_leave_to_parent)
    threading.Thread(target=_watch, args=(reader,), name="interrupt", daemon=True).start()


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt that the code around will catch: the program goes on after it."""
    if signal.getsignal(signal.SIGINT) is not _note:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _note)


def say() -> None:
    """The line, once."""
    _state["said"] += 1
    if _state["said"] > 1:
        return
    with contextlib.suppress(OSError, ValueError):
        print("\ninterrupted" if sys.stderr.isatty() else "interrupted", file=sys.stderr, flush=True)


def end() -> None:
    """Says so and ends the program at once."""
    say()
    if "multiprocessing" in sys.modules:  # readers of data would outlive this process
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(EXIT_CODE)


def _note(number: int, frame: FrameType | None) -> None:
    _state["presses"] += 1
    if _state["presses"] > 1:
        end()
    raise KeyboardInterrupt


def _watch(reader: int) -> None:
    """Ends the program some seconds after a Ctrl-C that nobody else has taken up (`interrupt_flag`, `StopNotice`)."""
    while True:
        received = os.read(reader, 64)
        if signal.SIGINT in received and signal.getsignal(signal.SIGINT) is _note:
            time.sleep(_PATIENCE)
            end()


def _leave_to_parent() -> None:
    """In a process that was forked: it dies of a Ctrl-C without a word, and does not write into our pipe."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
