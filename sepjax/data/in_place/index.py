"""The index of a corpus of JSON lines: one pass over its files, kept in a folder that is whole or absent.

    index.json                            files, field, how many documents, which records were left out
    train.entries, validation.entries     where each record lies (`scan.ENTRY`), in the order of the files

Records are judged as they are where files are copied (`corpora/records`): by the same functions, to the same splits.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sepjax.data.corpora.bad_records import BadRecords
from sepjax.data.corpora.files import is_packed, kind_of_file
from sepjax.data.corpora.rows import FileRows, side_of_rows, too_long
from sepjax.data.corpora.splits import is_held_out
from sepjax.data.errors import DataError
from sepjax.data.in_place.scan import ENTRY, Found, Piece, in_order
from sepjax.data.in_place.scanners import cores, in_parallel
from sepjax.files import replacing_folder
from sepjax.progress import working

SPLITS: tuple[str, ...] = ("train", "validation")
_FILE = "index.json"
_PIECE = 1 << 25  # bytes; so that progress is seen and no process waits long for the last one
_ALONE = 2  # pieces that are no work for another process


@dataclasses.dataclass(frozen=True)
class Index:
    """What index.json says.

    Attributes:
      files: path, kind and size of each, in order.
      text_key: field of the texts.
      documents: of each split.
      size: bytes of all texts.
      bad: place and reason of each record that was left out.
    """

    files: list[tuple[str, str, int]]
    text_key: str
    documents: dict[str, int]
    size: int
    bad: list[str]


def lies_open(rows: FileRows) -> bool:
    """Whether all files can be read from any byte on: JSON lines and texts that are not packed."""
    return not any(is_packed(file) or kind_of_file(file) == "parquet" for file in rows.files)


def has_index(folder: Path) -> bool:
    """Whether a folder has a whole index."""
    return (folder / _FILE).is_file()


def read_index(folder: Path) -> Index:
    """The index in a folder. Raises DataError where it is damaged."""
    try:
        found = json.loads((folder / _FILE).read_bytes())
        index = Index(**found | {"files": [tuple(file) for file in found["files"]]})
        for split, count in index.documents.items():
            if (there := entries_file(folder, split).stat().st_size) != count * ENTRY.itemsize:
                raise ValueError(f"{split} has {there} bytes, expected {count * ENTRY.itemsize}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the index in {str(folder)!r}: {error}; remove it to have it made anew") from error
    return index


def entries_file(folder: Path, split: str) -> Path:
    """Where the entries of a split are."""
    return folder / f"{split}.entries"


def write_index(folder: Path, rows: FileRows, text_key: str, *, max_bad: int, hold_out: bool) -> None:
    """Reads all files and writes their index.

    Args:
      folder: of the index.
      rows: files that lie open, of texts.
      text_key: field of the texts.
      max_bad: records that may be of no use.
      hold_out: whether some are held back for validation.

    Raises:
      DataError: more records are of no use, a file cannot be read or changes meanwhile, or none can be held back.
      WriteError: the folder cannot be written.
    """
    side = side_of_rows(rows, "text") if hold_out else is_held_out
    pieces = list(_pieces(rows, text_key, max_bad, hold_out))
    bad, size = BadRecords(max_bad), 0
    with replacing_folder(folder, "an index of sepjax's", has_index) as partial, contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(entries_file(partial, split).open("wb")) for split in SPLITS]
        for piece, found, lines in _found(rows.name, pieces, side):
            for line, reason in found.bad:
                bad.note(f"{piece.place(lines + line)}: {reason}")
            if found.error or found.too_long:
                raise DataError(found.error or too_long(piece.place(lines + found.too_long)))
            size += found.size
            for output, entries in zip(outputs, found.entries, strict=True):
                output.write(entries)
        rows.check_unchanged()
        counts = [output.tell() // ENTRY.itemsize for output in outputs]
        documents = dict(zip(SPLITS[: 1 + hold_out], counts, strict=False))
        files = [(str(path), kind_of_file(path), fact[1]) for path, fact in zip(rows.files, rows.facts, strict=True)]
        index = Index(files, text_key, documents, size, bad.found)
        (partial / _FILE).write_text(json.dumps(vars(index)))


def _pieces(rows: FileRows, text_key: str, max_bad: int, hold_out: bool) -> Iterator[Piece]:
    base = 0
    for path, (_, size, _) in zip(rows.files, rows.facts, strict=True):
        kind = kind_of_file(path)
        for first in range(0, size, _PIECE) if kind == "lines" else [0]:
            yield Piece(str(path), kind, first, min(first + _PIECE, size), base, text_key, hold_out, max_bad)
        base += size


def _found(name: str, pieces: Sequence[Piece], side: Callable[[str], bool]) -> Iterator[tuple[Piece, Found, int]]:
    """Each piece, what it holds, and the lines of its file before it; in order, with progress."""
    count = min(cores(), len(pieces) - _ALONE)
    # Another rule than the usual one is that of a few records, or of one that is there many times.
    is_alone = count < 2 or side is not is_held_out
    results = in_order(pieces, side) if is_alone else in_parallel(pieces, count)
    total = sum(piece.last - piece.first for piece in pieces)
    lines, file = 0, ""
    with working(f"indexing {name}", total, "bytes") as work, contextlib.closing(results):
        for piece, found in zip(pieces, results, strict=True):
            lines, file = lines if piece.file == file else 0, piece.file
            yield piece, found, lines
            lines += found.lines
            work.add(piece.last - piece.first)
