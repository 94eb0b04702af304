"""Documents that are read from files of JSON lines where they lie, at random, by their index.

Their order is not that of the files, which may be sorted: a part of a split ("train[:10%]", the first so many texts of
an evaluation) is a sample of the whole. It depends on the number of documents alone.
"""

import bisect
import itertools
import os
import threading
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, override

import grain
import numpy as np
import tensorflow_datasets as tfds

from sepjax.config import first_line
from sepjax.data.conversations import text_of
from sepjax.data.corpora.rows import record_of, text_record
from sepjax.data.errors import DataError
from sepjax.data.in_place.index import entries_file, read_index
from sepjax.data.in_place.scan import ENTRY
from sepjax.data.texts import TextSource

_OPEN_FILES = 64
_SEED = 0


class TextsInPlace(TextSource):
    """The texts of one split. Another process opens index and files itself."""

    def __init__(self, folder: str, split: str, name: str):
        """Opens the index in `folder`; `split` is written as TFDS writes it, `name` is for messages.

        Raises:
          DataError: there is no such split, it has no documents, or the index is damaged.
        """
        self._place = (folder, split, name)
        self._folder, self._index = Path(folder), read_index(Path(folder))
        self.name, self.conversations, self.read_from = f"{name}:{split}", False, "files"
        self.bytes_per_document = max(self._index.size / max(sum(self._index.documents.values()), 1), 1.0)
        self._parts = [self._part(*part) for part in _chosen(self._index.documents, split, name)]
        self._ends = list(itertools.accumulate(last - first for _, first, last in self._parts))
        if not len(self):
            raise DataError(f"split {split!r} of {name} has no documents; choose another one")
        self._begins = list(itertools.accumulate((size for _, _, size in self._index.files), initial=0))
        self._files: dict[int, int] = {}  # open ones, the last used at the end
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._files)

    def __reduce__(self) -> tuple[Any, ...]:
        """See above."""
        return TextsInPlace, self._place

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @override
    def _read(self, indices: Sequence[int]) -> list[str]:
        with self._lock:
            return [self._text(i) for i in indices]

    @override
    def _remedy(self) -> str:
        return f"put the file back as it was, or remove {self._folder} to have it read anew"

    def _part(self, split: str, first: int, last: int) -> tuple[np.ndarray, int, int]:
        return np.memmap(entries_file(self._folder, split), ENTRY, "r"), first, last

    def _text(self, index: int) -> str:
        part = bisect.bisect_right(self._ends, index)
        entries, first, last = self._parts[part]
        number = first + index - (self._ends[part] - (last - first))
        number = grain.experimental.index_shuffle(number, max_index=len(entries) - 1, seed=_SEED, rounds=4)
        at, length, crc = entries[number].item()
        file = bisect.bisect_right(self._begins, at) - 1
        path, kind, _ = self._index.files[file]
        at -= self._begins[file]
        raw = self._bytes(file, at, length)
        if zlib.crc32(raw) != crc:
            raise DataError(
                f"{path} changed since it was indexed: bytes {at:,} to {at + length:,} are others, or gone; "
                f"{self._remedy()}, in a new run"
            )
        key = self._index.text_key
        return text_of(record_of(text_record(raw, key) if kind == "text" else raw), key)

    def _bytes(self, file: int, at: int, length: int) -> bytes:
        """Bytes of a file; fewer where it ends before."""
        if file in self._files:
            handle = self._files.pop(file)
        else:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            handle = os.open(self._index.files[file][0], os.O_RDONLY | os.O_CLOEXEC)
        self._files[file] = handle
        parts = []
        while length and (part := os.pread(handle, length, at)):  # at most 2 GiB at once
            parts.append(part)
            at, length = at + len(part), length - len(part)
        return b"".join(parts)


def _chosen(documents: dict[str, int], split: str, name: str) -> list[tuple[str, int, int]]:
    """The parts of splits that `split` names: [first, last) documents of each."""
    infos = {key: tfds.core.SplitInfo(name=key, shard_lengths=[n], num_bytes=0) for key, n in documents.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, NotImplementedError) as error:
        there = ", ".join(key for key, count in documents.items() if count)
        raise DataError(
            f"cannot read split {split!r} of {name}: {first_line(error)}; it has the splits {there}"
        ) from error
    chosen = [(part.splitname, range(documents[part.splitname])[part.from_ : part.to]) for part in parts]
    return [(key, numbers.start, numbers.stop) for key, numbers in chosen if numbers]


def _close(files: dict[int, int]) -> None:
    for handle in files.values():
        os.close(handle)
