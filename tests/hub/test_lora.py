"""Low-rank adapters: what a step computes, what is frozen, runs that resume, and models that are merged."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sepjax
from sepjax.begin import adopt_shape, pretrained_state
from sepjax.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    validate,
)
from sepjax.config.lora import adapter_parameters, check_adapters, projections
from sepjax.data.batch import Batch
from sepjax.flops import training_flops
from sepjax.hub import adapter
from sepjax.hub.adapter import origin_family, write_adapter
from sepjax.hub.convert import convert
from sepjax.hub.errors import HubError
from sepjax.hub.families import family_for
from sepjax.hub.safetensors_file import write_safetensors
from sepjax.keeping import Lesson
from sepjax.keeping.distill import distill
from sepjax.model.attend import forward
from sepjax.model.lora import divided, joined, merged
from sepjax.model.transformer import abstract, merge, split
from sepjax.run import checkpoint_files, frozen
from sepjax.run.checkpoint import load_adapter, load_params
from sepjax.run.frozen import FrozenError, merged_with, read_frozen, write_frozen
from sepjax.run.metrics import Throughput
from sepjax.sharding import batch_sharding, make_mesh
from sepjax.training.optimizer import decayed_parameters
from sepjax.training.step import _loss, abstract_state, create_state, model_graph, train_step
from tests.hub import tiny
from tests.hub.test_training_form import CHATML, conversations, write, write_tokenizer
from tests.models import random_params
from tests.runs import losses, start_quickly, tell_all
from train import train

TORCH = os.environ.get("SEPJAX_TORCH_PYTHON")
T, B = 16, 4
LORA = LoraConfig(rank=3, alpha=6.0)
# Biases everywhere and norms of heads: an adapter of the output reads values with their bias.
SHAPE = ModelConfig(
    vocab_size=31, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    attention_bias=True, mlp_bias=True, qk_norm="head",
)  # fmt: skip
CONFIG = Config(
    model=SHAPE,
    attention=AttentionConfig(num_sinks=1, window_size=4, implementation="reference"),  # compiles in half the time
    data=DataConfig(sequence_length=T, batch_size=B),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    training=TrainingConfig(steps=20, init_from="a model"),
    lora=LORA,
)
PLAIN = dataclasses.replace(CONFIG, lora=LoraConfig())
GATED = AttentionConfig("gated", num_sinks=1, window_size=6, gate_layer=1, gate_stretch=4, gate_keep=2)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SHAPE.vocab_size, (B, T + 1)).astype(np.int32)
    segments = np.repeat([[1] * 10 + [2] * 6], B, 0).astype(np.int32)
    positions = np.repeat([[*range(10), *range(6)]], B, 0).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], rng.random((B, T)) < 0.8, positions, segments, tokens[:, :-1] < 6)


def noisy(params, scale=0.1):
    """`params` with random numbers in place of zeros: biases, and B of adapters."""

    def draw(path, x):
        random = np.random.default_rng([7, len(str(path)), x.size])
        return jnp.asarray(np.asarray(x, np.float32) + scale * random.standard_normal(x.shape, np.float32))

    return jax.tree_util.tree_map_with_path(draw, params)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), found, expected)


def begun(config, base=None):
    """`create_state` without its compilations: random adapters over `base`, or over random numbers."""
    shapes = jax.eval_shape(lambda: create_state(config))
    state = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)
    frozen = random_params(shapes.frozen, 1) if base is None else base
    return dataclasses.replace(state, params=random_params(shapes.params, 2), frozen=frozen)


def logits(config, graph, params):
    rows = batch()
    model = merge(graph, params)
    hidden, _ = forward(model, rows.tokens, rows.positions, rows.is_separator, rows.segment_ids, config.attention)
    return model.logits(hidden)


@pytest.mark.soak  # a step is that of the merged matrix, below
def test_a_new_adapter_changes_no_bit_and_a_learned_one_is_the_merged_matrix():
    """Step 0 is the base; afterwards what the adapted model computes is what a plain one of W + alpha / r B A does."""
    base = noisy(begun(PLAIN).params)
    state = begun(CONFIG, base)  # as `create_state` does: test_the_state_before_the_first_step_is_the_source
    plain = model_graph(PLAIN)
    run = jax.jit(lambda params: logits(CONFIG, model_graph(CONFIG), params))
    expected = jax.jit(lambda params: logits(PLAIN, plain, params))
    assert_same(run(state.all_params), expected(base))
    learned = joined(state.frozen, noisy(state.params))
    found, whole = run(learned), merged(learned, LORA)
    assert float(np.abs(found - run(state.all_params)).max()) > 0.05
    np.testing.assert_allclose(found, expected(whole), atol=2e-5 * float(np.abs(found).max()))
    # The definition, written out for two matrices of one layer.
    for part, name, inputs in (("attention", "out", 2), ("mlp", "down", 1)):
        x = jax.tree.map(lambda x: np.asarray(x[1], np.float64), learned["layers"][part][name])
        rows = int(np.prod(x["kernel"].shape[:inputs]))
        flat = x["kernel"].reshape(rows, -1) + 6.0 / 3 * x["lora_a"].reshape(rows, 3) @ x["lora_b"].reshape(3, -1)
        np.testing.assert_allclose(
            np.asarray(whole["layers"][part][name]["kernel"][1]).reshape(rows, -1), flat, atol=1e-6
        )


@functools.cache
def plain_step():
    """Of one device; compiled once."""
    return jax.jit(lambda state, rows: train_step(CONFIG, model_graph(CONFIG), state, rows))


def test_a_step_is_the_one_written_by_hand():
    """A and B have the gradients of the whole matrix W + s A B: dA = s dW B^T, dB = s A^T dW."""
    state = begun(CONFIG, noisy(begun(PLAIN).params, 0.05))
    state = dataclasses.replace(state, params=noisy(state.params, 0.05))
    rows, optimizer = batch(), CONFIG.optimizer
    after, metrics = plain_step()(state, rows)

    def loss(params):
        return _loss(params, {}, PLAIN, model_graph(PLAIN), rows)[0] / jnp.sum(rows.loss_mask)

    value, slopes = jax.jit(lambda params: jax.value_and_grad(loss)(merged(params, LORA)))(state.all_params)
    gradients = jax.tree.map(np.zeros_like, state.params)
    for part, name, x, _ in linears(state.params):
        dw, s = np.asarray(slopes["layers"][part][name]["kernel"], np.float64), LORA.scale
        a, b = (np.asarray(x[k], np.float64) for k in ("lora_a", "lora_b"))
        flat = dw.reshape(2, int(np.prod(a.shape[1:-1])), -1)
        a2, b2 = a.reshape(2, -1, 3), b.reshape(2, 3, -1)
        gradients["layers"][part][name] = {
            "lora_a": (s * flat @ b2.swapaxes(1, 2)).reshape(a.shape),
            "lora_b": (s * a2.swapaxes(1, 2) @ flat).reshape(b.shape),
        }
    norm = float(np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients))))
    assert float(metrics["optim/grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert float(metrics["train/loss"]) == pytest.approx(float(value), rel=1e-5)
    assert_same(after.frozen, state.frozen)
    assert {x.shape for x in jax.tree.leaves(after.optimizer)} <= {x.shape for x in jax.tree.leaves(after.params)} | {
        ()
    }
    assert all(jax.tree.leaves(decayed_parameters(state.params)))
    # The first step of a warm-up has a learning rate of 0: it changes no bit, the moments tell what it saw.
    assert_same(after.params, state.params)
    mean = next(x.mu for x in jax.tree.leaves(after.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    clip = min(1.0, optimizer.clip_norm / norm)
    assert_close(mean, jax.tree.map(lambda g: (1 - optimizer.b1) * clip * g, gradients), 2e-5 * clip * norm)


def linears(params):
    return [
        (part, name, x, 2 if name == "out" else 1)
        for part, them in params["layers"].items()
        for name, x in them.items()
        if "lora_a" in x
    ]


MESHES = [MeshConfig(data=1, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=2, context=2)]


@pytest.mark.parametrize("sizes", MESHES)
def test_a_and_b_lie_as_their_matrix_does(sizes):
    devices = jax.devices()[: sizes.fsdp * sizes.tensor * sizes.context]
    state = abstract_state(CONFIG, make_mesh(sizes, devices))
    for part, name, x, inputs in linears(state.params):
        arrays = state.frozen["layers"][part][name]["kernel"], x["lora_a"], x["lora_b"]
        # A spec leaves out what is whole at its end.
        kernel, a, b = ((*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec))) for x in arrays)
        assert any(kernel[1:])
        assert a[: inputs + 1] == kernel[: inputs + 1]
        assert b[2:] == kernel[inputs + 1 :]


@pytest.mark.soak  # where they lie is above; steps on meshes and micro-batches, in training/test_step.py
@pytest.mark.parametrize("sizes", MESHES)
def test_meshes_and_micro_batches_give_the_same_step(sizes):
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, accumulation_steps=2))
    devices = jax.devices()[: sizes.fsdp * sizes.tensor * sizes.context]
    mesh, graph, alone = make_mesh(sizes, devices), model_graph(config), begun(CONFIG)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    expected, found = [], []
    with jax.set_mesh(mesh):
        spread = jax.device_put(alone, shardings)
        step = jax.jit(lambda s, b: train_step(config, graph, s, b), out_shardings=(shardings, None))
        for i in range(3):
            spread, metrics = step(spread, jax.device_put(batch(i), batch_sharding(mesh)))
            found.append(float(metrics["train/loss"]))
    for i in range(3):
        alone, metrics = plain_step()(alone, batch(i))
        expected.append(float(metrics["train/loss"]))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert_close(spread.params, alone.params, 0.1 * CONFIG.optimizer.learning_rate)


def test_only_adapters_have_moments_and_the_base_has_its_matmuls_type():
    """The memory that is gained: 8 bytes of moments and 2 of rounding for each parameter that does not learn."""
    model = dataclasses.replace(SHAPE, dtype="bfloat16", attention_bias=False, qk_norm="none", vocab_size=500)
    config = dataclasses.replace(CONFIG, model=model, lora=LoraConfig(rank=2, targets=("query", "down")))
    state = jax.eval_shape(lambda: create_state(config))
    learn = sum(x.size for x in jax.tree.leaves(state.params))
    assert learn == adapter_parameters(config.lora, model) == 2 * 2 * (16 + 32 + 24 + 16)
    assert [name for _, name, _, _ in linears(state.params)] == ["query", "down"]
    moments = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert moments == 2 * 4 * learn
    types = {(path[-1].key, x.dtype.name) for path, x in jax.tree_util.tree_leaves_with_path(state.frozen)}
    assert types >= {("kernel", "bfloat16"), ("embedding", "bfloat16"), ("scale", "float32")}
    gated = dataclasses.replace(config, attention=GATED)
    after = jax.eval_shape(lambda: train_step(gated, model_graph(gated), create_state(gated), batch()))[0]
    assert set(after.params) == {"layers", "gate"}  # it is small, and new to most models
    full = dataclasses.replace(config, lora=LoraConfig())
    assert 2 / 3 < training_flops(config, 1) / training_flops(full, 1) < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, r"lora\.rank=-1 must be 0 or more"),
        ({"rank": 2, "alpha": 0.0}, r"lora\.alpha=0\.0 must be above 0"),
        ({"rank": 2, "targets": ("q_proj",)}, r"'q_proj', which is not one of a model's matrices, query, key"),
        ({"rank": 2, "targets": ("gat",)}, "did you mean 'gate'"),
        ({"rank": 2, "targets": ()}, r"lora\.targets='' must be all"),
        ({"rank": 2, "targets": ("all", "up")}, r"lora\.targets='all,up' must be all, or names of matrices, each once"),
        ({"alpha": 32.0}, r"lora\.alpha=32\.0 does nothing without lora\.rank"),
        ({"targets": ("query", "up")}, r"lora\.targets=query,up does nothing without lora\.rank"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(dataclasses.replace(CONFIG, lora=LoraConfig(**changes)))


def test_a_rank_is_held_against_the_shape_that_is_begun_with(config, tmp_path):
    """Not against the model section, which stands for the source's shape."""
    wide = validate(dataclasses.replace(config, model=ModelConfig(), lora=LoraConfig(rank=600)))
    with pytest.raises(ConfigError, match=r"lora\.rank=600 is above the \d+ that the matrix 'query' has at most"):
        adopt_shape(wide, tmp_path / "run")
    with pytest.raises(ConfigError, match="'gate', which is not one of this model's matrices, query, key"):
        check_adapters(LoraConfig(rank=2, targets=("gate",)), ModelConfig(gated_mlp=False))


