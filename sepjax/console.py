"""Lines for whoever watches a run."""

import contextlib
import sys
from collections.abc import Callable, Iterator

_takers: list[Callable[[str], None]] = []


def say(message: str, *, error: bool = True) -> None:
    """Prints a line to stderr, or to stdout. A log on a full disk must not end the run: it gets the line later."""
    if error and _takers:
        _takers[-1](message)
        return
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr if error else sys.stdout, flush=True)


@contextlib.contextmanager
def given_to(taker: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile `taker` gets what would go to stderr: that of a program whose stderr has another form."""
    _takers.append(taker)
    try:
        yield
    finally:
        _takers.remove(taker)


def is_taken() -> bool:
    """Whether such a `taker` has the lines."""
    return bool(_takers)
