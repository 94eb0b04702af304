"""The benchmark beside transformers, on a model that takes no time."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import jax
import pytest

from sepjax.bench import peers
from sepjax.config import AttentionConfig, ModelConfig, UserError
from sepjax.data.tokenizer import train_sentencepiece
from sepjax.hub.export import save_folder
from sepjax.model.transformer import create

TORCH = sys.executable if importlib.util.find_spec("torch") else os.environ.get("SEPJAX_TORCH_PYTHON")
SMALL = {"batch_sizes": (1, 2), "prompt_tokens": 8, "new_tokens": 4, "budget": "2/3/6/20"}


@pytest.fixture(scope="module")
def model():
    tokenizer = train_sentencepiece(["a text of words, and of more words. " * 40], 280)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16,
        mlp_dim=48, dtype="float32",
    )  # fmt: skip
    return create(config, AttentionConfig(), jax.random.key(0)), tokenizer


def test_both_caches_answer_at_every_size(model, monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Generator:  # answers themselves are below, and everywhere else
        def __init__(self, model, tokenizer, attention):
            self.pattern = attention.pattern

        def generate(self, ids, *, max_new_tokens, stop_at_eos, bounded):
            asked.append((self.pattern, len(ids), {len(row) for row in ids}, max_new_tokens, stop_at_eos, bounded))

    monkeypatch.setattr(peers, "Generator", Generator)
    found = list(peers.ours(*model, peers.Settings(model="-", **SMALL)))
    assert [(x.name, x.rows) for x in found] == [
        (name, rows) for name in ("sepjax, dense, growing", "sepjax, bounded 2/3/6/20") for rows in (1, 2)
    ]
    assert all(x.tokens_per_second(4) == pytest.approx(x.rows * 4 / x.seconds) for x in found)
    each = [("dense", 1, {8}, 4, False, False), ("dense", 2, {8}, 4, False, False)]
    each += [("separator", 1, {8}, 4, False, True), ("separator", 2, {8}, 4, False, True)]
    assert asked == [case for case in each for _ in range(3)]


def test_a_python_without_torch_is_said(model, tmp_path: Path):
    bare = tmp_path / "python"  # isolated: no site packages
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    save_folder(*model, tmp_path / "model")
    for python, said in ((str(bare), "lacks numpy; name a Python that has"), (str(tmp_path / "none"), "cannot run")):
        with pytest.raises(UserError, match=said):
            next(peers.theirs(peers.Settings(model=str(tmp_path / "model"), torch_python=python, **SMALL)))


@pytest.mark.soak  # compiles four programs of generation; who is asked for what is above
@pytest.mark.skipif(TORCH is None, reason="needs transformers here, or SEPJAX_TORCH_PYTHON")
def test_transformers_answers_too(model, tmp_path: Path, capsys: pytest.CaptureFixture):
    save_folder(*model, tmp_path / "model")
    peers.main(peers.Settings(model=str(tmp_path / "model"), torch_python=str(TORCH), **SMALL))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {x["name"] for x in told["figures"]} >= {"transformers, its default cache", "sepjax, dense, growing"}
    assert told["transformers"]
    assert told["torch"]
