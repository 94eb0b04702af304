"""What a checkpoint asks of the batches whose place it keeps, beside what Grain has."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from sepjax.run.checkpoint_files import agreed


@runtime_checkable
class Moving(Protocol):
    """Batches that can take up the place of other processes: `sepjax.data.labelled.LabelledIterator`."""

    def has_moved(self, folder: Path) -> bool:
        """Whether a checkpoint's `data` folder was written by other processes, or for other rows of a batch."""
        ...

    def read_moved(self, folder: Path) -> None:
        """Takes up the place that is there; raises whatever damaged files do, and ConfigError for other data."""
        ...


def has_moved_anywhere(data: Moving, folder: Path) -> bool:
    """`Moving.has_moved`, of any process: all read a checkpoint in one way, or they wait for one another."""
    return agreed("it has moved" if data.has_moved(folder) else None) is not None
