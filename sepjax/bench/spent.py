"""Where a server's time went while it was under load, as a table and as JSON.

parts      named parts of its threads' work: calls, seconds, seconds in which they had a processor
threads    processor seconds of each thread: Python runs one of them at a time
alone      what each thing that the device is asked for takes by itself, once nobody asks for anything
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

from sepjax.clocks import Spent, threads_computing
from sepjax.measure import counted_compilations
from sepjax.serve.worker import Worker


class Watch:
    """A context in which a load runs; `found` is what was spent in a stretch of it, JSON."""

    def __init__(self, worker: Worker, after: float, seconds: float):
        """`after`: seconds until the stretch of `seconds` begins."""
        self._worker, self._after, self._seconds = worker, after, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="watch")
        self.found: dict[str, Any] = {}

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _main(self) -> None:
        if self._over.wait(self._after):
            return
        parts, threads, begin = self._worker.clocks.read(), threads_computing(), time.perf_counter()
        with counted_compilations() as compiled:
            self._over.wait(self._seconds)
        seconds, now = time.perf_counter() - begin, self._worker.clocks.read()
        spent = {name: x.since(parts.get(name, Spent())) for name, x in now.items()}
        self.found = {
            "seconds": seconds,
            "compilations": len(compiled),
            "compiling": sum(compiled),
            "parts": {
                name: {"calls": x.calls, "seconds": x.seconds, "computing": x.computing}
                for name, x in sorted(spent.items())
                if x.calls
            },
            "threads": {name: x - threads.get(name, 0.0) for name, x in threads_computing().items()},
        }


def table(found: Mapping[str, Any]) -> str:
    """What a `Watch` found, to be read."""
    if not found:
        return "the load ended before anything was measured"
    seconds = found["seconds"]
    lines = [
        f"  in {seconds:.1f} s; {found['compilations']} compilations of {found['compiling']:.2f} s",
        f"  {'part':<40}{'calls/s':>10}{'busy':>8}{'computing':>11}{'ms each':>10}",
    ]
    for name, x in found["parts"].items():
        lines.append(
            f"  {name:<40}{x['calls'] / seconds:>10.1f}{x['seconds'] / seconds:>8.1%}{x['computing'] / seconds:>11.1%}"
            f"{1e3 * x['seconds'] / x['calls']:>10.3f}"
        )
    busy = {name: x / seconds for name, x in found["threads"].items() if x >= 1e-3 * seconds}
    lines.append("  threads  " + ", ".join(f"{name} {x:.1%}" for name, x in sorted(busy.items(), key=lambda x: -x[1])))
    return "\n".join(lines)


def alone_table(found: Mapping[str, tuple[float, float]]) -> str:
    """`SlotDevice.alone`, to be read."""
    return "\n".join(
        f"  alone: {name:<50}{done:>10.3f} ms, asked for in {asked:.3f}" for name, (done, asked) in found.items()
    )