def test_settings_by_layer_are_held_against_the_shape_that_is_begun_with(config, tmp_path):
    """A source of two layers: four, the default, are not those of the run."""
    layers = adopt_shape(config, tmp_path / "run").model.num_layers
    windows = dataclasses.replace(config.attention, layer_windows=(8,) * layers)
    fits = validate(dataclasses.replace(config, attention=windows))
    assert layers != config.model.num_layers
    assert adopt_shape(fits, tmp_path / "run").attention == windows
    kept = dataclasses.replace(config.attention, kept_layers=(20,))
    beyond = validate(dataclasses.replace(config, attention=kept))
    with pytest.raises(ConfigError, match=rf"attention\.kept_layers has 20; the model's layers are 0 to {layers - 1}"):
        adopt_shape(beyond, tmp_path / "run")


def test_adapters_need_a_model_that_has_learned():
    with pytest.raises(ConfigError, match=r"lora\.rank=3 without training\.init_from"):
        validate(dataclasses.replace(CONFIG, training=TrainingConfig()))


@pytest.fixture
def source(tmp_path):
    golden, folder = tiny.golden()["llama-bias"], tmp_path / "llama"
    tiny.write_checkpoint(folder, golden["config"] | {"torch_dtype": "float32"}, golden["shapes"])
    write_tokenizer(folder, CHATML, size=64)
    return folder


