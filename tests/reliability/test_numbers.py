"""Numbers that are not finite, spikes, and full, vanished or read-only disks under a run: promises 4 and 5."""

import dataclasses
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train as program
from sepjax.config import Config, ConfigError, validate
from sepjax.programs.train import Settings
from sepjax.run import guard
from sepjax.run.checkpoint import CheckpointError, load_params
from sepjax.run.checkpoint_files import MANIFEST
from sepjax.run.guard import BadNumbers, StepGuard, Watchdog
from tests import runs
from tests.reliability.common import EVERY, STEPS, assert_same, checkpoints, done, finish, losses, start, wait_until
from tests.runs import state_of_numpy
from tests.training.test_step import CONFIG, compiled, make_batch


def with_training(config: Config, **values: object) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **values))


def poisoned(params, value: float):
    """Parameters whose first weight is `value`: what a bad batch or a bad memory cell does to a loss."""
    leaves, structure = jax.tree.flatten(params)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(value)
    return structure.unflatten(leaves)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_of_bad_numbers_changes_no_bit(value: float):
    batch, step = make_batch(), compiled(CONFIG)
    state, _ = step(state_of_numpy(CONFIG), batch)
    bad = dataclasses.replace(state, params=poisoned(state.params, value))
    after, metrics = step(bad, batch)
    assert not np.isfinite(float(metrics["optim/grad_norm"]))
    assert float(metrics["optim/skipped_steps"]) == int(after.health.skipped) == 1
    assert int(after.step) == int(bad.step) + 1
    assert float(after.health.loss_mean) == float(bad.health.loss_mean)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.optimizer), (bad.params, bad.optimizer))
    # Back to health, the next step is the one that would have come without it, at the same learning rate.
    healed = dataclasses.replace(after, params=state.params)
    (ours, our_metrics), (theirs, metrics) = step(healed, batch), step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, (ours.params, ours.optimizer), (theirs.params, theirs.optimizer))
    assert our_metrics["optim/learning_rate"] == metrics["optim/learning_rate"]


def test_a_spike_is_judged_by_the_running_mean():
    batch, step = make_batch(), compiled(CONFIG)
    state, metrics = step(state_of_numpy(CONFIG), batch)
    assert float(state.health.loss_mean) == float(metrics["train/loss"])
    low = dataclasses.replace(state.health, loss_mean=jnp.float32(0.5 * float(metrics["train/loss"])))
    after, metrics = step(dataclasses.replace(state, health=low), batch)
    assert float(metrics["optim/skipped_steps"]) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    after, metrics = step(state, batch)
    assert float(metrics["optim/skipped_steps"]) == 0
    with pytest.raises(ConfigError, match=r"training.spike_factor=0.5 would fail ordinary steps"):
        validate(with_training(CONFIG, spike_factor=0.5))


def step_of_nan(config, graph, state, batch):
    """What `train_step` gives where its loss is NaN in the steps 5, 6 and 9, of which it is told above, and no more."""
    poison = jnp.isin(state.step + 1, jnp.array([5, 6, 9]))
    after, metrics = runs.step_that_tells_all(config, graph, state, batch)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(poison, old, new), (after.params, after.optimizer), (state.params, state.optimizer)
    )
    health = dataclasses.replace(state.health, skipped=state.health.skipped + poison)
    names = ("train/loss", "optim/grad_norm")
    metrics |= {name: jnp.where(poison, jnp.nan, metrics[name]) for name in names}
    metrics["optim/skipped_steps"] = health.skipped.astype(jnp.float32)
    return dataclasses.replace(after, params=params, optimizer=moments, health=health), metrics


@pytest.fixture
def poison(monkeypatch) -> None:
    monkeypatch.setattr(program, "train_step", step_of_nan)
    monkeypatch.setattr(runs, "ONCE", [*runs.ONCE, step_of_nan])


@pytest.mark.usefixtures("poison")
def test_nan_ends_the_run_and_names_the_step_and_the_last_good_checkpoint(tiny, tmp_path):
    with pytest.raises(BadNumbers) as error:
        program.train(with_training(tiny, steps=12), tmp_path / "run")  # the program of the next tests
    assert error.value.exit_code == 3
    assert "step 5 failed and was not applied: loss nan" in str(error.value)
    assert f"the newest complete checkpoint is of step {EVERY}" in str(error.value)
    assert checkpoints(tmp_path / "run") == [EVERY] == [4]
    assert max(losses(tmp_path / "run")) == EVERY


