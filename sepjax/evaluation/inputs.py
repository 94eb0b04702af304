"""What the jobs score: settings and texts of a run, of files or of a corpus."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepjax.config import AttentionConfig, Config, ConfigError, DataConfig, under, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.documents import Document, documents_of, first_tokens, has_records, read_texts
from sepjax.model.transformer import Transformer
from sepjax.run.checkpoint import load_config


def config_of(path: Path, model: Transformer) -> Config:
    """The config of a run, or for a pretrained model one with its settings and windows of 2048 tokens."""
    if (path / "checkpoints").is_dir():
        return load_config(path)
    data = DataConfig(sequence_length=min(2048, model.config.max_positions))
    return Config(model=model.config, attention=model.attention, data=data)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Documents of one source; of conversations what is to be scored has marks around it (`sepjax.data.scored`)."""

    name: str  # "": the only source
    share: float  # of what is scored, in (0, 1]
    documents: Sequence[str]
    loss_on: str = ""  # what alone of them is scored; "": all, or what is marked


def is_trained(path: Path) -> bool:
    """Whether this is a run that was trained here; a converted model has no config of a run."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def texts_of(path: Path, config: Config, tokenizer: Tokenizer | None, text: str, split: str, most: int) -> list[Texts]:
    """The texts to score: of files, or of a split of a corpus; of a mixture those of each part.

    Of a run's own data what counted in training is scored (`data.train_on`, `data.loss_on`), of other conversations
    what an assistant says, of other texts all.

    Args:
      path: of the model.
      config: its own, or that of `config_of`.
      tokenizer: the model's; None: conversations are refused.
      text: files, a dataset's name or a mixture; "": the run's own.
      split: of that; "": all of files, or `data.eval_split`.
      most: documents of each part; 0: all.
    """
    may_be_plain = text and not split and not (path / "checkpoints").is_dir()  # without a text Path() is a folder
    if may_be_plain and Path(text).exists() and not has_records(Path(text)):
        documents = read_texts(Path(text))
        return [Texts("", 1.0, documents[: most or len(documents)])]
    plain = DataConfig()  # what a run does with its data is nothing to another text
    other = {"name": text, "train_on": plain.train_on, "too_long": plain.too_long, "loss_on": plain.loss_on}
    data = dataclasses.replace(config.data, **other) if text else config.data
    with tempfile.TemporaryDirectory() as scratch:  # a pretrained model has no folder for prepared data
        folder = data.data_dir or str(path / "data" if (path / "checkpoints").is_dir() else scratch)
        sources = _sources(data, folder, tokenizer, split or ("all" if text else data.eval_split))
        return [dataclasses.replace(x, documents=list(x.documents[: most or len(x.documents)])) for x in sources]


def _sources(data: DataConfig, folder: str, tokenizer: Tokenizer | None, split: str) -> list[Texts]:
    """The documents of a corpus, or of each part of a mixture; without a tokenizer no conversations. Imported late:
    token ids and text files are scored without TFDS.
    """
    from sepjax.data.conversations import NoFormError
    from sepjax.data.mixture import parts_of
    from sepjax.data.sources import has_records, sources_of
    from sepjax.hub.training_form import training_form

    try:
        form = training_form(data, tokenizer) if tokenizer is not None and has_records(data.name) else None
        sources = sources_of(data, folder, split, form)
    except NoFormError as error:
        if tokenizer is not None:
            raise
        raise ConfigError(
            f"{data.name!r} has conversations, but whole texts are streamed here, questions and answers alike: give "
            f"--text with .txt files; `sepjax evaluate windows` scores the answers of conversations"
        ) from error
    shares = [(part.name, part.share) for part in parts_of(data.name)] or [("", 1.0)]
    return [Texts(*share, source, data.loss_on) for share, source in zip(shares, sources, strict=True)]


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


def corpus_of(path: Path, split: str, tokenizer: Tokenizer, *, max_tokens: int = 0, **cut: Any) -> list[Document]:
    """The documents of a run's own corpus, up to `max_tokens` scored ones; 0: all. Of a mixture those of each part in
    its share, up to the end of the one that ends first.
    """
    if not (path / "checkpoints").is_dir():
        raise ConfigError("a pretrained model has no corpus of its own: give --text")
    data = load_config(path).data
    parts = _sources(data, data.data_dir or str(path / "data"), None, split or data.eval_split)
    # Of each so much as its share can be at most: a corpus may be larger than all that is asked for.
    most = [math.ceil(part.share * max_tokens) for part in parts]
    whole = [documents_of(tokenizer, x.documents, max_tokens=n, **cut) for x, n in zip(parts, most, strict=True)]
    sizes = [sum(len(document.inputs) for document in documents) for documents in whole]
    taken = in_shares([part.share for part in parts], sizes, max_tokens)
    return [x for some, most in zip(whole, taken, strict=True) if most for x in first_tokens(some, most)]


def in_shares(shares: Sequence[float], sizes: Sequence[int], most: int = 0) -> list[int]:
    """How much to take of sources with so much, so that all of it is in these shares and up to `most` (0: no limit):
    until one of them has no more.
    """
    total = min([size / share for size, share in zip(sizes, shares, strict=True)] + [most] * bool(most))
    return [min(size, round(share * total)) for size, share in zip(sizes, shares, strict=True)]