@pytest.fixture
def config(tmp_path, source):
    """Fine-tuning on conversations."""
    corpus = write(tmp_path / "conversations.jsonl", conversations(40))
    return Config(
        attention=AttentionConfig(num_sinks=2, window_size=8, implementation="reference"),
        data=DataConfig(name=str(corpus), sequence_length=100, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=1),
        training=TrainingConfig(
            steps=6, log_every=1, eval_every=6, eval_batches=1, checkpoint_every=3, init_from=str(source)
        ),
        lora=LORA,
    )


@pytest.mark.soak  # a step and the way out are above; resuming, in test_train.py
def test_a_run_on_conversations_resumes_bit_for_bit_and_goes_out_merged(config, source, tmp_path, monkeypatch):
    """What is around its steps, with steps that change every number; what a step computes is above."""
    start_quickly(monkeypatch)
    tell_all(monkeypatch)
    counted, add = [], Throughput.add
    monkeypatch.setattr(Throughput, "add", lambda self, tokens: counted.append(tokens) or add(self, tokens))
    whole, again = tmp_path / "whole", tmp_path / "again"
    last = train(config, whole)
    assert len(counted) == 6
    assert all(200 < tokens < 400 for tokens in counted)  # of 4 rows of 100, padding left out
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "6")
    shutil.rmtree(source)  # a run that has begun needs it no longer
    assert_same(train(config, again), last)
    assert losses(again) == losses(whole)
    assert len(set(losses(whole).values())) == 6

    assert convert(whole, tmp_path / "alone", adapter_only=True).endswith(
        f"belong to {str(source)!r}, which PEFT cannot open: give it that model yourself"
    )

    # Checkpoints have adapters alone (another tree would be refused); what is read is one plain model.
    saved, params, step = load_params(whole)
    assert (saved.lora, step) == (LORA, 6)
    assert_close(params, merged(last.all_params, LORA), 1e-7)
    model, tokenizer = sepjax.load(whole)
    assert_same(split(model)[1], params)
    assert tokenizer.encode("the cat")
    convert(whole, tmp_path / "out")
    out, _ = sepjax.load(tmp_path / "out")
    assert_same(split(out)[1], split(model)[1])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sepllm"]["window_size"] == 8
    shutil.rmtree(whole / "frozen" / "d")
    with pytest.raises(FrozenError, match=r"frozen, the model that this run's adapters belong to: d/.* is missing"):
        sepjax.load(whole)
    assert_same(load_adapter(whole)[1], last.params)  # of which the base is no part
    other = dataclasses.replace(config, lora=LoraConfig(rank=2))
    with pytest.raises(ConfigError, match=r"lora\.rank: 3 in the workdir, 2 now"):
        train(other, again)