@pytest.mark.usefixtures("poison")
def test_nan_is_skipped_and_counted_as_often_as_the_config_says(tiny, tmp_path, capsys):
    config = with_training(tiny, steps=12, max_skipped_steps=2)
    state = program.train(config, tmp_path / "run")
    assert int(state.health.skipped) == 3
    counts = [values["optim/skipped_steps"] for _, values in sorted(losses(tmp_path / "run").items())]
    assert counts == [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert losses(tmp_path / "run")[5]["train/loss"] is None
    err = capsys.readouterr().err
    assert "warning: step 6 failed and was not applied: loss nan, |g| nan (skipped so far: 2)" in err


def test_bad_numbers_are_counted_in_a_row():
    """One may pass; a good step between them begins anew."""
    guard = StepGuard(Watchdog(0.0), 1, 0, lambda: "the newest checkpoint")
    for step, skipped in enumerate((0, 1, 1, 2, 3), start=1):
        guard.follow(step, {"optim/skipped_steps": skipped, "train/loss": np.nan, "optim/grad_norm": np.nan})
    with pytest.raises(BadNumbers, match=r"step 5 failed .*, the 2\. in a row; the newest checkpoint.* above 1"):
        guard.catch_up()


@pytest.mark.usefixtures("poison")
def test_the_count_of_skipped_steps_survives_a_restart(tiny, tmp_path, monkeypatch):
    config = with_training(tiny, steps=12, max_skipped_steps=2)  # the program of the test above
    with monkeypatch.context() as notice:
        notice.setattr(guard.StopNotice, "reached", lambda self, step: step == 7)
        with pytest.raises(guard.Stopped, match="the checkpoint of step 7 is complete"):
            program.train(config, tmp_path / "run")
    state = program.train(config, tmp_path / "run")
    assert int(state.health.skipped) == 3
    assert losses(tmp_path / "run")[12]["optim/skipped_steps"] == 3


@pytest.fixture
def room() -> Iterator[Callable[[int | None], None]]:
    """Sets how large a file may grow, in bytes: the operating system refuses the rest, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if size is None else size, limits[1]))

    yield limit
    limit(None)


def at_step(step: int, workdir: Path, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls `do` once when `step` has been recorded and the last checkpoint before it is complete, if it can be."""
    real, pending = program.MetricWriter.write, [do]

    def write(self, now, metrics):
        real(self, now, metrics)
        if now >= step and pending:
            deadline = time.monotonic() + 3
            while not (workdir / "checkpoints" / "8" / MANIFEST).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            pending.pop()()

    monkeypatch.setattr(program.MetricWriter, "write", write)


# Orbax leaves files and futures of a failed write to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_but_not_the_run(
    tiny, whole, tmp_path, room, monkeypatch, capsys
):
    """Full from step 10 to step 22: two checkpoints fail, the older stay, the run goes on and ends as it would have."""
    workdir = tmp_path / "run"
    at_step(10, workdir, lambda: (room(9000), at_step(22, workdir, lambda: room(None), monkeypatch)), monkeypatch)
    program.train(tiny, workdir)
    err = capsys.readouterr().err
    assert "warning: step 12 is not saved: cannot write a checkpoint" in err
    assert "the newest complete checkpoint is of step 8" in err
    assert "warning: step 24 is not saved" not in err
    assert not list((workdir / "checkpoints").glob("*tmp*"))  # failed writes give their room back
    assert_same(workdir, whole, STEPS)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.soak  # one that is full for a while is above
def test_a_disk_that_stays_full_is_an_error_at_the_end(tiny, tmp_path, room, monkeypatch):
    at_step(10, tmp_path / "run", lambda: room(40_000), monkeypatch)  # metrics fit, checkpoints do not
    with pytest.raises(
        CheckpointError, match=r"cannot write a checkpoint in .*; the newest complete checkpoint is of step 8"
    ):
        program.train(tiny, tmp_path / "run")
    room(None)
    assert checkpoints(tmp_path / "run") == [4, 8]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1.4 MB: two checkpoints of the tiny run fit, a third does not. Only root can make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)]
    is_mounted = not subprocess.run(command, capture_output=True, check=False).returncode
    yield disk
    if is_mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.soak  # a process of its own; what it prints of a full disk, within this process, is above
