"""Steps of a stream that are made before they are asked for: several in one call of the device.

A call takes the host a millisecond or more, several times as long as a step of a small model takes a GPU. So a stream
makes up to 32 steps a call, and hands their tokens out one by one. They are what steps one by one would have drawn, bit
for bit. A stream that is saved, fed or looked at between two of them must stand there: a copy of its state from before
the call is kept, from which as many steps as were handed out are made again.

    before --- t1 -- t2 -- t3 -- t4 --> after        t1 and t2 were handed out
    before --- t1 -- t2 --> where the stream stands
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.generation.device_loop import DecodeState, Request, Steps, make_advance
from sepjax.generation.prepared import Prepared

MOST = 32  # steps a call
_SECONDS = 0.02  # that a call should take at most: nobody sees that tokens come together
_MOST_BYTES = 2**28  # of a state that is copied, which takes some of the device's time and memory


@jax.jit
def _copied(state: DecodeState) -> DecodeState:
    return jax.tree.map(jnp.copy, state)


def _is_small(state: DecodeState) -> bool:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) <= _MOST_BYTES


def fetched(steps: Steps, *, told: bool) -> Any:
    """A record as NumPy arrays; what is told of probabilities only if `told`: each array takes some of a small model's
    time.
    """
    if not told:
        steps = dataclasses.replace(steps, logprob=None, top_tokens=None, top_logprobs=None)
    return jax.device_get(steps)


class Ahead:
    """The steps of one stream.

    Attributes:
      program: `advance`, of up to `MOST` steps.
      record: `Steps` of the last call, `fetched`.
      column: of the record, of the step that was handed out last.
    """

    def __init__(self, of: Prepared):
        """Nothing has been made."""
        self._of = of
        self.program = make_advance(of.graph, of.attention, MOST)
        self._size = 1  # steps of the next call, by how long the last ones took
        self._clear()

    def _clear(self) -> None:
        self._before: DecodeState | None = None
        self._request: Request | None = None
        self.record: Any = None
        self._first = self._end = 0
        self.column = -1

    def __len__(self) -> int:
        """Steps that have been made and not handed out."""
        return self._end - self.column - 1

    def step(self, state: DecodeState, request: Request, most: int, *, told: bool) -> DecodeState:
        """Hands out one more step, its number in `record` and `column`, and returns the state behind all that are made.

        Args:
          state: that it returned last; used up.
          request: what is wanted of the row; the same as before while there are steps left.
          most: steps that may be made, 1 at least.
          told: whether anyone asks how probable tokens are (`fetched`).
        """
        if len(self):
            self.column += 1
        else:
            state = self._called(state, request, most, told)
        if not len(self):
            self._before = None  # which nobody needs any more
        return state

    def _called(self, state: DecodeState, request: Request, most: int, told: bool) -> DecodeState:
        size = max(1, min(self._size, most))
        if size > 1 and not _is_small(state):
            size = 1
        began, self._first = time.perf_counter(), MOST - size
        self._before, self._request = (_copied(state), request) if size > 1 else (None, None)
        state, steps = self.program(*self._given(state, request, size))
        self.record = fetched(steps, told=told)
        self.column, self._end = self._first, self._first + int((self.record.token[0] != -1).sum())
        self._resize(size, time.perf_counter() - began)
        return state

    def _resize(self, size: int, seconds: float) -> None:
        if seconds > _SECONDS:
            self._size = max(1, size // 2)
        elif size == self._size and seconds < _SECONDS / 2:
            self._size = min(MOST, 2 * size)

    def programs(self, request: Request, state: DecodeState) -> dict[str, tuple[Any, ...]]:
        """What a stream that stands at `state` will run, by name, with what it is given."""
        found: dict[str, tuple[Any, ...]] = {"steps": (self.program, *self._given(state, request, 1))}
        return found | ({"copy": (_copied, state)} if _is_small(state) else {})

    def _given(self, state: DecodeState, request: Request, size: int) -> tuple[Any, ...]:
        return self._of.params, state, np.zeros(1, bool), request, np.int32(MOST - size)

    def settled(self, state: DecodeState) -> DecodeState:
        """The state behind the step that was handed out last, where `state` is that behind all; forgets the others."""
        if self._before is not None and self._request is not None:
            self._size = self.column - self._first + 1  # as many as were wanted
            state, _ = self.program(*self._given(self._before, self._request, self._size))
        self._clear()
        return state
