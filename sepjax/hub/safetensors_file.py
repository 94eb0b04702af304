"""The safetensors format: a length, a JSON header, raw numbers. Tensors are views of the mapped file.

    bytes 0-7   n, the header's size, little-endian
    n bytes     {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
    the rest    the tensors, one after the other, without gaps

(https://huggingface.co/docs/safetensors, "Format".) Nothing of a tensor is read before its numbers are used, so that a
shard reads only its own part of a large file.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sepjax.config.checks import once
from sepjax.files import replacing
from sepjax.hub.errors import HubError
from sepjax.hub.fields import check_file
from sepjax.progress import counted

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST = 100_000_000  # bytes of a header: the limit of the format's own library


class Entry(NamedTuple):
    """A tensor's place in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes after the header
    end: int


class SafetensorsFile:
    """One file, opened for reading.

    Attributes:
      path: of the file.
      entries: name -> dtype, shape and place of every tensor.
      metadata: the free text in the header.
    """

    def __init__(self, path: Path):
        """Reads and checks the header.

        Raises:
          HubError: the file is no safetensors, cut short, or its header contradicts itself; names the tensor.
          OSError: the file cannot be read.
        """
        self.path = path
        check_file(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
            if not 2 <= length <= min(size - 8, _MOST):
                raise HubError(
                    f"{str(path)!r} is not a complete safetensors file: {size} bytes, and its header would have "
                    f"{length}; download it again"
                )
            header = _parse(path, file.read(length))
        self.metadata: dict[str, Any] = header.pop("__metadata__", None) or {}
        self._data = 8 + length
        self.entries = {name: _entry(path, name, value) for name, value in header.items()}
        _check_places(path, self.entries, size - self._data)

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the mapped file."""
        dtype, shape, start, _ = self.entries[name]
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype, "r", self._data + start, shape)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise HubError(f"{str(path)!r}: the header is not valid JSON: {error}; download the file again") from error
    if not isinstance(header, dict):
        raise HubError(f"{str(path)!r}: the header is a {type(header).__name__}, expected a JSON object of tensors")
    return header


def _entry(path: Path, name: str, value: Any) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise HubError(
            f"{str(path)!r}: tensor {name!r} needs dtype, shape and two data_offsets, got {str(value)[:80]}"
        ) from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HubError(f"{str(path)!r}: tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, start, end]):
        raise HubError(f"{str(path)!r}: tensor {name!r} has shape {str(shape)[:80]} at {str([start, end])[:80]}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != size:
        raise HubError(
            f"{str(path)!r}: tensor {name!r} of shape {shape} and dtype {dtype} needs {size} bytes, but its "
            f"data_offsets {[start, end]} have {end - start}"
        )
    return Entry(DTYPES[dtype], tuple(shape), start, end)


def _check_places(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """Tensors must follow one another and fill the file: anything else is damage, or hides something."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise HubError(
                f"{str(path)!r}: tensor {name!r} starts at byte {entry.start}, expected {at}: there is a gap or overlap"
            )
        at = entry.end
        if at > size:
            raise HubError(
                f"{str(path)!r} is cut short: tensor {name!r} ends at byte {at} of {size}; download it again"
            )
    if at != size:
        raise HubError(f"{str(path)!r} has {size - at} bytes behind its last tensor; it is damaged")


class Planned(NamedTuple):
    """A tensor to be written: `read` is called when its turn comes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Planned]) -> None:
    """Writes a file, one tensor in memory at a time, beside its place and renamed. "format": "pt" as transformers asks.

    Raises:
      HubError: a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, planned in tensors.items():
        if planned.dtype not in _NAMES:
            raise HubError(f"tensor {name!r} has dtype {planned.dtype}, which safetensors cannot hold")
        offsets = [at, at := at + planned.nbytes]
        header[name] = {"dtype": _NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, planned in counted(tensors.items(), f"writing {path}", at, "bytes", lambda item: item[1].nbytes):
            array = np.ascontiguousarray(planned.read().reshape(planned.shape).astype(planned.dtype, copy=False))
            if array.nbytes != planned.nbytes:
                raise HubError(f"tensor {name!r} has {array.nbytes} bytes, {planned.nbytes} were announced")
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
