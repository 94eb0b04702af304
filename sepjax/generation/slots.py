"""Slots: requests that come and go over n rows of one compiled step, in constant memory.

    slots = engine.slots(8)
    first = slots.submit(SlotRequest("Once", max_new_tokens=100, seed=1))
    while not slots.is_idle:
        for number, event in slots.step():       # runs of prompts, and a token of every row that generates
            ...                                  # event.text, event.finish_reason

A request takes the first free row. Its prompt is read in runs between the steps of the others, the rows that read
taking turns, so nobody waits longer than for one run. A row ends by a stop text, an end token, its length or `cancel`.
It gives what it would give alone, token for token, with its own settings and draws (`slot_programs`). With rows `ahead`
there are more than take part in a step: while those generate, others are read, and each begins where one ends.

While the host looks at what one launch drew, the device works on the next, so events are one behind the device:

    device     launch 1 | launch 2 | launch 3 | launch 4
    host       ask 1, 2 | events of 1, ask 3 | events of 2, ask 4

Where a row ended in a way that only the host finds (a stop text, repetition), the next launch is thrown away; a row
that is saved is as it was before it. `steps`: a launch may make several tokens of every row, since the device waits for
its host between two. Ends that the device knows (end tokens, lengths) end a row at their token. Of a row whose end it
may not know, and which is to be saved, a launch makes one token, drawn after its prompt or in the last step: it can be
taken back.

What runs on the device is asked for by a thread of its own: a program with branches may hold up whoever starts it until
the device has come to them.

`submit` and `cancel` may be called from any thread; all else belongs to one.
"""

import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

from sepjax import interrupt
from sepjax.clocks import Clocks
from sepjax.config import whole_number
from sepjax.generation.cache.view import CacheView, of_row
from sepjax.generation.packed import PackedState
from sepjax.generation.prepared import Prepared
from sepjax.generation.readers import BoundedReader
from sepjax.generation.row import StreamEvent
from sepjax.generation.saved_row import SavedRow
from sepjax.generation.slot_begin import slot_of
from sepjax.generation.slot_device import Coming, SlotDevice
from sepjax.generation.slot_pace import Pace
from sepjax.generation.slot_request import Flight, Numbers, Run, Slot, SlotError, SlotRequest
from sepjax.generation.slot_turns import Turns, ending, steps_of
from sepjax.promotion import as_usual, methods_as_usual

_AT_A_TIME = 128  # rows


