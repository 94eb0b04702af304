"""Checkpoints and workdirs that are damaged, of another config, or in use: promises 3, 7 and 8."""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from sepjax import loading
from sepjax.config import Config, ConfigError, from_json
from sepjax.run import checkpoint_files
from sepjax.run.checkpoint import CheckpointError, load_params
from sepjax.run.checkpoint_files import MANIFEST
from sepjax.run.moving import has_moved_anywhere
from sepjax.run.workdir import WorkdirInUse, claim_workdir, hold_workdir
from tests.reliability.common import EVERY, STEPS, assert_same, checkpoints, losses
from train import train

# Orbax and TensorStore leave what they were reading to the garbage collector when files are damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(step: Path) -> None:
    os.truncate(largest(step / "params"), 1000)


def no_bytes(step: Path) -> None:
    os.truncate(largest(step / "optimizer"), 0)


def zeros(step: Path) -> None:
    """As many zeros: what a crash of the machine leaves of a file whose blocks were not written yet."""
    largest(step / "params").write_bytes(bytes(largest(step / "params").stat().st_size))


def flip_one_bit(step: Path) -> None:
    content = bytearray(largest(step / "params").read_bytes())
    content[len(content) // 2] ^= 1
    largest(step / "params").write_bytes(bytes(content))


def no_commit_marker(step: Path) -> None:
    (step / "commit_success.txt").unlink()


def half_copied(step: Path) -> None:
    shutil.rmtree(step / "optimizer")
    (step / MANIFEST).unlink()


def no_bytes_of_data(step: Path) -> None:
    """Without the manifest too, as after a kill between the two: Grain's reader finds it."""
    (step / MANIFEST).unlink()
    os.truncate(step / "data" / "process_0-of-1.json", 0)


def torn_unsealed(step: Path) -> None:
    (step / MANIFEST).unlink()
    os.truncate(largest(step / "params"), 1000)


def manifest_no_text(step: Path) -> None:
    (step / MANIFEST).write_bytes(b"\x80" + (step / MANIFEST).read_bytes())


def link_to_a_device(step: Path) -> None:
    """Without the manifest, which would tell at once; and the manifest itself could be one."""
    (step / MANIFEST).unlink()
    (step / "config" / "metadata").unlink()
    (step / "config" / "metadata").symlink_to("/dev/zero")


def manifest_on_a_device(step: Path) -> None:
    (step / MANIFEST).unlink()
    (step / MANIFEST).symlink_to("/dev/zero")


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


BREAKS = [
    (truncate, "has 1000 of "),
    (no_bytes, "has 0 of "),
    (zeros, "have changed"),
    (flip_one_bit, "have changed"),
    (no_commit_marker, "commit_success.txt is missing"),
    (half_copied, "it lacks optimizer"),
    (no_bytes_of_data, "Expecting value"),
    (torn_unsealed, "reading array"),
    (manifest_no_text, "sepjax_files.json is damaged"),
    (link_to_a_device, "config/metadata is a link or a device"),
    (manifest_on_a_device, "sepjax_files.json is a link or a device"),
    (empty, "it lacks params"),
]


# Noticed as the others are: with -m soak.
RARE = (no_bytes, zeros, no_bytes_of_data, manifest_no_text, link_to_a_device, half_copied, manifest_on_a_device)
RARE += (torn_unsealed,)


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [pytest.param(*x, id=x[0].__name__, marks=pytest.mark.soak if x[0] in RARE else []) for x in BREAKS],
)
def test_the_last_good_checkpoint_is_used_and_the_torn_one_named(
    hurt: Callable[[Path], None], reason: str, tiny, whole, copy, capsys
):
    hurt(copy / "checkpoints" / str(STEPS))
    train(tiny, copy)
    out, err = capsys.readouterr()
    assert f"warning: the checkpoint of step {STEPS} cannot be used: " in err
    assert reason in err
    assert f"resumes at step {STEPS - EVERY}" in out
    assert f"the damaged checkpoint of step {STEPS} is now {copy}/torn_checkpoints/{STEPS}" in err
    assert (copy / "torn_checkpoints" / str(STEPS)).is_dir()  # nothing is thrown away
    assert_same(copy, whole, STEPS)


