"""Steps compiled for pods that are not here, and what is said of them."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from sepjax.config import Config, ConfigError, ModelConfig, UserError, load_config
from sepjax.sharding import make_mesh
from sepjax.training import plan

pytest.importorskip("libtpu", reason="the compiler for TPUs: python -m pip install -e '.[compile]'")
plan.compile_here()

ROOT = Path(__file__).parents[2]
SMALL = Config(
    model=ModelConfig(
        vocab_size=512, num_layers=2, embed_dim=128, num_heads=2, num_kv_heads=2, head_dim=64, mlp_dim=256
    )
)


def small(**changes):
    data = dataclasses.replace(SMALL.data, sequence_length=256, batch_size=8, tokenizer_vocab_size=512)
    return dataclasses.replace(SMALL, data=data, **changes)


@pytest.mark.soak  # a minute on two cores, and two as configured
@pytest.mark.parametrize("scan_layers", [True, False])
def test_sep_small_fits_256_chips(scan_layers, capsys):
    """The whole step of the 160M shape on v5e:16x16: 1.8 GiB of state, and a third of a chip's memory in all.

    Scanned layers compile in a third of the time and take as much memory.
    """
    config = load_config(ROOT / "configs" / "sep_small.py")
    config.model.scan_layers = scan_layers
    config.optimizer.accumulation_steps = 4
    found = plan.make_plan(config, "v5e:16x16", 5)
    with capsys.disabled():
        print(f"\n{plan.report(found, config)}")
    one = make_mesh(SMALL.mesh, jax.devices()[:1])
    parameters = sum(x.size for x in jax.tree.leaves(plan.abstract_state(config, one).params))
    assert found.mesh == {"data": 256, "fsdp": 1, "tensor": 1, "context": 1}
    assert found.hbm is not None
    assert found.memory.outputs < 2**20, "the state is updated in place"
    assert found.memory.arguments == pytest.approx(3 * 4 * parameters, rel=0.02), "parameters and two moments"
    assert found.memory.total < 6 * 2**30 < found.hbm
    assert found.memory.arguments < found.memory.peak <= found.memory.total
    # Replicated parameters: gradients are summed over all chips, and nothing else of size moves.
    assert {x.kind for x in found.collectives} == {"all-reduce"}
    assert found.largest[0].bytes < 2**29


@pytest.mark.soak  # the kernels on several chips: attention/test_tpu_compile.py; a step on a mesh: test_step.py
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_a_sharded_step_runs_the_kernels_on_each_chip(topology):
    """Rows over `data`, parameters over `fsdp`, heads over `tensor`; the batch in two micro-batches."""
    config = small(
        mesh=dataclasses.replace(SMALL.mesh, data=2, fsdp=2, tensor=2),
        optimizer=dataclasses.replace(SMALL.optimizer, accumulation_steps=2),
    )
    mesh = make_mesh(config.mesh, plan.topology_devices(topology))
    text = plan.compile_step(config, mesh).as_text() or ""
    for kernel in ("forward", "query_gradient", "key_gradient"):
        assert f"separator_attention_{kernel}" in text
    found = {x.kind: x for x in plan.Program(text).collectives()}
    assert found["all-gather"].times >= config.optimizer.accumulation_steps * config.model.num_layers, "fsdp gathers"


@pytest.mark.soak
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_a_step_over_parts_of_rows_runs_the_kernels_too(topology):
    """Tokens over `context`: Mosaic's kernels once for rows with room for their global keys, once for the others."""
    config = small(mesh=dataclasses.replace(SMALL.mesh, data=2, fsdp=2, context=2))
    mesh = make_mesh(config.mesh, plan.topology_devices(topology))
    text = plan.compile_step(config, mesh).as_text() or ""
    found = re.findall(r"%separator_attention_(\w+?)(?:\.\d+)? = .* custom_call_target=\"tpu_custom_call\"", text)
    assert {"forward", "query_gradient", "key_gradient"} == set(found)
    assert all(found.count(name) >= 2 for name in found)
    assert {"collective-permute", "all-gather"} <= {x.kind for x in plan.Program(text).collectives()}


def test_no_such_topology():
    with pytest.raises(UserError, match=r"--topology=v9:2x2: .*v9; expected a TPU and the grid of its chips, such as"):
        plan.topology_devices("v9:2x2")
    with pytest.raises(UserError, match=r"--topology=h100: expected h100:HOSTSxGPUS, such as h100:1x8"):
        plan.topology_devices("h100")


def test_no_compiler(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(plan.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match="libtpu, which is not installed; python -m pip install"):
        plan.topology_devices("v5e:16x16")


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"mesh.*does not fit 16 devices"):
        plan.make_plan(small(mesh=dataclasses.replace(SMALL.mesh, data=3)), "v5e:4x4", 1)
    with pytest.raises(ConfigError, match="of 8 rows does not split over 16 devices"):
        plan.make_plan(small(), "v5e:4x4", 1)
    wide = dataclasses.replace(SMALL.model, mlp_dim=2**21)
    with pytest.raises(UserError, match=r"the step does not fit TPU v5 lite: .*15\.75G.*mesh\.fsdp"):
        plan.make_plan(small(model=wide), "v5e:2x2", 1)


@pytest.mark.parametrize(
    ("kind", "gib", "verdict"),
    [
        ("TPU v5", 90, "fits\n"),
        ("NVIDIA H100 80GB HBM3", 59, "fits\n"),
        ("NVIDIA H100 80GB HBM3", 61, "fits with XLA_CLIENT_MEM_FRACTION=0.92: JAX takes 75%"),
        ("NVIDIA H100 80GB HBM3", 74, r"DOES NOT FIT: .*mesh\.fsdp.*lora\.rank"),
    ],
)
def test_a_plan_says_whether_it_fits(kind, gib, verdict):
    memory = plan.Memory(arguments=2**30, outputs=0, temporaries=(gib - 1) * 2**30, program=0, peak=gib * 2**30)
    found = plan.Plan(kind, {"fsdp": 8}, memory, int(plan._HBM[kind] * 2**30), [], [])
    assert re.search(f"at the most.*\n  {verdict}", plan.report(found, SMALL))


@pytest.mark.soak
def test_h100s_of_several_hosts():
    """Two hosts of four GPUs: the same report, from XLA's compiler for NVIDIA GPUs."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason='compiling for a GPU needs pip install -e ".[compile]"')
    config = small(mesh=dataclasses.replace(SMALL.mesh, data=2, fsdp=2, tensor=2))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1, dtype="bfloat16"))
    found = plan.make_plan(config, "h100:2x4", 3)
    assert found.device_kind.startswith("NVIDIA H100")
    assert found.hbm is not None
    assert 0 < found.memory.total < found.hbm
    assert {"all-gather", "all-reduce"} <= {x.kind for x in found.collectives}


@pytest.mark.parametrize("topology", ["h100:8", "h100:0x8", "h100:"])
def test_a_wrong_number_of_gpus(topology):
    with pytest.raises(UserError, match="expected h100:HOSTSxGPUS"):
        plan.topology_devices(topology)
