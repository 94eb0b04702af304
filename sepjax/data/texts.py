"""What a corpus is to its readers: documents by number, whatever they lie in; and those among them that are bad."""

import abc
from collections.abc import Sequence
from typing import overload, override

from absl import logging

from sepjax.config import first_line
from sepjax.data.errors import DataError

_BYTES_PER_TOKEN = 3  # how far to read ahead; a wrong guess costs another read
_DOCUMENTS_AT_ONCE = 1024


class TextSource(Sequence[str]):
    """Documents by index, read from disk when asked for. Another process gets them by pickling: a name, no texts.

    Attributes:
      name: dataset, fingerprint and split, for messages.
      bytes_per_document: in the mean.
      conversations: whether documents are of a chat template, with marks around what is scored.
      read_from: "files" of the user's, by an index, or "copies" and whatever else has an order of its own.
    """

    name: str
    bytes_per_document: float
    conversations: bool
    read_from: str = "copies"

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    @override
    def __getitem__(self, index: int | slice) -> str | list[str]:
        chosen = range(len(self))[index]
        return self.read(chosen) if isinstance(chosen, range) else self.read([chosen])[0]

    def read(self, indices: Sequence[int]) -> list[str]:
        """The documents at `indices`, which is quicker than one by one. Raises DataError for damaged files."""
        try:
            return self._read(indices)
        except DataError:
            raise
        except Exception as error:  # libraries raise all kinds
            if len(indices) > 1:
                return [text for i in indices for text in self.read([i])]
            reason = first_line(error)
            raise DataError(
                f"document {indices[0]} of {self.name} cannot be read: {reason}; {self._remedy()}, or pass over such "
                "documents with data.max_bad_documents"
            ) from error

    @abc.abstractmethod
    def _read(self, indices: Sequence[int]) -> list[str]:
        """`read`, with errors of any kind."""

    @abc.abstractmethod
    def _remedy(self) -> str:
        """What to do about a damaged document."""

    def documents_for(self, num_tokens: int) -> int:
        """How many documents to read for about so many tokens: 1 or more."""
        return min(1 + int(num_tokens * _BYTES_PER_TOKEN / self.bytes_per_document), _DOCUMENTS_AT_ONCE)


class BadDocuments:
    """Documents that cannot be read: passed over as empty ones, each named once, up to `most` of them."""

    def __init__(self, most: int):
        self.most = most
        self._found: set[int] = set()

    def read(self, source: TextSource, indices: Sequence[int]) -> list[str]:
        """The documents at `indices`. Raises DataError for one bad document more than `most`."""
        try:
            return source.read(indices)
        except DataError as error:
            if not self.most:
                raise
            if len(indices) > 1:
                return [text for i in indices for text in self.read(source, [i])]
            if indices[0] not in self._found:
                self._note(indices[0], error)
            return [""]

    def _note(self, index: int, error: DataError) -> None:
        if len(self._found) >= self.most:
            raise DataError(f"{error}; data.max_bad_documents={self.most} of them were passed over before") from error
        self._found.add(index)
        logging.warning("passed over, %d of at most %d: %s", len(self._found), self.most, error)