def test_two_torn_checkpoints_in_a_row_and_a_third(tiny, whole, copy, capsys):
    steps = checkpoints(copy)
    assert steps == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]
    flip_one_bit(copy / "checkpoints" / str(steps[2]))
    truncate(copy / "checkpoints" / str(steps[1]))
    again = Path(shutil.copytree(copy, copy.parent / "again"))
    train(tiny, copy)
    assert f"resumes at step {steps[0]}" in capsys.readouterr().out
    assert_same(copy, whole, STEPS)
    no_bytes(again / "checkpoints" / str(steps[0]))
    with pytest.raises(CheckpointError, match=rf"none of the 3 checkpoints .* of step {STEPS}: .* have changed"):
        train(tiny, again)
    assert checkpoints(again) == steps  # where none can be read, nothing is moved


def test_readers_use_the_last_good_checkpoint_too(whole, copy, capsys):
    flip_one_bit(copy / "checkpoints" / str(STEPS))
    _, params, step = load_params(copy)
    assert step == STEPS - EVERY
    assert f"warning: the checkpoint of step {STEPS} cannot be used: the contents of params/" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, params, load_params(whole, STEPS - EVERY)[1])
    with pytest.raises(CheckpointError, match=f"can be used of step {STEPS}"):
        loading.load(copy, step=STEPS)
    (copy / "checkpoints" / str(STEPS) / MANIFEST).unlink()
    truncate(copy / "checkpoints" / str(STEPS))
    with pytest.raises(CheckpointError, match=r"cannot read .*params: .*; use an older checkpoint"):
        load_params(copy, STEPS)


def test_a_torn_config_of_the_workdir_is_named(tiny, copy):
    (copy / "config.json").write_text('{"model": {"vocab_')
    with pytest.raises(ConfigError, match="a saved config must be JSON"):
        train(tiny, copy)


