"""Records, of files or of the hub, as a TFDS dataset: a conversation, written by a chat template, or a text per record.

Records that cannot be used are left out, each named, up to `data.max_bad_documents`; one more is an error. Which they
were is kept with the data, for a run that allows fewer.
"""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from sepjax.data.conversations import Form, RecordError, kind_of, messages_of, no_form, text_of, tools_of
from sepjax.data.corpora.bad_records import BadRecords, check_bad
from sepjax.data.corpora.files import key_of
from sepjax.data.corpora.rows import Raw, Rows, record_digest, record_of, side_of_rows
from sepjax.data.corpora.splits import fingerprint
from sepjax.data.errors import DataError

_PEEK = 1000  # records that may be wrong before one tells what the files hold


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Records of JSON lines and Parquet files, found recursively, and text files beside them, each a record; or rows of
    a dataset of the hub.

    Blank lines count as none. All are read as a stream, whatever their size.

    Splits: about one record in fifty is validation, by a hash of it, so that equal records are on one side. With
    `hold_out=False` all is train. The config's name is a fingerprint of the files, of the field and of how
    conversations are written: what is changed is prepared anew.

    Attributes:
      rows, text_key: as given.
      fingerprint: the config's name.
      passes: over the records, a split each.
      key: field with the texts, "conversation" (marked, `sepjax.data.scored`) or "text".
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        rows: Rows,
        text_key: str = "text",
        form: Form | None = None,
        max_bad: int = 0,
        hold_out: bool = True,
        **kwargs: Any,
    ):
        """Looks at the first records.

        Args:
          rows: the records.
          text_key: field of records that are texts.
          form: how conversations are written.
          max_bad: records that may be of no use.
          hold_out: whether some are held back for validation.
          kwargs: TFDS's, such as data_dir.

        Raises:
          DataError: no record can be used, or there are conversations and no `form`.
        """
        self.rows, self._name = rows, rows.name
        self.text_key, self._form, self._max_bad, self._hold_out = text_key, form, max_bad, hold_out
        self.passes = 1 + hold_out
        self.key = rows.kind(text_key) or self._kind()
        if self.key == "conversation" and form is None:
            raise no_form(f"data.name={self._name!r}")
        self._records(self.key)  # what cannot be read together is refused here
        made_by = form.key if form and self.key == "conversation" else text_key
        self.fingerprint = fingerprint([hold_out, rows.place, self.key, made_by, *rows.facts])
        super().__init__(config=self.fingerprint, **kwargs)

    @classmethod
    def get_builder_config(cls, name: str, version: Any = None) -> tfds.core.BuilderConfig:
        """Any fingerprint is a config."""
        return tfds.core.BuilderConfig(name=name)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict.fromkeys((self.key, "name"), tfds.features.Text()))
        return tfds.core.DatasetInfo(builder=self, features=features, metadata=tfds.core.MetadataDict())

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        self._bad = BadRecords(self._max_bad)
        if not self._hold_out:
            return {"train": self._generate_examples(lambda _: False, False)}
        is_held_out = side_of_rows(self.rows, self.key)
        return {
            "train": self._generate_examples(is_held_out, False),
            "validation": self._generate_examples(is_held_out, True),
        }

    def _generate_examples(
        self, is_held_out: Callable[[str], bool], wanted: bool
    ) -> Iterator[tuple[str, dict[str, str]]]:
        for place, raw in self._records(self.key):
            if is_held_out(str(record_digest(raw))) == wanted:
                text = self._read(place, raw)
                if text is not None:
                    yield key_of(place), {self.key: text, "name": key_of(place)}

    def _read(self, place: str, raw: Raw) -> str | None:
        """The text of a record; None for one that cannot be used."""
        try:
            record = record_of(raw)
            if self.key == "text":
                return text_of(record, self.text_key)
            assert self._form is not None
            return self._form(messages_of(record, answers=self._form.train_on != "all"), tools_of(record))
        except (RecordError, DataError) as error:
            self._bad.note(f"{place}: {error}")
            metadata: Any = self.info.metadata
            metadata["bad"] = self._bad.found
            return None

    def check_prepared(self) -> None:
        """Raises DataError where more records were left out, when the data were prepared, than may be now."""
        check_bad(dict(self.info.metadata or {}).get("bad", []), self._max_bad)

    def _kind(self) -> str:
        first = None
        for number, (place, raw) in enumerate(self._records("")):
            try:
                return kind_of(record_of(raw), self.text_key)
            except RecordError as error:
                way = f"; {self._name!r} is read as an object a line" if isinstance(raw, bytes) else ""
                first = first or DataError(f"{place}: {error}{way}")
            if number >= _PEEK or number >= self._max_bad:
                break
        raise first or DataError(f"{self._name!r} has no records: every file is empty")

    def _records(self, kind: str) -> Iterator[tuple[str, Raw]]:
        return self.rows.records(kind)
