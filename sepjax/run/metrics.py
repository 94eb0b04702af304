"""What a run reports: one line on the console, `metrics.jsonl`, TensorBoard events, `run_meta.json`.

Only process 0 writes; on the others everything here does nothing.
"""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from sepjax.config import UserError
from sepjax.console import say
from sepjax.files import WriteError, write_text
from sepjax.measure import checkout, driver_version
from sepjax.run.events import Event, EventsWriter, SessionLog, Summary
from sepjax.run.trackers import Trackers

_PACKAGES = ("sepjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


class MetricWriter:
    """Writes each step's metrics everywhere; a context manager.

    On resuming, lines of `metrics.jsonl` after `resume_step` and a line torn by a crash are dropped, and TensorBoard is
    told to hide its events of those steps, so that the record reads as if the run had never stopped.
    """

    def __init__(
        self, workdir: Path | str, *, total_steps: int, resume_step: int = 0, trackers: Trackers | None = None
    ):
        """Opens the files, or raises `UserError` where they cannot be written.

        Args:
          workdir: folder of the run; made if need be.
          total_steps: of the run, for the progress line.
          resume_step: steps already done; 0: the run begins, and what is there is of one that saved nothing.
          trackers: get the metrics too, and are closed at the end.
        """
        self._trackers = trackers
        self._path = Path(workdir) / "metrics.jsonl"
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None  # step and time of the first line, for the time left
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._resume_step = resume_step
        self._unwritten = b""  # lines that a full disk has not taken yet
        self._is_failing = False  # and has said so
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _keep_steps(self._path, resume_step)
            self._open()

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)
        self._events: EventsWriter | None = self._open_events()

    def _reopen(self) -> None:
        before, events = self._file, self._events
        self._open()
        before.close()
        if events is not None:
            events.close()

    def _open_events(self) -> EventsWriter:
        # The suffix keeps two starts within one second apart: the library names files by the second.
        suffix = f".{self._resume_step}.{os.getpid()}"
        events = EventsWriter(str(self._path.parent / "events"), suffix)
        start, first = SessionLog(status=SessionLog.START), self._resume_step + 1 if self._resume_step else 0
        events.write_event(Event(wall_time=time.time(), step=first, session_log=start))
        return events

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of `step`, scalars or 0-d arrays, and prints their line.

        A number that is not finite becomes null in `metrics.jsonl`, for JSON has no word for it. What cannot be written
        (a full disk) is told once, kept, and written with a later line.
        """
        if not self._active:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        now = time.time()
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._unwritten += (json.dumps({"step": step, "time": round(now, 3), **finite}) + "\n").encode()
        self._write_out()
        self._write_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))
        if self._trackers is not None:
            self._trackers.log(step, values)
        shown = {name: value for name, value in values.items() if name != "throughput/mfu" or has_known_peak()}
        say(progress_line(step, self._total_steps, shown, self._seconds_left(step)), error=False)

    def _write_out(self) -> None:
        try:
            if not self._path.exists():  # the workdir has vanished, and may be back
                self._reopen()
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]
        except OSError as error:
            if not self._is_failing:
                say(f"warning: {_cannot_write(self._path, error)}; lines are kept for later")
            self._is_failing = True
        else:
            self._is_failing = False

    def _write_event(self, event: Any) -> None:
        """Drops the event where it cannot be written: `metrics.jsonl` is the record, TensorBoard a view of it."""
        try:
            if self._events is None:
                self._resume_step = event.step  # a new file must not hide what the old one has
                self._events = self._open_events()
            self._events.write_event(event)
            self._events.flush()
        except OSError:
            self._events = None  # it may hold half a record now

    def _seconds_left(self, step: int) -> float | None:
        now = time.monotonic()
        if step == 0:  # the first step compiles
            return None
        if self._first is None or step <= self._first[0]:
            self._first = self._first or (step, now)
            return None
        first_step, first_time = self._first
        return (now - first_time) / (step - first_step) * (self._total_steps - step)

    def close(self) -> None:
        """Closes the files. Safe to call twice. Raises `UserError` where there are lines that could not be written."""
        if self._active:
            self._active = False
            if self._trackers is not None:
                self._trackers.close()
            self._write_out()
            with contextlib.suppress(OSError):
                if self._events is not None:
                    self._events.close()
            with _writing(self._path), contextlib.closing(self._file):
                while self._unwritten:
                    self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def has_known_peak() -> bool:
    """Whether MFU tells a reader something. A CPU has no listed peak, and cores that others use."""
    return jax.default_backend() != "cpu"


def peak_memory() -> dict[str, float]:
    """The `memory/` metric: the most bytes of this process's arrays and programs on one of its devices since its start.

    That of the device with the most. Empty where devices do not tell (CPUs).
    """
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    told = [peak for peak in peaks if peak is not None]
    return {"memory/peak_bytes": float(max(told))} if told else {}


def progress_line(
    step: int, total_steps: int, values: Mapping[str, float], seconds_left: int | float | None = None
) -> str:
    """The console's line; shows the metrics it knows and leaves out those that `values` lacks.

    step   120/1000  loss 4.213  lr 9.8e-04  |g| 0.83  12,345 tok/s  MFU 31.2 %  23.6 GiB  attention 22.1 %  eta 1:23
    """
    formats = {
        "train/loss": lambda x: f"loss {x:.3f}",
        "eval/loss": lambda x: f"eval loss {x:.3f}",
        "eval/perplexity": lambda x: f"eval perplexity {x:.4g}",
        "optim/learning_rate": lambda x: f"lr {x:.1e}",
        "optim/grad_norm": lambda x: f"|g| {x:.2f}",
        "throughput/tokens_per_second": lambda x: f"{x:,.0f} tok/s",
        "throughput/mfu": lambda x: f"MFU {100 * x:.1f} %",
        "memory/peak_bytes": lambda x: f"{x / 2**30:.1f} GiB",
        "sep/attention_fraction": lambda x: f"attention {100 * x:.1f} %",
    }
    parts = [f"step {step:{len(str(total_steps)) + 1}d}/{total_steps}"]
    parts += [show(values[name]) for name, show in formats.items() if name in values]
    if seconds_left is not None:
        hours, rest = divmod(round(seconds_left), 3600)
        minutes, seconds = divmod(rest, 60)
        parts.append(f"eta {hours}:{minutes:02d}:{seconds:02d}" if hours else f"eta {minutes}:{seconds:02d}")
    return "  ".join(parts)


class Throughput:
    """Tokens per second since the last `rate()`, pauses left out.

    Devices run ahead of Python: fetch a result of the last step (its loss) before `rate()` and before a pause, or the
    clock misses their work.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._tokens, self._start = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Counts the tokens of a step."""
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock inside the block: evaluation, checkpoints."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def rate(self) -> float:
        """Tokens per second since the last call (or since the start); begins a new interval."""
        rate = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        self._restart()
        return rate


def run_meta(workdir: Path | str, *, seed: int) -> None:
    """Writes `run_meta.json`: where a run's numbers come from.

    Commit of sepjax (null outside a checkout) and whether its files had changes, versions, devices, command line and
    seed of the newest start; `starts` has the time, commit and command line of every start. Other code than at the last
    start is a warning.

    Raises:
      UserError: the file cannot be written, or what is there is not JSON.
    """
    if jax.process_index() != 0:
        return
    path = Path(workdir) / "run_meta.json"
    commit, dirty = checkout()
    earlier = _earlier_starts(path)
    if earlier and earlier[-1].get("commit") != commit:
        before = earlier[-1].get("commit")
        say(f"warning: sepjax is at commit {commit}; at the last start of this run it was at {before}")
    start = {"time": datetime.datetime.now(datetime.UTC).isoformat(), "commit": commit, "argv": sys.argv}
    meta = {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "driver": driver_version(),
        "processes": jax.process_count(),
        "argv": sys.argv,
        "seed": seed,
        "starts": [*earlier, start],
    }
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(meta, indent=2) + "\n")


def _earlier_starts(path: Path) -> list[Any]:
    if not path.exists():
        return []
    try:
        return [dict(start) for start in json.loads(path.read_text(encoding="utf-8"))["starts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what sepjax writes ({error!r}); move it away to go on") from error


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _keep_steps(path: Path, last_step: int) -> None:
    """Drops the lines of `path` after `last_step` (all of them if it is 0), and a last line that a crash has torn."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not JSON of ours ({error}); move it away to go on") from error
        if step <= last_step and last_step:
            kept.append(line.rstrip("\n") + "\n")
    write_text(path, "".join(kept))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{_cannot_write(path, error)}; make room or give another --workdir, then start again: "
            "the run goes on from its last checkpoint"
        ) from error


def _cannot_write(path: Path, error: OSError) -> str:
    return f"cannot write {path}: {error.reason if isinstance(error, WriteError) else error.strerror or error}"
