"""Where documents come from: the embedded corpus, files of text, or any TFDS text dataset; read without TensorFlow."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, override

import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError

from sepjax.config import DataConfig, UserError, first_line
from sepjax.console import say
from sepjax.data.conversations import Form
from sepjax.data.corpora.bad_records import check_bad
from sepjax.data.corpora.embedded.embedded import Embedded
from sepjax.data.corpora.files import files_of, kind_of_file
from sepjax.data.corpora.recall.recall import Recall
from sepjax.data.corpora.records.records import Records
from sepjax.data.corpora.room import announce_copy
from sepjax.data.corpora.rows import FileRows, Rows
from sepjax.data.corpora.text_folder.text_folder import TextFolder
from sepjax.data.errors import DataError
from sepjax.data.hub_rows import HubRows, HubTexts, is_of_hub
from sepjax.data.in_place.index import has_index, lies_open, read_index, write_index
from sepjax.data.in_place.texts import TextsInPlace
from sepjax.data.locks import exclusive
from sepjax.data.mixture import parts_of
from sepjax.data.texts import TextSource
from sepjax.progress import working

_FORMAT = "array_record"
_MADE = ("embedded", "recall")  # names of ours, whatever the working folder holds


class PreparedTexts(TextSource):
    """Documents of a TFDS dataset."""

    def __init__(self, folder: str, split: str, key: str):
        """Opens `split` of the TFDS dataset that is prepared in `folder`; `key` is the field that holds the text.

        Raises:
          DataError: there is no such split or field, or the data are not in array_record.
        """
        self._place = (folder, split, key)
        self._key, self.conversations = key, key == "conversation"
        try:
            builder: Any = tfds.builder_from_directory(folder)
        except Exception as error:  # of JSON, of protocol buffers, of files
            raise DataError(f"cannot read the dataset in {folder}: {first_line(error)}; prepare it anew") from error
        info = builder.info
        self.name = f"{info.full_name}:{split}"
        self.bytes_per_document = max(int(info.dataset_size) / max(info.splits.total_num_examples, 1), 1.0)
        _check_field(dict(info.features.items()), key, info.full_name)
        try:
            if not info.splits[split].num_examples:
                raise DataError(f"split {split!r} of {info.full_name} has no documents; choose another one")
            self._records: Any = builder.as_data_source(split)
        except DataError:
            raise
        except (ValueError, NotImplementedError) as error:
            raise DataError(
                f"cannot read split {split!r} of {info.full_name} in {folder}: {first_line(error)}; it has the splits "
                f"{', '.join(info.splits)} and must be prepared with file_format={_FORMAT}"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return PreparedTexts, self._place

    def __len__(self) -> int:
        return len(self._records)

    @override
    def _read(self, indices: Sequence[int]) -> list[str]:
        records = self._records.__getitems__(indices)
        return [self._text(record, i) for record, i in zip(records, indices, strict=True)]

    @override
    def _remedy(self) -> str:
        return f"prepare the dataset anew (your own text: remove {self._place[0]})"

    def _text(self, record: dict[str, Any], index: int) -> str:
        try:
            return record[self._key].decode()
        except UnicodeDecodeError as error:
            raise DataError(f"document {index} of {self.name} is not UTF-8 text: {error.reason}") from error


def text_source(data: DataConfig, data_dir: str, split: str, form: Form | None = None) -> TextSource:
    """The documents of one split of `data.name`; what is not read where it lies is prepared in `data_dir` on first use.

    Args:
      data: `name` is "embedded", "recall" (generated, a document a row), an existing .txt, .jsonl (also .gz
        or .zst) or .parquet file or a folder of them, "hf://..." (`hub_rows.py`), or the name of a TFDS dataset that is
        prepared in `data_dir` as array_record; `text_key` is the field of the latter two, or of records, that holds
        the text.
      data_dir: where TFDS keeps prepared datasets.
      split: "train", "validation", or whatever TFDS understands ("train[:10%]"). "all" of files on disk keeps every
        file whole, holding back none.
      form: how conversations are written.

    Raises:
      DataError: there is no such dataset, split or field, or files are empty or no UTF-8 text.
      OSError: `data_dir` cannot be written.
    """
    if parts_of(data.name):
        raise DataError(f"{data.name!r} is a mixture, which is not read as one text; name one of its sources (--text)")
    source = _source(data, data_dir, split, form)
    _check_settings(data, [source])
    return source


def sources_of(data: DataConfig, data_dir: str, split: str, form: Form | None = None) -> list[TextSource]:
    """The sources of a mixture's parts, or the one of any other `data.name`. Arguments and errors as `text_source`."""
    names = [part.name for part in parts_of(data.name)] or [data.name]
    sources = [_source(dataclasses.replace(data, name=name), data_dir, split, form) for name in names]
    _check_settings(data, sources)
    return sources


