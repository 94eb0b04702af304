"""Records that are of no use: left out, each named, up to `data.max_bad_documents`; one more is an error."""

from collections.abc import Sequence

from absl import logging

from sepjax.data.errors import DataError


class BadRecords:
    """Those of a corpus that is being read.

    Attributes:
      found: place and reason of each.
    """

    def __init__(self, most: int):
        self.found: list[str] = []
        self._most = most

    def note(self, reason: str) -> None:
        """One more. Raises DataError where it is one too many."""
        self.found.append(reason)
        check_bad(self.found, self._most)
        logging.warning("a record is left out, %d of at most %d: %s", len(self.found), self._most, reason)


def check_bad(found: Sequence[str], most: int) -> None:
    """Raises DataError where more records were left out, when a corpus was read, than may be now."""
    if len(found) <= most:
        return
    before = f", and {most} before it were left out" if most else ""
    raise DataError(
        f"{found[most]}{before}; correct it, or, in training, pass over it: data.max_bad_documents={most + 1}"
    )
