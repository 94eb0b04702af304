"""What a checkpoint asks of the batches whose place it keeps, beside what Grain has."""

from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Moving(Protocol):
    """Batches that can take up the place of other processes: `sepjax.data.labelled.LabelledIterator`."""

    def has_moved(self, folder: Path) -> bool:
        """Whether a checkpoint's `data` folder was written by other processes, or for other rows of a batch."""
        ...

    def read_moved(self, folder: Path) -> None:
        """Takes up the place that is there; raises whatever damaged files do, and ConfigError for other data."""
        ...
