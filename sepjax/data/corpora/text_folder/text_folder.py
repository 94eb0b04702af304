"""Any folder of text files, or one of them, as a TFDS dataset: one document per file."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from sepjax.data.corpora.bad_records import BadRecords, check_bad
from sepjax.data.corpora.features import FEATURES
from sepjax.data.corpora.files import check_unchanged, facts_of, files_of, key_of, not_utf8, read_text, root_of
from sepjax.data.corpora.splits import fingerprint, held_out
from sepjax.data.errors import DataError

TRAIN_SHARE = 0.95  # of a single file
_BORDERS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"\s"))  # of paragraphs, lines, words


class TextFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Files (.txt, .txt.gz, .txt.zst) found recursively, in order of their paths; UTF-8, with any kind of line ends.

    Splits: a folder's files go to train or validation by a hash of their relative path. A single file is cut at a
    paragraph's end: the last 5 % are validation. With `hold_out=False` all is one split, train, and every file whole.
    The config's name is a fingerprint of the files' names, sizes and times: changed files are prepared anew.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, path: str | os.PathLike[str], hold_out: bool = True, max_bad: int = 0, **kwargs: Any):
        """`path` is a folder or a file; `kwargs` are TFDS's, such as data_dir. Raises DataError without files.

        `max_bad`: files of a folder that may be of no use.
        """
        root = root_of(path)
        self._files = {str(file.relative_to(root.parent)): file for file in files_of(root)}
        self._hold_out, self._max_bad = hold_out, max_bad
        self._root, self._facts = root, facts_of(self._files.values(), root)
        super().__init__(config=fingerprint([hold_out, str(root), *self._facts]), **kwargs)

    @classmethod
    def get_builder_config(cls, name: str, version: Any = None) -> tfds.core.BuilderConfig:
        """Any fingerprint is a config."""
        return tfds.core.BuilderConfig(name=name)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, metadata=tfds.core.MetadataDict())

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        self._bad = BadRecords(self._max_bad)
        if not self._hold_out:
            return {"train": self._generate_examples(set(self._files))}
        if len(self._files) == 1:
            return {"train": self._generate_examples(part=0), "validation": self._generate_examples(part=1)}
        validation = held_out(list(self._files))
        return {
            "train": self._generate_examples(set(self._files) - validation),
            "validation": self._generate_examples(validation),
        }

    def _generate_examples(
        self, names: set[str] | None = None, *, part: int | None = None
    ) -> Iterator[tuple[str, dict[str, str]]]:
        for name, file in self._files.items():
            if names is None or name in names:
                text = self._read(file)
                if text is not None:
                    key = key_of(name)
                    yield key, {"name": key, "text": text if part is None else _cut(text, file)[part]}
        check_unchanged(self._files.values(), self._root, self._facts)

    def _read(self, file: Path) -> str | None:
        """The text of a file; None for one that cannot be used."""
        try:
            text = read_text(file)
            reason = "" if text.strip() else "is empty"
        except UnicodeDecodeError as error:
            text, reason = "", not_utf8(error)
        if not reason:
            return text
        if len(self._files) == 1:
            raise DataError(f"{str(file)!r} {reason}")
        self._bad.note(f"{str(file)!r} {reason}")
        metadata: Any = self.info.metadata
        metadata["bad"] = self._bad.found
        return None

    def check_prepared(self) -> None:
        """Raises DataError where more files were left out, when the data were prepared, than may be now."""
        check_bad(dict(self.info.metadata or {}).get("bad", []), self._max_bad)


def _cut(text: str, file: Path) -> tuple[str, str]:
    """The text up to the last border in its first 95 %, and the rest; neither is blank."""
    end = int(TRAIN_SHARE * len(text))
    for border in _BORDERS:
        for match in reversed(list(border.finditer(text, end // 2, end))):
            if text[: match.end()].strip() and text[match.end() :].strip():
                return text[: match.end()], text[match.end() :]
    if end and text[:end].strip() and text[end:].strip():
        return text[:end], text[end:]
    raise DataError(f"{str(file)!r} is too short to hold back 5 % for validation; give more text")
