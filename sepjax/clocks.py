"""Where threads spend their time: seconds in named parts of their work, and processor seconds of each thread.

A part that takes longer than it computes has waited: for a device, for another thread's turn of Python, for a queue.
"""

import dataclasses
import re
import threading
import time
from collections import defaultdict
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spent:
    """What one part has taken so far."""

    calls: int = 0
    seconds: float = 0.0
    computing: float = 0.0  # of these, seconds in which the thread had a processor

    def since(self, before: "Spent") -> "Spent":
        """What was added to an earlier reading."""
        return Spent(self.calls - before.calls, self.seconds - before.seconds, self.computing - before.computing)


class Clocks:
    """Clocks by name; any thread may use any of them.

    with clocks("read"):
        ...
    """

    def __init__(self) -> None:
        self._mine = threading.local()
        self._all: list[dict[str, list[float]]] = []  # a thread's each, so that none waits for another

    def __call__(self, name: str) -> "_Part":
        """A context whose time is added to `name`."""
        return _Part(self._of_thread(), name)

    def _of_thread(self) -> dict[str, list[float]]:
        found = getattr(self._mine, "parts", None)
        if found is None:
            found = self._mine.parts = defaultdict(lambda: [0.0, 0.0, 0.0])
            self._all.append(found)
        return found

    def read(self) -> dict[str, Spent]:
        """What every part has taken so far, in all threads."""
        found: dict[str, Spent] = {}
        for parts in list(self._all):
            for name, (calls, seconds, computing) in list(parts.items()):
                sofar = found.get(name, Spent())
                found[name] = Spent(
                    sofar.calls + int(calls), sofar.seconds + seconds, sofar.computing + computing
                )  # fmt: skip
        return found


class _Part:
    __slots__ = ("_begin", "_cpu", "_name", "_parts")

    def __init__(self, parts: dict[str, list[float]], name: str):
        self._parts, self._name = parts, name

    def __enter__(self) -> None:
        self._begin, self._cpu = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: Any) -> None:
        part = self._parts[self._name]
        part[0] += 1
        part[1] += time.perf_counter() - self._begin
        part[2] += time.thread_time() - self._cpu


def threads_computing() -> dict[str, float]:
    """Processor seconds of this process's Python threads so far, by name, those of a pool together; "all": and others.

    Other threads are XLA's and the libraries'.
    """
    found: dict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.ident is not None:
            name = re.sub(r"[-_ (]*\d.*$", "", thread.name) or thread.name
            found[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return {**found, "all": time.process_time()}
