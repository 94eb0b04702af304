"""train.py and evaluate.py as a user runs them, and what bad input does to them."""

import contextlib
import dataclasses
import html
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sepjax.config import Config, ConfigError, UserError, load_config, validate
from sepjax.data.conversations import NoFormError
from sepjax.data.errors import DataError
from sepjax.evaluation import inputs, jobs
from sepjax.run.checkpoint import load_params
from sepjax.run.workdir import differing_fields
from tests.commands import command
from tests.run.test_trackers import Package, steps_of
from tests.runs import start_quickly, state_of_numpy, tell_all
from train import train

ROOT = Path(__file__).parent.parent
SENTENCES = ("The cat sat on the mat, and looked.", "Where is the dog? It ran away!", "One; two: three. Four, five.")
CONFIG = """
from sepjax.config import (AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig)

def get_config():
    return Config(
        model=ModelConfig(vocab_size=320, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16,
                          mlp_dim=64),
        attention=AttentionConfig(num_sinks=2, window_size=8, max_separators=8),
        data=DataConfig(name={corpus!r}, tokenizer_vocab_size=300, sequence_length=32, batch_size=4),
        optimizer=OptimizerConfig(warmup_steps=2),
        training=TrainingConfig(steps=24, log_every=1, eval_every=12, eval_batches=1, checkpoint_every=5),
    )
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """A tiny config over a folder of texts."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(SENTENCES, 12)) + "\n")
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(CONFIG.format(corpus=str(folder)))
    return path


def start(program: str, *flags: str, under: tuple[str, ...] = ()) -> subprocess.Popen:
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in conftest.py; with -m soak there is a run as users' are
    environment = quick | os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    words = [*under, sys.executable, str(ROOT / program), *flags]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(program: str, *flags: str, code: int = 0, under: tuple[str, ...] = ()) -> tuple[str, str]:
    process = start(program, *flags, under=under)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-4000:]
    return out, err


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    keep = ("train/loss", "eval/loss", "optim/grad_norm", "sep/attention_fraction")
    merged: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        merged.setdefault(record["step"], {}).update({k: v for k, v in record.items() if k in keep})
    return merged


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory) -> Path:
    """The workdir of a run that nothing disturbed, in this process; runs in their own: reliability/test_kill.py."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        start_quickly(patch)
        patch.setattr("train.create_state", state_of_numpy)  # random numbers of its own: reliability/test_kill.py
        patch.setitem(sys.modules, "wandb", package := Package("wandb"))
        train(load_config(config_file), workdir, profile_steps="2:3", log_to=("wandb",))
    assert "MFU" not in out.getvalue()  # of a CPU
    assert {step for step, _ in package.lines} == set(range(1, 25))
    assert package.finished == 1
    assert "attention" in out.getvalue()
    told = re.findall(
        r"first step after [\d.]+ s: .*; programs, lowering \+ compiling: step .*, evaluation .*, weights ",
        out.getvalue(),
    )
    assert len(told) == 1
    return workdir


def test_a_run_leaves_everything_that_design_names(finished):
    steps = losses(finished)
    assert sorted(steps) == list(range(1, 25))
    assert steps[24]["train/loss"] < steps[1]["train/loss"] - 0.5
    assert {s for s, values in steps.items() if "eval/loss" in values} == {12, 24}
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir() if p.name.isdigit()) == [15, 20, 24]
    assert {"config.json", "run_meta.json", "tokenizer"} <= {p.name for p in finished.iterdir()}
    assert list(finished.rglob("*tfevents*"))
    assert steps_of(finished / "profile") == [2, 3]


@pytest.mark.soak  # tests/reliability/test_torn.py has the like of it for every later checkpoint
def test_an_interrupted_first_checkpoint_is_no_checkpoint(config_file, tmp_path):
    """Orbax's temporary folder of a first save that a kill cut short: the run starts over, and readers are told."""
    workdir = tmp_path / "run"
    torn = workdir / "checkpoints" / "5.orbax-checkpoint-tmp-123"
    (torn / "params").mkdir(parents=True)
    (torn / "params" / "_METADATA").write_text("{")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_params(workdir)
    # Newlines alone are separators, of which there is hardly one: which is said, once.
    few = ("--config.attention.separators=ids", "--config.attention.separator_ids=3", "--config.data.batch_size=8")
    out, err = run("train.py", f"--config={config_file}", f"--workdir={workdir}", "--config.training.steps=2", *few)
    assert "starts" in out
    assert err.count("warning: the training data: 0.") == err.count("of 256 tokens are separators") == 1
    assert sorted(losses(workdir)) == [1, 2]


