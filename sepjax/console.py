"""Lines for whoever watches a run."""

import contextlib
import sys


def say(message: str, *, error: bool = True) -> None:
    """Prints a line to stderr, or to stdout. A log on a full disk must not end the run: it gets the line later."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr if error else sys.stdout, flush=True)
