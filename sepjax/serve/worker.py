"""The one thread that steps the slots, and what goes to and from it.

    HTTP side (an event loop)                      worker (a thread)
    submit(jobs) ---------------- orders --------> queue, one turn a client ---> slots.submit
    cancel(inbox)                                  slots.step -> events
    inbox.take() <---- call_soon_threadsafe -----  all events of a step in one go

Everything that the two share is a queue or a counter. A client that reads slowly has its row put aside, exactly where
it is, and gets it back when it has caught up: it holds neither a row nor memory that grows, and loses nothing.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sepjax.clocks import Clocks
from sepjax.config import UserError
from sepjax.generation.row import StreamEvent
from sepjax.generation.slots import Slots
from sepjax.serve.bounds import ahead_of, steps_of
from sepjax.serve.conversations import Conversations, chain
from sepjax.serve.errors import ApiError
from sepjax.serve.jobs import Failed, FairQueue, Inbox, Item, Job, Paused, failed_or
from sepjax.serve.keeper import Keeper
from sepjax.serve.metrics import Metrics
from sepjax.serve.outbox import Outbox
from sepjax.serve.prompts import Prompts
from sepjax.serve.served import Served, Zones
from sepjax.serve.view import find

log = logging.getLogger("sepjax.serve")
_UNREAD = 512  # tokens of each choice that wait for a slow client before its row is put aside
_PATIENCE = 0.5  # seconds between two looks at the clock, or at the keeper, while nothing happens


class Worker:
    """Begins with `start`; ends with `stop`, or by itself where loading or a step fails (`error`)."""

    def __init__(
        self, load: Callable[[], Served], keep: Callable[[Served], Conversations], *, rows: int, max_waiting: int,
        metrics: Metrics, steps: int | None = None, at_end: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """Does nothing yet.

        Args:
          load: makes the model; called in the worker's thread.
          keep: makes what keeps its conversations; called there too.
          rows: slots.
          max_waiting: choices that may wait for a row, beyond those that have one.
          metrics: what is counted.
          steps: tokens of a row between two looks at them (`Generator.slots`); None: as suits the device (`steps_of`).
          at_end: called when the thread ends, whatever the reason.
        """
        self._load, self._keep = load, keep
        self._num_rows, self._max_waiting, self._steps = rows, max_waiting, steps
        self._metrics, self._at_end = metrics, at_end
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._queue = FairQueue()
        self._running: dict[int, Job] = {}
        self._aside: list[Job] = []
        self._jobs: dict[Job, None] = {}  # that were taken on and have not ended, wherever they are
        self._lock = threading.Lock()  # of the next two
        self._open = 0  # choices that were taken on and have not ended
        self._stop_at: float | None = None
        self._seconds = 1.0  # that an answer takes, as a running mean
        self._out = Outbox()
        self._first: list[float] = []  # seconds to the first tokens of this step, and between two
        self._each: list[tuple[float, int]] = []  # and of how many tokens
        self._thread = threading.Thread(target=self._main, name="slots", daemon=True)
        self.clocks = Clocks()  # of all threads of the server
        self.served: Served | None = None
        self.slots: Slots | None = None
        self.conversations: Conversations | None = None
        self._keeper: Keeper | None = None
        self._prompts: Prompts | None = None
        self._slow: list[int] = []  # numbers of requests whose clients may not read
        self.error: BaseException | None = None
        self.at_ready: Callable[[Served], None] = lambda _: None  # called when it answers requests
        self.at_stop: Callable[[], None] = lambda: None  # and when it takes nothing on any more

    # -- for others -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Loads the model in its own thread and serves from then on."""
        self._thread.start()

    def ready(self) -> Served:
        """The model; raises ApiError(503) while it is being loaded, or the server stops."""
        if self._stop_at is not None or self.error is not None:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
        if self.served is None or self.slots is None:
            raise ApiError(503, "the model is being loaded", code="loading", retry_after=5)
        return self.served

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of these on, or none. Raises ApiError: 429 for a full queue, 503 while stopping."""
        with self._lock:  # or the thread could end before it hears of these
            self.check_room(len(jobs))
            self._open += len(jobs)
            self._orders.put(lambda: self._take_on(jobs))

    def check_room(self, choices: int) -> None:
        """Raises what `submit` would for so many choices now: before work is done for what will not be answered."""
        self.ready()
        most, now = self._num_rows + self._max_waiting, self._open
        if choices > most:
            raise ApiError(400, f"{choices} choices at once; this server takes up to {most}", param="n")
        if now + choices > most:
            retry = min(max(1, math.ceil(self._seconds * (now / self._num_rows))), 600)
            raise ApiError(429, f"{now} requests run or wait; try again later", code="queue_full", retry_after=retry)

    def cancel(self, inbox: Inbox) -> None:
        """Nobody reads this any more: its rows are free at the next step."""
        self._orders.put(lambda: self._drop(inbox))

    def caught_up(self, inbox: Inbox) -> None:
        """A client whose rows may have been put aside has read what there was."""
        self._orders.put(lambda: self._take_back(inbox))

    def inbox(self) -> Inbox:
        """A new one for a request, in the thread of an event loop."""
        return Inbox(asyncio.get_running_loop())

    async def metrics(self) -> bytes:
        """What /metrics tells."""
        return self._metrics.text()

    def tell(self) -> str:
        """The same, in any thread."""
        return self._metrics.text().decode()

    async def view(self, name: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """`sepjax.serve.view.find`, in a thread of its own."""
        return await asyncio.to_thread(self.find_view, name, asked)

    def find_view(self, name: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """The same, in this one."""
        served = self.ready()
        assert self.conversations is not None
        return find(served, self.conversations, name, asked)

    def fail(self, error: BaseException) -> None:
        """Ends with an error that is not the worker's own."""
        self.error = self.error or error
        self.stop(0.0)

    def stop(self, seconds: float) -> None:
        """Takes nothing on any more, and ends when all is answered or the time is up."""
        self._stop_at = time.monotonic() + seconds
        self._orders.put(lambda: None)
        self.at_stop()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end, if it was started; returns whether it came."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop_at is not None

    @property
    def num_running(self) -> int:
        """Choices that have a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Choices that wait for a row, or for their client to read."""
        return self._open - len(self._running)

    @property
    def held(self) -> Zones:
        """Cache entries of all rows that run."""
        uses = [job.use for job in list(self._running.values())]
        served = self.served
        zones = [served.zones(use) for use in uses if use is not None] if served is not None else []
        return Zones(*(sum(numbers) for numbers in zip(*zones, strict=True))) if zones else Zones(0, 0, 0)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        stack = contextlib.ExitStack()  # of what the whole of its life needs
        try:
            served = self._load()
            stack.enter_context(served.on_mesh())
            kept = self.conversations = self._keep(served)
            pool = kept.on_device // served.row_bytes
            steps = steps_of(self._steps)
            ahead = ahead_of(self._num_rows, pool)
            pool -= ahead
            slots: Slots = served.engine.slots(self._num_rows, steps=steps, clocks=self.clocks, pool=pool, ahead=ahead)
            self.slots = slots
            # The others of the pool are for rows that have just ended, and those that are being copied.
            self._keeper = Keeper(kept, self.clocks, (pool - -(-pool // 8)) * served.row_bytes)
            self._prompts = Prompts(
                slots, kept, self._keeper, self._metrics, self._queue, self._running, self._put, self._end
            )  # fmt: skip
            self.served = served
            log.info("ready", extra={"model": served.name, "slots": self._num_rows, "bytes": slots.cache_bytes})
            self.at_ready(served)
            self._serve(slots)
        except BaseException as error:
            self.error = error
            if not isinstance(error, UserError | OSError):
                log.exception("the worker has failed")
        finally:
            with contextlib.ExitStack() as ends:  # the last one first, and each whatever becomes of the others
                ends.push(stack)
                ends.callback(self._at_end)
                ends.callback(self._fail_all, ApiError(503, "the server is stopping", code="stopping", retry_after=5))
                if self._keeper is not None:
                    ends.callback(self._keeper.close)

    def _serve(self, slots: Slots) -> None:
        clocks = slots.clocks
        while self._goes_on():
            with clocks("worker: orders, or nothing to do"):
                self._take_orders(wait=slots.is_idle and not (len(self._queue) and self._may_begin))
            with clocks("worker: begin requests"):
                self._fill(slots)
            if not slots.is_idle:  # rows that were cancelled are let go by a step, too
                for part in slots.parts(joined=True):
                    self._hand_all_on(slots, part)
                slow, self._slow = self._slow, []
                for number in slow:
                    self._put_aside(slots, number)
            self._send()

    def _hand_all_on(self, slots: Slots, part: Sequence[tuple[int, StreamEvent]]) -> None:
        """A part of what a step gave; first tokens go out before the others are made."""
        with slots.clocks("worker: hand on"):
            now, events = time.perf_counter(), dict[int, list[StreamEvent]]()
            for number, event in part:
                events.setdefault(number, []).append(event)
            for number, its in events.items():
                self._hand_on(slots, number, its, now)
            self._metrics.tokens(self._first, self._each)
            self._first, self._each = [], []
        if self._out.is_urgent:
            self._send()

    def _goes_on(self) -> bool:
        if self._stop_at is None:
            return True
        return self._open > 0 and time.monotonic() < self._stop_at

    def _take_orders(self, *, wait: bool) -> None:
        # Those in the queue may wait for the keeper, not all of whose tasks tell that they are done.
        patience = _PATIENCE if self._stop_at is not None or len(self._queue) else None
        with contextlib.suppress(queue.Empty):
            self._orders.get(timeout=patience)() if wait else None
            while True:
                self._orders.get_nowait()()

    @property
    def _may_begin(self) -> bool:
        """Whether answers may begin whose rows are to be saved: those that run go on, whatever the disk does."""
        return self._keeper is None or not self._keeper.is_behind

    def _fill(self, slots: Slots) -> None:
        """Gives free rows to those whose turn it is."""
        prompts = self._prompts
        if not len(self._queue) or prompts is None or not self._may_begin:
            return
        ending = slots.num_ending
        while slots.num_free + ending > slots.num_waiting and (job := self._queue.pop()) is not None:
            prompts.begin(job)

    def _hand_on(self, slots: Slots, number: int, events: Sequence[StreamEvent], now: float) -> None:
        """All that a step gave to a row."""
        job = self._running.get(number)
        if job is None:
            return
        last, tokens = events[-1], sum(len(event.token_ids) for event in events)
        if job.cut:
            assert self._prompts is not None
            self._prompts.beginning_read(number, job, last)
            return
        is_first, passed = not job.answer, now - (job.last or job.came)
        if is_first:
            self._first.append(passed)  # what came with it in one launch says nothing about the time between two
        else:
            self._each.append((passed / max(1, tokens), tokens))
        job.last, job.use = now, last.cache
        for event in events:
            job.answer += event.token_ids
            if event.finish_reason is None:
                self._put(job, event, is_urgent=is_first)
        if last.finish_reason is not None:
            self._finish(slots, number, job, last)
        elif job.inbox.unread > _UNREAD:
            self._slow.append(number)

    def _finish(self, slots: Slots, number: int, job: Job, event: StreamEvent) -> None:
        """The last event: it goes out once the row is safe, if it is to be."""
        assert self.conversations is not None
        assert self._keeper is not None
        del self._running[number]
        if not self.conversations.is_on or event.finish_reason in ("full", "error"):
            slots.cancel(number)  # what was kept of it
            self._end(job, failed_or(event))
            return
        row = slots.save(number)
        if row.is_full:  # whatever it ended by: whoever went on from it would be refused
            self._end(job, event)
            return
        ids = np.concatenate([job.ids, np.array(job.answer, np.int32)])
        if row.seen != len(ids) - 1:  # or somebody would go on from another text
            raise RuntimeError(f"a row has seen {row.seen} tokens, expected {len(ids) - 1}")
        blocks = chain(ids[:-1], job.blocks)
        entry = self.conversations.add(ids[:-1], blocks, int(ids[-1]), row, job.name, instead=job.source)
        if job.source is not None and job.source.last is not None:
            self._keeper.passed(job.source)
        if self._keeper.put(entry, lambda: self._orders.put(lambda: self._end(job, event))):
            self._end(job, event)

    def _put_aside(self, slots: Slots, number: int) -> None:
        """Once all that came with a step was looked at: `save` is after the last of it."""
        job = self._running.get(number)
        if job is None or not slots.can_save(number):
            return
        job.aside = slots.save(number).on_host()
        slots.cancel(number)
        del self._running[number]
        self._aside.append(job)
        self._put(job, Paused())
        log.info("put aside", extra={"tokens": len(job.answer)})

    def _take_on(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._jobs[job] = None
            self._queue.put(job)

    def _take_back(self, inbox: Inbox) -> None:
        for job in [job for job in self._aside if job.inbox is inbox]:
            self._aside.remove(job)
            self._queue.put(job)

    def _drop(self, inbox: Inbox) -> None:
        gone = self._queue.remove(inbox) + [job for job in self._aside if job.inbox is inbox]
        self._aside = [job for job in self._aside if job.inbox is not inbox]
        for number, job in list(self._running.items()):
            if job.inbox is inbox:
                assert self.slots is not None
                self.slots.cancel(number)
                gone.append(job)
        waiting = [other for job in gone if job.share is not None for other in job.share.waiting]
        for job in dict.fromkeys([*gone, *waiting]):
            if job.share is not None:
                job.share.waiting = []
            self._end(job, None)

    def _end(self, job: Job, item: StreamEvent | Failed | None) -> None:
        """A choice has ended: by its last event, by an error, or because nobody reads it."""
        del self._jobs[job]
        if job.number is not None:
            self._running.pop(job.number, None)
        if self._prompts is not None:
            self._prompts.given_up(job)
        reason = item.finish_reason if isinstance(item, StreamEvent) else None
        seconds = time.perf_counter() - job.came
        if reason is not None:
            self._seconds += 0.1 * (seconds - self._seconds)
        self._metrics.ended(reason, seconds, len(job.answer))
        with self._lock:
            self._open -= 1
        if item is not None:
            self._put(job, item)

    def _put(self, job: Job, item: Item, *, is_urgent: bool = True) -> None:
        self._out.put(job, item, is_urgent=is_urgent)

    def _send(self) -> None:
        with self.clocks("worker: send"):
            self._out.send(len(self._running))

    def _fail_all(self, error: ApiError) -> None:
        with self._lock:
            self._stop_at = time.monotonic()
        self._take_orders(wait=False)
        # All, and not those only of the queue, of rows and the like: what failed may have had one in its hands.
        for job in list(self._jobs):
            if job.share is not None:
                job.share.waiting = []
            self._end(job, Failed(error))
        while self._queue.pop() is not None:
            pass
        self._aside = []
        self._out.send(0, everything=True)
