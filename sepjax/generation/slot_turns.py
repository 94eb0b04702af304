"""What the next launch of slots does: whose prompts are read (rows take turns), and how many steps each row makes."""

from collections.abc import Mapping, Sequence

import numpy as np

from sepjax.array_typing import Int32
from sepjax.generation.slot_device import Read
from sepjax.generation.slot_request import Flight, Run, Slot


class Turns:
    """Remembers who was the last."""

    def __init__(self, lengths: Mapping[int, int]):
        """`lengths`: tokens of the programs that read, the shortest first, and of how many rows each."""
        self._lengths = lengths
        self._last = dict.fromkeys(lengths, 0)  # the row that read last, with each program

    def next(self, slots: Sequence[Slot | None], flight: Flight | None) -> tuple[list[Read], list[Run]]:
        """The next runs of prompts, for the device and for its host.

        Args:
          slots: who has the rows.
          flight: what was asked for before. How far a row has come is known once its last run was looked at.
        """
        waiting: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            if slot is not None and slot.pending and (flight is None or flight.run_of(slot) is None):
                waiting.setdefault(slot.run_length(self._lengths), []).append(i)
        reads: list[Read] = []
        runs: list[Run] = []
        for length, rows in waiting.items():
            last = self._last[length]
            rows.sort(key=lambda i, last=last: (i <= last, i))
            del rows[self._lengths[length] :]
            self._last[length] = rows[-1]
            read = self._none(length, len(slots))
            for j, i in enumerate(rows):
                runs.append(_fill(read, j, i, slots[i], len(reads)))
            reads.append(read)
        return reads, runs

    def _none(self, length: int, num_rows: int) -> Read:
        """A program that reads nothing yet: its rows have numbers of no row."""
        most = self._lengths[length]
        rows = np.arange(num_rows, num_rows + most, dtype=np.int32)
        return Read(rows, np.zeros((most, length), np.int32), np.zeros(most, np.int32), np.zeros(most, bool))


def _fill(read: Read, j: int, i: int, slot: Slot | None, at: int) -> Run:
    """Has row j of a program read the next tokens of row i."""
    assert slot is not None
    part = slot.pending[: read.tokens.shape[1]]
    read.rows[j], read.left[j], read.tokens[j, : len(part)] = i, len(part), part
    read.is_last[j] = len(part) == len(slot.pending)
    return Run(slot, bool(read.is_last[j]), at, j)


def steps_of(
    slots: Sequence[Slot | None], generating: Sequence[bool], runs: Sequence[Run], most_steps: int
) -> tuple[int, Int32[np.ndarray, "B"]]:
    """How many steps the next launch makes, and from which each row takes part.

    Args:
      slots: who has the rows. Wishes to be saved are fulfilled with this.
      generating: which rows do, or may by then.
      runs: of prompts, before the steps.
      most_steps: of a launch.
    """
    drawing = {run.slot.number for run in runs if run.may_draw}
    most = np.zeros(len(slots), np.int32)
    for i, slot in enumerate(slots):
        if slot is None or not generating[i]:
            continue
        if slot.steps_singly or slot.wishes_to_be_saved:
            most[i] = slot.number not in drawing  # two tokens could not be taken back
        else:
            most[i] = most_steps
        slot.wishes_to_be_saved = False
    steps = int(most.max())
    return steps, steps - most
