"""A byte-level tokenizer of 64 tokens for the tiny checkpoints."""

import json

import pytest

from sepjax.separators import BYTE_OF_CHARACTER

CHARACTERS = sorted(BYTE_OF_CHARACTER, key=lambda c: (BYTE_OF_CHARACTER[c] not in b".,;!? \n", BYTE_OF_CHARACTER[c]))
ASCII = [
    c for c in CHARACTERS if BYTE_OF_CHARACTER[c] in b".,;!? \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
]


def tokenizer_json(size=64):
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *ASCII, "th", "he", "in", "an"][:size])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [special | {"normalized": False, "special": True}],
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [["t", "h"], ["h", "e"], ["i", "n"], ["a", "n"]]},
        }
    )


@pytest.fixture(scope="session")
def tokenizer_text():
    return tokenizer_json()
