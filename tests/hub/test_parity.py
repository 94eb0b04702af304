"""Every family against transformers: figures that it gave (golden.*), and itself where torch is installed."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sepjax
from sepjax.config import AttentionConfig, Config, ConfigError
from sepjax.data.batch import Batch
from sepjax.hub.export import save_folder
from sepjax.model.attend import forward
from sepjax.model.transformer import split
from sepjax.training.step import _loss

spec = importlib.util.spec_from_file_location("tiny_checkpoints", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

GOLDEN = tiny.golden()
SEPARATORS = AttentionConfig(
    num_sinks=tiny.SINKS, window_size=tiny.WINDOW, separators="ids", separator_ids=tuple(range(11)), max_separators=8,
    implementation="reference",  # the least to run; that all are alike is in tests/attention
)  # fmt: skip
DENSE = AttentionConfig(pattern="dense")
TORCH = sys.executable if importlib.util.find_spec("torch") else os.environ.get("SEPJAX_TORCH_PYTHON")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_text):
    """name -> (folder, model, tokenizer), of files in one piece and in three."""
    found = {}
    for number, (name, variant) in enumerate(GOLDEN.items()):
        folder = tmp_path_factory.mktemp(name)
        tiny.write_checkpoint(folder, variant["config"], variant["shapes"], files=1 + 2 * (number % 2))
        (folder / "tokenizer.json").write_text(tokenizer_text)
        found[name] = (folder, *sepjax.load(folder))
    return found


def logits(model, attention, *flags):
    """The scores where these tokens are separators, for all flags in one batch.

    One operation after another: the families have most in common, so few are compiled, where a program of each family
    would take a second or two.
    """
    rows = len(tiny.tokens())
    tokens = jnp.asarray(np.tile(tiny.tokens(), (len(flags), 1)), jnp.int32)
    positions = jnp.asarray(np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape))
    with jax.disable_jit():
        hidden, _ = forward(model, tokens, positions, jnp.asarray(np.concatenate(flags)), None, attention)
        scores = np.asarray(model.logits(hidden))
    return [scores[i : i + rows] for i in range(0, len(scores), rows)]


FEW, ALL = tiny.tokens() < 11, np.ones_like(tiny.tokens(), bool)


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_dense_and_masked_are_those_of_transformers(models, name):
    """Where every token is a separator, everything is seen. The pattern "dense" is below, and with -m soak."""
    _, model, _ = models[name]
    masked, dense = logits(model, SEPARATORS, FEW, ALL)
    np.testing.assert_allclose(dense, GOLDEN[name]["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(masked, GOLDEN[name]["masked"], atol=1e-4, rtol=0)
    assert np.abs(GOLDEN[name]["masked"] - GOLDEN[name]["logits"]).max() > 1  # the mask matters


@pytest.mark.soak
@pytest.mark.parametrize("name", GOLDEN)
def test_logits_of_the_dense_pattern_are_those_of_transformers(models, name):
    (dense,) = logits(models[name][1], DENSE, FEW)
    np.testing.assert_allclose(dense, GOLDEN[name]["logits"], atol=1e-4, rtol=0)


@pytest.mark.soak  # losses are those of logits, divided and capped ones too, in training/test_loss.py
@pytest.mark.parametrize("name", GOLDEN)
def test_the_loss_of_training_is_that_of_transformers_logits(models, name):
    model, rows = models[name][1], tiny.tokens().astype(np.int32)
    config = Config(model=model.config, attention=SEPARATORS)
    counts = np.broadcast_to(np.arange(rows.shape[1]) < rows.shape[1] - 1, rows.shape)
    positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    batch = Batch(rows, np.roll(rows, -1, axis=1), counts, positions, np.ones_like(rows), FEW)
    graph, params = split(model)
    with jax.disable_jit():
        _, (_, found, _) = _loss(params, {}, config, graph, jax.tree.map(jnp.asarray, batch))
    scores = GOLDEN[name]["masked"].astype(np.float64)[:, :-1]
    right = np.take_along_axis(scores, rows[:, 1:, None], axis=-1)[..., 0]
    expected = np.sum(np.log(np.sum(np.exp(scores), axis=-1)) - right)
    assert float(found) == pytest.approx(expected, abs=1e-4 * right.size)


# The logits are above; what decoding adds is in tests/generation/cache/test_growing_pass.py, for layers of every kind,
# and what `generate` does with the best of them in tests/test_generate.py, against whole forward passes.
@pytest.mark.soak
@pytest.mark.parametrize("name", GOLDEN)
def test_greedy_text_is_that_of_transformers(models, name):
    _, model, tokenizer = models[name]
    settings = {"max_new_tokens": tiny.NEW_TOKENS, "stop_at_eos": False, "attention": DENSE}
    (answer,) = sepjax.generate(model, tokenizer, [tiny.tokens()[0].tolist()], **settings)
    assert answer.token_ids == tuple(GOLDEN[name]["greedy"].tolist())


@pytest.mark.soak  # the masked logits are above, what a cache lets go in tests/test_generate.py
def test_training_free(models):
    _, model, tokenizer = models["pythia"]
    ids = tiny.tokens()[0].tolist()
    settings = {"max_new_tokens": 8, "stop_at_eos": False}
    (answer,) = sepjax.generate(model, tokenizer, [ids], attention=SEPARATORS, **settings)
    assert answer.token_ids[0] == int(GOLDEN["pythia"]["masked"][0, -1].argmax())
    assert answer.cache.held < answer.cache.seen  # it evicted


@pytest.mark.soak  # a bounded cache knows no more of other families than a growing one
def test_training_free_over_a_bounded_cache(models):
    _, model, tokenizer = models["pythia"]
    ids, settings = tiny.tokens()[0].tolist(), {"max_new_tokens": 8, "stop_at_eos": False}
    bounded = dataclasses.replace(SEPARATORS, max_separators=4, cache_size=16)
    events = list(sepjax.stream(model, tokenizer, ids, attention=bounded, bounded=True, **settings))
    assert len(events) == 8
    assert all(event.cache.held <= 16 < event.cache.seen for event in events)


def test_gpt2_does_not_stream_past_its_positions(models):
    _, model, tokenizer = models["gpt2"]
    with pytest.raises(ConfigError, match="64 learned positions"):
        sepjax.stream(model, tokenizer, "the")


def test_the_tiny_checkpoints_cover_every_family():
    from sepjax.hub.families import FAMILIES

    kinds = {variant["config"]["model_type"] for variant in GOLDEN.values()}
    assert kinds == {kind for family in FAMILIES for kind in family.model_types}


@pytest.mark.skipif(TORCH is None, reason="needs torch and transformers here, or SEPJAX_TORCH_PYTHON")
@pytest.mark.parametrize("name", GOLDEN)
def test_transformers_opens_what_is_written_and_agrees(models, name, tmp_path):
    _, model, tokenizer = models[name]
    save_folder(model, tokenizer, tmp_path / "out")
    script = Path(__file__).with_name("torch_reference.py")
    subprocess.run([TORCH, script, "logits", tmp_path / "out", tmp_path / "logits.npy"], check=True)
    np.testing.assert_allclose(*logits(model, DENSE, FEW), np.load(tmp_path / "logits.npy"), atol=1e-4, rtol=0)
