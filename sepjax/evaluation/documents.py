"""Documents to be streamed and scored, and how they are dealt to the rows of a batch.

Protocol: a document is [BOS] + tokens, with BOS where the model's own tokenizer puts it (of a run: what its documents
began with in training), and every token but the first is scored. The official code's protocol (`line_wise`) is another:
every line has a BOS of its own, the cache goes on from line to line, and the last token of a line is never seen.
"""

import dataclasses
import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sepjax.array_typing import Array, Bool, Int32
from sepjax.config import UserError
from sepjax.data.corpora.files import kind_of_file
from sepjax.data.tokenizer import Tokenizer
from sepjax.progress import counted

# Which of a document's tokens, int32[N], are kept when they leave the window: bool[N].
Rule = Callable[[np.ndarray], Any]


class StreamError(UserError, ValueError):
    """Documents that cannot be streamed as asked."""


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens to feed, and after each the one it is to predict."""

    inputs: Int32[np.ndarray, "N"]
    targets: Int32[np.ndarray, "N"]


def documents_of(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    line_wise: bool = False,
    max_tokens: int = 0,
    as_in_training: bool = False,
) -> list[Document]:
    """Tokenises texts, whole or by the official protocol, up to `max_tokens` scored ones; 0: all.

    `as_in_training`: documents begin with `Tokenizer.document_start`, as those of a run do, in place of BOS.

    Raises:
      StreamError: `line_wise` without a BOS token.
    """
    start = tokenizer.document_start
    first = start if as_in_training else _bos(tokenizer)
    if line_wise and start is None:
        raise StreamError("the line-wise protocol puts a BOS in front of every line, but the tokenizer has none")

    def by_lines() -> Iterator[Document]:
        for text in texts:
            found = tokenizer.encode_each(line for line in text.splitlines() if line.strip())
            lines = [np.array([start, *ids.tolist()], np.int32) for _, ids in found]
            sides = [line[:-1] for line in lines], [line[1:] for line in lines]
            yield Document(*(np.concatenate([np.zeros(0, np.int32), *side]) for side in sides))

    def whole() -> Iterator[Document]:
        for _, ids in tokenizer.encode_each(texts):
            yield from whole_documents([ids], first)

    found = by_lines() if line_wise else whole()
    return first_tokens(counted(found, "tokenising", max_tokens or None, "tokens", lambda x: len(x.inputs)), max_tokens)


def whole_documents(
    texts: Iterable[Sequence[int] | np.ndarray], bos_id: int | None, *, max_tokens: int = 0
) -> list[Document]:
    """Documents of token ids, each after one BOS, unless that is None: then after nothing."""
    prefix = [] if bos_id is None else [bos_id]

    def start(ids: Sequence[int] | np.ndarray) -> Sequence[int]:
        return prefix if list(ids[:1]) != prefix else ()  # never twice

    whole = (np.concatenate([np.asarray(x, np.int32) for x in (start(ids), ids)]) for ids in texts)
    return first_tokens((Document(ids[:-1], ids[1:]) for ids in whole), max_tokens)


def _bos(tokenizer: Tokenizer) -> int | None:
    """What the model's own tokenizer puts in front of a text."""
    return next(iter(tokenizer.prefix), None)


def read_documents(
    path: Path, tokenizer: Tokenizer, *, line_wise: bool = False, max_tokens: int = 0, as_in_training: bool = False
) -> list[Document]:
    """Documents of a UTF-8 text file, of a folder's .txt files in order of their names, or of an .npz of token ids.

    Settings are those of `documents_of`.

    Raises:
      FileNotFoundError: there is nothing there.
      StreamError: no UTF-8 text, ids outside the vocabulary, or token ids with `line_wise`.
    """
    if path.suffix == ".npz":
        if line_wise:
            raise StreamError(f"the line-wise protocol needs lines of text, and {str(path)!r} has token ids")
        with np.load(path, allow_pickle=False) as arrays:
            texts = [arrays[name].astype(np.int32).reshape(-1) for name in arrays.files]
        most = max((int(ids.max(initial=0)) for ids in texts), default=0)
        if most >= tokenizer.vocab_size:
            raise StreamError(f"{str(path)!r} has token id {most}, but the vocabulary only {tokenizer.vocab_size}")
        first = tokenizer.document_start if as_in_training else _bos(tokenizer)
        return whole_documents(texts, first, max_tokens=max_tokens)
    cut = {"line_wise": line_wise, "max_tokens": max_tokens, "as_in_training": as_in_training}
    return documents_of(tokenizer, map(_read_text, _text_files(path)), **cut)


def has_records(path: Path) -> bool:
    """Whether this is a file of JSON lines or Parquet, or a packed one, or a folder with some."""
    files = [path] if path.is_file() else path.rglob("*")
    return any(kind_of_file(file) and file.suffix != ".txt" for file in files)


