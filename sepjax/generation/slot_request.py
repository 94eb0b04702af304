"""Requests of slots, and what is known of one between two steps: the host's side of a row, and what is on its way."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future

import jax
import numpy as np

from sepjax.array_typing import Int32, UInt8
from sepjax.config import ConfigError, UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.lost import LOST
from sepjax.generation.packed import PackedState
from sepjax.generation.prompts import Prompt, encode_prompts
from sepjax.generation.row import Row, StreamEvent
from sepjax.generation.sampling import Sampling
from sepjax.generation.saved_row import SavedRow
from sepjax.generation.slot_rows import Record


class SlotError(UserError, LookupError):
    """A request that there is not, or whose row was not kept."""


@dataclasses.dataclass(frozen=True)
class SlotRequest:
    """One request for `Slots.submit`.

    Attributes:
      prompt: a text or token ids; None: continue where `resume` stopped, with its random numbers.
      seed: seed of sampling; None: 0, or the random numbers of `resume` continue.
      resume: a row to continue, of the same kind and size of cache, from `Slots.save` or `Stream.saved`.
      keep: whether the row can still be saved after it has ended.
      undrawn: with `keep`: save the row as it was before its last token was sampled, which can then be its prompt.

    The other attributes are as in `Generator.stream`.
    """

    prompt: Prompt | None
    max_new_tokens: int | None = None
    sampling: Sampling | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    stop_at_eos: bool = True
    control_tokens: bool = True
    max_repeats: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    min_new_tokens: int = 0
    resume: SavedRow | None = None
    keep: bool = False
    undrawn: bool = False

    def to_be_read(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens to prefill: those pending in the resumed row, its last token, and the prompt.

        Raises ConfigError if there are none, and PromptError.
        """
        resume, prompt = self.resume, self.prompt
        pending: list[int] = []
        if resume is not None:
            pending = [*resume.pending] + ([] if resume.last_token is None else [resume.last_token])
            if isinstance(prompt, str):  # no BOS in the middle of a text
                prompt = tokenizer.encode(prompt, control_tokens=self.control_tokens)
            if prompt is None and (resume.pending or resume.has_drawn):
                return [*resume.pending]  # a last token that was drawn is taken up by the next step
        if prompt is None:
            raise ConfigError("a request needs a prompt, or a row to go on with (resume)")
        return pending + encode_prompts(tokenizer, [prompt], control_tokens=self.control_tokens)[0]


