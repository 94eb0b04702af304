"""Small texts, a small tokenizer and a config over them, made once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sepjax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from sepjax.data.tokenizer import Tokenizer, train_sentencepiece

WORDS = "the cat sat on a mat and looked at its own tail while rain fell past an open window of some old house"


def sentences(rng: np.random.Generator, count: int) -> str:
    """Text of `count` sentences, a line each."""
    lines = [" ".join(rng.choice(WORDS.split(), rng.integers(3, 12))).capitalize() for _ in range(count)]
    return "".join(line + str(rng.choice([".", "!", "?", ", yes;"])) + "\n" for line in lines)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 40 files of very different lengths; an epoch of them is about 20 batches of `config`."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(sentences(rng, int(rng.integers(1, 14))))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """Where prepared datasets of the session are kept."""
    return str(tmp_path_factory.mktemp("data_dir"))


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Tokenizer:
    """A SentencePiece model of 400 tokens."""
    return train_sentencepiece([file.read_text() for file in sorted(corpus.iterdir())], 400)


@pytest.fixture(scope="session")
def config(corpus) -> Config:
    """Batches of 4 rows of 32 tokens of the corpus."""
    return Config(
        model=ModelConfig(vocab_size=400),
        data=DataConfig(name=str(corpus), tokenizer_vocab_size=400, sequence_length=32, batch_size=4),
        optimizer=OptimizerConfig(),
    )


@pytest.fixture
def with_data(config) -> Callable[..., Config]:
    """`config` with other fields in its data section."""
    return lambda **changes: dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
