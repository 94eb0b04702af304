"""Records of files of any kind, streamed: a line of JSON lines, a row of Parquet, a whole text file."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sepjax.config import first_line
from sepjax.data.conversations import FIELDS, RecordError, parse
from sepjax.data.corpora.files import (
    check_unchanged,
    decoded_text,
    facts_of,
    files_of,
    kind_of_file,
    library,
    not_utf8,
    opened,
    root_of,
    unpacking,
)
from sepjax.data.corpora.splits import digest, digest_of_bytes, side_of
from sepjax.data.errors import DataError

LINE = 1 << 28  # bytes of a record, at most
_ROWS = 64  # of Parquet, held at once
_BUFFER = 1 << 20  # bytes of a column of Parquet, read at once
_TOLD = 256  # lines between two words of how far it is

# A line as it is, a row or a text as fields, or why it cannot be read.
type Raw = bytes | dict[str, Any] | RecordError


@runtime_checkable
class Rows(Protocol):
    """Where a corpus of records comes from.

    Attributes:
      name: for messages.
      place, facts: change where any record does.
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def place(self) -> str:
        """See above."""
        ...

    @property
    def facts(self) -> Sequence[object]:
        """See above."""
        ...

    def kind(self, text_key: str) -> str:
        """ "text" or "conversation", where that is known before any record is read; else ""."""
        ...

    def records(self, kind: str) -> Iterator[tuple[str, Raw]]:
        """The place and the content of each; `kind` is "" or what they are known to be."""
        ...


class FileRows:
    """The records of a file, or of all in a folder.

    Attributes:
      files: their paths, in order.
      told: is called with the bytes, packed as they are, that a pass over the records has read since it was last.
    """

    def __init__(self, path: str | os.PathLike[str], text_key: str = "text"):
        """Raises DataError where there are no files, or some that are not read."""
        root = root_of(path)
        self.files, self.name, self.place, self._text_key = files_of(root), str(path), str(root), text_key
        self.facts = facts_of(self.files, root)
        self.told: Callable[[int], None] = lambda size: None

    def check_unchanged(self) -> None:
        """Raises DataError where a file is not what it was."""
        check_unchanged(self.files, Path(self.place), self.facts)

    def kind(self, text_key: str) -> str:
        """See `Rows`: the records tell."""
        return ""

    def records(self, kind: str) -> Iterator[tuple[str, Raw]]:
        """See `Rows`. Raises DataError for texts among conversations, and at the end where a file has changed."""
        if kind == "conversation" and (texts := [file for file in self.files if kind_of_file(file) == "text"]):
            raise DataError(f"{self.name!r} has conversations, and {texts[0].name} beside them: keep them apart")
        return self._watched(records(self.files, self._text_key, kind, lambda size: self.told(size)))

    def _watched[T](self, found: Iterator[T]) -> Iterator[T]:
        yield from found
        self.check_unchanged()


def records(
    files: Iterable[Path], text_key: str, kind: str = "", told: Callable[[int], None] = lambda size: None
) -> Iterator[tuple[str, Raw]]:
    """The place of every record ("FILE:LINE", "FILE: row group G, row R", "FILE"), and what is there.

    Args:
      files: in order.
      text_key: field of a plain text; a text file's text gets it.
      kind: "text" or "conversation", if it is known: other columns of Parquet are then not read.
      told: is called with the bytes that were read since it was last.

    Raises:
      DataError: a file cannot be read, or has a line without end or none of the columns.
    """
    for file in files:
        what = kind_of_file(file)
        if what == "lines":
            yield from _lines(file, told)
        elif what == "parquet":
            yield from _rows(file, text_key, kind, told)
        else:
            with opened(file) as stream:
                raw = stream.read()
            yield str(file), text_record(raw, text_key)
            told(file.stat().st_size)


def record_of(raw: Raw) -> dict[str, Any]:
    """The fields of a record; raises RecordError."""
    if isinstance(raw, RecordError):
        raise raw
    return parse(raw) if isinstance(raw, bytes) else raw


