"""`training.init_from`: a run that begins with the parameters, the shape and the tokenizer of another model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import sepjax
from sepjax import loading
from sepjax.begin import adopt_shape, given_tokenizer, planned, pretrained_state
from sepjax.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from sepjax.hub.convert import convert
from sepjax.hub.errors import HubError
from sepjax.hub.safetensors_file import SafetensorsFile
from sepjax.loading import LoadError
from sepjax.model.transformer import split
from sepjax.run.checkpoint import load_params, save_params
from sepjax.sharding import make_mesh
from sepjax.training.step import abstract_state
from tests.hub import tiny
from tests.runs import losses, start_quickly, step_that_tells_all
from train import train

GOLDEN = tiny.golden()["pythia"]


@pytest.fixture
def source(tmp_path, tokenizer_text):
    folder = tmp_path / "pythia"
    tiny.write_checkpoint(
        folder, GOLDEN["config"] | {"torch_dtype": "float32", "a_key_of_theirs": [1]}, GOLDEN["shapes"]
    )
    (folder / "tokenizer.json").write_text(tokenizer_text)
    return folder


@pytest.fixture
def config(tmp_path, source):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        words = rng.choice(["the cat, ", "in and out. ", "then an ant! ", "who ran? "], 20)
        (corpus / f"{number}.txt").write_text("".join(words) + "\n")
    return Config(
        attention=AttentionConfig(num_sinks=2, window_size=8, implementation="reference"),
        data=DataConfig(name=str(corpus), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        training=TrainingConfig(
            steps=4, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=2, init_from=str(source)
        ),
    )


@pytest.fixture
def quick_start(monkeypatch):
    start_quickly(monkeypatch)


def assert_same(params, others):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), params, others)


def begun(config, workdir):
    """The config and the state before step 1, as train.py makes them."""
    workdir.mkdir(exist_ok=True)
    config = adopt_shape(config, workdir)
    mesh = make_mesh(config.mesh)
    return config, pretrained_state(config, workdir, mesh, abstract_state(config, mesh))


def test_what_no_step_changes_goes_out_as_it_came_in(config, source, tmp_path):
    """Parameters before step 1, in shards, are the source's, and so is the exported folder, bit for bit.

    That a step at a learning rate of 0 changes none is in test_lora.py.
    """
    config, state = begun(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path / "run")
    assert any(len({shard.index for shard in x.addressable_shards}) > 1 for x in jax.tree.leaves(state.params))
    given_tokenizer(config)().save(tmp_path / "run" / "tokenizer")
    save_params(tmp_path / "run", config, state.params)
    saved, params, step = load_params(tmp_path / "run")
    model, tokenizer = sepjax.load(source)
    assert step == 0
    assert (saved.model, saved.attention) == (model.config, config.attention)
    assert_same(params, split(model)[1])
    _, own = sepjax.load(tmp_path / "run")
    assert own.encode("then an ant!") == tokenizer.encode("then an ant!")
    convert(tmp_path / "run", tmp_path / "out")
    theirs, ours = (SafetensorsFile(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {name: theirs.view(name).tobytes() for name in theirs.entries} == {
        name: ours.view(name).tobytes() for name in ours.entries
    }
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys.pop("sepllm")["window_size"] == 8
    assert keys == json.loads((source / "config.json").read_text())


@pytest.mark.usefixtures("quick_start")
@pytest.mark.soak  # so does a run of adapters, in test_lora.py; its first state is above
def test_it_resumes_without_its_source_and_another_begins_with_it(config, source, tmp_path, monkeypatch):
    """With steps that change every number; what it computes first is scored by train.py's own evaluation."""
    monkeypatch.setattr("train.train_step", step_that_tells_all)
    train(config, tmp_path / "run")
    whole = losses(tmp_path / "run")
    assert len(set(whole.values())) == 4
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train(config, tmp_path / "run")
    assert losses(tmp_path / "run") == whole
    # A run may begin with another, with its parameters and moments of its own.
    training = dataclasses.replace(config.training, init_from=str(tmp_path / "run"))
    train(dataclasses.replace(config, training=training), tmp_path / "again")
    assert losses(tmp_path / "again")[1] not in whole.values()
    # What it was before is scored first: here the other's last state, on the same rows.
    last, before = (
        [x for x in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()) if "eval/loss" in x]
        for name in ("run", "again")
    )
    assert [x["step"] for x in before] == [0, 4]
    assert before[0]["eval/loss"] == pytest.approx(last[-1]["eval/loss"], rel=1e-6)


