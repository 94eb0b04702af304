"""Trackers of other packages and profiles of steps, with modules of their interface in place of the packages."""

import gzip
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sepjax.config import Config, ConfigError
from sepjax.run import metrics
from sepjax.run.profile import Profile, parse_steps
from sepjax.run.trackers import TrackerError, Trackers, check_trackers


class Package(types.ModuleType):
    """What wandb and trackio have in common: `init` gives a run that takes metrics."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.runs, self.lines, self.broken, self.finished = [], [], None, 0

    def init(self, *, project, name, config, resume, **more):
        if self.broken:
            raise self.broken
        self.runs.append({"project": project, "name": name, "config": config, "resume": resume} | more)
        return self

    def log(self, metrics, step):
        if self.broken:
            raise self.broken
        self.lines.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.fixture
def packages(monkeypatch):
    found = {name: Package(name) for name in ("wandb", "trackio")}
    for name, package in found.items():
        monkeypatch.setitem(sys.modules, name, package)
    return found


def test_what_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        TrackerError, match=r"^--log_to=wandb needs the package of Weights & Biases, which is missing: "
    ):
        check_trackers(["wandb"])
    with pytest.raises(TrackerError, match=r'pip install "sepjax\[trackio\]"$'):
        check_trackers(["trackio"])
    with pytest.raises(TrackerError, match="--log_to=tensorbord is not one of wandb, trackio"):
        check_trackers(["tensorbord"])
    check_trackers([])


def test_a_tracker_gets_all_metrics_and_knows_the_run_again(tmp_path: Path, packages, monkeypatch, capsys) -> None:
    workdir, config = tmp_path / "mine", Config()
    workdir.mkdir()
    check_trackers(["wandb", "trackio"])
    trackers = Trackers(["wandb", "trackio"], workdir, config)
    with metrics.MetricWriter(workdir, total_steps=20, trackers=trackers) as writer:
        writer.write(10, {"train/loss": jnp.float32(2.5)})
        packages["trackio"].broken = OSError("no room\nmore")
        writer.write(20, {"train/loss": float("inf")})
        writer.write(20, {"eval/loss": 1.0})
    first, other = packages["wandb"], packages["trackio"]
    assert first.lines == [(10, {"train/loss": 2.5}), (20, {"train/loss": float("inf")}), (20, {"eval/loss": 1.0})]
    assert (first.finished, other.finished, other.lines) == (1, 0, first.lines[:1])
    assert capsys.readouterr().err == (
        "warning: Trackio takes no more of this run: no room; metrics.jsonl has all of it\n"
    )
    assert first.runs[0]["config"]["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    assert (first.runs[0]["name"], first.runs[0]["project"], first.runs[0]["dir"]) == ("mine", "sepjax", str(workdir))
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    for step in (20, 0):  # goes on, and then begins anew
        Trackers(["wandb"], workdir, config, resume_step=step).close()
    begun, resumed, anew = first.runs
    assert begun["id"] == resumed["id"] != anew["id"]
    assert resumed["project"] == "ours"
    with pytest.raises(TrackerError, match=r"^--log_to=trackio: no room; fix that, or omit the flag$"):
        Trackers(["wandb", "trackio"], workdir, config)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Trackers(["wandb", "trackio"], workdir, config).log(1, {"a": 1.0})
    assert len(first.lines) == 3


def steps_of(folder: Path) -> list[int]:
    """The steps that a profile has, by what Perfetto opens; what xprof opens lies beside it."""
    (file,) = folder.rglob("perfetto_trace.json.gz")
    assert [x for x in file.parent.glob("*.xplane.pb") if x.stat().st_size]
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {}))


def test_a_profile_covers_its_steps_and_nothing_else(tmp_path: Path, capsys) -> None:
    double = jax.jit(lambda x: x * 2)
    clocks: list[str] = []

    class Clock:
        def __enter__(self):
            clocks.append("stopped")

        def __exit__(self, *_):
            clocks.append("goes on")

    def run(workdir: Path, first: int, last: int) -> None:
        with Profile(workdir, parse_steps("2:3", 9), done=first - 1, pauses=[Clock]) as profile:
            for step in range(first, last + 1):
                with profile.step(step):
                    x = double(jnp.ones(3))
                profile.end(step, x)

    run(tmp_path / "a", 1, 5)
    assert steps_of(tmp_path / "a" / "profile") == [2, 3]
    assert "profile of steps 2 to 3" in capsys.readouterr().out
    assert clocks == ["stopped", "goes on"]
    run(tmp_path / "b", 3, 3)  # resumed within
    assert steps_of(tmp_path / "b" / "profile") == [3]
    run(tmp_path / "c", 4, 5)  # behind
    assert not (tmp_path / "c").exists()
    assert "steps 2 to 3 are behind" in capsys.readouterr().err
    run(tmp_path / "d", 1, 2)  # ends before its time: what there is is written
    assert steps_of(tmp_path / "d" / "profile") == [2]


@pytest.mark.parametrize("text", ["3", "a:b", "0:2", "5:4", "2:10", "1:2:3"])
def test_steps_that_a_run_does_not_have_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--profile_steps={text} is not FIRST:LAST, steps of this run.* 1 to 9;"):
        parse_steps(text, 9)