def _source(data: DataConfig, data_dir: str, split: str, form: Form | None) -> TextSource:
    if is_of_hub(data.name):
        return _source_of_hub(data, data_dir, split, form)
    try:
        if source := _source_in_place(data, data_dir, split, form):
            return source
        builder, key = _builder(data, data_dir, split, form)
    except UserError:
        raise
    except (ParseError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot read the dataset {data.name!r} in {data_dir}: {first_line(error)}; if its files are damaged, "
            "remove them to have it prepared anew"
        ) from error
    return PreparedTexts(str(builder.data_path), split, key)


def _source_of_hub(data: DataConfig, data_dir: str, split: str, form: Form | None) -> TextSource:
    """Texts where they lie; conversations once written by the model's template, which may name the day's date."""
    rows = HubRows(data.name, split)
    if rows.kind(data.text_key) == "text":
        return HubTexts(rows, data.text_key)
    builder = _prepared_records(rows, data, _local(data_dir), form, hold_out=False)
    return PreparedTexts(str(builder.data_path), "train", builder.key)


def _source_in_place(data: DataConfig, data_dir: str, split: str, form: Form | None) -> TextSource | None:
    """Texts of JSON lines where they lie. None for what must be unpacked or written by a template, and for what an
    earlier version has copied: runs that began with the copy go on with it.
    """
    if "://" in data_dir or not has_records(data.name) or is_of_hub(data.name):  # an index is mapped into memory
        return None
    rows, folder = FileRows(data.name, data.text_key), _local(data_dir)
    if not lies_open(rows):
        return None
    builder = _records(rows, data, folder, form, hold_out=split != "all")
    place = Path(folder) / "indexed" / builder.fingerprint
    if builder.key != "text" or (_is_prepared(builder) and not has_index(place)):
        return None
    if not has_index(place):
        with exclusive(place):
            if not has_index(place):
                say(f"indexing {data.name} in {place} (once); it is read where it lies")
                write_index(place, rows, data.text_key, max_bad=data.max_bad_documents, hold_out=split != "all")
    check_bad(read_index(place).bad, data.max_bad_documents)
    return TextsInPlace(str(place), split, f"{data.name} ({place.name})")


def _records(rows: Rows, data: DataConfig, folder: str, form: Form | None, *, hold_out: bool) -> Records:
    settings = {"text_key": data.text_key, "form": form, "max_bad": data.max_bad_documents, "hold_out": hold_out}
    return Records(rows=rows, data_dir=folder, file_format=_FORMAT, **settings)


def _prepared_records(rows: Rows, data: DataConfig, folder: str, form: Form | None, *, hold_out: bool) -> Any:
    builder = _prepared(lambda: _records(rows, data, folder, form, hold_out=hold_out), folder, _announced)
    builder.check_prepared()
    return builder


def _announced(builder: Records) -> str:
    """What to say before records are copied. Raises DataError where there is no room for them."""
    if not isinstance(builder.rows, FileRows) or "://" in str(builder.data_path):
        return _preparing(builder)
    place, is_form = Path(builder.data_path), builder.key == "conversation"
    return announce_copy(builder.rows, builder.text_key, place, is_form=is_form)


def _preparing(builder: Any) -> str:
    return f"preparing the corpus in {builder.data_path} (once)"


def _local(data_dir: str) -> str:
    return str(Path(data_dir).expanduser()) if "://" not in data_dir else data_dir


def _check_settings(data: DataConfig, sources: Sequence[TextSource]) -> None:
    """Refuses settings of conversations where there are none, and two that say what is scored."""
    conversations = any(source.conversations for source in sources)
    for name, default in (("train_on", "assistant"), ("too_long", "truncate")):
        if not conversations and (given := getattr(data, name)) != default:
            raise DataError(
                f"data.{name}={given!r} does nothing for {data.name!r}, which has no conversations; leave it out"
            )
    if conversations and data.loss_on and data.train_on != "all":
        raise DataError(
            f"data.loss_on={data.loss_on!r} with conversations, of which data.train_on={data.train_on!r} says what is "
            "scored; leave one of them out (train_on='all' to have loss_on decide)"
        )


