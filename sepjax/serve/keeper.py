"""A thread that moves kept rows to the host's memory and to disk, beside the thread that steps the slots.

Those that were used last stay on the device, as many as have room: a conversation that goes on soon need not come back
to it. Of the others, what is on disk already, or what its conversation has gone on from, is not copied any more. Nor is
what would have to wait: where conversations end faster than rows can be copied, the oldest are forgotten, since reading
a text again costs less than a device that stands still.
"""

import contextlib
import dataclasses
import logging
import queue
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable

from sepjax.clocks import Clocks
from sepjax.config import UserError
from sepjax.generation.packed import COPIES, Copying
from sepjax.generation.saved_row import SavedRow
from sepjax.serve.conversations import Conversations, Entry

log = logging.getLogger("sepjax.serve")
_RARELY = 8  # rows that have gone are looked for when an eighth as many as there are have come since the last time
_MOST = 16  # rows on their way: they are on the device still, whose memory is not to grow


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    entry: Entry
    row: SavedRow
    moves: bool  # it goes from the device
    saves: bool  # it is new, and goes to disk if rows do
    done: Callable[[], None]
    counts: bool = True  # among those on their way


class Keeper:
    """Begins at once; ends with `close`. `put` belongs to one thread."""

    def __init__(self, conversations: Conversations, clocks: Clocks, on_device: int = 0):
        """`on_device`: bytes of rows that stay there."""
        self._conversations, self._clocks, self._on_device = conversations, clocks, on_device
        self._staying: OrderedDict[Entry, None] = OrderedDict()  # on the device, those used last at the end
        self._bytes, self._since = 0, 0  # of those; how many were put since those that have gone were left out
        self._passed: weakref.WeakSet[Entry] = weakref.WeakSet()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(_MOST)  # for tasks that count
        self._ends = False
        self._thread = threading.Thread(target=self._main, name="keeper", daemon=True)
        self._thread.start()

    def put(self, entry: Entry, done: Callable[[], None] = lambda: None) -> bool:
        """Keeps an entry that was just added. May wait for rows that are saved to disk and have no place in a pool.

        Returns whether it is as safe as it gets: held in memory, or it has gone already. Else `done` is called when it
        is on disk, or cannot be saved.
        """
        row, to_disk = entry.row, self._conversations.has_disk
        if row is None:  # evicted at once
            return True
        leaving = self._leaving(entry)
        if to_disk:
            self._ask(_Task(entry, row, entry in leaving, True, done))
        for each in leaving:
            if (old := each.row) is None or (to_disk and each is entry):
                continue
            task = _Task(each, old, True, False, lambda: None)
            if each is not entry and each in self._passed:
                self._conversations.lost(each)
            elif each is entry or to_disk:
                self._ask(task)
            elif not self._offer(task):
                self._conversations.lost(each)
        return not to_disk

    def used(self, entry: Entry) -> None:
        """Somebody goes on from it: it stays as long as what is new."""
        if entry in self._staying:
            self._staying.move_to_end(entry)

    def passed(self, entry: Entry) -> None:
        """Its conversation has gone on: it leaves first, and for good."""
        self._passed.add(entry)
        if entry in self._staying:
            self._staying.move_to_end(entry, last=False)

    def _leaving(self, new: Entry) -> list[Entry]:
        """Takes an entry on, and lets go those that have no room on the device any more: the oldest, or itself."""
        self._bytes += 0 if new in self._staying else new.row_bytes
        self._staying[new] = None
        self._since += 1
        if self._bytes > self._on_device and self._since * _RARELY >= len(self._staying):
            self._staying = OrderedDict.fromkeys(each for each in self._staying if each.row is not None)
            self._bytes, self._since = sum(each.row_bytes for each in self._staying), 0
        leaving = []
        while self._bytes > self._on_device:
            each, _ = self._staying.popitem(last=False)
            self._bytes -= each.row_bytes
            leaving.append(each)
        return leaving

    @property
    def is_behind(self) -> bool:
        """Whether rows come faster than they are saved to disk. No answer is to begin then, whose row would come too.

        One that is saved calls its `done`.
        """
        return self._conversations.has_disk and self._tasks.qsize() >= _MOST

    def _ask(self, task: _Task) -> None:
        if task.row.is_pooled:
            self._tasks.put(dataclasses.replace(task, counts=False))
            return
        with self._clocks("worker: wait for the keeper"):
            self._room.acquire()
        self._tasks.put(task)

    def _offer(self, task: _Task) -> bool:
        """Whether it can be done without anybody waiting."""
        has_room = self._room.acquire(blocking=False)
        if has_room:
            self._tasks.put(task)
        return has_room

    def close(self) -> None:
        """Finishes what it has."""
        self._tasks.put(None)
        self._thread.join()

    def _main(self) -> None:
        while not self._ends:
            self._do_all(self._next())

    def _next(self) -> list[_Task]:
        """What there is to do; none: it is over."""
        tasks: list[_Task] = []
        task = self._tasks.get()
        while task is not None:
            tasks.append(task)
            if task.counts:
                self._room.release()
            try:
                if len(tasks) == COPIES:
                    return tasks
                task = self._tasks.get_nowait()
            except queue.Empty:
                return tasks
        self._ends = True
        return tasks

    def _do_all(self, tasks: list[_Task]) -> None:
        """All rows are asked for before one is waited for, and copied while the device computes."""
        begun = deque((task, self._copying(task)) for task in tasks)
        tasks.clear()  # or a row would lie on the device until the last of them is done
        with self._clocks("keeper: begin copies"):
            for copying in [copying for _, copying in begun if copying is not None]:
                with contextlib.suppress(Exception):  # whoever waits for its result has it
                    copying.send()
        while begun:
            self._do(*begun.popleft())

    def _is_to_be_lost(self, task: _Task) -> bool:
        """Whether nobody copies it: it is read from the disk."""
        return task.entry.disk_bytes > 0 and not task.saves

    def _copying(self, task: _Task) -> Copying | None:
        if self._is_to_be_lost(task):
            return None
        with contextlib.suppress(Exception):  # `_finish` asks once more, and says what is wrong
            return task.row.copying()
        return None

    def _do(self, task: _Task, copying: Copying | None) -> None:
        try:
            self._finish(task, copying)
        except (UserError, OSError) as error:
            log.error("a conversation was not saved", extra={"reason": str(error)})
        except Exception:
            log.exception("a conversation was not saved")
        finally:
            task.done()

    def _finish(self, task: _Task, copying: Copying | None) -> None:
        if self._is_to_be_lost(task):
            self._conversations.lost(task.entry)
            return
        try:
            with self._clocks("keeper: to the host"):
                row = task.row.copied(copying)
        except Exception:
            self._conversations.lost(task.entry)  # or whoever went on from it would fail
            raise
        if task.moves:
            self._conversations.moved(task.entry, row)
        if task.saves:
            self._conversations.save(task.entry, row)
