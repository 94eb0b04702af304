"""Datasets of the Hugging Face hub, and folders that its library `datasets` reads or has saved: "hf://...".

    hf://OWNER/NAME[/CONFIG][@REVISION]         of the hub, once into the cache of `datasets`
    hf:///data/mine  hf://./mine  hf://~/mine   a folder: what `save_to_disk` wrote, or files that `load_dataset` takes

Either way rows lie in Arrow files, which are read at random as they are: texts need no preparation of ours.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, override

from sepjax import progress
from sepjax.config import first_line
from sepjax.console import say
from sepjax.data.conversations import FIELDS, RecordError, kind_of, text_of
from sepjax.data.corpora.rows import Raw
from sepjax.data.corpora.splits import fingerprint
from sepjax.data.errors import DataError
from sepjax.data.texts import TextSource

PREFIX = "hf://"
_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[^@]+))?(@(?P<revision>.+))?")
_KINDS = ("arrow", "cache", "csv", "json", "parquet", "text")  # of files that hold rows of texts
_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")  # types of Arrow
_AT_ONCE = 64  # rows of conversations
_OLDEST = 4  # version of datasets


class HubRows:
    """The rows of one split, of which those fields count that a text or a conversation is made of.

    Attributes:
      name: as `data.name` has it, and the split.
      place, facts: change where any row does.
    """

    def __init__(self, name: str, split: str):
        """Opens `name`, after fetching it if it is not in the cache. `split` is written as TFDS writes it.

        Raises:
          DataError: `datasets` is missing, or there is no such dataset, config, revision or split, or no row in it.
        """
        library = _library(name)
        with _quietly(library):
            splits = _splits(library, name)
            self.table = _chosen(library, splits, name, split)
        self.name, self.place = f"{name}:{split}", name
        self.facts = (split, *(splits[key]._fingerprint for key in sorted(splits)))

    def kind(self, text_key: str) -> str:
        """ "text" or "conversation". Raises DataError where `text_key` is no text, or not there."""
        columns = dict(zip(self.table.column_names, self.table.data.schema.types, strict=True))
        with contextlib.suppress(RecordError):
            if kind_of(columns, text_key) == "conversation":
                return "conversation"
        texts = [repr(name) for name, kind in columns.items() if str(kind) in _TEXTS]
        if repr(text_key) not in texts:
            others = ", ".join(f"{name!r} ({kind})"[:40] for name, kind in columns.items() if repr(name) not in texts)
            raise DataError(
                f"{self.name} has no text field {text_key!r}; set data.text_key to one of its texts: "
                f"{', '.join(texts) or 'it has none'}; it has the other fields {others or 'none'}"
            )
        return "text"

    def records(self, kind: str) -> Iterator[tuple[str, Raw]]:
        """The place and the fields of each row, as of files; `kind` is known to be "conversation"."""
        table = self.table.select_columns([name for name in self.table.column_names if name in FIELDS])
        for first in range(0, len(table), _AT_ONCE):
            rows = table[first : first + _AT_ONCE]
            for i in range(min(_AT_ONCE, len(table) - first)):
                fields = {name: values[i] for name, values in rows.items() if values[i] is not None}
                yield f"{self.name}, row {first + i}", fields


class HubTexts(TextSource):
    """The texts of one field, from Arrow files on disk. Another process maps the same files."""

    def __init__(self, rows: HubRows, text_key: str):
        """`text_key` is a field of texts, as `rows.kind` says."""
        self._key, self._table = text_key, rows.table.select_columns([text_key])
        self.name, self.conversations = f"{rows.name} ({fingerprint(rows.facts)})", False
        column = self._table.data.column(text_key)
        self.bytes_per_document = max(column.nbytes / max(len(column), 1), 1.0)

    def __len__(self) -> int:
        return len(self._table)

    @override
    def _read(self, indices: Sequence[int]) -> list[str]:
        values = self._table[list(indices)][self._key]
        return [self._text(value, i) for value, i in zip(values, indices, strict=True)]

    @override
    def _remedy(self) -> str:
        return "fetch it anew (remove it from the cache of datasets), or save it anew"

    def _text(self, value: Any, index: int) -> str:
        try:
            value = value.decode() if isinstance(value, bytes) else value
            return text_of({self._key: value} if value is not None else {}, self._key)
        except UnicodeDecodeError as error:
            raise DataError(f"document {index} of {self.name} is not UTF-8 text: {error.reason}") from error
        except RecordError as error:
            raise DataError(f"document {index} of {self.name}: {error}") from error


def is_of_hub(name: str) -> bool:
    """Whether `data.name` is read by `datasets`."""
    return name.startswith(PREFIX)


def _library(name: str) -> Any:
    try:
        import datasets  # seconds, which other sources need not wait
    except ModuleNotFoundError as error:
        raise DataError(f'{name!r} is read by datasets, which is missing: pip install "sepjax[hf]"') from error
    if int(datasets.__version__.partition(".")[0]) < _OLDEST:  # those run code that a dataset brings
        raise DataError(
            f"{name!r} is read by datasets {_OLDEST} or newer, and {datasets.__version__} is installed: "
            'pip install --upgrade "sepjax[hf]"'
        )
    return datasets


def _splits(library: Any, name: str) -> dict[str, Any]:
    """The dataset of each split, mapped from disk."""
    path, config, revision = _parsed(name)
    try:
        if (folder := Path(path)).is_dir() and any((folder / x).exists() for x in ("state.json", "dataset_dict.json")):
            saved = library.load_from_disk(path)
            return dict(saved) if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        builder = library.load_dataset_builder(path, config, revision=revision)
        _check_kind(builder, name)
        if not Path(builder.cache_dir).exists():
            say(f"reading {name} into {builder.cache_dir} (once)")
        builder.download_and_prepare()
        return dict(builder.as_dataset())
    except DataError:
        raise
    except Exception as error:  # of networks, files, formats
        while error.__cause__ and isinstance(error, library.exceptions.DatasetGenerationError):
            error = error.__cause__
        raise DataError(f"cannot read {name!r}: {first_line(error)}") from error


def _parsed(name: str) -> tuple[str, str | None, str | None]:
    """What to load, its config, its revision."""
    rest = name.removeprefix(PREFIX)
    if rest.startswith(("/", ".", "~")):
        path = Path(rest).expanduser().resolve()
        if not path.is_dir():
            raise DataError(f"data.name={name!r}: there is no folder {str(path)!r}")
        return str(path), None, None
    if not (found := _ID.fullmatch(rest)):
        raise DataError(
            f"data.name={name!r}, expected hf://OWNER/NAME or hf://OWNER/NAME/CONFIG, with or without @REVISION behind "
            "it, or a folder: hf:///ABSOLUTE, hf://./RELATIVE"
        )
    return found["id"], found["config"], found["revision"]


def _check_kind(builder: Any, name: str) -> None:
    """Formats of files that may hold objects of Python (WebDataset) are not opened at all."""
    kind = type(builder).__module__.removeprefix("datasets.packaged_modules.").partition(".")[0]
    if kind not in _KINDS:
        raise DataError(f"{name!r} is made of {kind!r} files, which are not read; expected one of {', '.join(_KINDS)}")


def _chosen(library: Any, splits: dict[str, Any], name: str, split: str) -> Any:
    """The rows of a split, as "train", "train[:10%]", "train+test" or "all"; plain Python when they are asked for."""
    spec = "+".join(splits) if split == "all" else split
    try:
        places = library.ReadInstruction.from_spec(spec).to_absolute({key: len(x) for key, x in splits.items()})
    except (ValueError, AssertionError) as error:
        there = ", ".join(splits)
        hint = ""
        if len(splits) == 1:
            hint = f"; to hold some back, data.train_split='{there}[1%:]' and data.eval_split='{there}[:1%]'"
        raise DataError(f"cannot read split {split!r} of {name}: it has the splits {there}{hint}") from error
    parts = [splits[x.splitname].select(range(x.from_, x.to)) for x in places]
    table = parts[0] if len(parts) == 1 else library.concatenate_datasets(parts)
    if not len(table):
        raise DataError(f"split {split!r} of {name} has no rows; choose another one")
    return table.with_format(None)


@contextlib.contextmanager
def _quietly(library: Any) -> Iterator[None]:
    """The bars of `datasets` where ours would be shown, and nowhere else."""
    hides = not progress.is_shown() and library.are_progress_bars_disabled() is False
    if hides:
        library.disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            library.enable_progress_bars()
