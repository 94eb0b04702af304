"""A thread that moves kept rows to the host's memory and to disk, beside the thread that steps the slots.

The newest stay on the device, as many as have room: a conversation that goes on soon need not come back to it.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

from sepjax.clocks import Clocks
from sepjax.config import UserError
from sepjax.generation.saved_row import SavedRow
from sepjax.serve.conversations import Conversations, Entry

log = logging.getLogger("sepjax.serve")
_MOST = 16  # rows on their way: they are on the device still, whose memory is not to grow

_Task = tuple[Entry, SavedRow, Callable[[], None]]


class Keeper:
    """Begins at once; ends with `close`. `put` belongs to one thread."""

    def __init__(self, conversations: Conversations, clocks: Clocks, on_device: int = 0):
        """`on_device`: bytes of rows that stay there."""
        self._conversations, self._clocks, self._on_device = conversations, clocks, on_device
        self._staying: deque[Entry] = deque()  # on the device, the oldest first
        self._tasks: queue.Queue[_Task | None] = queue.Queue(_MOST)
        self._thread = threading.Thread(target=self._main, name="keeper", daemon=True)
        self._thread.start()

    def put(self, entry: Entry, done: Callable[[], None] = lambda: None) -> bool:
        """Keeps an entry that was just added. May wait.

        Returns whether it is as safe as it gets: held in memory, or it has gone already. Else `done` is called when it
        is on disk, or cannot be saved.
        """
        row = entry.row
        if row is None:  # evicted at once
            return True
        if self._conversations.has_disk:
            self._move(entry, row, done)
            return False
        self._staying.append(entry)
        while sum(each.row_bytes for each in self._staying if each.row is not None) > self._on_device:
            oldest = self._staying.popleft()
            if (row := oldest.row) is not None:
                self._move(oldest, row, lambda: None)
        return True

    def _move(self, entry: Entry, row: SavedRow, done: Callable[[], None]) -> None:
        with self._clocks("worker: wait for the keeper"):
            self._tasks.put((entry, row, done))

    def close(self) -> None:
        """Finishes what it has."""
        self._tasks.put(None)
        self._thread.join()

    def _main(self) -> None:
        while (task := self._tasks.get()) is not None:
            entry, row, done = task
            del task
            try:
                with self._clocks("keeper: to the host"):
                    row = row.on_host()
                self._conversations.moved(entry, row)
                self._conversations.save(entry, row)
            except (UserError, OSError) as error:
                log.error("a conversation was not saved", extra={"reason": str(error)})
            except Exception:
                log.exception("a conversation was not saved")
            finally:
                done()