def check_documents(path: Path) -> None:
    """Raises what `read_documents` and `read_texts` would for a path, before a model is loaded; reads no text."""
    for file in [path] if path.suffix == ".npz" else _text_files(path):
        if not file.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))


def read_texts(path: Path) -> list[str]:
    """The text of a UTF-8 file, or of a folder's .txt files in order of their names.

    Raises:
      FileNotFoundError: there is nothing there.
      StreamError: no UTF-8 text, or a folder without .txt files.
    """
    return [_read_text(file) for file in _text_files(path)]


def _text_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if path.is_file() and has_records(path):
        raise StreamError(
            f"{str(path)!r} has JSON lines or Parquet, or is packed: `sepjax evaluate windows` reads those, and "
            "nothing else here does; give .txt files"
        )
    if not files:
        raise StreamError(f"{str(path)!r} has no .txt files")
    return files


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StreamError(f"{str(path)!r} is not UTF-8 text: {error}; convert it first") from error


def first_tokens(documents: Iterable[Document], max_tokens: int) -> list[Document]:
    """Documents up to so many scored tokens, the last of them cut; 0: all."""
    taken, left = [], max_tokens or math.inf
    for document in documents:
        size = int(min(len(document.inputs), left))
        if size:
            taken.append(Document(document.inputs[:size], document.targets[:size]))
        left -= size
        if left <= 0:
            break
    return taken


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanes:
    """Documents dealt to rows, one after the other."""

    inputs: Int32[Array, "B N"]
    targets: Int32[Array, "B N"]
    ends: Int32[Array, "B X"]  # where each document of the lane ends; the last end repeats
    numbers: Int32[Array, "B X"]  # of these documents; -1 for none

    __no_type_check__ = True

    @classmethod
    def create(cls, documents: Sequence[Document], rows: int) -> "Lanes":
        """The longest document goes first, each to the lane that has least: all lanes end at about the same time.

        Raises StreamError for a document without tokens: a lane would never come to its end.
        """
        if empty := [i for i, document in enumerate(documents) if not len(document.inputs)]:
            raise StreamError(f"document {empty[0]} has no token to score; leave it out")
        longest = max(len(document.inputs) for document in documents)
        total = sum(len(document.inputs) for document in documents)
        lanes: list[list[int]] = [[] for _ in range(min(rows, len(documents), -(-total // longest)))]
        sizes = [0] * len(lanes)
        for number in sorted(range(len(documents)), key=lambda i: -len(documents[i].inputs)):
            lane = sizes.index(min(sizes))
            lanes[lane].append(number)
            sizes[lane] += len(documents[number].inputs)
        ends = np.zeros((len(lanes), 1 + max(map(len, lanes))), np.int32)
        numbers = np.full_like(ends, -1)
        inputs, targets = (np.zeros((len(lanes), max(sizes)), np.int32) for _ in range(2))
        for b, lane in enumerate([documents[i] for i in lane] for lane in lanes):
            numbers[b, : len(lane)] = lanes[b]
            inputs[b, : sizes[b]] = np.concatenate([document.inputs for document in lane])
            targets[b, : sizes[b]] = np.concatenate([document.targets for document in lane])
            ends[b] = sizes[b]
            ends[b, : len(lane)] = np.cumsum([len(document.inputs) for document in lane])
        return cls(inputs, targets, ends, numbers)

    def flags(self, rule: Rule, name: str) -> Bool[np.ndarray, "B N"]:
        """What a rule says of every token, document by document. Raises StreamError for what is no bool of each."""
        found = np.zeros(self.inputs.shape, bool)
        for b, row in enumerate(np.asarray(self.numbers)):
            for start, end, number in zip([0, *self.ends[b]], self.ends[b], row, strict=False):
                if number >= 0:
                    said = np.asarray(rule(np.asarray(self.inputs[b, start:end])))
                    if said.dtype != bool or said.shape != (end - start,):
                        raise StreamError(
                            f"keep[{name!r}] gave {said.dtype}{list(said.shape)} for document {number}; expected "
                            f"bool[{end - start}]: of each token whether it is kept"
                        )
                    found[b, start:end] = said
        return found

    def of_documents(self, values: np.ndarray) -> np.ndarray:
        """[N] of all documents in their own order, from values [B, N] of the tokens of the lanes."""
        found: dict[int, np.ndarray] = {}
        for b, row in enumerate(np.asarray(self.numbers)):
            for start, end, number in zip([0, *self.ends[b]], self.ends[b], row, strict=False):
                if number >= 0:
                    found[int(number)] = values[b, start:end]
        return np.concatenate([found[number] for number in sorted(found)])
