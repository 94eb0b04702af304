"""One process prepares, the others wait and find it done: on a machine, or on hosts that share a file system."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of `path`, a hidden file beside it, for the block; it frees itself when the process dies.

    Object stores (gs://...) have no locks: there processes prepare side by side, and the last rename wins.
    """
    if "://" in os.fspath(path):
        yield
        return
    file = Path(path).with_name(f".{Path(path).name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process to finish preparing {os.fspath(path)}", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
