"""SIGKILL, SIGTERM and hanging readers, sent to real processes: docs/reliability.md, promises 1, 2, 6 and 7."""

import dataclasses
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import train as program
from sepjax.config import load_config
from sepjax.run.guard import Stopped
from tests.reliability.common import (
    EVERY,
    STEPS,
    assert_same,
    checkpoints,
    done,
    finish,
    losses,
    start,
    wait_until,
    write_config,
)
from tests.runs import start_quickly

ON_GPU = os.environ["JAX_PLATFORMS"] == "cuda"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, tiny_file) -> Path:
    return write_config(tmp_path_factory.mktemp("reliability"), on_gpu=True) if ON_GPU else tiny_file


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch) -> None:
    """With train.py's own steps, which processes of their own have."""
    start_quickly(monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(config_file) -> Path:
    """The workdir of a run that nothing disturbed; on a CPU it ran in this process, and others must give its bits."""
    workdir = config_file.parent / "undisturbed"
    if ON_GPU:
        finish(start(config_file, workdir))
    else:
        with pytest.MonkeyPatch.context() as patch:
            start_quickly(patch)
            program.train(load_config(config_file), workdir)
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
    return workdir


def kill(config_file: Path, workdir: Path, seed: int, after: int, *, while_saving: bool) -> int:
    """Starts or resumes a run and kills it at a random moment after step `after`; returns the last step recorded."""
    rng = np.random.default_rng(seed)
    process = start(config_file, workdir, knows=True)
    target = after + int(rng.integers(1, EVERY + 1))
    wait_until(process, lambda: done(workdir) >= target)
    if while_saving:
        wait_until(process, lambda: any((workdir / "checkpoints").glob("*tmp*")) or done(workdir) >= STEPS - 1)
    time.sleep(float(rng.uniform(0, 0.02)))
    process.kill()
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, (out, err)
    return done(workdir)


def kill_again_and_again(config_file: Path, undisturbed: Path, workdir: Path, seeds: range) -> None:
    last = 0
    for seed in seeds:
        last = kill(config_file, workdir, seed, last, while_saving=bool(seed % 2))
        if last >= STEPS - 2 * EVERY:
            break
    assert 0 < last < STEPS
    out, err = finish(start(config_file, workdir))
    assert "resumes at step" in out
    assert "is gone without having ended; this one takes over" in err  # the lock file still names the killed process
    assert_same(workdir, undisturbed, STEPS)


RARELY = "--config.training.checkpoint_every=1000"  # nothing is saved but at the end and on a signal


def stop(config_file: Path, workdir: Path, at: int) -> tuple[int, str, str]:
    """Goes on until step `at`, then sends SIGTERM; returns the step that was saved, and what was printed."""
    process = start(config_file, workdir, RARELY)
    wait_until(process, lambda: done(workdir) >= at)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # impatient schedulers send more than one
    out, err = finish(process, 75)
    assert time.monotonic() - sent < 10
    saved = checkpoints(workdir)[-1]
    assert f"stopped: SIGTERM: the checkpoint of step {saved} is complete" in err
    assert "Traceback" not in err
    assert at <= saved < STEPS
    return saved, out, err


def go_on(config_file: Path, workdir: Path, capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The rest of a run, in this process where its bits are those of others, and what was printed."""
    if ON_GPU:
        return finish(start(config_file, workdir))
    capfd.readouterr()
    program.train(load_config(config_file), workdir)
    return capfd.readouterr()


def stop_here(config_file: Path, workdir: Path, at: int, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """As `stop` does, without the seconds that another process takes to begin."""
    if ON_GPU:
        return stop(config_file, workdir, at)
    place, begin, sent, before = program._place, program._begin, [], []

    def begins(*arguments, **settings):
        before.append(signal.getsignal(signal.SIGTERM))
        return begin(*arguments, **settings)

    def told(*arguments):
        if done(workdir) >= at and not sent:
            sent.append(at)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return place(*arguments)

    config = load_config(config_file)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, checkpoint_every=1000))
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_place", told)
        patch.setattr(program, "_begin", begins)
        with pytest.raises(Stopped) as ended:
            program.train(config, workdir)
    saved = checkpoints(workdir)[-1]
    assert f"SIGTERM: the checkpoint of step {saved} is complete" in str(ended.value)
    assert (ended.value.exit_code, ended.value.label) == (75, "stopped")
    assert before == [signal.getsignal(signal.SIGTERM)], "nobody waits for a compilation with nothing to save"
    assert at <= saved < STEPS
    return saved, *capfd.readouterr()


def test_killed_and_stopped_a_run_is_bit_for_bit_what_it_would_have_been(config_file, undisturbed, tmp_path, capfd):
    """Killed during a save, told to stop: on what the kill has left.

    More kills, between saves too, and processes of their own that are told to stop, with -m soak.
    """
    workdir = tmp_path / "run"
    last = kill(config_file, workdir, 1, 2 * EVERY, while_saving=True)  # by then the first checkpoint is complete
    assert EVERY < last < STEPS - EVERY
    saved, out, err = stop_here(config_file, workdir, last + 2, capfd)
    assert "resumes at step" in out
    assert "is gone without having ended; this one takes over" in err  # the lock file still names the killed process
    out, err = go_on(config_file, workdir, capfd)
    assert f"resumes at step {saved}" in out
    assert "is gone" not in err
    assert_same(workdir, undisturbed, STEPS)


@pytest.mark.soak
def test_killed_again_and_again(config_file, undisturbed, tmp_path):
    """Between saves and during them, each time on what the last kill has left."""
    kill_again_and_again(config_file, undisturbed, tmp_path / "run", range(3))


@pytest.mark.gpu
def test_killed_on_a_gpu_with_deterministic_flags(config_file, undisturbed, tmp_path):
    kill_again_and_again(config_file, undisturbed, tmp_path / "run", range(3))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_five_seeds_of_five_kills(config_file, undisturbed, tmp_path, seed):
    kill_again_and_again(config_file, undisturbed, tmp_path / "run", range(10 * seed, 10 * seed + 5))


@pytest.mark.soak
def test_sigterm_saves_within_seconds_twice_in_a_row(config_file, undisturbed, tmp_path):
    workdir, last = tmp_path / "run", 0
    for wanted in (6, 17):  # no multiples of EVERY: nothing would be saved there without the signal
        saved, out, _ = stop(config_file, workdir, wanted)
        assert (f"resumes at step {last}" in out) == (last > 0)
        last = saved
    finish(start(config_file, workdir, RARELY))
    assert_same(workdir, undisturbed, STEPS)


@pytest.mark.soak  # what watches it is in test_numbers.py
def test_a_reader_that_hangs_ends_the_run(config_file, tmp_path):
    workdir = tmp_path / "run"
    flags = ("--config.data.num_workers=1", "--config.training.steps=100000", "--step_timeout=14")
    flags += ("--config.training.eval_every=100000",)
    first = start(config_file, workdir, *flags, "--config.training.checkpoint_every=10")
    wait_until(first, lambda: done(workdir) >= 12)
    (reader,) = [p for p in children(first.pid) if "spawn_main" in command(p)]
    os.kill(reader, signal.SIGSTOP)  # alive, and silent for ever
    _, err = finish(first, 4)
    assert "takes 10 s so far, the median step " in err
    assert "hangs: nothing for 14 s" in err
    assert "in __next__" in err  # the stack of the thread that waits for data
    assert checkpoints(workdir)
    wait_until_gone(reader)


def children(pid: int) -> list[int]:
    return [int(p) for file in Path(f"/proc/{pid}/task").glob("*/children") for p in file.read_text().split()]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.soak
def test_a_reader_that_dies_is_named(config_file, tmp_path):
    workdir = tmp_path / "run"
    process = start(config_file, workdir, "--config.data.num_workers=1", "--config.training.steps=100000")
    wait_until(process, lambda: done(workdir) >= 6)
    (reader,) = [p for p in children(process.pid) if "spawn_main" in command(p)]
    os.kill(reader, signal.SIGKILL)
    _, err = finish(process, 2)
    assert "error: a process that reads data has died" in err


@pytest.mark.soak
def test_a_folder_that_becomes_read_only_costs_checkpoints_and_no_step(config_file, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(config_file, workdir)
    wait_until(process, lambda: (workdir / "checkpoints" / str(EVERY)).is_dir())
    (workdir / "checkpoints").chmod(0o555)
    _, err = finish(process, 2)
    (workdir / "checkpoints").chmod(0o755)
    assert "is not saved: cannot write a checkpoint" in err
    assert err.splitlines()[-1].startswith("error: cannot write a checkpoint")
    assert "ermission denied" in err.splitlines()[-1]
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
    kept = checkpoints(workdir)
    assert kept
    assert kept[-1] < STEPS
    out, _ = finish(start(config_file, workdir))
    assert f"resumes at step {kept[-1]}" in out
    assert_same(workdir, undisturbed, STEPS)


def start_two(config_file: Path, workdir: Path, *flags: str) -> list[subprocess.Popen]:
    """Two processes of one run, as on two hosts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(config_file, workdir, *flags, extra=both | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]


@pytest.mark.soak
def test_two_processes_stop_together_when_one_is_told_to(config_file, tmp_path):
    for process in start_two(config_file, tmp_path / "whole"):
        finish(process)
    workdir, flag = tmp_path / "run", "--config.training.checkpoint_every=1000"
    processes = start_two(config_file, workdir, flag)
    wait_until(processes[0], lambda: done(workdir) >= 6)
    processes[1].send_signal(signal.SIGTERM)  # the one that records nothing
    for process in processes:
        _, err = finish(process, 75)
        assert "the checkpoint of step" in err
    saved = checkpoints(workdir)[-1]
    assert 6 <= saved < STEPS
    for process in start_two(config_file, workdir, flag):
        finish(process)
    assert losses(workdir) == losses(tmp_path / "whole")