def test_the_state_before_the_first_step_is_the_source(config, source, tmp_path, monkeypatch):
    config = adopt_shape(config, tmp_path / "run")
    (tmp_path / "run").mkdir()
    mesh = make_mesh(config.mesh)
    loaded, read = [], sepjax.load(source, mesh=mesh)
    monkeypatch.setattr(
        "sepjax.begin.load", lambda *_, **__: (loaded.extend(jax.tree.leaves(split(read[0])[1])), read)[1]
    )
    state = pretrained_state(config, tmp_path / "run", mesh, abstract_state(config, mesh))
    assert {id(x) for x in jax.tree.leaves(state.frozen)} == set(map(id, loaded)), "in memory once, as it was read"
    assert_same(merged(state.all_params, config.lora), split(sepjax.load(source)[0])[1])
    base = dict(state.frozen)
    assert_same(merged_with(base, state.params, config, mesh), split(sepjax.load(source)[0])[1])
    assert not base, "nor is it there a second time as float32: what was merged is given up"
    assert_same(*(divided(state.all_params)[i] for i in (0, 0)))
    assert projections(config.model)["gate"] == (32, 48)


def adapted(config, params, tokens):
    """Logits of a plain model under dense attention."""
    tokens, shape = jnp.asarray(tokens, jnp.int32), np.shape(tokens)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    model = merge(abstract(config)[0], params)
    flags, segments = jnp.zeros(shape, bool), jnp.ones(shape, jnp.int32)
    return model.logits(forward(model, tokens, positions, flags, segments, AttentionConfig("dense"))[0])


