"""How much room a copy of files takes: told before it is made, and refused where there is not so much."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from sepjax.data.corpora.files import is_packed, kind_of_file, library, unpacking
from sepjax.data.corpora.rows import FileRows
from sepjax.data.errors import DataError

_UNPACKED = 1 << 24  # bytes of a packed file that stand for all of it
_FILES = 8  # of a kind, that stand for all
_SORTED_IN_MEMORY = 1000 << 20  # bytes; TFDS puts more than that on the disk a second time, while it sorts them
_SMALLEST = 0.3  # of a text's bytes, that ArrayRecord packs it into


def announce_copy(rows: FileRows, text_key: str, place: Path, *, is_form: bool) -> str:
    """What to say before `rows` are copied into `place`; `is_form`: because a chat template writes them.

    Raises:
      DataError: there is no room for the smallest copy that may come of them.
    """
    size, unpacked = sum(fact[1] for fact in rows.facts), unpacked_bytes(rows.files, text_key)
    meanwhile = unpacked if unpacked > _SORTED_IN_MEMORY else 0
    folder = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if meanwhile + _SMALLEST * unpacked > free:
        raise DataError(
            f"{rows.name!r} is copied once, which takes about {_amount(unpacked + meanwhile)} in {str(place)!r}, where "
            f"{_amount(free)} are free; set data.data_dir to a disk with more room"
            + ("" if is_form else ", or make plain JSON lines (.jsonl) of it, which are read where they lie")
        )
    packed = next((x for x in rows.files if is_packed(x) or kind_of_file(x) == "parquet"), None)
    why = "a chat template writes them once" if is_form else f"{packed and packed.name} cannot be read at random"
    most = f"{_amount(unpacked)} at most" + (f", and {_amount(meanwhile)} more meanwhile" if meanwhile else "")
    files = f"{len(rows.files):,} files" if len(rows.files) > 1 else "a file"
    return f"copying {files} of {_amount(size)} into {place} (once; {most}): {why}"


def unpacked_bytes(files: Sequence[Path], text_key: str) -> int:
    """About how many bytes of text are in files, judged by the first ones of each kind."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    total = 0.0
    for file in files:
        sample = kinds.setdefault(file.suffix, [])
        size = file.stat().st_size
        if len(sample) < _FILES:
            sample.append((size, _unpacked_share(file, size, text_key)))
        total += size * sum(x * share for x, share in sample) / max(sum(x for x, _ in sample), 1)
    return int(total)


def _unpacked_share(file: Path, size: int, text_key: str) -> float:
    """Bytes of text a byte of the file. What cannot be read is named when it is copied."""
    if kind_of_file(file) == "parquet":
        return _share_of_columns(file, size, text_key)
    if not is_packed(file):
        return 1.0
    with contextlib.suppress(DataError), unpacking(file) as (stream, packed):
        return len(stream.read(_UNPACKED)) / max(packed.tell(), 1)
    return 1.0


def _share_of_columns(file: Path, size: int, text_key: str) -> float:
    arrow = library("pyarrow", file)
    try:
        footer = library("pyarrow.parquet", file).read_metadata(file)
    except (OSError, arrow.ArrowException):
        return 1.0
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    wanted = [x.total_uncompressed_size for x in columns if x.path_in_schema.partition(".")[0] == text_key]
    return (sum(wanted) or sum(x.total_uncompressed_size for x in columns)) / max(size, 1)


def _amount(size: int | float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):.1f} MB"
