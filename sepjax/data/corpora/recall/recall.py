"""A generated recall task: facts in segments of random length, filler, and questions (arXiv 2312.04927, with ends).

    --Kq---.Zb.----Ae--. ... -----.--. ... ?Ae?Kq?Zb

A character is a token. A segment is filler with a fact somewhere in it, a key (A-Z) and its value (a-z), and ends with
a point; facts come first, at least half of the filler stands between them and the questions, and every key is asked for
in every round, in another order. Guessing gives 1 in 26. A model that sees everything can look the value up; one that
sees a window shorter than the filler cannot; what it can with separators is what it has learnt to leave in a segment's
end.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sepjax.data.corpora.features import FEATURES
from sepjax.data.corpora.splits import fingerprint
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.separators import BYTE_OF_CHARACTER

KEYS, VALUES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
FILLER, END, QUESTION = "-", ".", "?"
_SIZES = {"train": 65_536, "validation": 512}
_SEGMENT = 10  # characters of filler in a segment, at most
_SHARE = 16  # tokens of a row for each fact
_ROUNDS = 2  # of questions: more of a row's tokens teach, so that the task is learnt sooner
_VERSION = 2  # of what `document` writes: another one is another corpus


class Recall(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents that fill a row of `length` tokens each, BOS included."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, length: int, **kwargs: Any):
        """`length` is data.sequence_length, 64 or more; `kwargs` are TFDS's, such as data_dir."""
        self._length = length
        super().__init__(config=fingerprint([_VERSION, length, _SIZES]), **kwargs)

    @classmethod
    def get_builder_config(cls, name: str, version: Any = None) -> tfds.core.BuilderConfig:
        """Any fingerprint is a config."""
        return tfds.core.BuilderConfig(name=name)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(FEATURES))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        return {
            split: self._generate_examples(np.random.default_rng([number, self._length]), size)
            for number, (split, size) in enumerate(_SIZES.items())
        }

    def _generate_examples(self, rng: np.random.Generator, size: int) -> Iterator[tuple[str, dict[str, str]]]:
        for number in range(size):
            yield str(number), {"name": str(number), "text": document(rng, self._length - 1)}


def document(rng: np.random.Generator, size: int) -> str:
    """One text of `size` characters."""
    keys = rng.choice(list(KEYS), size=min(len(KEYS), (size + 1) // _SHARE), replace=False)
    facts = {str(key): str(value) for key, value in zip(keys, rng.choice(list(VALUES), size=len(keys)), strict=True)}
    order = [key for _ in range(_ROUNDS) for key in rng.permutation(keys).tolist()]
    asked = "".join(QUESTION + key + facts[key] for key in order)
    room = size - len(asked) - 3 * len(facts)  # filler, and the ends of segments without facts
    text, spent = "", 0
    for key, value in facts.items():
        filler = min(int(rng.integers(0, _SEGMENT + 1)), room // (2 * len(facts)))
        before, spent = int(rng.integers(0, filler + 1)), spent + filler
        text += FILLER * before + key + value + FILLER * (filler - before) + END
    room -= spent
    while room:
        filler = min(int(rng.integers(0, _SEGMENT + 1)), room - 1)
        text, room = text + FILLER * filler + END, room - filler - 1
    return text + asked


def recall_tokenizer() -> Tokenizer:
    """A token for each byte, and one that begins and ends documents."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    names = ["<|endoftext|>", *BYTE_OF_CHARACTER]
    parts: dict[str, Any] = dict.fromkeys(("normalizer", "post_processor"))
    file = {
        "version": "1.0",
        "added_tokens": [special | {"normalized": False, "special": True}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []},
    }
    return Tokenizer(HuggingFaceModel(json.dumps(file | parts)))
