"""train.py on meshes of virtual devices and on two processes: the same losses and batches, checkpoints that move."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sepjax.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    validate,
)
from sepjax.sharding import check_batch, check_heads, check_length, join_cluster, make_mesh, row_share
from sepjax.training.step import train_step
from tests.runs import losses, measure_once, scores_of_nothing, state_of_numpy, step_that_tells_all
from train import train

ROOT = Path(__file__).parents[1]
STEPS = 6
# Losses are near 5; float32 sums in another order, through a few steps of Adam.
BOUND = 2e-4
SENTENCES = ("The cat sat on the mat, and looked.", "Where is the dog? It ran away!", "One; two: three. Four, five.")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Four query and two key heads; a constant learning rate, so that the length of a run changes nothing.

    One layer and the op's definition compile quickest; what runs on meshes without the latter is in test_step.py.
    """
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(SENTENCES, 12)) + "\n")
    return Config(
        model=ModelConfig(
            vocab_size=320, num_layers=1, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
        ),
        attention=AttentionConfig(num_sinks=2, window_size=8, max_separators=8, implementation="reference"),
        data=DataConfig(name=str(folder), tokenizer_vocab_size=300, sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-3, warmup_steps=2),
        training=TrainingConfig(steps=STEPS, log_every=1, eval_every=STEPS, eval_batches=1, checkpoint_every=2),
    )


def train_on(
    devices: int, mesh: tuple[int, ...], config: Config, workdir: Path, steps: int = STEPS, step=train_step
) -> dict[int, float]:
    """Trains on the first of the virtual devices. Evaluations, a program more, are in the run of two processes."""
    training = dataclasses.replace(config.training, steps=steps)
    config = validate(dataclasses.replace(config, mesh=MeshConfig(*mesh), training=training))
    some = jax.devices()[:devices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: some)
        patch.setattr("train.eval_step", scores_of_nothing)
        patch.setattr("train.train_step", step)
        if step is step_that_tells_all:
            patch.setattr("train.create_state", state_of_numpy)
        measure_once(patch)
        train(config, workdir)
    return losses(workdir)


def assert_same(got: dict[int, float], expected: dict[int, float]) -> None:
    assert sorted(got) == sorted(expected)
    np.testing.assert_allclose(list(got.values()), [expected[step] for step in got], atol=BOUND)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    """The workdir of a run on one device that nothing disturbed. Not to be written to."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    found = train_on(1, (1, 1, 1, 1), config, workdir)
    assert found[STEPS] < found[1] - 0.3, "it learns, so the losses would show other gradients or batches"
    return workdir


# One is in the run that moves, one in that of two processes; a sharded step of every kind in training/test_step.py.
@pytest.mark.soak
@pytest.mark.parametrize("mesh", [(-1, 1, 1, 1), (4, 2, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)], ids=str)
def test_every_mesh_gives_the_same_losses(mesh, config, tmp_path):
    """As users have them: the best op, and a layer that sees everything."""
    attention = dataclasses.replace(config.attention, layer_windows=(8, 32), implementation=None)
    model = dataclasses.replace(config.model, num_layers=2)
    config = dataclasses.replace(config, attention=attention, model=model)
    assert_same(train_on(8, mesh, config, tmp_path / "run"), train_on(1, (1, 1, 1, 1), config, tmp_path / "alone"))


@pytest.mark.soak
def test_a_run_moves_from_one_device_to_eight_and_to_two(config, alone, tmp_path):
    workdir = Path(shutil.copytree(alone, tmp_path / "run"))
    for step in (4, STEPS):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert sorted(train_on(8, (1, 2, 2, 2), config, workdir, steps=4)) == [1, 2, 3, 4], "it went on from step 2"
    assert_same(train_on(2, (2, 1, 1, 1), config, workdir), losses(alone))


def test_a_run_moves_from_one_device_to_eight(config, tmp_path):
    """The state is read into other shards, and the batches go on where they were.

    What a step itself computes on meshes is in training/test_step.py; with it, and to two devices, with -m soak.
    """
    workdir = tmp_path / "run"
    whole = train_on(1, (1, 1, 1, 1), config, workdir, step=step_that_tells_all)
    assert len({round(loss, 2) for loss in whole.values()}) == STEPS
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    (workdir / "metrics.jsonl").unlink()
    found = train_on(8, (1, 2, 2, 2), config, workdir, step=step_that_tells_all)
    assert sorted(found) == [5, 6], "it went on from step 4"
    assert_same(found, {step: whole[step] for step in found})


@pytest.mark.soak  # 24 s; which rows a process reads is below, what they agree on in reliability/test_torn.py
def test_a_run_of_two_processes_starts_again(config, tmp_path):
    """Two devices each, joined by gloo. In processes of their own, and on other axes, below."""
    workdir = tmp_path / "run"
    (out, _), (other, _) = _two_processes(_file(config, tmp_path), workdir, *TWO_EACH, program=("-c", TWICE))
    assert [line.partition(": ")[2].partition(";")[0] for line in out.splitlines() if "parameters" in line] == [
        "starts",
        f"resumes at step {STEPS - 2}",
    ]
    assert "parameters" not in other, "one of them reports"
    first = losses(workdir / "first")
    assert sorted(first) == list(range(1, STEPS + 1))
    assert len({round(loss, 2) for loss in first.values()}) == STEPS
    assert_same(losses(workdir), first)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))  # and goes on in one, which reads what both would have read
    (workdir / "metrics.jsonl").unlink()
    alone = train_on(2, (2, 1, 1, 1), config, workdir, step=step_that_tells_all)
    assert sorted(alone) == [STEPS - 1, STEPS]
    assert_same(alone, {step: first[step] for step in alone})


@pytest.mark.soak
@pytest.mark.parametrize("again", [("data", "fsdp"), ("fsdp", "tensor")])
def test_two_processes_train_save_restore_and_end(config, tmp_path, again):
    """Each time in processes of their own, on the same axes and on others."""
    file, workdir = _file(config, tmp_path), tmp_path / "run"
    _two_processes(file, workdir, *TWO_EACH)
    first = losses(workdir)
    assert sorted(first) == list(range(1, STEPS + 1))
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    mesh = [f"--config.mesh.{axis}={2 if axis in again else 1}" for axis in ("data", "fsdp", "tensor")]
    (out, _), _ = _two_processes(file, workdir, *mesh)
    assert f"resumes at step {STEPS - 2}" in out
    assert_same(losses(workdir), first)


TWO_EACH = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
# train.py as a user starts it; and once more, without its last checkpoint, where all is imported and joined already.
# With the steps of `tell_all`, whose losses and sums tell every number of the state and of the batch, whoever has it;
# with train.py's own below, with -m soak.
TWICE = """
import pathlib, runpy, shutil, sys