def test_adapters_go_out_and_come_in_as_pefts(source, tmp_path):
    """What is written adds the same to the base as what has learned."""
    model, _ = sepjax.load(source)
    shape = model.config
    config = dataclasses.replace(
        CONFIG, model=shape, lora=LoraConfig(rank=3, alpha=6.0, targets=("query", "out", "gate"))
    )
    state = begun(config, split(model)[1])
    learned = noisy(state.params)
    write_adapter(tmp_path / "adapter", config, learned, origin_family(shape, source))
    keys = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert keys["target_modules"] == ["gate_proj", "o_proj", "q_proj"]
    assert keys["base_model_name_or_path"] is None  # "a model" is none of PEFT's
    assert (keys["r"], keys["lora_alpha"], keys["fan_in_fan_out"]) == (3, 6.0, False)
    found, _ = sepjax.load(source, adapter=tmp_path / "adapter")
    assert_close(split(found)[1], merged(joined(state.frozen, learned), config.lora), 1e-6)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    spread, _ = sepjax.load(source, adapter=tmp_path / "adapter", mesh=mesh)
    assert_same(split(spread)[1], split(found)[1])
    plain = split(sepjax.load(source, mesh=mesh)[0])[1]
    assert jax.tree.map(lambda x: x.sharding, split(spread)[1]) == jax.tree.map(lambda x: x.sharding, plain)
    before = plain["layers"]["attention"]["query"]["kernel"]
    adapter.add_adapter(plain, tmp_path / "adapter", shape, origin_family(shape, source))
    assert before.is_deleted()  # so that no second model needs room
    converted = convert(source, tmp_path / "run", adapter=tmp_path / "adapter")
    assert "step 0 of a run" in converted
    assert_same(load_params(tmp_path / "run")[1], split(found)[1])

    def refused(message, **changes):
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(keys | changes))
        with pytest.raises(HubError, match=message):
            sepjax.load(source, adapter=tmp_path / "adapter")

    refused("peft_type='LOHA': adapters of the type LORA", peft_type="LOHA")
    refused("use_dora=True: it is not read; merge", use_dora=True)
    refused("bias='all': expected one of 'none'", bias="all")
    refused("init_lora_weights='pissa': expected one of", init_lora_weights="pissa")
    refused("lora_alpha=-1: expected a number above 0", lora_alpha=-1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps(keys))
    write_safetensors(tmp_path / "empty" / "adapter_model.safetensors", {})
    with pytest.raises(HubError, match="has no tensors, so there is nothing to add"):
        sepjax.load(source, adapter=tmp_path / "empty")
    with pytest.raises(HubError, match="has no place for a gate"):
        write_adapter(tmp_path / "no", config, learned | {"gate": {}}, origin_family(shape, source))
    neox = dataclasses.replace(
        shape, parallel_residual=True, norm="layernorm", activation="gelu", gated_mlp=False, attention_bias=True,
        mlp_bias=True, num_kv_heads=4, tie_embeddings=False,
    )  # fmt: skip
    family = family_for(neox)[0]
    assert family.name == "gpt_neox"
    narrow = dataclasses.replace(config, model=neox, lora=LoraConfig(rank=2, targets=("query",)))
    with pytest.raises(HubError, match="has attention/query and attention/key and attention/value in one matrix"):
        write_adapter(tmp_path / "no", narrow, begun(narrow).params, family)
    for bad in (source, tmp_path / "run"):
        with pytest.raises(HubError, match=r"adapter_only needs a run with lora\.rank"):
            convert(bad, tmp_path / "out", adapter_only=True)
    with pytest.raises(HubError, match="is for pretrained models; export"):
        convert(tmp_path / "run", tmp_path / "out", adapter=tmp_path / "adapter")


