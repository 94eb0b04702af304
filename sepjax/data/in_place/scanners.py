"""Pieces of files, scanned by as many processes as there are cores, and their results in order."""

import json
import os
import queue
import subprocess
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from sepjax import children
from sepjax.data.errors import DataError
from sepjax.data.in_place.scan import Found, Piece

_MOST = 16  # processes; a disk gives no more
_PROGRAM = "sepjax.data.in_place.scan"


def in_parallel(pieces: Sequence[Piece], count: int) -> Generator[Found]:
    """What each piece holds, in order, by `count` processes, which end with the iteration.

    Raises DataError where one of them ends before.
    """
    processes = [_start() for _ in range(count)]
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def scan(piece: Piece) -> Found:
        process = idle.get()
        try:
            return _asked(process, piece)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(count, "scanning")
    try:
        yield from threads.map(scan, pieces)
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def cores() -> int:
    """How many processes may scan."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST)


def _start() -> subprocess.Popen[bytes]:
    """A process that imports this very tree. In a session of its own: Ctrl-C is not meant for it, and its stdin ends
    with this process.
    """
    command, environment = children.command(_PROGRAM), children.environment()
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )


def _asked(process: subprocess.Popen[bytes], piece: Piece) -> Found:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(vars(piece)).encode() + b"\n")
        process.stdin.flush()
        header = json.loads(process.stdout.readline())
        train, validation = (process.stdout.read(size) for size in header.pop("sizes"))
        bad = [(line, reason) for line, reason in header.pop("bad")]
        return Found(**header, bad=bad, entries=(train, validation))
    except (OSError, ValueError) as error:
        process.kill()
        raise DataError(
            f"a process that reads {piece.file!r} has ended ({process.wait()}); it may have been killed for memory: a "
            "line is held whole"
        ) from error
