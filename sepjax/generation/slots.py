"""Slots: requests that come and go over n rows of one compiled step, in constant memory.

    slots = engine.slots(8)
    first = slots.submit(SlotRequest("Once", max_new_tokens=100, seed=1))
    while not slots.is_idle:
        for number, event in slots.step():       # one token of every row that is generating, one run of one prompt
            ...                                  # event.text, event.finish_reason

A request takes the first free row. Its prompt is read in runs between the steps of the others, the rows that read
taking turns, so nobody waits longer than for one run; prompts may be longer than the cache. A row ends by a stop text,
an end token, its length or `cancel`, and is free at once. It gives what it would give alone, token for token: no result
of a row depends on the others, and every row has its own settings and draws (`slot_programs`).

`step` belongs to one thread; `submit` and `cancel` may be called from others.
"""

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.config import ConfigError, UserError
from sepjax.generation.cache.view import CacheView, of_row
from sepjax.generation.prepared import Prepared
from sepjax.generation.prompts import Prompt, encode_prompts, row_keys
from sepjax.generation.readers import BoundedReader
from sepjax.generation.row import Row, RowSettings, StreamEvent
from sepjax.generation.sampling import Sampling
from sepjax.generation.saved_row import SavedRow
from sepjax.generation.slot_programs import Rows, SlotPrograms, Wishes, slot_programs
from sepjax.separators import warn_of_few_in

_ENDS = 16  # end tokens that the device knows of; the host knows all
_SHORT = 64  # tokens of the shorter of two programs that read


class SlotError(UserError, LookupError):
    """A request that there is not, or whose row was not kept."""


@dataclasses.dataclass(frozen=True)
class SlotRequest:
    """What is asked for. See `Generator.stream` for what is not explained here."""

    prompt: Prompt | None  # None: go on where `resume` stopped, with its draws
    max_new_tokens: int | None = None
    sampling: Sampling | None = None
    seed: int | None = None  # None: 0, or the draws of `resume` go on
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    stop_at_eos: bool = True
    control_tokens: bool = True
    max_repeats: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    resume: SavedRow | None = None  # a row of these settings' cache, from `Slots.save` or `Stream.saved`
    keep: bool = False  # whether the row can still be saved once it has ended


@dataclasses.dataclass(eq=False)
class _Slot:
    """A request that waits for a row, or has one."""

    number: int
    request: SlotRequest
    row: Row
    pending: list[int]  # to be read; empty: the row is generating
    wishes: Wishes
    key: jax.Array | None  # None: those of `resume`
    has_drawn: bool = False
    is_cancelled: bool = False