def test_a_workdir_in_use_is_refused_and_one_left_behind_is_not(copy, capsys):
    with (
        hold_workdir(copy),
        pytest.raises(WorkdirInUse, match=f"in use: process {os.getpid()} on .* trains there"),
        hold_workdir(copy),
    ):
        pass
    assert (copy / ".run.lock").read_text() == ""
    (copy / ".run.lock").write_text(json.dumps({"pid": 2**22 + 1, "host": "gone", "since": "2026"}))
    with hold_workdir(copy):
        assert "process 4194305 on gone (since 2026) is gone without having ended" in capsys.readouterr().err
    (copy / ".run.lock").write_text("torn{")
    with open(copy / ".run.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(WorkdirInUse, match="in use: another process trains there"), hold_workdir(copy):
            pass


def changed(config: Config, section: str, **values: object) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_other_data_need_the_flag_and_another_model_is_refused_with_it(tiny, copy, capsys):
    longer = changed(tiny, "training", steps=STEPS + EVERY)
    fewer = changed(longer, "data", batch_size=16)
    message = r"data.batch_size: 8 in the workdir, 16 now\. Or add --new_data"
    with pytest.raises(ConfigError, match=message):
        train(fewer, copy)
    with pytest.raises(ConfigError, match=r"model.num_layers: 2 in the workdir, 3 now"):
        train(changed(fewer, "model", num_layers=3), copy, new_data=True)
    with pytest.raises(ConfigError, match=r"data.tokenizer_vocab_size: 300 in the workdir, 299 now"):
        train(changed(longer, "data", tokenizer_vocab_size=299), copy, new_data=True)
    train(fewer, copy, new_data=True)
    assert f"resumes at step {STEPS}" in capsys.readouterr().out
    assert max(losses(copy)) == STEPS + EVERY
    place = json.loads((copy / "checkpoints" / str(STEPS + EVERY) / "data" / "process_0-of-1.json").read_text())
    assert place["made_by"]["rows"] == 16
    with pytest.raises(ConfigError, match=r"data.batch_size: 16 in the workdir, 8 now"):
        train(longer, copy)


def test_killed_after_new_data_and_before_a_checkpoint_the_flag_is_asked_for_again(tiny, copy):
    """config.json has the new data then, but the newest checkpoint is still a place in the old ones."""
    other = changed(changed(tiny, "training", steps=STEPS + EVERY), "data", batch_size=16)
    text = json.loads((copy / "config.json").read_text())
    text["data"]["batch_size"] = 16
    (copy / "config.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match=rf"checkpoints/{STEPS} .* go back to data.batch_size: 8 .*, 16 now\. Or add"):
        train(other, copy)
    train(other, copy, new_data=True)
    assert max(losses(copy)) == STEPS + EVERY


def test_a_workdir_without_a_checkpoint_is_free(tiny, copy, tmp_path, capsys):
    """A start that failed has saved nothing: what it made of its data goes, and any other run may begin there."""
    other = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, num_layers=1))
    data = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, tokenizer_vocab_size=290))
    workdir = tmp_path / "run"
    claim_workdir(workdir, tiny)
    for name in ("tokenizer", "hub", "data"):
        (workdir / name).mkdir()
    for config, remain in ((tiny, 3), (other, 3), (data, 1)):
        claim_workdir(workdir, config)
        assert from_json((workdir / "config.json").read_bytes()) == config
        assert sum((workdir / name).exists() for name in ("tokenizer", "hub", "data")) == remain
    assert "an earlier start of another config saved nothing" in capsys.readouterr().err
    (workdir / "config.json").write_text("{")
    claim_workdir(workdir, tiny)
    with pytest.raises(
        ConfigError, match=r"holds a run of another config.* go back to model.num_layers: 2 in the workdir, 1 now"
    ):
        claim_workdir(copy, other)


@pytest.mark.parametrize(("here", "elsewhere"), [(False, False), (True, False), (False, True)])
def test_what_one_process_has_to_read_anew_all_do(here, elsewhere, monkeypatch, tmp_path):
    """Else some would wait in Orbax for others, which read the places of all processes."""

    class Data:
        def has_moved(self, folder):
            return here

        def read_moved(self, folder):
            raise AssertionError

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint_files.multihost_utils, "process_allgather", lambda x: np.array([x, elsewhere]))
    assert has_moved_anywhere(Data(), tmp_path) == (here or elsewhere)


def test_parameters_of_other_code_are_named_and_not_taken_for_torn(tiny, copy):
    """The config says what it said; the model that the code makes of it is another."""
    for path in (copy / "config.json", *copy.glob("checkpoints/*/config/metadata")):
        text = json.loads(path.read_text())
        text["model"]["mlp_dim"] = 96
        path.write_text(json.dumps(text))
    for path in copy.glob(f"checkpoints/*/{MANIFEST}"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"are not those of this config and code.*\n  layers/mlp/down/kernel"):
        train(changed(tiny, "model", mlp_dim=96), copy)
    with pytest.raises(ConfigError, match=r"layers/mlp/down/kernel: \(2, 64, 32\) saved, \(2, 96, 32\) now"):
        load_params(copy)
    assert not (copy / "torn_checkpoints").exists()


def test_a_checkpoint_of_another_version_names_the_setting(copy):
    path = copy / "checkpoints" / str(STEPS) / "config" / "metadata"
    text = json.loads(path.read_text())
    text["model"]["flux_capacity"] = 1
    path.write_text(json.dumps(text))
    (copy / "checkpoints" / str(STEPS) / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"unknown setting 'model.flux_capacity'.*another version"):
        load_params(copy)
