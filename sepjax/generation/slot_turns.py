"""What the next launch of slots does: whose prompts are read (rows take turns), and how many steps each row makes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sepjax.array_typing import Bool, Int32
from sepjax.generation.slot_request import Flight, Run, Slot

_LENGTHS = 64, 192  # tokens of the shorter programs that read, on a processor
# On an accelerator a program that reads takes as long as its layers take to be begun, however few its tokens are. So a
# launch has one, of these rows and tokens: some short ones, some long ones, or many; and one more if many still wait.
_FEW, _MANY, _SHORT = 4, 32, 128


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """The next tokens of some prompts, for one program; where there are fewer than M, the last have no row's number."""

    rows: Int32[np.ndarray, "M"]
    tokens: Int32[np.ndarray, "M T"]
    left: Int32[np.ndarray, "M"]
    is_last: Bool[np.ndarray, "M"]
    after: Int32[np.ndarray, "M"]  # tokens that a row must have seen, modulo `count_wrap`, or reads none; -1: any

    @classmethod
    def none(cls, rows: int, length: int, num_rows: int) -> "Read":
        """A program that reads nothing yet, beside `num_rows` rows."""
        none = np.zeros(rows, np.int32)
        which = np.arange(num_rows, num_rows + rows, dtype=np.int32)
        return cls(which, np.zeros((rows, length), np.int32), none, np.zeros(rows, bool), np.full(rows, -1, np.int32))

    def sent(self) -> Int32[np.ndarray, "M _"]:
        """All of it in one array, for `SlotPrograms.read`."""
        return np.column_stack([self.rows, self.left, self.is_last.astype(np.int32), self.after, self.tokens])


type ReadShape = tuple[int, int]  # rows and tokens of a program that reads


def shapes_of(backend: str, rows: int, chunk: int, together: int = 0) -> tuple[tuple[ReadShape, ...], int]:
    """The programs that read, and how many of them a launch has at most.

    Args:
      backend: where they run. A processor takes as many times longer as there are rows, whether they are wanted or not.
      rows: that there are.
      chunk: tokens that lie between two compactions, at most.
      together: rows of each program; 0: as suits the device.
    """
    if backend == "cpu" or together:
        lengths = sorted({min(length, chunk) for length in (*_LENGTHS, chunk)})
        return tuple((min(rows, together or 1), length) for length in lengths), len(lengths)
    short = min(_SHORT, chunk)
    shapes = {(min(rows, _FEW), short), (min(rows, _FEW), chunk), (min(rows, _MANY), short)}
    return tuple(sorted(shapes, key=_cost)), 2


def _cost(shape: ReadShape) -> int:
    return shape[0] * shape[1]


def best_shape(shapes: Sequence[ReadShape], left: Sequence[int]) -> ReadShape:
    """The least program that reads all tokens that are left of some prompts, or else the one that reads most of them.

    Args:
      shapes: that there are, the least first.
      left: tokens of each prompt, in the order of their turns.
    """
    for rows, length in shapes:
        if rows >= len(left) and length >= max(left):
            return rows, length
    return max(shapes, key=lambda shape: sum(min(tokens, shape[1]) for tokens in left[: shape[0]]))


class Turns:
    """Remembers who was the last."""

    def __init__(self, shapes: Sequence[ReadShape], at_once: int, count_wrap: int):
        """`shapes` of programs that read, of which a launch has up to `at_once`; `count_wrap` of caches."""
        self._shapes, self._at_once, self._wrap = shapes, at_once, count_wrap
        self._many = max(rows for rows, _ in shapes) // 2
        self._last = 0  # the row that read last

    def next(self, slots: Sequence[Slot | None], flight: Flight | None) -> tuple[list[Read], list[Run]]:
        """The next runs of prompts, for the device and for its host.

        Args:
          slots: who has the rows.
          flight: what was asked for before. How far a row has come is known once its last run was looked at: the next
            one is for a row that has taken up all of that, and reads nothing of one that had to compact on the way.
        """
        asked = {} if flight is None else {id(run.slot): run.tokens for run in flight.runs}
        waiting = [i for i, slot in enumerate(slots) if slot is not None and len(slot.pending) > asked.get(id(slot), 0)]
        waiting.sort(key=lambda i: (i <= self._last, i))
        reads: list[Read] = []
        runs: list[Run] = []
        # One more program holds up all rows that generate, and so is for many that would wait for the next launch.
        while waiting and len(reads) < self._at_once and (not reads or len(waiting) >= self._many):
            left = [len(slot.pending) - asked.get(id(slot), 0) for i in waiting if (slot := slots[i]) is not None]
            shape = best_shape(self._shapes, left)
            those, waiting = waiting[: shape[0]], waiting[shape[0] :]
            read = Read.none(*shape, len(slots))
            for j, i in enumerate(those):
                slot = slots[i]
                assert slot is not None
                runs.append(_fill(read, j, i, slot, len(reads), asked.get(id(slot), 0)))
                if id(slot) in asked:
                    read.after[j] = (slot.row.seen + asked[id(slot)]) % self._wrap
            reads.append(read)
            self._last = those[-1]
        return reads, runs


def _fill(read: Read, j: int, i: int, slot: Slot, at: int, asked: int) -> Run:
    """Has row j of a program read the next tokens of row i, after those that it was `asked` to read before."""
    part = slot.pending[asked : asked + read.tokens.shape[1]]
    read.rows[j], read.left[j], read.tokens[j, : len(part)] = i, len(part), part
    read.is_last[j] = asked + len(part) == len(slot.pending)
    return Run(slot, bool(read.is_last[j]), at, j, len(part))


def ending(slots: Sequence[Slot | None], flight: Flight | None) -> list[int]:
    """Rows that end, whatever they draw, with what the device was asked for: they come to their length."""
    if flight is None or not flight.steps:
        return []
    return [
        i
        for i, slot in enumerate(slots)
        if slot is not None and slot is flight.slots[i] and not slot.pending and not slot.is_cancelled
        and 0 < slot.row.left <= flight.steps - flight.first[i] and flight.run_of(slot) is None
    ]  # fmt: skip


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
