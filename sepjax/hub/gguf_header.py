"""The GGUF format up to its numbers: metadata and the places of tensors, every length checked before it is believed.

    "GGUF", version u32, tensors u64, fields u64
    fields    name string, kind u32, value          an array: kind u32, length u64, values; a string: length u64, UTF-8
    tensors   name string, axes u32, lengths u64 (the last axis first), kind u32, offset u64
    padding to general.alignment, then the tensors' bytes, each padded too

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.) Little-endian throughout. The package
`gguf` reads the same, an object a value; it believes the counts, and takes seconds for a vocabulary.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sepjax.hub.errors import HubError
from sepjax.hub.fields import check_file

_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_FIELD, _TENSOR = 13, 32  # bytes of the smallest of each
_MOST = 1 << 24  # entries of a list: what is made of them in memory is far larger than the file
_AXES = 4


class GGUFError(HubError):
    """A GGUF file that cannot be read, or is of a kind that is not supported."""


class Field(NamedTuple):
    """A value of the metadata."""

    value: Any  # int, float, bool, str, or a list of one of them

    def contents(self, index: int | None = None) -> Any:
        """The value, or one entry of a list."""
        return self.value if index is None else self.value[index]


class Tensor(NamedTuple):
    """A tensor's place in the file."""

    kind: int  # of the format's types of numbers
    shape: tuple[int, ...]  # rows first, as NumPy counts
    start: int  # byte of the file


class Header:
    """One file, opened for reading.

    Attributes:
      path: of the file.
      fields: name -> value of the metadata.
      tensors: name -> place of every tensor.
      data: the whole file, mapped.
    """

    def __init__(self, path: Path):
        """Reads metadata and places.

        Raises:
          GGUFError: the file is no GGUF, cut short, or its header contradicts itself.
          OSError: the file cannot be read.
        """
        self.path = path
        check_file(path)
        with path.open("rb") as file:
            try:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise GGUFError(f"{str(path)!r} is empty; download it again") from error
        self._at = 0
        if self.data[:4] != b"GGUF":
            raise self._fault("it does not begin with 'GGUF'")
        self._at = 4
        version = self._number("<u4")
        if version not in (2, 3):
            order = ", whose bytes are in the other order" if version & 0xFFFF == 0 else ""
            raise GGUFError(f"{str(path)!r} is of version {version:#x}{order}; versions 2 and 3 are supported")
        tensors, fields = self._count(_TENSOR, "tensors"), self._count(_FIELD, "fields")
        self.fields: Mapping[str, Field] = self._named(fields, lambda: Field(self._value(self._number("<u4"))))
        self.tensors: Mapping[str, Tensor] = self._named(tensors, self._tensor)
        self._place()

    def _fault(self, what: str) -> GGUFError:
        return GGUFError(f"{str(self.path)!r} is not a complete GGUF file: {what}; download it again")

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self._at:
            raise self._fault(f"{size} bytes are to follow byte {self._at}, but it has {len(self.data)}")
        self._at += size
        return self.data[self._at - size : self._at]

    def _number(self, kind: str) -> Any:
        return np.frombuffer(self._take(np.dtype(kind).itemsize), kind)[0].item()

    def _count(self, smallest: int, what: str) -> int:
        """A number of things that must have room in the rest of the file."""
        (count,) = struct.unpack("<Q", self._take(8))
        if count > min((len(self.data) - self._at) // smallest, _MOST):
            raise self._fault(f"it would have {count} {what} after byte {self._at}, and has {len(self.data)} bytes")
        return count

    def _string(self) -> str:
        at = self._at
        text = self._take(struct.unpack("<Q", self._take(8))[0])
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._fault(f"the string at byte {at} is not UTF-8") from error

    def _named[T](self, count: int, read: Callable[[], T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for _ in range(count):
            name = self._string()
            if name in found:
                raise self._fault(f"{name[:80]!r} is there twice")
            found[name] = read()
        return found

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._fault(f"the value before byte {self._at} is of the unknown kind {kind}")
        inner = self._number("<u4")
        if inner == _STRING:
            return [self._string() for _ in range(self._count(8, "strings"))]
        if inner not in _NUMBERS:
            what = "arrays within arrays" if inner == _ARRAY else f"values of the unknown kind {inner}"
            raise GGUFError(f"{str(self.path)!r} has {what} before byte {self._at}, which are not supported")
        size = np.dtype(_NUMBERS[inner]).itemsize
        return np.frombuffer(self._take(size * self._count(size, "numbers")), _NUMBERS[inner]).tolist()

    def _tensor(self) -> Tensor:
        axes = self._number("<u4")
        if not 1 <= axes <= _AXES:
            raise self._fault(f"the tensor before byte {self._at} would have {axes} axes")
        lengths = struct.unpack(f"<{axes}Q", self._take(8 * axes))
        return Tensor(self._number("<u4"), lengths[::-1], self._number("<u8"))

    def _place(self) -> None:
        """Offsets become bytes of the file; every tensor must lie in it, and beside the others."""
        alignment = self.fields["general.alignment"].value if "general.alignment" in self.fields else 32
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._fault(f"general.alignment={alignment!r} must be a power of two")
        first = at = self._at + -self._at % alignment
        self.tensors = {name: x._replace(start=x.start + first) for name, x in self.tensors.items()}
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].start):
            end = tensor.start + self.nbytes(name)
            if tensor.start < at or tensor.start % alignment or end > len(self.data):
                raise self._fault(
                    f"tensor {name[:80]!r} lies at bytes {tensor.start} to {end} of {len(self.data)}, the one before "
                    f"ends at {at}"
                )
            at = end

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes; raises GGUFError for a type of numbers that is not known."""
        rows, columns = math.prod(self.tensors[name].shape[:-1]), self.tensors[name].shape[-1]
        block, size = self.block(name)
        if columns % block:
            raise self._fault(f"tensor {name[:80]!r} has rows of {columns} numbers, no multiple of {block}")
        return rows * (columns // block) * size

    def block(self, name: str) -> tuple[int, int]:
        """Numbers and bytes of a block of a tensor's type."""
        import gguf

        try:
            return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.tensors[name].kind)]
        except (ValueError, KeyError) as error:
            kind = self.tensors[name].kind
            raise GGUFError(
                f"{str(self.path)!r}: tensor {name[:80]!r} holds numbers of the unknown type {kind}"
            ) from error