@pytest.mark.usefixtures("quick_start")
def test_a_shape_of_its_own_is_refused_and_computing_is_not(config, tmp_path):
    model = ModelConfig(dtype="bfloat16", remat="full", scan_layers=False, num_layers=2, embed_dim=99, mlp_dim=7)
    message = r"another shape than the model section: model\.embed_dim=99, but 32 there; model\.mlp_dim=7, but 64 there"
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, model=model), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    model = dataclasses.replace(model, embed_dim=ModelConfig().embed_dim, mlp_dim=64)
    adopted, state = begun(dataclasses.replace(config, model=model), tmp_path / "run")
    assert (adopted.model.remat, adopted.model.dtype, adopted.model.scan_layers) == ("full", "bfloat16", False)
    assert adopted.model.embed_dim == 32
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_a_plan_needs_the_shape_of_its_source_alone(config, source, tmp_path, monkeypatch):
    """What `sepjax plan` compiles is what train.py would run, before weights and tokenizer are here."""

    def of(init_from, model=config.model):
        training = dataclasses.replace(config.training, init_from=str(init_from))
        return planned(dataclasses.replace(config, model=model, training=training))

    whole = adopt_shape(config, tmp_path / "run").model
    assert whole != config.model
    assert of(source).model == whole
    for path in source.iterdir():
        if path.name != "config.json":
            path.unlink()
    bare = of(source, ModelConfig(dtype="bfloat16", remat="full"))
    assert bare.model == dataclasses.replace(whole, dtype="bfloat16", remat="full")
    assert of(source / "config.json").model == whole
    with pytest.raises(ConfigError, match=r"another shape than the model section: model\.mlp_dim=7"):
        of(source, ModelConfig(mlp_dim=7))
    assert of("owner/name", ModelConfig(mlp_dim=7)).model.mlp_dim == 7, "a shape of its own, and no such path"
    monkeypatch.setattr(loading, "fetch", lambda name, *, download: source)  # in the hub's cache
    with pytest.raises(ConfigError, match=r"another shape than the model section"):
        of("owner/name", ModelConfig(mlp_dim=7))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"data\.tokenizer='x' with training\.init_from=.*leave it empty"):
        planned(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="x")))
    for missing in ("owner/name", "nowhere"):
        with pytest.raises(ConfigError, match=rf"{missing}' is not here.*its config\.json is enough for a plan"):
            of(missing)
    with pytest.raises(LoadError, match="is a folder without checkpoints or config"):
        of(config.data.name)


def test_mistakes_are_named(config, source, tmp_path):
    def begin(init_from=str(source), **data):
        training = dataclasses.replace(config.training, init_from=init_from)
        data = dataclasses.replace(config.data, **data)
        train(dataclasses.replace(config, training=training, data=data), tmp_path / "run")

    with pytest.raises(ConfigError, match=r"data\.tokenizer='x' with training\.init_from=.*leave it empty"):
        begin(tokenizer="x")
    with pytest.raises(FileNotFoundError, match="no such folder: 'nowhere'"):
        begin("nowhere")
    with pytest.raises(LoadError, match="is a folder without checkpoints or config"):
        begin(config.data.name)
    convert(source, tmp_path / "converted")
    with pytest.raises(ConfigError, match=r"a converted model.*--config\.training\.init_from=.*converted"):
        train(config, tmp_path / "converted")
    with pytest.raises(HubError, match=r"no .owner/name. here.*--download"):
        begin("owner/name")