@methods_as_usual("__init__", "submit", "save", "view", "alone")
class Slots:
    """Continuous batching: requests that come and go over a fixed number of rows. Made by `Generator.slots`."""

    def __init__(
        self, prepared: Prepared, reader: BoundedReader, rows: int, steps: int = 1, clocks: Clocks | None = None,
        *, together: int = 0, pool: int = 0, ahead: int = 0,
    ):  # fmt: skip
        """Allocates the caches and compiles every program that will run.

        Args:
          prepared: the model.
          reader: of its bounded caches.
          rows: rows of a decode step.
          steps: decode steps per launch.
          clocks: where to count the time of each phase.
          together: rows whose prompts one program prefills; 0: a number that suits the device.
          pool: finished rows that may stay on the device while the result of their `save` is referenced.
          ahead: additional rows, prefilled while `rows` others generate.
        """
        rows, steps = whole_number("rows", rows, 1), whole_number("steps", steps, 1)
        together, pool, ahead = (whole_number(*x) for x in (("together", together), ("pool", pool), ("ahead", ahead)))
        self._of, self._reader, self._at_once = prepared, reader, rows
        rows += ahead
        self.clocks, self.pace = clocks or Clocks(), Pace()
        self._device = SlotDevice(prepared, reader, rows, steps, self.clocks, together, pool)
        self._row_bytes = self._device.row_bytes
        self._slots: list[Slot | None] = [None] * rows
        self._waiting: deque[Slot] = deque()
        self._known: dict[int, Slot] = {}  # that wait or have a row
        self._kept: dict[int, SavedRow] = {}
        self._numbers = itertools.count()
        self._turns = Turns(self._device.shapes, self._device.reads_at_once, reader.sizes.main.count_wrap)
        self._coming: list[Coming] = []  # rows that begin with the next launch
        self._flight: Flight | None = None  # what was asked for and has not been looked at
        self._settled: list[tuple[int, StreamEvent]] = []  # events that the next step gives
        self._is_stepping = False
        self._cancelled: set[int] = set()  # whose events the next step leaves out
        self._lock = threading.RLock()  # of what other threads change: who waits, who is known, what is kept

    def __repr__(self) -> str:
        return f"Slots({len(self._slots)} rows, {self.num_free} free, {self.num_waiting} requests wait)"

    # -- requests ---------------------------------------------------------------------------------------------------
    def submit(self, request: SlotRequest) -> int:
        """Queues a request until a row is free; returns its number, by which its events are known.

        Raises:
          ConfigError, PromptError, TypeError: what `Generator.stream` raises, from here.
          ConfigError: the row to go on with has ended, and there is no prompt; or its cache is full.
          StreamStateError: the row to go on with is of another kind of cache, or of one of other sizes.
        """
        slot = slot_of(self._of, self._reader, self._device.arrivals, request, next(self._numbers))
        with interrupt.Deferred(), self._lock:
            self._known[slot.number] = slot
            self._waiting.append(slot)
        return slot.number

    def cancel(self, number: int) -> None:
        """Ends a request: no more events, and its row is free at the next step. Kept state is dropped."""
        with self._lock:
            self._kept.pop(number, None)
            self._cancelled.add(number)  # it may have ended, and have events that are settled
            slot = self._known.get(number)
            if slot is not None:
                slot.is_cancelled = True

    def save(self, number: int) -> SavedRow:
        """The state of a running request, or of one that ended with `keep` (once, then dropped). Copies the cache.

        The state is that after its last event. If its prompt was just read, or several tokens are in flight
        (`can_save`), it is the state after those, and their events come with the next step unless it is cancelled.
        Raises SlotError for any other request.
        """
        with interrupt.Deferred():
            found = self._standing(number)
            if not isinstance(found, SavedRow):
                return self._saved(*found)
        self._kept.pop(number, None)  # another thread may have cancelled it
        return found

    def view(self, number: int) -> CacheView:
        """The entries of a request's cache, with their positions in the text, in the state that `save` would give.

        Raises SlotError as `save` does.
        """
        with interrupt.Deferred():
            found = self._standing(number)
        if isinstance(found, SavedRow):
            return found.view(self._row_bytes)
        i, slot = found
        return of_row(self._device.look(i, back=self._runs_ahead()), slot.row.seen, self._row_bytes)

    def can_save(self, number: int) -> bool:
        """Whether `save` would give the state after the row's last event; if not, it can after the row's next events.

        The next launch then generates one token for this row; later ones as many as usual, unless asked again.
        """
        slot, flight = self._known.get(number), self._flight
        if slot is not None:
            slot.wishes_to_be_saved = True
        if flight is None or slot is None or slot not in flight.slots:
            return True
        return flight.steps_of(slot) <= 1 and flight.run_of(slot) is None

    def _standing(self, number: int) -> SavedRow | tuple[int, Slot]:
        """What was kept of a request, or its row."""
        slot, flight = self._known.get(number), self._flight
        if flight is not None and slot is not None and slot in flight.slots:
            run = flight.run_of(slot)
            if flight.steps_of(slot) > 1:  # which cannot be taken back
                self._flight = None
                self._settled += self._events_of(flight)
            elif run is not None:  # likewise
                self._flight = flight.without(slot)
                self._settled += self._events_of_run(run, Numbers.of(flight.reads.result()[run.at], [slot]))
        kept = self._kept.get(number)  # at once: another thread may be cancelling it
        if kept is not None:
            return kept
        if slot is None or slot not in self._slots:
            raise SlotError(f"request {number} has no row: it waits, or has ended and was not to be kept (keep=True)")
        return self._slots.index(slot), slot

    def _saved(self, i: int, slot: Slot) -> SavedRow:
        has_ended, taken = slot.row.finish_reason is not None, slot.taken
        undrawn = slot.request.undrawn and has_ended
        if taken is None:
            taken = self._taken(i, back=self._runs_ahead(), undrawn=undrawn, has_ended=has_ended)
        return SavedRow(taken, tuple(slot.pending), slot.has_drawn and not undrawn, slot.row.state())

    def _taken(self, i: int, *, back: bool, undrawn: bool, has_ended: bool) -> PackedState:
        """A copy of row i: in the pool, if it has ended and there is room."""
        taken = self._device.leave(i, back=back, undrawn=undrawn) if has_ended else None
        return self._device.take(i, back=back, undrawn=undrawn) if taken is None else taken

    def _runs_ahead(self) -> bool:
        """Whether a step was asked for whose events have not been given."""
        return self._flight is not None and self._flight.steps > 0

    # -- the step ---------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[int, StreamEvent]]:
        """Runs of prompts, and a token of every row that is generating, or several (`steps`). Returns their events.

        An event is the number of its request and what `Stream` gives. The last has a `finish_reason`: those of a
        stream, "full" where the cache of `keep_all_separators` has no room, or "error" (`lost.WORDS`). After Ctrl-C the
        next call has the events of this one too. Raises SlotError where a step has not ended (`interrupt.check`).
        """
        interrupt.check("these slots", self._is_stepping, SlotError)
        with interrupt.Deferred(), as_usual():
            self._is_stepping = True
            self._settled = [event for part in self.parts(joined=False) for event in part]
            self._is_stepping = False
        events, self._settled = self._settled, []  # without a call in between, nothing interrupts
        return events

    def parts(self, *, joined: bool) -> Iterator[list[tuple[int, StreamEvent]]]:
        """The events of `step` in the order in which the device has them: of prompts, then of the steps behind them.

        Take all of them before anything else is asked for but `save` of a request that has ended, `submit` and
        `cancel`. `joined`: what a launch drew for one row comes as one event, where nobody wants more of each token
        (`Row.joins`).
        """
        clocks = self.clocks
        with clocks("slots: admit"):
            self._let_go()
            self._admit()
        with clocks("slots: ask"):
            if self._flight is not None and not self._flight.matters_to(self._slots):
                self._flight = None
            if self._flight is None:
                self.pace.begins()
                self._flight = self._ask()
            ahead = self._ask()
        flight, self._flight = self._flight, ahead
        settled, self._settled = self._settled, []
        if settled or flight is None or flight.runs:
            yield self._wanted(settled + ([] if flight is None else self._events_of_runs(flight)))
        if flight is not None:
            yield self._wanted(self._events_of_steps(flight, joined=joined))

    def _wanted(self, events: list[tuple[int, StreamEvent]]) -> list[tuple[int, StreamEvent]]:
        """Without those of requests that were cancelled."""
        with self._lock:  # of those that have rows still, more may be settled
            cancelled, self._cancelled = self._cancelled, self._cancelled & self._known.keys()
        return [(number, event) for number, event in events if number not in cancelled]

    def _let_go(self) -> None:
        """Frees the rows of requests that were cancelled."""
        for i, slot in enumerate(self._slots):
            if slot is not None and slot.is_cancelled:
                self._free(i, slot)
        with self._lock:
            for slot in list(self._waiting):
                if slot.is_cancelled:
                    self._waiting.remove(slot)
                    self._known.pop(slot.number)

    def _free(self, i: int, slot: Slot) -> None:
        """Whoever cancels it meanwhile waits, and finds what was kept: nothing stays that nobody can ask for."""
        with self._lock:
            if slot.request.keep and not slot.is_cancelled:
                self._kept[slot.number] = self._saved(i, slot)
            if self._slots[i] is slot:
                self._slots[i] = None
            self._known.pop(slot.number)

    def _admit(self) -> None:
        """Gives free rows to those that wait, in their order; then those that are free when this launch is made."""
        for i in [*(i for i, slot in enumerate(self._slots) if slot is None), *ending(self._slots, self._flight)]:
            if not self._waiting:
                return
            slot = self._slots[i]
            if slot is not None:
                slot.has_left = True
                if slot.request.keep:
                    slot.taken = self._taken(i, back=False, undrawn=slot.request.undrawn, has_ended=True)
            new = self._waiting.popleft()
            resume = new.request.resume
            saved = None if resume is None else resume.packed(self._reader.form)
            self._coming.append((i, new.told, saved))
            new.request = dataclasses.replace(new.request, resume=None)  # or its arrays would live as long as the row
            self._slots[i] = new

    def _ask(self) -> Flight | None:
        """Asks the device for the next runs of prompts and the next steps; None: there is nothing to do."""
        before = self._flight
        reads, runs = self._turns.next(self._slots, before)
        may_draw = [*runs, *(() if before is None else before.runs)]
        drawing = {id(run.slot) for run in may_draw if run.may_draw}
        generating = [x is not None and (not x.pending or id(x) in drawing) for x in self._slots]
        steps, first = steps_of(self._slots, generating, runs, self._device.most_steps, self._at_once, before)
        if not steps and not reads:
            return None
        self.pace.asked(steps, sum(1 for x in self._slots if x is not None and x.pending))
        ended = np.array([slot is None for slot in self._slots]) if steps else None
        coming, self._coming = self._coming, []
        launched = self._device.launch(coming, reads, ended, first, steps)
        return Flight(tuple(self._slots), steps, first, tuple(runs), *launched)

    def _events_of(self, flight: Flight) -> list[tuple[int, StreamEvent]]:
        """Waits for what was asked for. What comes of rows that have ended since is nobody's."""
        return [*self._events_of_runs(flight), *self._events_of_steps(flight, joined=False)]

    def _events_of_runs(self, flight: Flight) -> list[tuple[int, StreamEvent]]:
        """Those of the prompts that were read, which are there before the steps are made."""
        with self.clocks("slots: wait for prompts"):
            records = flight.reads.result()
            jax.block_until_ready([record.numbers for record in records])
            self.pace.read()
        with self.clocks("slots: look at first tokens"):
            numbers = [
                Numbers.of(record, [run.slot for run in flight.runs if run.at == at])
                for at, record in enumerate(records)
            ]
            return [event for run in flight.runs for event in self._events_of_run(run, numbers[run.at])]

    def _events_of_steps(self, flight: Flight, *, joined: bool) -> list[tuple[int, StreamEvent]]:
        """A row's one after another, or `joined`."""
        if flight.record is None:
            return []
        with self.clocks("slots: wait for the device"):
            record = flight.record.result()
            jax.block_until_ready(record.numbers)
        events = []
        with self.clocks("slots: look at tokens"):
            numbers = Numbers.of(record, flight.slots)
            self.pace.stepped(numbers.drawn)
            for i, slot in enumerate(flight.slots):
                if not i % _AT_A_TIME:
                    time.sleep(0)  # Python would let the other thread wait for milliseconds, and the device for it
                if slot is not None and (self._slots[i] is slot or slot.is_to_end):
                    found = numbers.events(slot.row, i, self._row_bytes, joined=joined)
                    events += self._given(i, slot, found)
        return events

    def _events_of_run(self, run: Run, numbers: Numbers) -> list[tuple[int, StreamEvent]]:
        slot, j = run.slot, run.row
        if slot not in self._slots:
            return []
        i, taken = self._slots.index(slot), numbers.taken[j][0]
        del slot.pending[:taken]
        if taken < run.tokens and self._flight is not None:  # what was asked for behind it reads nothing
            self._flight = self._flight.without(slot)
        if not slot.pending:
            return self._given(i, slot, [numbers.event(slot.row, j, 0, self._row_bytes)])
        if numbers.is_stuck[j][0]:  # the rest would push separators out
            return self._given(i, slot, [slot.row.end_without(
                "full", taken=taken, held=numbers.held[j][0], nbytes=self._row_bytes, kept=numbers.kept[j][0]
            )])  # fmt: skip
        slot.row.seen += taken
        return []

    def _given(self, i: int, slot: Slot, events: list[StreamEvent]) -> list[tuple[int, StreamEvent]]:
        """Events of row i with the number of its request; frees the row after its last."""
        slot.has_drawn = slot.has_drawn or any(event.token_ids for event in events)
        if slot.row.finish_reason is not None:
            self._free(i, slot)
        return [(slot.number, event) for event in events]

    def alone(self) -> dict[str, tuple[float, float]]:
        """Milliseconds of what the device is asked for, each by itself, while no request is there (`SlotDevice.alone`).

        Raises SlotError where one is.
        """
        if any(self._slots):
            raise SlotError("what the device does is timed alone, and there are requests")
        return self._device.alone(self._at_once)

    # -- how full it is ---------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: no request waits, runs, or has events to come."""
        return not self._known and not self._settled

    @property
    def num_free(self) -> int:
        """Free rows."""
        return sum(slot is None for slot in self._slots)

    @property
    def num_ending(self) -> int:
        """Rows that will be free, whatever they draw, when what is asked for next is done."""
        return len(ending(self._slots, self._flight))

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def cache_size(self) -> int:
        """Maximum entries of a row's cache."""
        return self._reader.sizes.cache_size

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of all rows, full or not."""
        return self._row_bytes * len(self._slots)