def test_the_base_is_named_where_peft_can_open_it(source, tmp_path, monkeypatch):
    def fetched(name, *, download):
        assert not download
        if name != "owner/cached":
            raise HubError("not here")

    monkeypatch.setattr(adapter, "fetch", fetched)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    assert adapter.peft_base(str(source)) == str(source)
    assert adapter.peft_base("owner/cached") == "owner/cached"
    for name in (str(tmp_path / "run"), str(tmp_path / "model.gguf"), "smollm2-135m", "runs/gone"):
        assert adapter.peft_base(name) is None


@pytest.mark.skipif(TORCH is None, reason="needs torch, transformers and peft in SEPJAX_TORCH_PYTHON")
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama-bias", ["q_proj", "down_proj"]),
        ("pythia", ["query_key_value", "dense"]),
        ("gpt2", ["c_attn", "c_fc"]),
    ],
)
def test_peft_computes_the_same(name, modules, tmp_path, tokenizer_text):
    """Logits of a model with an adapter that PEFT made, and of one that we wrote where the family's names allow it."""
    golden, base = tiny.golden()[name], tmp_path / "base"
    tiny.write_checkpoint(base, golden["config"] | {"torch_dtype": "float32"}, golden["shapes"])
    (base / "tokenizer.json").write_text(tokenizer_text)
    model, _ = sepjax.load(base)
    config = dataclasses.replace(CONFIG, model=model.config, lora=LoraConfig(rank=3, alpha=6.0, targets=("up", "down")))
    learned = noisy(create_state(config).params)
    write_adapter(tmp_path / "ours", config, learned, origin_family(model.config, base))
    script = f"""
import sys, torch, transformers, peft, numpy as np
folder = sys.argv[1]
tokens = torch.tensor(np.load(folder + '/tokens.npy'))
load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder + '/base', dtype=torch.float32).eval()
theirs = peft.LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules={modules})
theirs = peft.get_peft_model(load(), theirs)
torch.manual_seed(0)
for n, p in theirs.named_parameters():
    if 'lora_' in n: p.data = torch.randn_like(p) * 0.3
theirs.eval().save_pretrained(folder + '/theirs')
ours = peft.PeftModel.from_pretrained(load(), folder + '/ours').eval()
with torch.no_grad():
    np.savez(folder + '/logits.npz', theirs=theirs(tokens).logits.numpy(), ours=ours(tokens).logits.numpy())
"""
    np.save(tmp_path / "tokens.npy", tiny.tokens())
    subprocess.run([TORCH, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    with np.load(tmp_path / "logits.npz", allow_pickle=False) as logits:
        for kind in ("theirs", "ours"):
            found, _ = sepjax.load(base, adapter=tmp_path / kind)
            got = adapted(model.config, split(found)[1], tiny.tokens())
            np.testing.assert_allclose(got, logits[kind], atol=1e-4 * np.abs(logits[kind]).max())
            assert np.abs(logits[kind] - golden["logits"]).max() > 0.05


def test_a_base_is_written_once_unless_a_start_left_another(tmp_path):
    target = {"a": {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}}
    first, second = (jax.tree.map(lambda x, i=i: x + i, target) for i in (1, 2))
    write_frozen(tmp_path, {}, anew=True)
    assert read_frozen(tmp_path, {}) == {}
    with pytest.raises(FrozenError, match="it is not there; bring back a copy of the folder"):
        read_frozen(tmp_path, target)
    for params, anew, expected in ((first, False, first), (second, False, first), (second, True, second)):
        write_frozen(tmp_path, params, anew=anew)
        assert_same(read_frozen(tmp_path, target), expected)


def test_what_one_process_finds_of_a_base_is_an_error_of_all(tmp_path, monkeypatch):
    """Here the other of two processes, which alone fails; then this one, whose seal does not succeed."""
    target = {"a": {"kernel": jnp.ones((2, 3))}}
    write_frozen(tmp_path, target, anew=True)
    shares, answers, damage = [], [True], checkpoint_files.damage
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        checkpoint_files.multihost_utils, "process_allgather", lambda mine: np.array([mine, answers.pop(0)])
    )
    monkeypatch.setattr(frozen, "damage", lambda *args, share: shares.append(share) or damage(*args, share=share))
    with pytest.raises(FrozenError, match="another process found its files damaged"):
        read_frozen(tmp_path, target)
    assert shares == [(0, 2)]
    for failed, message in ((True, "process 0 could not write its files"), (False, "a full disk")):
        answers.append(failed)

        def act(failed=failed):
            if not failed:
                raise OSError("a full disk")

        with pytest.raises(OSError, match=message):
            checkpoint_files.on_first(act)
    assert not answers


def test_a_gate_is_not_distilled_into_adapters(tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.rank=3, but a gate is distilled for a model as it is"):
        distill(dataclasses.replace(CONFIG, attention=GATED), tmp_path / "run", Lesson())
