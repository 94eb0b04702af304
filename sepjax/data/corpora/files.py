"""The files that a corpus is made of, by their names: texts, JSON lines and Parquet, the first two packed or not."""

import gzip
import importlib
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, override

from sepjax.data.errors import DataError

PACKED = ("", ".gz", ".zst")
SUFFIXES = {
    "text": tuple(f".txt{packed}" for packed in PACKED),
    "lines": tuple(f".{name}{packed}" for name in ("jsonl", "ndjson") for packed in PACKED),
    "parquet": (".parquet",),
}
_OTHER_PACKERS = (".7z", ".br", ".bz2", ".lz4", ".lzma", ".rar", ".xz", ".z", ".zip")
_TABLES = (".json", ".csv", ".tsv")  # of which nobody wants to read the commas and brackets as a text
_READ = 1 << 16  # bytes of what is unpacked
_CHUNK = 1024  # bytes of a .zst file unpacked at once: 32 MB come out of the worst of them


def kind_of_file(file: Path) -> str:
    """ "text", "lines" or "parquet", by the file's name; "" for any other."""
    return next((kind for kind, suffixes in SUFFIXES.items() if file.name.lower().endswith(suffixes)), "")


def is_packed(file: Path) -> bool:
    """Whether a file is packed in a way that is read."""
    return file.suffix.lower() in PACKED[1:]


def root_of(path: str | os.PathLike[str]) -> Path:
    """Where a file or folder lies. A file that is a link keeps its own name, which tells what kind it is: caches of the
    hub link `train.jsonl` to a name of digits.
    """
    given = Path(path).expanduser()
    return given.resolve() if given.is_dir() else given.parent.resolve() / given.name


def files_of(root: Path) -> list[Path]:
    """The files at a path that a corpus is read from, in order. A single file that is of no known kind is a text.

    Raises:
      DataError: there are none, or one is packed in a way that is not read, is a link to nothing, or holds records in a
        form that is not read; or a folder cannot be read.
    """
    files = _walked(root) if root.is_dir() else [root]
    for file in files:
        if not kind_of_file(file) and (".jsonl." in file.name or _is_packed_otherwise(file)):
            raise DataError(
                f"{str(file)!r} is packed in a way that is not read; unpack it, or pack it with gzip or zstd"
            )
        if not file.exists() and kind_of_file(file):
            raise DataError(f"{str(file)!r} is a link to {os.readlink(file)!r}, which does not exist; fix or remove it")
    if not root.is_dir():
        _check_single(root)
        return files
    if found := [file for file in files if kind_of_file(file) and file.is_file()]:
        return found
    raise DataError(f"folder {str(root)!r} holds no {_what_it_holds(root, files)}")


def _walked(root: Path) -> list[Path]:
    """All that lies in a folder and in those that it links to, each once, but for what is hidden."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def refused(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename!r}: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=refused, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:  # a link upwards would lead round for ever
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _check_single(file: Path) -> None:
    if not file.is_file():
        raise DataError(f"{str(file)!r} is neither a file nor a folder, and is read more than once; write it to a file")
    unpacked = Path(file.stem) if is_packed(file) else file
    if unpacked.suffix.lower() in _TABLES:
        is_json = unpacked.suffix.lower() == ".json"
        way = "name it .jsonl if every line is an object" if is_json else "have datasets read it (hf://FOLDER)"
        raise DataError(f"{str(file)!r} is not read by that name: {way}, or name it .txt to have it read as one text")


def _what_it_holds(root: Path, files: list[Path]) -> str:
    counts = Counter(file.suffix or "without a suffix" for file in files).most_common(8)
    there = ", ".join(f"{count} {suffix}" for suffix, count in counts) or "no files"
    if any(file.suffix == ".arrow" for file in files):
        raise DataError(f"folder {str(root)!r} was saved by datasets: --config.data.name=hf://{root.resolve()}")
    json = "; JSON lines are named .jsonl" if any(".json" in file.suffixes for file in files) else ""
    return f".txt, .jsonl or .parquet files (.txt and .jsonl may be packed: .gz, .zst); it has {there}{json}"


def _is_packed_otherwise(file: Path) -> bool:
    return file.suffix.lower() in _OTHER_PACKERS and bool(kind_of_file(Path(file.stem)))


@contextmanager
def opened(file: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The bytes of a file, unpacked as they are read.

    Raises:
      DataError: it cannot be opened, or, from within the block, read or unpacked; or the library for it is missing.
    """
    with unpacking(file) as (stream, _):
        yield stream


