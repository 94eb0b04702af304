"""Timing of compiled functions on an asynchronous device."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated timed loops over one function. Times in milliseconds a call."""

    milliseconds: float  # median over the loops
    samples: tuple[float, ...]  # of each loop
    calls: int  # in each loop


def time_calls(run: Callable[[], Any], *, repeats: int, seconds: float) -> Timing:
    """Times `run` in loops of several calls, so that the gaps between launches vanish.

    One call compiles and is not counted; loops are as long as `repeats` of them fit into `seconds`, and the first is a
    warm-up. A call slower than its share is timed alone, at least twice and until the time is up.

    Args:
      run: returns arrays of the device; the last call's are waited for.
      repeats: loops, 1 or more.
      seconds: to spend on them.
    """
    jax.block_until_ready(run())
    calls = max(1, int(seconds / repeats / _loop(run, 1)))
    if calls > 1:
        _loop(run, calls)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < repeats and (calls > 1 or len(samples) < 2 or time.perf_counter() < end):
        samples.append(_loop(run, calls) / calls * 1e3)
    return Timing(statistics.median(samples), tuple(samples), calls)


def _loop(run: Callable[[], Any], calls: int) -> float:
    """Seconds for that many calls. An accelerator runs them in order; a CPU might overlap them, so it is waited for."""
    in_order = jax.default_backend() != "cpu"
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
        if not in_order:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return time.perf_counter() - start
