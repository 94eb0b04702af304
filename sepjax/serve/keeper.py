"""A thread that moves kept rows to the host's memory and to disk, beside the thread that steps the slots."""

import logging
import queue
import threading
from collections.abc import Callable

from sepjax.clocks import Clocks
from sepjax.config import UserError
from sepjax.generation.saved_row import SavedRow
from sepjax.serve.conversations import Conversations, Entry
from sepjax.serve.state import on_host

log = logging.getLogger("sepjax.serve")
_MOST = 16  # rows on their way: they are on the device still, whose memory is not to grow

_Task = tuple[Entry, SavedRow, Callable[[], None]]


class Keeper:
    """Begins at once; ends with `close`."""

    def __init__(self, conversations: Conversations, clocks: Clocks):
        self._conversations, self._clocks = conversations, clocks
        self._tasks: queue.Queue[_Task | None] = queue.Queue(_MOST)
        self._thread = threading.Thread(target=self._main, name="keeper", daemon=True)
        self._thread.start()

    def put(self, entry: Entry, done: Callable[[], None] = lambda: None) -> None:
        """Moves an entry that was just added; `done` is called when it is safe, or cannot be saved. May wait."""
        if entry.row is None:  # evicted at once
            done()
            return
        with self._clocks("worker: wait for the keeper"):
            self._tasks.put((entry, entry.row, done))

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
                    row = on_host(row)
                self._conversations.moved(entry, row)
                self._conversations.save(entry, row)
            except (UserError, OSError) as error:
                log.error("a conversation was not saved", extra={"reason": str(error)})
            except Exception:
                log.exception("a conversation was not saved")
            finally:
                done()
