"""A tiny model over bytes, for what scores text."""

import json

import pytest

from sepjax.config import AttentionConfig, ModelConfig
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.separators import BYTE_OF_CHARACTER
from tests.models import random_model


@pytest.fixture(scope="session")
def byte_tokenizer():
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    names = ["<|endoftext|>", *BYTE_OF_CHARACTER]
    file = {
        "version": "1.0",
        "added_tokens": [special | {"normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []},
    }
    return Tokenizer(HuggingFaceModel(json.dumps(file)))


@pytest.fixture(scope="session")
def byte_model(byte_tokenizer):
    config = ModelConfig(
        vocab_size=byte_tokenizer.vocab_size, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=32, max_positions=1024,
    )  # fmt: skip
    # What is scored does not know the op, which has tests of its own: its definition compiles quickest.
    attention = AttentionConfig(num_sinks=2, window_size=8, implementation="reference")
    return random_model(config, attention, seed=3)