class Slots:
    """Made by `Generator.slots`."""

    def __init__(self, prepared: Prepared, reader: BoundedReader, rows: int):
        """Makes room for `rows` rows, and compiles all that will ever run."""
        if rows < 1:
            raise ConfigError(f"slots need 1 row or more, got {rows}")
        self._of, self._reader = prepared, reader
        self._programs: SlotPrograms = slot_programs(prepared.graph, prepared.attention)
        self._runs = sorted({min(_SHORT, reader.sizes.chunk), reader.sizes.chunk})
        self._rows = self._empty(rows)
        self._nothing = self._empty(1)
        self._slots: list[_Slot | None] = [None] * rows
        self._waiting: deque[_Slot] = deque()
        self._known: dict[int, _Slot] = {}  # that wait or have a row
        self._kept: dict[int, SavedRow] = {}
        self._numbers = itertools.count()
        self._turn = 0  # the row that read last
        self._lock = threading.RLock()  # of what other threads change: who waits, who is known, what is kept
        self._warm_up()

    def _empty(self, rows: int) -> Rows:
        state = self._reader.empty(row_keys(0, rows))
        cache: Any = state.cache
        sampling = Sampling.of_rows([Sampling.create()] * rows, rows)
        none, asks = jnp.full((rows, _ENDS), -1, jnp.int32), (jnp.zeros(rows, bool) for _ in range(2))
        wishes = Wishes(jax.device_put(sampling), none, jnp.full(rows, -1, jnp.int32), *asks)
        done = jnp.ones(rows, bool)
        return self._of.placed(Rows(cache, state.token, state.count, done, state.key, state.uses, wishes))

    def _warm_up(self) -> None:
        """Runs every program on rows that nobody has: what is compiled later would be somebody's wait."""
        of, first = self._of, np.zeros((), np.int32)
        self._rows = self._programs.place(self._rows, first, self._nothing)
        for length in self._runs:
            args = first, np.zeros((1, length), np.int32), np.zeros(1, np.int32), np.zeros((), bool)
            self._rows, read = self._programs.read(of.params, self._rows, *args, of.table_on_device)
        ended = np.ones(len(self._slots), bool)
        self._rows, _ = self._programs.step(of.params, self._rows, ended, of.table_on_device)
        jax.block_until_ready((self._programs.take(self._rows, first), self._programs.look(self._rows, first), read))

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
        slot = _Slot(next(self._numbers), request, row, pending, self._wishes(settings, request.sampling), key)
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
        ends = np.full((1, _ENDS), -1, np.int32)
        known = sorted(settings.ends.eos | settings.ends.stop)[:_ENDS]
        ends[0, : len(known)] = known
        # How long a row may get the host knows: a row that goes on somewhere else has drawn before.
        numbers: Any = (
            ends,
            np.full(1, -1, np.int32),
            *(np.array([x > 0]) for x in (settings.logprobs, settings.top_logprobs)),
        )
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

        Raises SlotError for any other.
        """
        kept = self._kept.pop(number, None)  # at once: another thread may be cancelling it
        if kept is not None:
            return kept
        slot = self._known.get(number)
        if slot is None or slot not in self._slots:
            raise SlotError(f"request {number} has no row: it waits, or has ended and was not to be kept (keep=True)")
        return self._saved(self._slots.index(slot), slot)

    def view(self, number: int) -> CacheView:
        """What the cache of a request's row holds, and from where in the text. By the thread that steps.

        Raises SlotError where it has no row.
        """
        kept, slot = self._kept.get(number), self._known.get(number)
        if kept is not None:
            return kept.view(self._row_bytes)
        if slot is None or slot not in self._slots:
            raise SlotError(f"request {number} has no row: it waits, or has ended and was not to be kept (keep=True)")
        return of_row(self._programs.look(self._rows, _number(self._slots.index(slot))), slot.row.seen, self._row_bytes)

    def _saved(self, i: int, slot: _Slot) -> SavedRow:
        row = self._programs.take(self._rows, _number(i))
        return SavedRow(row.state, tuple(slot.pending), slot.has_drawn, slot.row.state())

    # -- the step ---------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[int, StreamEvent]]:
        """One token of every row that is generating, and one run of one row's prompt; returns their events.

        An event is the number of its request and what `Stream` gives. The last has a `finish_reason`: those of a
        stream, or "full" where the cache of `keep_all_separators` has no room for another separator.
        """
        self._let_go()
        self._admit()
        generating = [i for i, slot in enumerate(self._slots) if slot is not None and not slot.pending]
        reading = self._next_to_read()
        steps: Any = None
        of = self._of
        if generating:
            ended = np.array([slot is None for slot in self._slots])
            self._rows, steps = self._programs.step(of.params, self._rows, ended, of.table_on_device)
        read: Any = None
        if reading is not None:
            tokens, left, is_last = self._next_run(reading)
            args = _number(reading), tokens, left, is_last
            self._rows, read = self._programs.read(of.params, self._rows, *args, of.table_on_device)
        steps, read = jax.device_get((steps, read))
        events = []
        for i in generating:
            top = steps.top_tokens[i, 0], steps.top_logprobs[i, 0]
            events.append(
                self._event(i, 1, steps.token[i, 0], steps.held[i, 0], steps.logprob[i, 0], top, steps.is_stuck[i])
            )
        if reading is not None:
            events += self._after_read(reading, read)
        return events

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

    def _free(self, i: int, slot: _Slot) -> None:
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
            row = dataclasses.replace(self._nothing, wishes=new.wishes)
            if new.request.resume is not None:
                row = row.at(new.request.resume.state)
            row = dataclasses.replace(row, done=np.array([bool(new.pending)]))
            if new.key is not None:
                row = dataclasses.replace(row, key=new.key, count=np.zeros(1, np.int32))
            self._rows = self._programs.place(self._rows, _number(i), self._of.placed(row))
            new.request = dataclasses.replace(new.request, resume=None)  # or its arrays would live as long as the row
            self._slots[i] = new

    def _next_to_read(self) -> int | None:
        """Rows that read take turns."""
        n = len(self._slots)
        order = (i % n for i in range(self._turn + 1, self._turn + 1 + n))
        found = next((i for i in order if (slot := self._slots[i]) is not None and slot.pending), None)
        self._turn = self._turn if found is None else found
        return found

    def _next_run(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        slot = self._slots[i]
        assert slot is not None
        length = next((length for length in self._runs if length >= len(slot.pending)), self._runs[-1])
        part = slot.pending[:length]
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(part)] = part
        return tokens, np.array([len(part)], np.int32), np.array(len(part) == len(slot.pending))

    def _after_read(self, i: int, read: Any) -> list[tuple[int, StreamEvent]]:
        slot = self._slots[i]
        assert slot is not None
        taken = int(read.taken)
        del slot.pending[:taken]
        if slot.pending and read.is_stuck:  # the rest would push separators out
            event = slot.row.end_full(taken=taken, held=int(read.held), nbytes=self._row_bytes)
            self._free(i, slot)
            return [(slot.number, event)]
        if slot.pending:
            slot.row.seen += taken
            return []
        top = read.drawn.top_tokens[0], read.drawn.top_logprobs[0]
        return [self._event(i, taken, read.token, read.held, read.drawn.logprob[0], top, read.is_stuck)]

    def _event(
        self, i: int, taken: int, token: Any, held: Any, logprob: Any, top: Any, is_stuck: Any
    ) -> tuple[int, StreamEvent]:
        slot = self._slots[i]
        assert slot is not None
        slot.has_drawn = True
        event = slot.row.take(
            int(token), taken=taken, held=int(held), nbytes=self._row_bytes, logprob=float(logprob),
            top=top, is_full=bool(is_stuck),
        )  # fmt: skip
        if event.finish_reason is not None:
            self._free(i, slot)
        return slot.number, event

    @property
    def _row_bytes(self) -> int:
        return self.cache_bytes // len(self._slots)

    # -- how full it is ---------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: no request waits or has a row."""
        return not self._known

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
        return self._rows.cache.nbytes


def _number(i: int) -> np.ndarray:
    return np.array(i, np.int32)
