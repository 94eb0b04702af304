"""Slots: requests that come and go over n rows of one compiled step, in constant memory.

    slots = engine.slots(8)
    first = slots.submit(SlotRequest("Once", max_new_tokens=100, seed=1))
    while not slots.is_idle:
        for number, event in slots.step():       # one token of every row that generates, runs of prompts
            ...                                  # event.text, event.finish_reason

A request takes the first free row. Its prompt is read in runs between the steps of the others, the rows that read
taking turns, so nobody waits longer than for one run; prompts may be longer than the cache. A row ends by a stop text,
an end token, its length or `cancel`, and is free at once. It gives what it would give alone, token for token: no result
of a row depends on the others, and every row has its own settings and draws (`slot_programs`).

While the host looks at what a step drew, the device makes the next one, so events are a step behind the device:

    device     step 1 | step 2 | step 3 | step 4
    host       ask 1, 2 | events of 1, ask 3 | events of 2, ask 4

Where a row ended with a step that the host had not seen yet (a stop text, repetition), the next one is thrown away; a
row that is saved is as it was before it. What runs on the device is asked for by a thread of its own: a program with
branches may hold up whoever starts it until the device has come to them.

`step`, `save` and `view` belong to one thread; `submit` and `cancel` may be called from others.
"""

import dataclasses
import itertools
import threading
import time
from collections import deque
from typing import Any

import jax
import numpy as np

from sepjax.clocks import Clocks
from sepjax.config import ConfigError
from sepjax.generation.cache.view import CacheView, of_row
from sepjax.generation.prepared import Prepared
from sepjax.generation.prompts import encode_prompts, row_keys
from sepjax.generation.readers import BoundedReader
from sepjax.generation.row import Row, RowSettings, StreamEvent
from sepjax.generation.sampling import Sampling
from sepjax.generation.saved_row import SavedRow
from sepjax.generation.slot_device import ENDS, Read, SlotDevice
from sepjax.generation.slot_programs import Rows, Wishes
from sepjax.generation.slot_request import Flight, Numbers, Run, Slot, SlotError, SlotRequest
from sepjax.separators import warn_of_few_in

_AT_A_TIME = 32  # rows
_MOST_COUNTED = 2**30  # new tokens that the device counts


