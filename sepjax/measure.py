"""Figures and where they come from: timed calls, counted compilations, commit and device."""

import contextlib
import dataclasses
import datetime
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parents[1]
_NVIDIA = Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version")  # a container may lack the first


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


class counted_compilations:
    """A context whose value is a list that gets an entry for every program that XLA compiles inside."""

    def __enter__(self) -> list[float]:
        self._compiled: list[float] = []
        self._listen: Callable[..., None] = self._add
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self._compiled

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _add(self, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiled.append(duration)


def checkout(root: Path = _ROOT) -> tuple[str | None, bool | None]:
    """The checked-out commit of `root` and whether tracked files differ from it; (None, None) outside a checkout."""
    if not (root / ".git").exists():
        return None, None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout of another user
        return None, None
    return commit.strip(), bool(changes.strip())


def driver_version() -> str | None:
    """The NVIDIA driver's, such as "580.95.05"; None on another device, and where the system does not tell."""
    if jax.default_backend() != "gpu":
        return None
    for path in _NVIDIA:
        with contextlib.suppress(OSError):
            if found := re.search(r"\b\d{3,}(\.\d+)+", path.read_text(encoding="utf-8")):
                return found[0]
    return None


def provenance(*, has_device: bool = True) -> dict[str, Any]:
    """What stands beside every measured figure: device, driver, jax version, commit of sepjax, changes to it, UTC time.

    Args:
      has_device: whether this process measures a device; False: none is named, and JAX does not take one.
    """
    head, changed = checkout()
    device: dict[str, Any] = {}
    if has_device:
        device = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
        if driver := driver_version():
            device["driver"] = driver
    return {
        **device,
        "jax": jax.__version__,
        "commit": head,
        "changed": changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def heading(source: dict[str, Any]) -> str:
    """`provenance()` in one line, to stand above a table."""
    head = f"commit {source['commit'][:9]}" if source["commit"] else "no commit known"
    changed = " with changes" if source["changed"] else ""
    device = f"{source['device']}, " if "device" in source else ""
    device += f"driver {source['driver']}, " if "driver" in source else ""
    return f"{device}jax {source['jax']}, {head}{changed}, {source['date']}"