@dataclasses.dataclass(eq=False)
class Slot:
    """A request that waits for a row, or has one."""

    number: int
    request: SlotRequest
    row: Row
    pending: list[int]  # to be read; empty: the row is generating
    told: UInt8[np.ndarray, "_"]  # `Arrival`
    steps_singly: bool  # whether a launch makes one token of it: it may end in a way that only the host finds
    wishes_to_be_saved: bool = False  # whether the next launch is to make one token of it
    has_drawn: bool = False
    is_cancelled: bool = False

    has_left: bool = False  # another one has its row: it ends with what the device was asked for before
    taken: PackedState | None = None  # a copy of its row, of one that `has_left`

    @property
    def is_to_end(self) -> bool:
        """Whether it has left its row and its last events are yet to come."""
        return self.has_left and self.row.finish_reason is None


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The next tokens of a prompt."""

    slot: Slot  # whose
    may_draw: bool  # whether they may be its last
    at: int  # its record's number in the flight
    row: int  # and its row there
    tokens: int  # how many of them; its row may stop before, to compact


@dataclasses.dataclass(frozen=True, eq=False)
class Flight:
    """What the device was asked for, on its way."""

    slots: tuple[Slot | None, ...]  # who had the rows
    steps: int  # of the rows that generate
    first: Int32[np.ndarray, "B"]  # number of the step from which each takes part
    runs: tuple[Run, ...]  # of prompts that are read before, one a row at most
    reads: Future[list[Record]]  # of the programs that read them
    record: Future[Record] | None  # of the steps, if there are any

    def run_of(self, slot: Slot | None) -> Run | None:
        """The run of a request; None: it is not read."""
        return next((run for run in self.runs if run.slot is slot), None)

    def without(self, slot: Slot) -> "Flight":
        """The same, and nobody looks at the run of this request."""
        return dataclasses.replace(self, runs=tuple(run for run in self.runs if run.slot is not slot))

    def steps_of(self, slot: Slot) -> int:
        """The most tokens that it makes of a request which has a row, beyond one that is drawn after its prompt."""
        return max(0, self.steps - int(self.first[self.slots.index(slot)]))

    def matters_to(self, slots: Sequence[Slot | None]) -> bool:
        """Whether anyone is there whom it was asked for."""
        return any(x is not None and (x is y or x.is_to_end) for x, y in zip(self.slots, slots, strict=True))


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A `Record` as Python's own numbers, which are many times faster to look at one by one than an array's."""

    token: list[list[int]]  # of each row, and of it in each step; -1: none. A run of a prompt is one step
    held: list[list[int]]
    is_stuck: list[list[int]]
    taken: list[list[int]]
    kept: list[list[int]]
    stuck_rows: frozenset[int]  # in any step
    drawn: int  # tokens, of all rows
    logprob: list[list[float]] | None  # None: nobody asks
    top: tuple[np.ndarray, np.ndarray] | None

    @classmethod
    def of(cls, record: Record, slots: Sequence[Slot | None]) -> "Numbers":
        """Waits for it. The most probable tokens are fetched where someone asks for them."""
        numbers = np.asarray(record.numbers)
        numbers = np.ascontiguousarray(numbers.reshape(-1, *numbers.shape[-2:]).transpose(1, 2, 0))
        token, held, _, stuck, taken, kept = (x.tolist() for x in numbers)
        rows = frozenset(np.flatnonzero((numbers[3] > 0).any(axis=-1)).tolist())  # -1: no such step was made
        known = [slot.row for slot in slots if slot is not None]
        logprob = numbers[2].view(np.float32).tolist() if any(row.wants_logprobs for row in known) else None
        top = None
        if any(row.wants_top for row in known):
            ids, values = jax.device_get((record.top_tokens, record.top_logprobs))
            top = tuple(x.reshape(-1, *x.shape[-2:]) for x in (ids, values))
        drawn = int((numbers[0] >= 0).sum())
        return cls(token, held, stuck, taken, kept, rows, drawn, logprob, top)

    def event(self, row: Row, i: int, step: int, nbytes: int) -> StreamEvent:
        """What row i, whose host's side is `row`, has drawn in a step; `nbytes` of its cache."""
        top = (self.top[0][step, i], self.top[1][step, i]) if row.wants_top and self.top is not None else ((), ())
        return row.take(
            self.token[i][step], taken=self.taken[i][step], held=self.held[i][step], nbytes=nbytes,
            logprob=0.0 if self.logprob is None else self.logprob[i][step], top=top, kept=self.kept[i][step],
            is_full=bool(self.is_stuck[i][step]),
        )  # fmt: skip

    def events(self, row: Row, i: int, nbytes: int, *, joined: bool) -> list[StreamEvent]:
        """Those of all steps, up to the row's end; `joined`: as one, if it may be."""
        tokens = self.token[i]
        if joined and row.joins and i not in self.stuck_rows and LOST not in tokens:
            first = next((step for step, token in enumerate(tokens) if token >= 0), len(tokens))
            found = row.up_to_end([token for token in tokens[first:] if token >= 0])
            if not found:
                return []
            last = first + len(found) - 1
            return [row.take_all(found, held=self.held[i][last], nbytes=nbytes, kept=self.kept[i][last])]
        events = []
        for step, token in enumerate(tokens):
            if token != -1:
                events.append(self.event(row, i, step, nbytes))
                if row.finish_reason is not None:
                    break
        return events