def record_digest(raw: Raw) -> int:
    """64 bits that depend on a record's content alone, so that equal records are on one side of a split."""
    if isinstance(raw, bytes):
        try:
            if not raw.isascii():
                raw.decode()  # what it would be encoded to again
        except UnicodeDecodeError:
            return digest(raw.decode(errors="backslashreplace"))
        return digest_of_bytes(raw)
    return digest(json.dumps(raw, sort_keys=True, default=str) if isinstance(raw, dict) else str(raw))


def side_of_rows(rows: Rows, kind: str) -> Callable[[str], bool]:
    """Tells which records are held out, by their digests. Raises DataError where no two of them differ."""
    side = side_of(str(record_digest(raw)) for _, raw in rows.records(kind))
    if side is None:
        raise DataError(f"{rows.name!r} has less than two different records, so none can be held back; give more")
    return side


def too_long(place: str) -> str:
    """What to say of a line of `LINE` bytes and more."""
    return f"{place} has more than {LINE:,} bytes; divide it"


def _lines(file: Path, told: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
    with unpacking(file) as (lines, packed):
        number = before = 0
        while line := lines.readline(LINE):
            number += 1
            if len(line) >= LINE:
                raise DataError(too_long(f"{file}:{number}"))
            if stripped := line.strip():
                yield f"{file}:{number}", stripped
            if number % _TOLD == 0:
                told((now := packed.tell()) - before)
                before = now
        told(packed.tell() - before)


def text_record(raw: bytes, text_key: str) -> Raw:
    """What a text file is as a record."""
    try:
        text = decoded_text(raw)
    except UnicodeDecodeError as error:
        return RecordError(f"it {not_utf8(error)}")
    return {text_key: text} if text.strip() else RecordError("it is empty")


def _rows(file: Path, text_key: str, kind: str, told: Callable[[int], None]) -> Iterator[tuple[str, Raw]]:
    """Rows, a few at a time, whatever the size of a row group."""
    parquet, arrow = library("pyarrow.parquet", file), library("pyarrow", file)
    group = 0
    try:
        with parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
            columns = _columns(file, list(table.schema_arrow.names), text_key, kind)
            size = file.stat().st_size
            for group in range(table.num_row_groups):
                number, of_rows = 0, table.metadata.num_rows
                batches = table.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False)
                for batch in batches:
                    for row in range(batch.num_rows):
                        yield f"{file}: row group {group}, row {number}", _row(batch, row)
                        number += 1
                    told(size * batch.num_rows // of_rows)
    except (OSError, UnicodeDecodeError, arrow.ArrowException) as error:  # names of columns are texts too
        raise DataError(f"cannot read row group {group} of {str(file)!r}: {first_line(error)}") from error


def _columns(file: Path, there: list[str], text_key: str, kind: str) -> list[str]:
    wanted = {"text": {text_key}, "conversation": FIELDS}.get(kind, FIELDS | {text_key})
    if not (columns := [name for name in there if name in wanted]):
        names = ", ".join(repr(name[:30]) for name in there[:8]) or "none"
        expected = {"text": repr(text_key), "conversation": "'messages', or 'prompt' with 'completion'"}
        raise DataError(
            f"{str(file)!r} has the columns {names}, expected "
            f"{expected.get(kind) or ', or '.join(expected[x] for x in ('conversation', 'text'))}; data.text_key names "
            "the column of texts"
        )
    return columns


def _row(batch: Any, row: int) -> Raw:
    """The fields of a row that are not null, as JSON lines leave them out."""
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = column[row].as_py()
            value = value.decode() if isinstance(value, bytes) else value  # texts that are not marked as such
        except UnicodeDecodeError as error:
            return RecordError(f"{name!r} is not UTF-8 text: {error.reason} at byte {error.start}")
        if value is not None:
            fields[name] = value
    return fields