@pytest.fixture
def one_device(monkeypatch):
    """`train` in this process sees what a program started on a laptop sees."""
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: device)


@pytest.mark.usefixtures("one_device")
def test_a_workdir_of_another_config_is_refused(config_file, finished):
    before, config = (finished / "config.json").read_text(), load_config(config_file)
    with pytest.raises(ConfigError, match=r"model\.num_layers: 2 in the workdir, 3 now"):
        train(dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3)), finished)
    assert (finished / "config.json").read_text() == before


def test_what_training_does_not_use_may_change_when_it_is_resumed():
    def with_attention(**changes):
        return dataclasses.replace(Config(), attention=dataclasses.replace(Config().attention, **changes))

    assert differing_fields(Config(), with_attention(stream_positions="absolute", cache_dtype="int8")) == []
    assert differing_fields(Config(), with_attention(window_size=7)) == [
        ("attention.window_size", Config().attention.window_size, 7)
    ]


def test_evaluate_compares_patterns(finished, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES * 4))
    # Which there are without a word is in keeping/test_distill.py, scores of all four in evaluation/test_perplexity.py.
    asked = "--patterns=separator,sink_window"
    ended = command(capfd, "evaluate", "windows", f"--model={finished}", f"--text={text}", asked)
    out, (written,) = ended.out, (finished / "evaluations").iterdir()
    assert re.fullmatch(r"windows_text_step24_[0-9a-f]{6}\.json", written.name), ended
    result = json.loads(written.read_text())
    patterns = ["separator", "sink_window"]
    assert (result["job"], result["step"]) == ("windows", 24)
    assert result["settings"] == {"text": str(text), "patterns": patterns}
    scores = {score["pattern"]: score for score in result["scores"]}
    assert list(scores) == patterns
    assert all(pattern in out for pattern in scores)
    assert scores["sink_window"]["kv_kept"] < scores["separator"]["kv_kept"] < 1.0
    assert {score["bytes"] for score in scores.values()} == {len(text.read_bytes())}
    for score in scores.values():  # bits per byte and perplexity are two views of one sum
        nats = np.log(score["perplexity"]) * score["tokens"]
        assert score["bits_per_byte"] == pytest.approx(nats / np.log(2) / score["bytes"], rel=1e-6)


@pytest.mark.soak  # arms of windows and of streams are in tests/evaluation
def test_evaluate_scores_any_arms(finished, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES * 4))  # rows as above
    arms = f"dense; rare: separator ids=7,9; sink_window n=kv:rare; again: dense model={finished}"
    dense, rare, window, again = jobs.evaluate(finished, arms=arms, text=str(text), baseline="rare")
    assert window.kv_kept == pytest.approx(rare.kv_kept, abs=0.02)
    assert (again.perplexity, rare.difference, rare.baseline) == (dense.perplexity, 0, "rare")
    assert dense.difference == pytest.approx(np.log(dense.perplexity / rare.perplexity))
    streams = jobs.stream(finished, [], [], arms="wide: sink_window n=20 c=22", text=str(text), far=30)
    assert [(s.arm, s.cache_size, s.far, s.near) for s in streams] == [("wide", 22, 30, 20)]


