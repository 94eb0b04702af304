"""Rows that have ended and stay on the device, side by side in the arrays of one cache: to go on in, they need no copy.

Whoever has a `PooledState` has its place; when nobody has it any more, the place is free. What is asked of the device
happens in its order, so a place that is free may be given away at once.
"""

import queue
from collections.abc import Callable
from concurrent.futures import Future

from sepjax.generation.packed import Form, Packed, PackedState


class Pool:
    """The places. For any thread, and for whatever a garbage collection interrupts, `take` itself too: no lock."""

    def __init__(self, places: int):
        self.size, self._free = places, queue.SimpleQueue[int]()
        for place in range(places):
            self._free.put(place)

    def take(self) -> int | None:
        """A place; None: there is none."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return None

    def give(self, place: int) -> None:
        """Nobody has it any more."""
        self._free.put(place)

    @property
    def num_free(self) -> int:
        """Places that nobody has."""
        return self._free.qsize()


class PooledState(PackedState):
    """A state in the pool; packed anew for everyone who wants its arrays.

    Attributes:
      pool: where.
      place: its number there.
    """

    is_pooled = True

    def __init__(self, form: Form, pool: Pool, place: int, fetch: "Callable[[int], Future[Packed]]"):
        """`fetch` has the device copy what is in a place."""
        self.form, self.pool, self.place, self._fetch = form, pool, place, fetch

    def __del__(self) -> None:
        self.pool.give(self.place)

    @property
    def packed(self) -> Packed:
        """A copy of the arrays."""
        return self.ask().result()

    def ask(self) -> Future[Packed]:
        """A copy, to come."""
        return self._fetch(self.place)

    @property
    def is_on_host(self) -> bool:
        """It is not."""
        return False
