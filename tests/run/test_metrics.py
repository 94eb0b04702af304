"""Needed FLOPs against the model's own matrices and the compiler's count; records that outlive crashes."""

import gc
import importlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sepjax import flops
from sepjax.config import Config, DataConfig, ModelConfig, UserError
from sepjax.layout import build_layout
from sepjax.model.transformer import abstract
from sepjax.run import events, metrics

SMALL = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, vocab_size=96)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_matmul_parameters_are_the_models_matrices(gated: bool, tied: bool) -> None:
    model = ModelConfig(
        **(vars(SMALL) | {"gated_mlp": gated, "tie_embeddings": tied, "attention_bias": True, "mlp_bias": True})
    )
    _, params = abstract(model)
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    matrices = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    (head,) = jax.tree.leaves(params["embedding" if tied else "head"])
    assert flops.matmul_parameters(model) == matrices + head.size


def test_torch_is_not_imported_for_events(tmp_path, monkeypatch):
    """tensorboardX would, where it is installed: seconds of every start."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [x for x in sys.modules if x.split(".")[0] in ("torch", "tensorboardX") or x == events.__name__]:
        monkeypatch.delitem(sys.modules, name)
    assert importlib.import_module(events.__name__) is not events
    with pytest.raises(RuntimeError, match="imported"):
        importlib.import_module("torch")  # which others still find


def test_a_pair_costs_what_the_compiler_counts_for_dense_attention() -> None:
    T, N, H = 64, 2, 16

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:  # without softmax: matmuls only
        return jnp.einsum("nqk,knh->qnh", jnp.einsum("qnh,knh->nqk", q, k), v).sum()

    arguments = [jax.ShapeDtypeStruct((T, N, H), jnp.float32)] * 3
    gradient = jax.jit(jax.grad(attention, argnums=(0, 1, 2))).lower(*arguments).compile()
    # The forward product with v is dead code in the gradient alone: 2 N H T^2 FLOPs that a training step has.
    counted = gradient.cost_analysis()["flops"] + 2 * N * H * T**2
    model = ModelConfig(num_layers=1, num_heads=N, num_kv_heads=N, head_dim=H)
    config = Config(model=model, data=DataConfig(sequence_length=T))
    needed = T * (flops.training_flops(config, T * T) - flops.training_flops(config, 0))
    assert counted == pytest.approx(needed, rel=0.02)  # the sum over T N H outputs is the rest


def test_dense_mfu_is_the_dense_equivalent_and_sparse_is_less() -> None:
    config = Config(model=SMALL, data=DataConfig(sequence_length=32))
    peak = flops.Peak(1e9, "table: a toy")
    dense = build_layout(jnp.zeros((1, 32), bool), window_size=32, num_sinks=0)
    sparse = build_layout(jnp.zeros((1, 32), bool), window_size=4, num_sinks=1)
    assert int(dense.num_pairs()[0]) == flops.dense_pairs(32)
    report = flops.flops_report(config, float(dense.num_pairs()[0]), 100.0, peak)
    assert report["throughput/mfu"] == report["throughput/mfu_dense_equivalent"]
    assert report["throughput/mfu"] == 100.0 * flops.training_flops(config, flops.dense_pairs(32)) / 1e9
    fewer = flops.flops_report(config, float(sparse.num_pairs()[0]), 100.0, peak)
    assert fewer["throughput/mfu"] < fewer["throughput/mfu_dense_equivalent"] == report["throughput/mfu"]


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA GB200", "NVIDIA GB200"),
        ("TPU v5", "TPU v5"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_listed_devices_are_found_by_their_own_name(device_kind: str, name: str | None) -> None:
    expected = (name, flops.PEAK_BFLOAT16[name]) if name else None
    assert flops._listed_peak(device_kind) == expected


def test_an_unlisted_device_is_measured_and_says_so() -> None:
    start = time.perf_counter()
    peak = flops.peak_flops("float32")
    assert peak.source.startswith("measured: ")
    assert "float32" in peak.source
    # A matmul of 2 GFLOP took at least a nanosecond and at most the whole call.
    assert 2 * 1024**3 / (time.perf_counter() - start) <= peak.flops_per_second < 2 * 1024**3 / 1e-9


def _records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _events(workdir: Path) -> Iterator[Event]:
    for file in sorted(workdir.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:  # record: length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_metrics_go_to_console_file_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with metrics.MetricWriter(tmp_path / "new", total_steps=20) as writer:
        writer.write(10, {"train/loss": jnp.float32(2.5), "throughput/mfu": 0.125})
        writer.write(20, {"train/loss": float("nan")})
    first, second = _records(tmp_path / "new")
    assert {**first, "time": 0} == {"step": 10, "time": 0, "train/loss": 2.5, "throughput/mfu": 0.125}
    assert abs(first["time"] - time.time()) < 60
    assert second["train/loss"] is None
    scalars = {(e.step, v.tag): v.simple_value for e in _events(tmp_path / "new") for v in e.summary.value}
    assert scalars[10, "train/loss"] == 2.5
    assert scalars[10, "throughput/mfu"] == 0.125
    assert set(scalars) == {(10, "train/loss"), (10, "throughput/mfu"), (20, "train/loss")}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step  10/20  loss 2.500"  # of a CPU, MFU is recorded and not shown
    assert lines[1] == "step  20/20  loss nan  eta 0:00"


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    with metrics.MetricWriter(tmp_path, total_steps=50) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"train/loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/l')
    with metrics.MetricWriter(tmp_path, total_steps=50, resume_step=20) as writer:
        writer.write(30, {"train/loss": 3.0})
    assert [(record["step"], record["train/loss"]) for record in _records(tmp_path)] == [(10, 1), (20, 2), (30, 3)]
    starts = [event.step for event in _events(tmp_path) if event.session_log.status == SessionLog.START]
    assert sorted(starts) == [0, 21]  # TensorBoard hides what earlier files have from these steps on


def test_a_run_that_saved_nothing_leaves_no_steps(tmp_path: Path, monkeypatch, capsys) -> None:
    """Its evaluation at step 0 is made again, and is not there twice."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for _ in range(2):
        with metrics.MetricWriter(tmp_path, total_steps=5) as writer:
            for step in (0, 1):
                writer.write(step, {"eval/loss": 1.0, "throughput/mfu": 0.5})
    assert [record["step"] for record in _records(tmp_path)] == [0, 1]
    assert capsys.readouterr().out.splitlines()[-2:] == [f"step  {i}/5  eval loss 1.000  MFU 50.0 %" for i in (0, 1)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not JSON of ours"):
        metrics.MetricWriter(tmp_path, total_steps=5)
    assert "nonsense" in (tmp_path / "metrics.jsonl").read_text()


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.MetricWriter(tmp_path, total_steps=5) as writer:
        writer.write(1, {"train/loss": 1.0})
    metrics.run_meta(tmp_path, seed=0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may grow to 300 bytes: the operating system refuses the rest, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# The library leaves its file to the garbage collector when the last flush fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_loses_no_line_and_stops_no_run(
    tmp_path: Path, small_disk: None, capsys: pytest.CaptureFixture
) -> None:
    writer = metrics.MetricWriter(tmp_path, total_steps=100)
    for step in range(50):
        writer.write(step, {"train/loss": 1.0})
    assert (tmp_path / "metrics.jsonl").stat().st_size == 300
    assert capsys.readouterr().err.count("File too large; lines are kept for later") == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # room again
    writer.write(50, {"train/loss": 1.0})
    writer.close()
    gc.collect()
    assert [record["step"] for record in _records(tmp_path)] == list(range(51))
    last = max(tmp_path.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns)
    assert b"train/loss" in last.read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_lines_that_a_full_disk_never_took_are_a_clear_error(tmp_path: Path, small_disk: None, capsys) -> None:
    writer = metrics.MetricWriter(tmp_path, total_steps=100)
    for step in range(50):
        writer.write(step, {"train/loss": 1.0})
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: File too large; make room"):
        writer.close()
    del writer
    gc.collect()


def test_a_workdir_that_vanishes_gets_its_records_again(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with metrics.MetricWriter(workdir, total_steps=5) as writer:
        writer.write(1, {"train/loss": 1.0})
        shutil.rmtree(workdir)
        writer.write(2, {"train/loss": 2.0})  # nowhere to write
        workdir.mkdir()
        writer.write(3, {"train/loss": 3.0})
    assert [record["step"] for record in _records(workdir)] == [2, 3]


def test_a_workdir_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*another --workdir"):
        metrics.MetricWriter(tmp_path / "file" / "run", total_steps=5)
    with pytest.raises(UserError, match=r"cannot write .*run_meta.json"):
        metrics.run_meta(tmp_path / "file" / "run", seed=0)


def test_progress_line_shows_what_it_is_given() -> None:
    values = {
        "train/loss": 4.2134,
        "optim/learning_rate": 9.8e-4,
        "optim/grad_norm": 0.834,
        "throughput/tokens_per_second": 12345.4,
        "throughput/mfu": 0.312,
        "memory/peak_bytes": 23.55 * 2**30,
        "sep/attention_fraction": 0.221,
        "sep/kv_kept": 0.3,
    }
    assert metrics.progress_line(120, 1000, values, 83.2) == (
        "step   120/1000  loss 4.213  lr 9.8e-04  |g| 0.83  12,345 tok/s  MFU 31.2 %  23.6 GiB  attention 22.1 %"
        "  eta 1:23"
    )
    assert metrics.progress_line(5, 10, {"eval/loss": 1.0, "eval/perplexity": 2.71828}, 3661) == (
        "step   5/10  eval loss 1.000  eval perplexity 2.718  eta 1:01:01"
    )


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, stats: dict | None) -> None:
            self.memory_stats = lambda: stats

    for stats, peak in (
        ([{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 5}], {"memory/peak_bytes": 5.0}),
        ([None, {"bytes_in_use": 1}], {}),
    ):
        monkeypatch.setattr(metrics.jax, "local_devices", lambda stats=stats: [Device(x) for x in stats])
        assert metrics.peak_memory() == peak


def test_throughput_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    throughput = metrics.Throughput()
    throughput.add(100)
    now[0] += 2
    with throughput.pause():
        now[0] += 50
    throughput.add(300)
    now[0] += 2
    assert throughput.rate() == 100
    throughput.add(10)
    now[0] += 1
    assert throughput.rate() == 10  # a new interval


def test_run_meta_tells_where_a_run_comes_from_and_every_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    metrics.run_meta(tmp_path, seed=7)
    metrics.run_meta(tmp_path, seed=7)
    meta = json.loads((tmp_path / "run_meta.json").read_text())
    assert meta["seed"] == 7
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["devices"] == [device.device_kind for device in jax.devices()]
    assert [start["argv"] for start in meta["starts"]] == [meta["argv"]] * 2
    assert capsys.readouterr().err == ""
    meta["starts"][-1]["commit"] = "0123abc"
    (tmp_path / "run_meta.json").write_text(json.dumps(meta))
    metrics.run_meta(tmp_path, seed=7)
    assert "at the last start of this run it was at 0123abc" in capsys.readouterr().err
    for text in ("torn", "[]", '{"starts": [1]}'):
        (tmp_path / "run_meta.json").write_text(text)
        with pytest.raises(UserError, match="move it away"):
            metrics.run_meta(tmp_path, seed=7)
