"""What watches a run from the host: bad numbers, notices to stop, steps that hang.

Exit codes of train.py: 0 done, 2 a mistake or files that cannot be written, 3 numbers that are not finite, 4 a step
that hung, 75 stopped by a notice with its work saved (start the same command again).
"""

import collections
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from sepjax.config import UserError
from sepjax.console import say

EXIT_BAD_NUMBERS, EXIT_HUNG, EXIT_STOPPED = 3, 4, 75  # 75: EX_TEMPFAIL of sysexits.h, "try again"
_AHEAD = (
    2  # steps that the host may be ahead of the devices: they stay busy, and there is little to wait for at the end
)
_FIRST, _LONG, _MEDIAN_OF, _LEAST_STALL = (
    10,
    20,
    101,
    10.0,
)  # a step is long above so many times the median, and so many seconds


class BadNumbers(UserError):
    """More steps in a row have failed than the config lets pass."""

    exit_code = EXIT_BAD_NUMBERS


class Stopped(UserError):
    """The run was told to stop and has saved its work."""

    exit_code = EXIT_STOPPED
    label = "stopped"


class Watchdog:
    """Prints every thread's stack when a step takes far longer than others, and ends the program when one hangs.

    A context manager. Its thread also runs while the main thread is stuck in a read that no signal interrupts.
    """

    def __init__(self, timeout: float):
        """`timeout`: seconds that a step may take before the program ends with `EXIT_HUNG`; 0: for ever.

        The first step may take `_FIRST` times as long: it compiles, and readers start.
        """
        self._timeout = timeout
        self._times: collections.deque[float] = collections.deque(maxlen=_MEDIAN_OF)
        self._since = time.monotonic()
        self._step, self._is_first, self._is_counted, self._has_said = 0, True, False, False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """`step` is done; the next begins."""
        now = time.monotonic()
        if self._is_counted:
            self._times.append(now - self._since)
        self._step, self._since, self._is_first, self._is_counted, self._has_said = step, now, False, True, False

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Work inside the block is no step: it may take longer, though not longer than the timeout."""
        self._since, self._is_counted = time.monotonic(), False
        try:
            yield
        finally:
            self._since = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.2):
            spent = time.monotonic() - self._since
            if self._is_counted and not self._has_said and len(self._times) >= 5:
                median = statistics.median(self._times)
                if spent > max(_LONG * median, _LEAST_STALL):
                    self._has_said = True
                    self._dump(f"takes {spent:.0f} s so far, the median step {median:.3g} s")
            if self._timeout and spent > self._timeout * (_FIRST if self._is_first else 1):
                self._dump(f"hangs: nothing for {spent:.0f} s (--step_timeout); exit code {EXIT_HUNG}")
                for child in multiprocessing.active_children():  # readers: they would outlive this process
                    child.kill()
                os._exit(EXIT_HUNG)  # the main thread may never come back to hear of it

    def _dump(self, what: str) -> None:
        say(f"watchdog: step {self._step + 1} {what}; the stacks of all threads:")
        with contextlib.suppress(OSError, ValueError):  # stderr may be no file
            faulthandler.dump_traceback(all_threads=True)


class StopNotice:
    """Notes SIGTERM and Ctrl-C inside its block, so that the loop can save and end. A second Ctrl-C ends at once.

    With several processes JAX's preemption service tells all of them of a SIGTERM to one, and at which step to stop.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process must ask after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received is not None

    def stopped(self, step: int) -> Stopped:
        """What to raise once `step` is saved."""
        name = self._received.name if self._received else "a preemption notice"
        return Stopped(f"{name}: the checkpoint of step {step} is complete; start the same command to go on from there")

    def __enter__(self) -> "StopNotice":
        # JAX's service has a handler of its own, which Python's would replace.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number)
        # `print` may be under way in the code that was interrupted.
        os.write(2, f"{self._received.name}: this step ends, a checkpoint is written\n".encode())


class StepGuard:
    """Follows the steps as they finish on the devices: keeps the host near them, and acts on those that failed."""

    def __init__(self, watchdog: Watchdog, most: int, skipped: int, complete: Callable[[], str]):
        """`most` failed steps in a row pass; `skipped` of them so far; `complete` describes the newest checkpoint."""
        self._watchdog, self._most, self._skipped, self._complete = watchdog, most, skipped, complete
        self._in_a_row = 0
        self._pending: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()

    def follow(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes up the results of `step`, which need not be there yet, and waits for those of earlier ones.

        Raises:
          BadNumbers: too many steps have failed.
        """
        self._pending.append((step, metrics))
        self._check(_AHEAD)

    def catch_up(self) -> None:
        """Waits for every step so far. Raises as `follow` does."""
        self._check(0)

    def _check(self, ahead: int) -> None:
        while len(self._pending) > ahead:
            step, metrics = self._pending.popleft()
            skipped = int(metrics["optim/skipped_steps"])
            self._watchdog.beat(step)
            self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
            self._skipped = skipped
            if self._in_a_row:
                self._tell(
                    step, f"loss {float(metrics['train/loss']):.4g}, |g| {float(metrics['optim/grad_norm']):.4g}"
                )

    def _tell(self, step: int, numbers: str) -> None:
        what = f"step {step} failed and was not applied: {numbers}"
        if self._in_a_row <= self._most:
            if jax.process_index() == 0:
                say(f"warning: {what} (skipped so far: {self._skipped})")
            return
        row = f", the {self._in_a_row}. in a row" if self._in_a_row > 1 else ""
        raise BadNumbers(
            f"{what}{row}; {self._complete()}. To pass over such steps set training.max_skipped_steps above "
            f"{self._most}; if they go on, lower optimizer.learning_rate or look at the data"
        )