@pytest.mark.soak  # three programs; pages and their command are in report/test_report.py
def test_a_report_has_samples_and_kept_tokens_where_they_are_asked_for(finished, tmp_path, capfd, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES * 4))
    page = f"--output={tmp_path}/r.html"
    flags = (f"--workdir={finished}", page, "--samples=1", "--max_new_tokens=20", f"--kept={text}")
    ended = command(capfd, "report", *flags)
    (file,) = (finished / "samples").iterdir()  # other prompts would have another
    assert re.fullmatch(r"step24_[0-9a-f]{6}\.json", file.name)
    assert ended.out == f"samples: {file}\nwritten to {tmp_path}/r.html\n", ended.err
    samples = json.loads(file.read_text())["samples"]
    assert len(samples) == 1
    written = (tmp_path / "r.html").read_text()
    for sample in samples:
        assert f'<span class="prompt">{html.escape(sample["prompt"])}</span>{html.escape(sample["text"])}' in written
    assert '<span class="gone">' in written
    assert "has no chat template" in command(capfd, "report", *flags, "--prompt=a", "--apply_chat_template").err

    def conversations(*_):
        raise ConfigError("no texts") from NoFormError("conversations")

    monkeypatch.setattr(inputs, "texts_of", conversations)
    assert "give --samples texts to answer" in command(capfd, "report", *flags[:3]).err


def test_bad_texts_are_the_users_mistakes(finished, tmp_path):
    """`run_settings` prints these kinds of errors in one line (tests/test_config.py)."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for text, message in (("none.txt", "none.txt"), ("empty.txt", "empty"), ("latin.txt", "UTF-8")):
        with pytest.raises((UserError, OSError), match=message):
            jobs.evaluate(finished, ["dense"], text=str(tmp_path / text))
    with pytest.raises(ConfigError, match="separator"):
        jobs.evaluate(finished, ["separater"])


def test_bad_settings_of_a_run_are_the_users_mistakes(config_file, tmp_path, monkeypatch):
    start_quickly(monkeypatch)
    tell_all(monkeypatch)  # compilers begin before data are looked at
    (tmp_path / "bad.model").write_bytes(b"\x00not a model")
    config = load_config(config_file)
    with pytest.raises(OSError, match="/proc/run"):
        train(config, Path("/proc/run"))
    data = dataclasses.replace(config.data, tokenizer=str(tmp_path / "bad.model"))
    with pytest.raises(DataError, match=r"bad\.model"):
        train(dataclasses.replace(config, data=data), tmp_path / "run")
    data = dataclasses.replace(config.data, eval_split="held_out")
    with pytest.raises(DataError, match="split 'held_out'"):
        train(dataclasses.replace(config, data=data), tmp_path / "late")
    assert not (tmp_path / "late" / "metrics.jsonl").exists()  # before any step, not when it is evaluated
    small = dataclasses.replace(config, attention=dataclasses.replace(config.attention, cache_size=18))
    with pytest.raises(ConfigError, match="cache_size"):
        validate(small)


@pytest.mark.soak  # every config is traced in tests/training/test_every_config.py, and a smaller run is above
def test_sep_small_itself_trains_with_no_download(tmp_path, monkeypatch):
    """The 160M shape on the embedded corpus, as the README gives it, but smaller and quicker to compile."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    small = ("data.batch_size=2", "data.sequence_length=64", "optimizer.accumulation_steps=1", "training.steps=2")
    quick = ("optimizer.warmup_steps=1", "training.eval_batches=1", "model.scan_layers=True")
    flags = [f"--config.{flag}" for flag in (*small, *quick)]
    out, _ = run("train.py", f"--config={ROOT / 'configs' / 'sep_small.py'}", f"--workdir={tmp_path / 'run'}", *flags)
    assert "162,322,944 parameters" in out
    assert set(losses(tmp_path / "run")) >= {2}