@contextmanager
def unpacking(file: Path) -> Iterator[tuple[io.BufferedReader | gzip.GzipFile, io.BufferedReader]]:
    """`opened`, and the file as it is, whose place tells how much was read."""
    try:
        with file.open("rb") as packed:
            if file.suffix.lower() == ".gz":
                with gzip.GzipFile(fileobj=packed) as stream:
                    yield stream, packed
            elif file.suffix.lower() == ".zst":
                unpacked: Any = _Unpacked(packed, library("zstandard", file))
                with io.BufferedReader(unpacked, _READ) as stream:
                    yield stream, packed
            else:
                yield packed, packed
    except (OSError, EOFError, zlib.error) as error:  # gzip's own are of these
        raise DataError(f"cannot read {str(file)!r}: {error}") from error


type Facts = tuple[str, int, int]  # of a file: its name, its size, when it was last changed


def facts_of(files: Iterable[Path], root: Path) -> list[Facts]:
    """What changes where any of the files does. Raises DataError where one is gone."""
    try:
        stats = [(str(file.relative_to(root.parent)), file.stat()) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename!r} was there and cannot be read any more: {error.strerror}") from error
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def check_unchanged(files: Iterable[Path], root: Path, before: Iterable[Facts]) -> None:
    """Raises DataError where a file is not what it was: some of its records may have been read, others not."""
    files = list(files)
    for file, was, now in zip(files, before, facts_of(files, root), strict=True):
        if was != now:
            raise DataError(
                f"{str(file)!r} changed while it was read: it had {was[1]:,} bytes, now {now[1]:,}; wait until nobody "
                "writes to it, or copy it"
            )


def read_text(file: Path) -> str:
    """A text file, unpacked, with any kind of line ends. Raises DataError as `opened`, and UnicodeDecodeError."""
    with opened(file) as stream:
        return decoded_text(stream.read())


def decoded_text(raw: bytes) -> str:
    """The text of a file's bytes, with any kind of line ends. Raises UnicodeDecodeError."""
    return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig").read()


def not_utf8(error: UnicodeDecodeError) -> str:
    """Where a text is not UTF-8, and how to convert it: a mark at its beginning says if it is UTF-16."""
    encoding = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
    return (
        f"is not UTF-8 text: {error.reason} at byte {error.start}; convert it, for example with iconv -f {encoding} "
        "-t UTF-8"
    )


def key_of(place: object) -> str:
    """A file's name, or what has it in front, as text for a file: of bytes that are no UTF-8 their numbers."""
    return os.fsencode(str(place)).decode(errors="backslashreplace")


def library(name: str, file: Path) -> Any:
    """A library of the extra `data`. Raises DataError where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise DataError(f'{str(file)!r} is read by {package}, which is missing: pip install "sepjax[data]"') from error


class _Unpacked(io.RawIOBase):
    """What frames of zstd hold, one after the other. A file that ends within a frame is an error, not a short file."""

    def __init__(self, packed: io.BufferedReader, zstandard: Any):
        self._packed, self._zstandard = packed, zstandard
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any, /) -> int:
        while not self._output and self._fill():
            pass
        part, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def _fill(self) -> bool:
        """Unpacks some more; False at the end."""
        self._input = self._input or self._packed.read(_CHUNK)
        if not self._input:
            if self._frame is not None:
                raise EOFError("it ends within a frame of zstd, so its end is missing")
            return False
        try:
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
        except self._zstandard.ZstdError as error:
            raise OSError(f"damaged: {error}") from error
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True
