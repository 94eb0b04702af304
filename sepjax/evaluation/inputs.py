"""What the jobs score: settings and texts of a run, of files or of a corpus."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepjax.config import AttentionConfig, Config, ConfigError, DataConfig, under, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.documents import Document, documents_of, has_records, read_texts
from sepjax.model.transformer import Transformer
from sepjax.run.checkpoint import load_config


def config_of(path: Path, model: Transformer) -> Config:
    """The config of a run, or for a pretrained model one with its settings and windows of 2048 tokens."""
    if (path / "checkpoints").is_dir():
        return load_config(path)
    data = DataConfig(sequence_length=min(2048, model.config.max_positions))
    return Config(model=model.config, attention=model.attention, data=data)


def texts_of(path: Path, config: Config, tokenizer: Tokenizer | None, text: str, split: str, most: int) -> list[str]:
    """The texts to score: of files, or of a split of a corpus. Conversations have marks around what is scored of them,
    which is what `data.train_on` of the run says; of other files what an assistant says.
    """
    may_be_plain = text and not split and not (path / "checkpoints").is_dir()  # without a text Path() is a folder
    if may_be_plain and Path(text).exists() and not has_records(Path(text)):
        documents: Sequence[str] = read_texts(Path(text))
        return list(documents[: most or len(documents)])
    plain = DataConfig()  # what a run does with conversations is nothing to another text
    other = {"name": text, "train_on": plain.train_on, "too_long": plain.too_long}
    data = dataclasses.replace(config.data, **other) if text else config.data
    with tempfile.TemporaryDirectory() as scratch:  # a pretrained model has no folder for prepared data
        folder = data.data_dir or str(path / "data" if (path / "checkpoints").is_dir() else scratch)
        documents = _source(data, folder, tokenizer, split or ("all" if text else data.eval_split))
        return list(documents[: most or len(documents)])


def _source(data: DataConfig, folder: str, tokenizer: Tokenizer | None, split: str) -> Sequence[str]:
    """The documents of a corpus; without a tokenizer no conversations. Imported late: token ids and text files are
    scored without TFDS.
    """
    from sepjax.data.conversations import NoFormError
    from sepjax.data.sources import has_records, text_source
    from sepjax.hub.training_form import training_form

    try:
        form = training_form(data, tokenizer) if tokenizer is not None and has_records(data.name) else None
        return text_source(data, folder, split, form)
    except NoFormError as error:
        if tokenizer is not None:
            raise
        raise ConfigError(
            f"{data.name!r} has conversations, but whole texts are streamed here, questions and answers alike: give "
            f"--text with .txt files; `sepjax evaluate windows` scores the answers of conversations"
        ) from error


def with_pattern(config: Config, pattern: str, window_size: int) -> AttentionConfig:
    """The attention of a config under another pattern, and window unless 0."""
    attention = under(config.attention, pattern)
    if window_size:
        attention = dataclasses.replace(attention, window_size=window_size, layer_windows=())
    return validate_attention(attention, config.model.num_layers)


def base_of_arms(config: Config, window_size: int) -> AttentionConfig:
    """The settings that arms change: the own ones, pattern included, with another window unless 0."""
    windows = {"window_size": window_size, "layer_windows": ()} if window_size else {}
    return dataclasses.replace(config.attention, cache_size=0, **windows)


def corpus_of(path: Path, split: str, tokenizer: Tokenizer, **cut: Any) -> list[Document]:
    """The documents of a run's own corpus."""
    if not (path / "checkpoints").is_dir():
        raise ConfigError("a pretrained model has no corpus of its own: give --text")
    data = load_config(path).data
    source = _source(data, data.data_dir or str(path / "data"), None, split or data.eval_split)
    return documents_of(tokenizer, source, **cut)
