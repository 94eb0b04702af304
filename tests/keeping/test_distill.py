"""Gates learned from a dense model's attention: what is observed, what is learned, and what becomes of the workdir."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sepjax
from sepjax.begin import adopt_shape, pretrained_state
from sepjax.config import AttentionConfig, Config, ConfigError, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from sepjax.data.pipeline import prepare_tokenizer
from sepjax.evaluation import compare
from sepjax.evaluation.jobs import evaluate
from sepjax.hub.convert import convert
from sepjax.hub.errors import HubError
from sepjax.keeping import Lesson
from sepjax.keeping.distill import _check_judged, distill
from sepjax.keeping.lesson import Rows
from sepjax.keeping.teacher import observe
from sepjax.model.rope import rope_table, rotate
from sepjax.model.transformer import split
from sepjax.run.checkpoint import load_params, save_params
from sepjax.sharding import make_mesh
from sepjax.training.step import abstract_state
from tests.models import random_model
from tests.runs import start_quickly

MODEL = ModelConfig(vocab_size=320, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64)
GATED = AttentionConfig(
    "gated", num_sinks=1, window_size=8, gate_layer=1, gate_stretch=8, gate_keep=1, implementation="reference"
)
SENTENCES = ("The cat sat on the mat, and looked.", "Where is the dog? It ran away!", "One; two: three. Four, five.")


def looking():
    """A random model that looks at few tokens, sharply: at those whose keys are long."""
    model = random_model(MODEL, dataclasses.replace(GATED, pattern="separator"))
    for matrix in (model.layers.attention.query, model.layers.attention.key):
        matrix.kernel[...] *= 30
    return model


def test_worth_is_what_the_dense_model_looks_at():
    model, T = looking(), 48
    tokens = np.random.default_rng(0).integers(0, 320, (1, T)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], [30, 14, 4], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(30), np.arange(14), np.zeros(4)])[None].astype(np.int32)
    seen = jax.jit(lambda: observe(model, tokens, positions, segments, GATED))()

    def weighed(q, k, v, layer):
        q, k = (rotate(x, rope_table(positions, MODEL.rope, MODEL.head_dim)) for x in (q, k))
        sees = (segments[0][:, None] == segments[0]) & np.tri(T, dtype=bool)
        scores = jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / 4
        weights = jax.nn.softmax(jnp.where(sees, scores, -jnp.inf))
        return jnp.einsum("bhts,bsd->bthd", weights, v[:, :, 0]), weights

    _, weights = jax.jit(lambda: model.run_layers(model.embed(tokens, positions), weighed))()
    far = np.arange(T)[:, None] - np.arange(T) >= GATED.window_size
    expected = np.sum(np.where(far, np.asarray(weights)[1, 0], 0) ** 2, axis=(0, 1))  # layers from the gate on: one
    np.testing.assert_allclose(np.asarray(seen.worth)[0, :44], expected[:44], rtol=1e-4, atol=1e-7)
    # A stretch is judged if 8 queries are far from all of it: 15 are from 0 ... 7, but only 7 from 8 ... 15.
    np.testing.assert_array_equal(np.flatnonzero(seen.is_judged), np.arange(1, 8))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run that begins with a model that was never trained with a gate."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(rng.choice(SENTENCES, 12)) + "\n")
    config = Config(
        model=MODEL,
        attention=GATED,
        data=DataConfig(name=str(folder / "corpus"), tokenizer_vocab_size=300, sequence_length=64, batch_size=4),
        optimizer=OptimizerConfig(warmup_steps=1, accumulation_steps=2),
        training=TrainingConfig(
            steps=2, log_every=1, eval_batches=1, checkpoint_every=2, init_from=str(folder / "source")
        ),
    )
    model = looking()
    own = dataclasses.replace(config, attention=model.attention, training=TrainingConfig())
    prepare_tokenizer(own, str(folder / "data"), folder / "source" / "tokenizer")
    save_params(folder / "source", own, split(model)[1])
    return config


@pytest.fixture
def quick_start(monkeypatch):
    start_quickly(monkeypatch)


@pytest.mark.usefixtures("quick_start")
def test_a_gate_learns_what_to_keep_and_goes_wherever_models_go(config, tmp_path, capsys, monkeypatch):
    grades = distill(config, tmp_path / "gate", Lesson(rows=24, held_out=8, steps=60, learning_rate=1e-2))
    assert all(x.recall > 2 / 8 and x.captured > x.recall for x in grades.values()), grades  # chance: 1 / 8
    assert "worth kept" in capsys.readouterr().out

    model, _ = sepjax.load(tmp_path / "gate")
    assert model.attention == GATED
    params, source = split(model)[1], load_params(config.training.init_from)[1]
    gate = params.pop("gate")
    jax.tree.map(np.testing.assert_array_equal, params, source)

    scores = {x.pattern: x for x in evaluate(tmp_path / "gate", ["sink_window", "gated"], length=64)}
    gated, window = (scores[pattern].layer_kept for pattern in ("gated", "sink_window"))
    assert gated[0] == window[0] < gated[1] < window[1] + 1 / 8, "the layer below the gate, the one above it"
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(
            compare, "score_arms", lambda load, windows, arms, **cut: asked.append({x.name for x in arms}) or []
        )
        for path in (tmp_path / "gate", config.training.init_from):
            evaluate(Path(path), length=64)
    with_gate, without = asked
    assert without == {"separator", "dense", "sink_window", "fixed_interval"}
    assert with_gate == without | {"gated"}
    with pytest.raises(ConfigError, match="needs a model with a gate, and this one has none"):
        evaluate(Path(config.training.init_from), ["gated"], length=64, max_documents=1)

    convert(tmp_path / "gate", tmp_path / "folder", dtype="float32")
    again, _ = sepjax.load(tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], params | {"gate": gate})
    convert(tmp_path / "folder", tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "back")[1]["gate"], gate)
    settings = tmp_path / "folder" / "config.json"
    settings.write_text(settings.read_text().replace('"gated"', '"separator"'))
    with pytest.raises(HubError, match=r"has sepllm_gate.safetensors, but its config.json says sepllm.pattern='sep"):
        sepjax.load(tmp_path / "folder")

    # A run goes on with the gate, or without it.
    training = dataclasses.replace(config.training, init_from=str(tmp_path / "gate"))

    def begun(pattern):
        changed = dataclasses.replace(config, attention=dataclasses.replace(GATED, pattern=pattern), training=training)
        workdir = tmp_path / pattern
        changed, mesh = adopt_shape(changed, workdir), make_mesh(config.mesh)
        return pretrained_state(changed, workdir, mesh, abstract_state(changed, mesh)).params

    jax.tree.map(np.testing.assert_array_equal, begun("gated")["gate"], gate)
    assert "gate" not in begun("separator")
    assert "is left out, attention.pattern='separator' has no use for it" in capsys.readouterr().err


def test_what_cannot_be_distilled_is_named(config, tmp_path):
    def refused(message, changed):
        with pytest.raises(ConfigError, match=message):
            distill(changed, tmp_path / "gate", Lesson(rows=2, held_out=2, steps=1))

    plain = dataclasses.replace(GATED, pattern="separator")
    refused("'separator' has no gate; use a config with 'gated'", dataclasses.replace(config, attention=plain))
    refused("training.init_from is empty", dataclasses.replace(config, training=TrainingConfig()))
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=16))
    refused("no stretch of the training rows is seen by 8 queries beyond its window.*sequence_length=16", short)
    # What no number tells before they are read: rows long enough, of documents that are not.
    judged, unjudged = (Rows(*[np.full((1, 64), flag)] * 4) for flag in (True, False))
    _check_judged(config, judged, judged)
    with pytest.raises(ConfigError, match=r"no stretch of the evaluation rows.*sequence_length=64"):
        _check_judged(config, judged, unjudged)
