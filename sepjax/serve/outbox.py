"""What the worker has for clients, until it is handed over to their event loops."""

import logging
import time

from sepjax.serve.jobs import Inbox, Item, Job, Loop, put_all, tokens_of

log = logging.getLogger("sepjax.serve")
# Seconds between two times that tokens in the middle of an answer are handed over: at least, and for each running row.
_EVERY, _EACH = 0.01, 5e-4


class Outbox:
    """The worker's alone."""

    def __init__(self) -> None:
        self._items: dict[Inbox, list[tuple[int, Item]]] = {}
        self._urgent: set[Inbox] = set()
        self._sent_at = 0.0

    @property
    def is_urgent(self) -> bool:
        """Whether there is something to be handed over at once."""
        return bool(self._urgent)

    def put(self, job: Job, item: Item, *, is_urgent: bool) -> None:
        """One item of a choice; urgent are beginnings and ends."""
        self._items.setdefault(job.inbox, []).append((job.choice, item))
        if is_urgent:
            self._urgent.add(job.inbox)

    def send(self, num_running: int, *, everything: bool = False) -> None:
        """Hands over what has come up: beginnings and ends at once, tokens between up to a hundred times a second.

        Each waking of a loop, and each chunk that it writes, takes time from the thread that steps: of many rows, less
        often, so that all chunks together take a part of the time and no more.
        """
        now = time.monotonic()
        if everything or now - self._sent_at >= max(_EVERY, _EACH * num_running):
            out, self._items, self._sent_at = self._items, {}, now
        else:
            out = {inbox: self._items.pop(inbox) for inbox in self._urgent}
        self._urgent = set()
        of_loop: dict[Loop, list[tuple[Inbox, list[tuple[int, Item]]]]] = {}
        for inbox, items in out.items():
            inbox.sent += tokens_of(items)
            of_loop.setdefault(inbox.loop, []).append((inbox, items))
        for loop, found in of_loop.items():
            try:
                loop.call_soon_threadsafe(put_all, found)
            except RuntimeError:  # the loop is closed: nobody reads
                log.debug("nobody reads any more")
