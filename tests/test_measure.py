"""Timed loops, on a clock that the test turns, and where numbers come from."""

import json
import statistics
import subprocess
from pathlib import Path

import jax
import pytest

from sepjax import measure


class Clock:
    """A function that takes `seconds` (the first call longer: it compiles), and the clock that it moves."""

    def __init__(self, seconds: float, drift: float = 0.0):
        self.now, self.seconds, self.drift, self.calls = 0.0, seconds, drift, 0

    def perf_counter(self) -> float:
        return self.now

    def run(self) -> int:
        self.now += 100.0 if self.calls == 0 else self.seconds + self.drift * self.calls
        self.calls += 1
        return self.calls


def timed(monkeypatch: pytest.MonkeyPatch, clock: Clock, **settings: float) -> measure.Timing:
    monkeypatch.setattr(measure, "time", clock)
    return measure.time_calls(clock.run, **settings)


def test_fast_calls_are_timed_in_loops_without_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(monkeypatch, Clock(2**-7), repeats=4, seconds=1.0)
    assert result.calls == 32  # 1 s / 4 loops / (1/128) s
    assert result.samples == pytest.approx([1000 / 128] * 4)
    assert result.milliseconds == pytest.approx(1000 / 128)


def test_slow_calls_are_timed_alone_and_at_least_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(3.0)
    result = timed(monkeypatch, clock, repeats=5, seconds=1.0)
    assert (result.calls, len(result.samples)) == (1, 2)
    assert clock.calls == 4  # to compile, to estimate, two to time
    assert len(timed(monkeypatch, Clock(0.4), repeats=5, seconds=1.0).samples) == 3  # until the second is over


def test_the_figure_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    result = timed(monkeypatch, Clock(0.5, drift=0.25), repeats=3, seconds=10.0)
    assert len(set(result.samples)) == 3
    assert result.milliseconds == statistics.median(result.samples)


def test_commit_is_that_of_the_checkout_and_none_outside(tmp_path: Path) -> None:
    assert measure.checkout(tmp_path) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert measure.checkout(tmp_path) == (head, False)
    (tmp_path / "file").write_text("2")
    assert measure.checkout(tmp_path) == (head, True)


def test_provenance_is_json_and_has_a_line() -> None:
    source = json.loads(json.dumps(measure.provenance()))
    assert source["jax"] == jax.__version__
    assert jax.devices()[0].device_kind in measure.heading(source)
    assert "commit 0123456789 "[:16] in measure.heading(source | {"commit": "0123456789abcdef", "changed": False})
    assert "with changes" in measure.heading(source | {"commit": "0123456789abcdef", "changed": True})
    assert "no commit known" in measure.heading(source | {"commit": None, "changed": None})


def test_the_driver_of_a_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "driver" not in measure.provenance()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(measure, "_NVIDIA", (tmp_path / "none", tmp_path / "version"))
    assert measure.driver_version() is None
    for text in ("580.95.05\n", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"):
        (tmp_path / "version").write_text(text)
        assert measure.driver_version() == "580.95.05"
    assert "driver 580.95.05, jax " in measure.heading(measure.provenance())