def has_records(name: str) -> bool:
    """Whether `data.name` is a file of records (JSON lines, Parquet), a folder with some, of the hub, or a mixture of
    such.

    Raises DataError for a folder without any file that is read, and for a mixture that is written wrongly.
    """
    if parts := parts_of(name):
        return any(has_records(part.name) for part in parts)
    path = Path(name).expanduser()
    return is_of_hub(name) or (
        name not in _MADE
        and path.exists()
        and any(kind_of_file(file) in ("lines", "parquet") for file in files_of(path))
    )


def _builder(data: DataConfig, data_dir: str, split: str, form: Form | None) -> tuple[Any, str]:
    """A builder whose data are on disk, and the name of its text field."""
    folder = _local(data_dir)
    if data.name == "embedded":
        return _prepared(lambda: Embedded(data_dir=folder, file_format=_FORMAT), folder), "text"
    if data.name == "recall":
        if data.sequence_length < 64:
            raise DataError(f"data.name='recall' needs data.sequence_length of 64 or more, got {data.sequence_length}")
        return _prepared(
            lambda: Recall(length=data.sequence_length, data_dir=folder, file_format=_FORMAT), folder
        ), "text"
    if Path(data.name).expanduser().exists():
        hold_out = split != "all"
        if has_records(data.name):
            rows = FileRows(data.name, data.text_key)
            builder = _prepared_records(rows, data, folder, form, hold_out=hold_out)
            return builder, builder.key
        kwargs: Any = {"hold_out": hold_out, "max_bad": data.max_bad_documents, "file_format": _FORMAT}
        builder = _prepared(lambda: TextFolder(path=data.name, data_dir=folder, **kwargs), folder)
        builder.check_prepared()
        return builder, "text"
    try:
        builder = tfds.builder(data.name, data_dir=folder, file_format=_FORMAT)
    except ValueError as error:
        raise DataError(
            f"{data.name!r} is neither 'embedded' nor 'recall', nor an existing file or folder, nor a TFDS "
            f"dataset in data_dir={folder!r}: {first_line(error)}"
        ) from error
    if not _is_prepared(builder):
        raise DataError(
            f"TFDS dataset {data.name!r} is not prepared: looked in {builder.data_path}. Nothing is downloaded "
            f"unasked: set data.data_dir, or prepare it with file_format={_FORMAT} as docs/data.md says"
        )
    return builder, data.text_key


def _prepared(make: Callable[[], Any], folder: str, announced: Callable[[Any], str] = _preparing) -> Any:
    """The builder, once its data are on disk: prepared here, or by the process that came first."""
    builder = make()
    if _is_prepared(builder):
        return builder
    with exclusive(Path(folder) / builder.name if "://" not in folder else folder):
        builder = make()  # reads what another process has written in the meantime
        if not _is_prepared(builder):
            say(announced(builder))
            with _at_work(builder):
                _prepare(builder)
    return builder


@contextlib.contextmanager
def _at_work(builder: Any) -> Iterator[None]:
    """Shows that a corpus is being prepared; of files also how far it is, and how long it will take."""
    rows = builder.rows if isinstance(builder, Records) else None
    if not isinstance(rows, FileRows):
        with working("preparing the corpus"):
            yield
        return
    with working("copying the corpus", sum(fact[1] for fact in rows.facts), "bytes") as work:
        rows.told = lambda size: work.add(size / builder.passes)
        yield


def _prepare(builder: Any) -> None:
    """Writes into a folder beside and renames it, so that data are whole or absent."""
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    except RuntimeError as error:  # how TFDS and ArrayRecord report a full disk
        if "write" not in str(error):
            raise
        raise OSError(f"cannot write the corpus to {builder.data_path}: {first_line(error)}") from error


def _is_prepared(builder: Any) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def _check_field(features: dict[str, Any], key: str, name: str) -> None:
    texts = [repr(k) for k, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if repr(key) not in texts:
        raise DataError(
            f"dataset {name} has no text field {key!r}; set data.text_key to one of its texts: "
            f"{', '.join(texts) or 'it has none'}"
        )
