"""The bench of several devices, run on virtual ones: every figure that is compared must agree."""

import json

import jax
import pytest

from sepjax.bench import mesh as bench
from sepjax.bench.mesh import attention, generation, training

TRAINING = training.Settings(
    configs=("sep_tiny",),
    axes=("context",),
    length=64,
    long_length=64,
    tokens=64,
    micro_batches=1,
    steps=2,
    seconds=0.0,
)
ATTENTION = attention.Settings(
    lengths=(512,),
    room=1.5,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    dtype="float32",
    passes=("forward",),
    seconds=0.0,
)
GENERATION = generation.Settings("sep_tiny", rows=2, prompt=64, new=4, capacity=64)


@pytest.fixture(scope="module")
def two_devices():
    devices = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices)
        patch.setattr(jax, "device_count", lambda *args: 2)
        yield


@pytest.mark.soak
@pytest.mark.usefixtures("two_devices")
def test_every_part_runs_and_agrees(tmp_path, capsys):
    file = tmp_path / "mesh.json"
    settings = bench.Settings(TRAINING, ATTENTION, GENERATION)
    bench.main(("training", "attention", "generation"), settings, str(file))
    one, mesh, separators, dense, alone, *generated = json.loads(file.read_text())["figures"]
    assert (one["devices"], mesh["devices"], mesh["mesh"]) == (1, 2, {"context": 2})
    assert mesh["losses_agree"]
    assert mesh["losses"][1] < mesh["losses"][0] - 0.01, "the optimizer moves, so gradients are compared too"
    assert {x["kind"] for x in mesh["collectives"]} >= {"all-gather", "collective-permute"}
    assert separators["pairs"] == alone["pairs"] < dense["pairs"] == 512 * 513 // 2
    token = 2 * 16 * 4  # bytes of one token's key and value
    assert dense["bytes_received"] == 256 * token
    # A window of 256 needs all keys of a device that has 256: the halo is as large. 12 % of the keys come on top.
    assert separators["bytes_received"] > dense["bytes_received"]
    assert [x["devices"] for x in generated] == [1, 2]
    assert all(x["all_steps_ran"] and x["same_tokens"] == 1 for x in generated)
    assert generated[1]["cache_bytes_per_device"] < 0.6 * generated[0]["cache_bytes_per_device"]
    assert "losses agree" in capsys.readouterr().out