def test_a_full_file_system_is_a_line_for_each_checkpoint(tiny_file, small_disk):
    """As a user sees it: what Orbax and TensorStore leave of failed writes speaks up until Python has ended."""
    workdir = small_disk / "run"
    process = start(tiny_file, workdir, "--config.training.steps=16")
    if not small_disk.is_mount():
        wait_until(process, lambda: (workdir / "checkpoints" / "8" / MANIFEST).exists() or done(workdir) > 11)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    _, err = finish(process, 2)
    lines = err.splitlines()
    saved = [line for line in lines if line.startswith("warning: step ")]
    assert 1 <= len(saved) <= 3
    assert all("is not saved: cannot write a checkpoint in " in line for line in saved)
    assert lines[-1].startswith(f"error: cannot write a checkpoint in {workdir / 'checkpoints'}: ")
    rest = [line for line in lines[:-1] if line not in saved]
    assert all(line.startswith(("preparing the corpus", "warning: cannot write ")) for line in rest), rest[:9]
    newest = checkpoints(workdir)[-1]
    assert f"the newest complete checkpoint is of step {newest}" in lines[-1]
    load_params(workdir, newest)
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_a_workdir_that_vanishes_is_made_anew(tiny, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    config = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, data_dir=str(tmp_path / "data")))
    at_step(10, workdir, lambda: shutil.rmtree(workdir), monkeypatch)
    program.train(config, workdir)
    assert (
        f"{workdir}/checkpoints has vanished, with every checkpoint in it; it is made anew" in capsys.readouterr().err
    )
    assert checkpoints(workdir) == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]
    assert {"config.json", "run_meta.json", "tokenizer"} <= {p.name for p in workdir.iterdir()}
    assert load_params(workdir)[2] == STEPS


def test_the_watchdog_prints_stacks_once_of_a_step_that_takes_long(monkeypatch, capfd):
    monkeypatch.setattr(guard, "_LEAST_STALL", 0.3)
    with Watchdog(0.0) as watchdog:
        for step in range(1, 9):
            time.sleep(0.005)
            watchdog.beat(step)
        with watchdog.pause():
            time.sleep(0.7)  # an evaluation
        watchdog.beat(9)
        assert capfd.readouterr().err == ""
        a_step_that_hangs()
        watchdog.beat(10)
    err = capfd.readouterr().err
    assert err.count("watchdog: step 10 takes ") == 1
    assert "in a_step_that_hangs" in err


def a_step_that_hangs() -> None:
    time.sleep(1.2)


@pytest.mark.soak  # stacks of a long step are below
def test_a_step_that_hangs_ends_the_program_and_its_readers(tiny, tmp_path, monkeypatch, capfd):
    """With real readers, one of which is stopped, in test_kill.py, with -m soak."""
    ends, over, reader = [], threading.Event(), mock.Mock()

    def end(code: int) -> None:
        ends.append(code)
        over.set()

    def read_for_ever(share, sharding, batch):
        if done(tmp_path / "run") >= 4:
            over.wait()
            raise InterruptedError
        return real(share, sharding, batch)

    real = program._place
    monkeypatch.setattr(program, "_place", read_for_ever)
    monkeypatch.setattr(guard.os, "_exit", end)
    monkeypatch.setattr(guard.multiprocessing, "active_children", lambda: [reader])
    with pytest.raises(InterruptedError):
        program.main(Settings(config=tiny, workdir=str(tmp_path / "run"), step_timeout=6.0))
    assert set(ends) == {4}
    assert reader.kill.called
    err = capfd.readouterr().err
    assert "hangs: nothing for 6 s" in err
    assert "in read_for_ever" in err


def test_the_host_is_never_more_than_two_steps_ahead():
    class Metric:
        """Like a device's scalar: reading it waits."""

        def __init__(self, step: int):
            self.step = step

        def __int__(self) -> int:
            read.append(self.step)
            return 0

    read: list[int] = []
    follower = StepGuard(Watchdog(0.0), 0, 0, str)
    for step in range(1, 6):
        follower.follow(step, {"optim/skipped_steps": Metric(step)})
        assert read == list(range(1, step - 1))
    follower.catch_up()
    assert read == [1, 2, 3, 4, 5]
