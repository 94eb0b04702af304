"""What goes between the HTTP side and the worker: jobs one way, items the other; and the queue of those that wait."""

import asyncio
import dataclasses
from collections import OrderedDict, deque
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sepjax.array_typing import Int32
from sepjax.generation import lost
from sepjax.generation.row import CacheUse, StreamEvent
from sepjax.generation.saved_row import SavedRow
from sepjax.generation.slots import SlotRequest
from sepjax.serve.conversations import Entry, Plan
from sepjax.serve.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Begun:
    """A choice has a row now."""

    cached: int  # tokens of its prompt that were not read again


@dataclasses.dataclass(frozen=True)
class Failed:
    """A choice will not be answered."""

    error: ApiError


@dataclasses.dataclass(frozen=True)
class Paused:
    """The row of a choice was put aside until its client has read all that came before this."""


Item = Begun | StreamEvent | Paused | Failed


def failed_or(event: StreamEvent) -> StreamEvent | Failed:
    """The last event of a choice, or the error that it tells."""
    if event.finish_reason != "error":
        return event
    return Failed(ApiError(500, f"after {event.cache.seen} tokens {lost.WORDS}", code="not_numbers"))


@runtime_checkable
class Loop(Protocol):
    """Of it, what the worker needs of an event loop."""

    def call_soon_threadsafe(self, callback: Any, *args: Any) -> Any:
        """Has it call."""
        ...


class Inbox:
    """What comes back for one HTTP request. All but `sent` belongs to the event loop.

    Attributes:
      choices: how many answers come through it.
      taken: tokens that the client's side has taken out.
      sent: tokens that the worker has handed over; the worker's alone.
    """

    def __init__(self, loop: Loop, choices: int = 1):
        self.loop, self.choices, self.taken, self.sent = loop, choices, 0, 0
        self._items: list[tuple[int, Item]] = []
        self._filled = asyncio.Event()

    @property
    def unread(self) -> int:
        """Tokens of each choice that were handed over and lie there; what the worker still holds nobody could read."""
        return (self.sent - self.taken) // self.choices

    def put(self, items: list[tuple[int, Item]]) -> None:
        """Called by the loop."""
        self._items += items
        self._filled.set()

    async def take(self) -> list[tuple[int, Item]]:
        """(choice, item) of all that has come, one at least."""
        await self._filled.wait()
        self._filled.clear()
        found, self._items = self._items, []
        self.taken += tokens_of(found)
        return found


def tokens_of(items: list[tuple[int, Item]]) -> int:
    """Tokens of all choices."""
    return sum(len(item.token_ids) for _, item in items if isinstance(item, StreamEvent))


def put_all(found: list[tuple[Inbox, list[tuple[int, Item]]]]) -> None:
    """Puts items into the inboxes of one loop; called by it."""
    for inbox, items in found:
        inbox.put(items)


@dataclasses.dataclass(eq=False)
class Share:
    """What the choices of one prompt have in common: it is read once."""

    to_begin: int  # choices that have no row yet
    reader: "Job | None" = None  # who reads it now
    waiting: list["Job"] = dataclasses.field(default_factory=list)  # for that
    plan: Plan | None = None  # how the others go on, once it is read


@dataclasses.dataclass(eq=False)
class Job:
    """One choice of one request: what one row does."""

    inbox: Inbox
    choice: int
    ids: Int32[np.ndarray, "T"]
    request: SlotRequest  # its prompt is `ids`
    client: str  # whose turn it is
    came: float  # time.perf_counter()
    name: str = ""  # by which its row is found when it has ended
    blocks: tuple[bytes, ...] = ()  # `chain` of the ids
    number: int | None = None  # of the slots' request, while it has one
    answer: list[int] = dataclasses.field(default_factory=list)
    last: float = 0.0  # when the last token came
    use: CacheUse | None = None  # what its row's cache held then
    share: Share | None = None  # with other choices of the prompt
    cut: int = 0  # tokens of a beginning that is being read by itself
    reads_for_others: bool = False  # whether that is for the other choices
    source: Entry | None = None  # what it goes on from
    aside: SavedRow | None = None  # where it stands, while its client does not read


class FairQueue:
    """Jobs that wait: clients take turns, each client's own in their order."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Job]] = OrderedDict()

    def put(self, job: Job) -> None:
        """Last of its client's."""
        self._of.setdefault(job.client, deque()).append(job)

    def put_back(self, job: Job) -> None:
        """First of all: it has had its turn."""
        self._of.setdefault(job.client, deque()).appendleft(job)
        self._of.move_to_end(job.client, last=False)

    def pop(self) -> Job | None:
        """The next; None: nobody waits."""
        if not self._of:
            return None
        client, jobs = self._of.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._of[client] = jobs  # behind all others
        return job

    def remove(self, inbox: Inbox) -> list[Job]:
        """Takes out the jobs of one request."""
        gone = [job for jobs in self._of.values() for job in jobs if job.inbox is inbox]
        left = {client: deque(job for job in jobs if job.inbox is not inbox) for client, jobs in self._of.items()}
        self._of = OrderedDict((client, jobs) for client, jobs in left.items() if jobs)
        return gone

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))
