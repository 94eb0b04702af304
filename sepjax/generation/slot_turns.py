"""What the next launch of slots does: whose prompts are read (rows take turns), and how many steps each row makes."""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sepjax.array_typing import Bool, Int32
from sepjax.generation.slot_request import Flight, Run, Slot

_LENGTHS = 64, 192  # tokens of the shorter programs that read, on a processor
# On an accelerator a program that reads takes as long as its layers take to be begun, however few its tokens are. So a
# launch has one, of these rows and tokens: some short ones, some long ones, or many; and one more if many still wait.
_FEW, _MANY, _MOST, _SHORT = 4, 32, 40, 128  # many: an eighth of all rows within these bounds


_FULL = 5 / 8  # of these the tokens that it reads together, at most: most prompts are shorter than the longest


class ReadShape(NamedTuple):
    """A program that reads."""

    rows: int
    length: int  # tokens of a row, at most
    tokens: int  # of all of them together

    def runs(self, left: Sequence[int]) -> list[int]:
        """How many tokens it reads of the first of some prompts, of which so many are `left`.

        Those that have no room together wait: a run that depends on others would round otherwise than by itself.
        """
        ends = itertools.accumulate(min(tokens, self.length) for tokens in left[: self.rows])
        return [min(tokens, self.length) for tokens, end in zip(left, ends, strict=False) if end <= self.tokens]


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """The next tokens of some prompts, for one program; where there are fewer than M, the last have no row's number."""

    rows: Int32[np.ndarray, "M"]
    tokens: Int32[np.ndarray, "M T"]
    left: Int32[np.ndarray, "M"]
    is_last: Bool[np.ndarray, "M"]
    after: Int32[np.ndarray, "M"]  # tokens that a row must have seen, modulo `count_wrap`, or reads none; -1: any
    most: int  # tokens of all of them

    @classmethod
    def none(cls, shape: ReadShape, num_rows: int) -> "Read":
        """A program that reads nothing yet, beside `num_rows` rows."""
        rows, length, most = shape
        none, others = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
        which = np.arange(num_rows, num_rows + rows, dtype=np.int32)
        return cls(which, np.zeros((rows, length), np.int32), none, np.zeros(rows, bool), others, most)

    def sent(self) -> Int32[np.ndarray, "M _"]:
        """All of it in one array, for `SlotPrograms.read`."""
        return np.column_stack([self.rows, self.left, self.is_last.astype(np.int32), self.after, self.tokens])


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
        return tuple(_of_many(min(rows, together or 1), length) for length in lengths), len(lengths)
    short, few, many = min(_SHORT, chunk), min(rows, _FEW), max(_MANY, min(rows // 8, _MOST))
    shapes = {ReadShape(few, length, few * length) for length in (short, chunk)}
    if many <= rows:
        shapes.add(_of_many(many, short))
    elif rows > few:
        shapes.add(ReadShape(rows, short, rows * short))
    return tuple(sorted(shapes, key=lambda shape: shape.tokens)), 2


def _of_many(rows: int, length: int) -> ReadShape:
    return ReadShape(rows, length, max(length, int(rows * length * _FULL)))


def best_shape(shapes: Sequence[ReadShape], left: Sequence[int]) -> ReadShape:
    """The least program that reads all tokens that are left of some prompts, or else the one that reads most of them.

    Args:
      shapes: that there are, the least first.
      left: tokens of each prompt, in the order of their turns.
    """
    for shape in shapes:
        if shape.runs(left) == [*left]:
            return shape
    return max(shapes, key=lambda shape: sum(shape.runs(left)))


class Turns:
    """Remembers who was the last."""

    def __init__(self, shapes: Sequence[ReadShape], at_once: int, count_wrap: int):
        """`shapes` of programs that read, of which a launch has up to `at_once`; `count_wrap` of caches."""
        self._shapes, self._at_once, self._wrap = shapes, at_once, count_wrap
        self._many = max(shape.rows for shape in shapes) // 2
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
            number = len(shape.runs(left))
            those, waiting = waiting[:number], waiting[number:]
            read = Read.none(shape, len(slots))
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
    slots: Sequence[Slot | None], generating: Sequence[bool], runs: Sequence[Run], most_steps: int, at_once: int,
    before: Flight | None,
) -> tuple[int, Int32[np.ndarray, "B"]]:  # fmt: skip
    """How many steps the next launch makes, and from which each row takes part.

    Args:
      slots: who has the rows. Wishes to be saved are fulfilled with this.
      generating: which rows do, or may by then.
      runs: of prompts, before the steps.
      most_steps: of a launch.
      at_once: rows that take part in a step.
      before: what was asked for before.
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
    first = steps - most
    if np.count_nonzero(most) > at_once:
        _take_turns(slots, first, steps, at_once, drawing, before)
    return steps, first


def _take_turns(
    slots: Sequence[Slot | None], first: Int32[np.ndarray, "B"], steps: int, at_once: int, drawing: set[int],
    before: Flight | None,
) -> None:  # fmt: skip
    """Has no more than `at_once` rows take part in a step: those that did before, then others as they came.

    A row that comes to its length within the launch gives its turn to another, at that very step.

        turn 1   a a a a a a a a|b b b b b b b b        a ends at step 8 at the latest, b, which has been read, begins
        turn 2   c c c c c c c c c c c c c c c c

    Args:
      slots: who has the rows.
      first: number of the step from which each would take part; `steps`: none. Changed.
      steps: of the launch.
      at_once: turns that there are.
      drawing: requests that may draw a token before the steps.
      before: what was asked for before, which has yet to be looked at.
    """
    reads: set[int] = set()
    took_part: dict[int, int] = {}  # in how many steps, of those that did not have to read on
    if before is not None:
        reads = {id(run.slot) for run in before.runs if run.may_draw}
        for x, begin in zip(before.slots, before.first, strict=True):
            if x is not None and (not x.pending or id(x) in reads):
                took_part[id(x)] = before.steps - int(begin)
    those = [(not took_part.get(id(x)), x.number, i) for i, x in enumerate(slots) if x is not None and first[i] < steps]
    turns = [0] * at_once  # when each is free
    for _, number, i in sorted(those):
        slot = slots[i]
        assert slot is not None
        begin = first[i] = min(steps, max(int(first[i]), turns[0]))
        # Tokens that it may still draw in these steps: no more than that, so nobody else comes too early.
        left = slot.row.left - took_part.get(id(slot), 0) - (id(slot) in reads) - (number in drawing)
        if begin < steps:
            heapq.heapreplace(turns, steps if slot.row.left < 0 else min(steps, begin + max(0, left)))