class Slots:
    """Made by `Generator.slots`."""

    def __init__(self, prepared: Prepared, reader: BoundedReader, rows: int, clocks: Clocks | None = None):
        """Makes room for `rows` rows, and compiles all that will ever run."""
        if rows < 1:
            raise ConfigError(f"slots need 1 row or more, got {rows}")
        self._of, self._reader = prepared, reader
        self.clocks = clocks or Clocks()
        self._device = SlotDevice(prepared, reader, rows, self.clocks)
        self._runs, self._nothing, self._row_bytes = self._device.runs, self._device.nothing, self._device.row_bytes
        self._slots: list[Slot | None] = [None] * rows
        self._waiting: deque[Slot] = deque()
        self._known: dict[int, Slot] = {}  # that wait or have a row
        self._kept: dict[int, SavedRow] = {}
        self._numbers = itertools.count()
        self._turn = 0  # the row that read last
        self._coming: list[tuple[int, Rows]] = []  # rows that begin before the next step
        self._flight: Flight | None = None  # what was asked for and has not been looked at
        self._settled: list[tuple[int, StreamEvent]] = []  # events that the next step gives
        self._lock = threading.RLock()  # of what other threads change: who waits, who is known, what is kept

    # -- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: SlotRequest) -> int:
        """Takes a request on; returns its number, which its events bear. It waits until a row is free.

        Raises:
          ConfigError, PromptError, TypeError: what `Generator.stream` raises, from here.
          ConfigError: the row to go on with has ended, and there is no prompt; or its cache is full.
          StreamStateError: the row to go on with is of another kind of cache, or of one of other sizes.
        """
        tokenizer, resume = self._of.tokenizer, request.resume
        settings = RowSettings.create(
            tokenizer, stop=request.stop, stop_token_ids=request.stop_token_ids, stop_at_eos=request.stop_at_eos,
            max_new_tokens=request.max_new_tokens, max_repeats=request.max_repeats, logprobs=request.logprobs,
            top_logprobs=request.top_logprobs,
        )  # fmt: skip
        pending = self._pending(request)
        seen, continues = (0 if resume is None else resume.seen), True
        self._reader.check(seen, [pending], request.max_new_tokens)
        if request.prompt is not None:
            warn_of_few_in(pending, self._of.table, self._of.attention, "a prompt")
            continues = any(map(tokenizer.token_bytes, pending))
        absolute = self._reader.sizes.absolute
        if resume is not None:
            resume.check(self._reader)
            if resume.is_full:
                raise ConfigError("the row to go on with has a full cache (keep_all_separators); begin another one")
        row = Row(tokenizer, settings, continues=continues, seen=seen, has_end=absolute)
        if request.prompt is None and resume is not None:
            row.restore(resume.row)
            if row.finish_reason is not None:
                raise ConfigError(f"the row to go on with has ended ({row.finish_reason}); give it a prompt")
        key = row_keys(request.seed or 0, 1) if resume is None or request.seed is not None else None
        slot = Slot(next(self._numbers), request, row, pending, self._wishes(settings, request.sampling), key)
        slot.has_drawn = resume is not None and resume.has_drawn
        with self._lock:
            self._known[slot.number] = slot
            self._waiting.append(slot)
        return slot.number

    def _pending(self, request: SlotRequest) -> list[int]:
        """What the row has to read: what the resumed one had, its last token, and the prompt."""
        resume, prompt, tokenizer = request.resume, request.prompt, self._of.tokenizer
        pending: list[int] = []
        if resume is not None:
            pending = [*resume.pending] + ([] if resume.last_token is None else [resume.last_token])
            if isinstance(prompt, str):  # no BOS in the middle of a text
                prompt = tokenizer.encode(prompt, control_tokens=request.control_tokens)
            if prompt is None and (resume.pending or resume.has_drawn):
                return [*resume.pending]  # a last token that was drawn is taken up by the next step
        if prompt is None:
            raise ConfigError("a request needs a prompt, or a row to go on with (resume)")
        return pending + encode_prompts(tokenizer, [prompt], control_tokens=request.control_tokens)[0]

    def _wishes(self, settings: RowSettings, sampling: Sampling | None) -> Wishes:
        ends = np.full((1, ENDS), -1, np.int32)
        known = sorted(settings.ends.eos | settings.ends.stop)[:ENDS]
        ends[0, : len(known)] = known
        asks, new = (settings.logprobs, settings.top_logprobs), settings.max_new_tokens
        limit = -1 if new is None or new > _MOST_COUNTED else new  # the host counts, too
        numbers: Any = ends, np.full(1, limit, np.int32), *(np.array([x > 0]) for x in asks)
        sampling = Sampling.of_rows([sampling or Sampling.create()], 1).check(self._of.tokenizer.vocab_size)
        return jax.device_put(Wishes(sampling, *numbers))

    def cancel(self, number: int) -> None:
        """Ends a request: it has no more events, and its row is free at the next step. What was kept is dropped."""
        with self._lock:
            self._kept.pop(number, None)
            slot = self._known.get(number)
            if slot is not None:
                slot.is_cancelled = True

    def save(self, number: int) -> SavedRow:
        """Where a request stands that has a row, or had one to `keep` (once: it is forgotten then). Copies its cache.

        That is after its last event. Of a request whose prompt was just read it is after its first, which comes next.
        Raises SlotError for any other.
        """
        found = self._standing(number)
        if isinstance(found, SavedRow):
            del self._kept[number]
            return found
        return self._saved(*found)

    def view(self, number: int) -> CacheView:
        """What the cache of a request's row holds, and from where in the text, where `save` would take it.

        Raises SlotError as `save` does.
        """
        found = self._standing(number)
        if isinstance(found, SavedRow):
            return found.view(self._row_bytes)
        i, slot = found
        back = self._runs_ahead()
        cache = self._device.look(i, back).result()
        return of_row(cache, slot.row.seen, self._row_bytes)

    def _standing(self, number: int) -> SavedRow | tuple[int, Slot]:
        """What was kept of a request, or its row."""
        slot, flight = self._known.get(number), self._flight
        run = None if slot is None or flight is None else flight.run_of(slot)
        if flight is not None and run is not None:  # which cannot be taken back
            self._flight = dataclasses.replace(flight, runs=tuple(x for x in flight.runs if x is not run))
            self._settled += self._events_of_run(flight, run)
        kept = self._kept.get(number)  # at once: another thread may be cancelling it
        if kept is not None:
            return kept
        if slot is None or slot not in self._slots:
            raise SlotError(f"request {number} has no row: it waits, or has ended and was not to be kept (keep=True)")
        return self._slots.index(slot), slot

    def _saved(self, i: int, slot: Slot) -> SavedRow:
        with self.clocks("slots: save"):
            state = self._device.take(i, self._runs_ahead()).result()
        return SavedRow(state, tuple(slot.pending), slot.has_drawn, slot.row.state())

    def _runs_ahead(self) -> bool:
        """Whether a step was asked for whose events have not been given."""
        return self._flight is not None and self._flight.steps

    # -- the step ---------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[int, StreamEvent]]:
        """One token of every row that is generating, and runs of prompts of as many tokens as one run may have at most:
        one of a long prompt, or several of short ones. Returns their events.

        An event is the number of its request and what `Stream` gives. The last has a `finish_reason`: those of a
        stream, or "full" where the cache of `keep_all_separators` has no room for another separator.
        """
        clocks = self.clocks
        with clocks("slots: admit"):
            self._let_go()
            self._admit()
        with clocks("slots: ask"):
            if self._flight is not None and not self._flight.matters_to(self._slots):
                self._flight = None
            if self._flight is None:
                self._flight = self._ask()
            ahead = self._ask()
        flight, self._flight = self._flight, ahead
        settled, self._settled = self._settled, []
        return settled + ([] if flight is None else self._events_of(flight))

    def _let_go(self) -> None:
        """Frees the rows of requests that were cancelled."""
        for i, slot in enumerate(self._slots):
            if slot is not None and slot.is_cancelled:
                self._settled = [(number, event) for number, event in self._settled if number != slot.number]
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
            self._slots[i] = None
            self._known.pop(slot.number)

    def _admit(self) -> None:
        """Gives free rows to those that wait, in their order."""
        for i, slot in enumerate(self._slots):
            if slot is not None or not self._waiting:
                continue
            new = self._waiting.popleft()
            resume = new.request.resume
            state = self._nothing.state if resume is None else resume.state
            state = dataclasses.replace(state, done=np.array([bool(new.pending)]))
            if new.key is not None:
                state = dataclasses.replace(state, key=new.key, count=np.zeros(1, np.int32))
            self._coming.append((i, dataclasses.replace(self._nothing, state=state, wishes=new.wishes)))
            new.request = dataclasses.replace(new.request, resume=None)  # or its arrays would live as long as the row
            self._slots[i] = new

    def _ask(self) -> Flight | None:
        """Asks the device for the next step and the next runs of prompts; None: there is nothing to do."""
        reading, before = self._next_to_read(), self._flight
        just_read = [] if before is None else [id(run.slot) for run in before.runs if run.may_draw]
        steps = any(slot is not None and (not slot.pending or id(slot) in just_read) for slot in self._slots)
        if not steps and not reading:
            return None
        slots, runs = tuple(self._slots), []
        reads: list[Read] = []
        for i in reading:
            slot = slots[i]
            assert slot is not None
            read = slot.next_run(self._runs)
            reads.append((np.array(i, np.int32), *read))
            runs.append(Run(slot, bool(read[-1]), len(reads)))
        ended = np.array([slot is None for slot in slots]) if steps else None
        coming, self._coming = self._coming, []
        return Flight(slots, steps, tuple(runs), self._device.launch(coming, ended, reads))

    def _next_to_read(self) -> list[int]:
        """Rows that read take turns: as many in a step as have room in the longest run, so nobody waits longer for many
        short prompts than for a long one. How far a row has come is known once its last run was looked at.
        """
        n, flight, found, room = len(self._slots), self._flight, [], self._runs[-1]
        for i in range(self._turn + 1, self._turn + 1 + n):
            slot = self._slots[i % n]
            if slot is None or not slot.pending or (flight is not None and flight.run_of(slot) is not None):
                continue
            room -= slot.run_length(self._runs)
            if room < 0:
                break
            found.append(i % n)
        self._turn = found[-1] if found else self._turn
        return found

    def _events_of(self, flight: "Flight") -> list[tuple[int, StreamEvent]]:
        """Waits for what was asked for. What comes of rows that have ended since is nobody's."""
        events, numbers = [], None
        with self.clocks("slots: wait for the device"):
            steps = flight.records.result()[0]
            if steps is not None:
                numbers = Numbers.of(steps, flight.slots)
        with self.clocks("slots: look at tokens (with saving)"):
            for i, slot in enumerate(flight.slots if numbers is not None else ()):
                if not i % _AT_A_TIME:
                    time.sleep(0)  # Python would let the other thread wait for milliseconds, and the device for it
                if slot is not None and numbers is not None and numbers.token[i] >= 0 and self._slots[i] is slot:
                    events.append(self._event(i, slot, numbers, i))
            return events + [event for run in flight.runs for event in self._events_of_run(flight, run)]

    def _events_of_run(self, flight: Flight, run: Run) -> list[tuple[int, StreamEvent]]:
        slot = run.slot
        if slot not in self._slots:
            return []
        i, numbers = self._slots.index(slot), Numbers.of(flight.records.result()[run.at], [slot])
        taken = numbers.taken[0]
        del slot.pending[:taken]
        if not slot.pending:
            return [self._event(i, slot, numbers, 0)]
        if numbers.is_stuck[0]:  # the rest would push separators out
            event = slot.row.end_full(taken=taken, held=numbers.held[0], nbytes=self._row_bytes)
            self._free(i, slot)
            return [(slot.number, event)]
        slot.row.seen += taken
        return []

    def _event(self, i: int, slot: Slot, numbers: Numbers, at: int) -> tuple[int, StreamEvent]:
        slot.has_drawn = True
        top = numbers.top_of(at) if slot.row.wants_top else ((), ())
        event = slot.row.take(
            numbers.token[at], taken=numbers.taken[at], held=numbers.held[at], nbytes=self._row_bytes,
            logprob=numbers.logprob[at], top=top, is_full=bool(numbers.is_stuck[at]),
        )  # fmt: skip
        if event.finish_reason is not None:
            self._free(i, slot)
        return slot.number, event

    def alone(self) -> dict[str, float]:
        """Milliseconds of what the device is asked for, each by itself, while no request is there.

        Raises SlotError where one is.
        """
        if any(self._slots):
            raise SlotError("what the device does is timed alone, and there are requests")
        return self._device.alone()

    # -- how full it is ---------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: no request waits, has a row, or has events to come."""
        return not self._known and not self._settled

    @property
    def num_free(self) -> int:
        """Rows that no request has."""
        return sum(slot is None for slot in self._slots)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def cache_size(self) -> int:
        """The most entries that a row's cache may hold."""
        return self._reader.sizes.cache_size

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of all rows, whatever they hold."""
        return self._row_bytes * len(self._slots)
