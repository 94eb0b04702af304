"""Tiny runs that tests disturb: started as a user starts them, or in this process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
SENTENCES = ("The cat sat on the mat, and looked.", "Where is the dog? It ran away!", "One; two: three. Four, five.")
EVERY = 4  # steps between two checkpoints
STEPS = 28
# Permissions count for root too from here on: prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE), then Python again.
OBEY_PERMISSIONS = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
# Programs are known again by the devices of a process, and these by their number.
ON_ONE_DEVICE = (
    "import jax, runpy, sys; there = jax.devices; jax.devices = lambda *which: there(*which)[:1]; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)

CONFIG = """
from sepjax.config import (AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig)

def get_config():
    return Config(
        model=ModelConfig(vocab_size=320, num_kv_heads=1, {shape}),
        attention=AttentionConfig(num_sinks=2, window_size=8, max_separators=8{op}),
        data=DataConfig(name={corpus!r}, tokenizer_vocab_size=300, sequence_length={length}, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        training=TrainingConfig(steps={steps}, log_every=1, eval_every=20, eval_batches=1, checkpoint_every={every}),
    )
"""
OP = ", implementation='reference'"  # compiles in half the time; tests/test_train.py has what users get
SHAPE = "num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64"
GPU_SHAPE = "num_layers=4, embed_dim=256, num_heads=4, head_dim=64, mlp_dim=512, dtype='bfloat16'"


def write_config(folder: Path, *, on_gpu: bool = False) -> Path:
    """A corpus and a config file over it."""
    corpus = folder / "corpus"
    corpus.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        (corpus / f"{number}.txt").write_text(" ".join(rng.choice(SENTENCES, 12)) + "\n")
    shape, length = (GPU_SHAPE, 256) if on_gpu else (SHAPE, 32)
    path = folder / "tiny.py"
    path.write_text(
        CONFIG.format(corpus=str(corpus), op="" if on_gpu else OP, shape=shape, length=length, steps=STEPS, every=EVERY)
    )
    return path


def start(
    config_file: Path, workdir: Path, *flags: str, extra: dict[str, str] | None = None, knows: bool = False
) -> subprocess.Popen:
    """train.py as a process of its own; on a CPU it `knows` what this one has compiled, and writes nothing there."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **(extra or {}),
    }
    if os.environ["JAX_PLATFORMS"] == "cpu":
        environment.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as tests/conftest.py does for this process
    if os.environ["JAX_PLATFORMS"] == "cuda":  # the same bits in every process: no atomics, no timing of candidates
        environment["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    words, kept = [str(ROOT / "train.py")], jax.config.jax_compilation_cache_dir
    if knows and kept and os.environ["JAX_PLATFORMS"] == "cpu":
        words = ["-c", ON_ONE_DEVICE, *words]
        environment |= {"JAX_COMPILATION_CACHE_DIR": kept, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
        environment["JAX_NUM_CPU_DEVICES"] = str(jax.device_count())
    program = [sys.executable, *words, f"--config={config_file}", f"--workdir={workdir}", *flags]
    command, out = [sys.executable, "-c", OBEY_PERMISSIONS, *program], subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=out, stderr=out, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """What the process printed, once it has ended with `code`."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, err[-4000:])
    return out, err


def wait_until(process: subprocess.Popen, holds: Callable[[], bool]) -> None:
    """Returns as soon as `holds`, which it asks every millisecond."""
    deadline = time.monotonic() + 240
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """Step -> what was recorded of it, times and speeds left out."""
    merged: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        merged.setdefault(record["step"], {}).update(
            {k: v for k, v in record.items() if k.startswith(("train/", "eval/", "optim/", "sep/"))}
        )
    return merged


def done(workdir: Path) -> int:
    """The last step recorded so far."""
    try:
        lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def checkpoints(workdir: Path) -> list[int]:
    """Steps in the checkpoints folder."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def contents(workdir: Path, step: int) -> dict[str, Any]:
    """Everything in a checkpoint, as NumPy arrays and JSON."""
    folder = workdir / "checkpoints" / str(step)
    read: dict[str, Any] = {"data": json.loads((folder / "data" / "process_0-of-1.json").read_text())}
    read["health"] = json.loads((folder / "health" / "metadata").read_text())
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("params", "optimizer"):
            tree = reader.metadata(folder / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            read[item] = reader.restore(folder / item, restore_args=as_numpy)
    return read


def assert_same(a: Path, b: Path, step: int) -> None:
    """Parameters, moments, place in the data and every recorded number are the same bits."""
    assert losses(a) == losses(b)
    ours, theirs = contents(a, step), contents(b, step)
    assert (ours.pop("data"), ours.pop("health")) == (theirs.pop("data"), theirs.pop("health"))
    assert len(jax.tree.leaves(ours)) > 20
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