import sepjax.training.step, train
from tests.runs import scores_of_nothing, state_of_numpy, step_that_tells_all

for module in (sepjax.training.step, train):
    module.train_step, module.eval_step = step_that_tells_all, scores_of_nothing
sys.argv.pop(0)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if end.code:
        raise

import jax
from jax.experimental.multihost_utils import sync_global_devices
from sepjax.config import from_json

workdir = next(pathlib.Path(x.partition("=")[2]) for x in sys.argv if x.startswith("--workdir="))
config = from_json((workdir / "config.json").read_bytes())
sync_global_devices("both have ended")
if jax.process_index() == 0:
    (workdir / "first").mkdir()
    shutil.copy(workdir / "metrics.jsonl", workdir / "first")
    shutil.rmtree(workdir / "checkpoints" / str(config.training.steps))
sync_global_devices("the last checkpoint is gone")
train.train(config, workdir)
"""


def _file(config: Config, folder: Path) -> Path:
    """A config file with it."""
    file = folder / "config.py"
    sections = ", ".join(
        sorted({type(value).__name__ for value in (config, *vars(config).values(), config.model.rope)})
    )
    file.write_text(f"from sepjax.config import {sections}\ndef get_config():\n    return {config!r}\n")
    return file


def _two_processes(
    config_file: Path, workdir: Path, *flags: str, program: tuple[str, ...] = ()
) -> list[tuple[str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT), "JAX_NUM_PROCESSES": "2"}
    shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, *program, str(ROOT / "train.py")]
    command += [f"--config={config_file}", f"--workdir={workdir}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)
    ]
    try:
        ends = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err[-4000:]
    return ends


class _Device:
    """A device of another process, as far as a mesh is concerned."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, number: int, per_process: int):
        self.id, self.process_index = number, number // per_process

    def __repr__(self) -> str:
        return f"device {self.id}"


@pytest.mark.parametrize(
    ("mesh", "per_process", "shares"),
    [((8, 1, 1, 1), 2, 4), ((2, 2, 1, 2), 2, 4), ((1, 2, 2, 2), 4, 2), ((1, 2, 2, 2), 2, 2), ((1, 1, 2, 4), 4, 1)],
    ids=str,
)
def test_every_row_is_read_by_those_who_hold_it(mesh, per_process, shares):
    """The shares are disjoint and complete, and processes whose devices split the same rows read the same ones."""
    devices = np.array([_Device(i, per_process) for i in range(8)]).reshape(mesh)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor", "context"))
    found = [row_share(mesh, 16, process) for process in range(8 // per_process)]
    assert {x.count for x in found} == {shares}
    rows = {x.index: [row for first, last in x.ranges for row in range(first, last)] for x in found}
    assert sorted(row for part in rows.values() for row in part) == list(range(16))
    assert all(rows[x.index] == [row for a, b in x.ranges for row in range(a, b)] for x in found)


def test_rows_that_would_be_shared_in_part_are_refused():
    devices = np.array([_Device(i, 2) for i in (0, 2, 4, 1, 3, 5)]).reshape(3, 1, 2, 1)  # rows of 0 1, 2 0, 1 2
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor", "context"))
    with pytest.raises(ConfigError, match="3 processes hold rows that overlap in part"):
        row_share(mesh, 6, 0)


def test_a_mesh_that_does_not_fit_names_both_numbers():
    with pytest.raises(ConfigError, match=r"'data': 3.* does not fit 8 devices"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ConfigError, match=r"a .* of 6 rows does not split over 8 devices"):
        check_batch(make_mesh(MeshConfig(data=8)), 6)
    with pytest.raises(ConfigError, match=r"num_heads=4 does not split over mesh\.tensor=8"):
        check_heads(make_mesh(MeshConfig(data=1, tensor=8)), 4)
    with pytest.raises(ConfigError, match=r"sequence_length=72 does not split over mesh\.context=8 .* multiple of 16"):
        check_length(make_mesh(MeshConfig(data=1, context=8)), 72)


def test_a_cluster_named_in_part_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID"):
        join_cluster()
