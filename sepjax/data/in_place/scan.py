"""What a piece of a file holds: where its records lie, and which are of no use. Also the program of `scanners.py`.

Records belong to the piece in which they begin:

    bytes    | {"text": "a"}\n{"text" | : "b"}\n\n{"text": "c"}\n |
    pieces   | a, b                   | c                         |

Only what is quick to import is imported: as many processes as the machine has cores begin with this.
"""

import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sepjax.data.conversations import RecordError, text_of
from sepjax.data.corpora.files import opened
from sepjax.data.corpora.rows import LINE, Raw, record_digest, record_of, text_record
from sepjax.data.corpora.splits import is_held_out
from sepjax.data.errors import DataError

# `at`: the first byte, of all files one after the other. `crc` is of the bytes: others are noticed when they are read.
ENTRY = np.dtype([("at", "<u8"), ("length", "<u4"), ("crc", "<u4")])
_LONGEST = 2**32 - 1  # bytes of a text file


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a file.

    Attributes:
      file: its path.
      kind: "lines" or "text"; a text file is one piece.
      first, last: bytes [first, last) of it.
      base: bytes of the files before it.
      text_key: field of the texts.
      hold_out: whether some are for validation.
      most: records of no use, of which no more than one more is looked for.
    """

    file: str
    kind: str
    first: int
    last: int
    base: int
    text_key: str
    hold_out: bool
    most: int

    def place(self, line: int) -> str:
        """A line of the file, counted from 1, or the file."""
        return f"{self.file}:{line}" if self.kind == "lines" else self.file


@dataclasses.dataclass
class Found:
    """What a piece holds.

    Attributes:
      lines: that begin in it, empty ones too.
      size: bytes of the texts.
      entries: of training and of validation records, as `ENTRY` has them.
      bad: [line, reason] of records of no use; lines are counted from 1 in the piece, 0 for a whole file.
      error: why the file cannot be read at all.
      too_long: the line that is longer than any may be, or 0.
    """

    lines: int = 0
    size: int = 0
    entries: tuple[bytes, bytes] = (b"", b"")
    bad: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    error: str = ""
    too_long: int = 0


def scanned(piece: Piece, side: Callable[[str], bool] = is_held_out) -> Found:
    """Reads a piece as a stream. `side` tells by a record's digest whether it is held out."""
    notes = _Notes(piece, side)
    try:
        with opened(Path(piece.file)) as stream:
            (_scan_text if piece.kind == "text" else _scan_lines)(stream, piece, notes)
    except DataError as error:
        notes.found.error = str(error)
    notes.found.entries = notes.packed()
    return notes.found


def in_order(pieces: Iterable[Piece], side: Callable[[str], bool] = is_held_out) -> Generator[Found]:
    """What each piece holds, in this process."""
    for piece in pieces:
        yield scanned(piece, side)


class _Notes:
    """What was found so far."""

    def __init__(self, piece: Piece, side: Callable[[str], bool]):
        self.found = Found()
        self._piece, self._side = piece, side
        self._entries: tuple[list[Any], list[Any]] = ([], [])

    def add(self, at: int, raw: bytes, record: Raw, line: int) -> bool:
        """Notes a record, as `record_digest` and `record_of` take it; False where enough of them are of no use."""
        try:
            text = text_of(record_of(record), self._piece.text_key)
        except RecordError as error:
            self.found.bad.append((line, str(error)))
            return len(self.found.bad) <= self._piece.most
        self.found.size += len(text) if text.isascii() else len(text.encode())
        held_out = self._piece.hold_out and self._side(str(record_digest(record)))
        self._entries[held_out].append((self._piece.base + at, len(raw), zlib.crc32(raw)))
        return True

    def packed(self) -> tuple[bytes, bytes]:
        """The entries of both sides."""
        train, validation = (np.array(entries, ENTRY).tobytes() for entries in self._entries)
        return train, validation


def _scan_lines(stream: Any, piece: Piece, notes: _Notes) -> None:
    at = _begin(stream, piece.first)
    while at < piece.last and (line := stream.readline(LINE)):
        notes.found.lines += 1
        if len(line) >= LINE:
            notes.found.too_long = notes.found.lines
            return
        raw = line.strip()
        blank = len(line) - len(line.lstrip())
        if raw and not notes.add(at + blank, raw, raw, notes.found.lines):
            return
        at += len(line)


def _begin(stream: Any, first: int) -> int:
    """Where the first line begins that begins at or after a byte."""
    if not first:
        return 0
    stream.seek(first - 1)
    while (line := stream.readline(LINE)) and not line.endswith(b"\n"):
        pass
    return stream.tell()


def _scan_text(stream: Any, piece: Piece, notes: _Notes) -> None:
    raw = stream.read()
    if len(raw) > _LONGEST:
        raise DataError(f"{piece.file!r} has more than {_LONGEST:,} bytes; divide it, or make JSON lines of it")
    notes.add(0, raw, text_record(raw, piece.text_key), 0)


def main() -> None:
    """Answers each piece of stdin, until there are no more: a line of JSON, then the entries."""
    try:
        for line in sys.stdin.buffer:
            found = vars(scanned(Piece(**json.loads(line))))
            entries = found.pop("entries")
            header = json.dumps(found | {"sizes": [len(part) for part in entries]})
            sys.stdout.buffer.write(b"".join([header.encode(), b"\n", *entries]))
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # nobody waits for it any more
        os._exit(1)


if __name__ == "__main__":
    main()
