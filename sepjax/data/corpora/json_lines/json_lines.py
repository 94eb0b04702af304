"""Files of JSON lines as a TFDS dataset: a conversation, written by a chat template, or a text per record.

Records that cannot be used are left out, each named, up to `data.max_bad_documents`; one more is an error. Which they
were is kept with the data, for a run that allows fewer.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from sepjax.data.conversations import Form, RecordError, kind_of, messages_of, no_form, parse, text_of
from sepjax.data.corpora.splits import digest, fingerprint, held_out
from sepjax.data.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")
_PEEK = 1000  # lines that may be wrong before one tells what the files hold
_LINE = 1 << 28  # bytes of a record, at most


class JsonLines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Records of .jsonl and .jsonl.gz files, found recursively; blank lines count as none.

    Splits: about one record in fifty is validation, by a hash of its line, so that equal records are on one side. With
    `hold_out=False` all is train. The config's name is a fingerprint of the files, of the field and of how
    conversations are written: what is changed is prepared anew.

    Attributes:
      key: field with the texts, "conversation" (marked, `sepjax.data.scored`) or "text".
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        text_key: str = "text",
        form: Form | None = None,
        max_bad: int = 0,
        hold_out: bool = True,
        **kwargs: Any,
    ):
        """Looks at the first records.

        Args:
          path: a file or a folder.
          text_key: field of records that are texts.
          form: how conversations are written.
          max_bad: records that may be of no use.
          hold_out: whether some are held back for validation.
          kwargs: TFDS's, such as data_dir.

        Raises:
          DataError: there are no files, no record can be used, or there are conversations and no `form`.
        """
        root = Path(path).expanduser().resolve()
        self._files, self._name = json_files(root), str(path)
        self._text_key, self._form, self._max_bad, self._hold_out = text_key, form, max_bad, hold_out
        self.key = self._kind()
        if self.key == "conversation" and form is None:
            raise no_form(f"data.name={self._name!r}")
        facts = [(str(x.relative_to(root.parent)), x.stat().st_size, x.stat().st_mtime_ns) for x in self._files]
        made_by = form.key if form and self.key == "conversation" else text_key
        super().__init__(config=fingerprint([hold_out, str(root), self.key, made_by, *facts]), **kwargs)

    @classmethod
    def get_builder_config(cls, name: str, version: Any = None) -> tfds.core.BuilderConfig:
        """Any fingerprint is a config."""
        return tfds.core.BuilderConfig(name=name)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict.fromkeys((self.key, "name"), tfds.features.Text()))
        return tfds.core.DatasetInfo(builder=self, features=features, metadata=tfds.core.MetadataDict())

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        self._bad: list[str] = []
        if not self._hold_out:
            return {"train": self._generate_examples(frozenset(), False)}
        digests = sorted({line_digest(line) for _, line in self._lines()})
        if len(digests) < 2:
            raise DataError(f"{self._name!r} has less than two different records, so none can be held back; give more")
        validation = held_out([str(x) for x in digests])
        chosen = frozenset(int(x) for x in validation)
        return {
            "train": self._generate_examples(chosen, False),
            "validation": self._generate_examples(chosen, True),
        }

    def _generate_examples(self, validation: frozenset[int], wanted: bool) -> Iterator[tuple[str, dict[str, str]]]:
        for place, line in self._lines():
            if (line_digest(line) in validation) == wanted:
                text = self._read(place, line)
                if text is not None:
                    yield place, {self.key: text, "name": place}

    def _read(self, place: str, line: bytes) -> str | None:
        """The text of a record; None for one that cannot be used."""
        try:
            record = parse(line)
            if self.key == "text":
                return text_of(record, self._text_key)
            assert self._form is not None
            return self._form(messages_of(record, answers=self._form.train_on != "all"))
        except (RecordError, DataError) as error:
            self._note(f"{place}: {error}")
            return None

    def _note(self, reason: str) -> None:
        self._bad.append(reason)
        if len(self._bad) > self._max_bad:
            raise self._too_many(reason)
        logging.warning("a record is left out, %d of at most %d: %s", len(self._bad), self._max_bad, reason)
        metadata: Any = self.info.metadata
        metadata["bad"] = self._bad

    def _too_many(self, reason: str) -> DataError:
        before = f", and {self._max_bad} before it were left out" if self._max_bad else ""
        return DataError(
            f"{reason}{before}; correct it, or leave as many out as data.max_bad_documents={self._max_bad + 1} says"
        )

    def check_prepared(self) -> None:
        """Raises DataError where more records were left out, when the data were prepared, than may be now."""
        bad = dict(self.info.metadata or {}).get("bad", [])
        if len(bad) > self._max_bad:
            raise self._too_many(bad[self._max_bad])

    def _kind(self) -> str:
        first = None
        for number, (place, line) in enumerate(self._lines()):
            try:
                return kind_of(parse(line), self._text_key)
            except RecordError as error:
                first = first or DataError(f"{place}: {error}")
            if number >= _PEEK or number >= self._max_bad:
                break
        raise first or DataError(f"{self._name!r} has no records: every file is empty")

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """("FILE:LINE", its bytes) of every record."""
        for file in self._files:
            try:
                with _opened(file) as lines:
                    number = 0
                    while line := lines.readline(_LINE):
                        number += 1
                        if len(line) >= _LINE:
                            raise DataError(f"{file}:{number} has more than {_LINE:,} bytes; divide it")
                        if stripped := line.strip():
                            yield f"{file}:{number}", stripped
            except (OSError, EOFError, zlib.error) as error:  # gzip's own are of these
                raise DataError(f"cannot read {str(file)!r}: {error}") from error


def line_digest(line: bytes) -> int:
    """64 bits that depend on a record's line alone."""
    return digest(line.decode(errors="backslashreplace"))


def json_files(root: Path) -> list[Path]:
    """The files of JSON lines at a path, in order; empty if there are none. Raises DataError for ones that are packed
    in a way that is not read, or lie beside .txt files.
    """
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    packed = [file for file in files if ".jsonl." in file.name and not file.name.endswith(SUFFIXES)]
    if packed:
        raise DataError(f"{str(packed[0])!r} is packed in a way that is not read; unpack it, or pack it with gzip")
    found = [file for file in files if file.name.endswith(SUFFIXES)]
    if found and (text := [file for file in files if file.suffix == ".txt"]):
        raise DataError(f"{str(root)!r} has {found[0].name} and {text[0].name}: keep JSON lines and .txt files apart")
    return found


def _opened(file: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")
