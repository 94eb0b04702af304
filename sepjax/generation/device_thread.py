"""A thread that asks a device for one thing after another, so that nobody else is held up by it; and one that frees.

Whoever starts a program with branches in it may wait until the device has come to them, and the device then waits for
whoever has waited. Jobs run in their order, under the mesh of the thread that made this one.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from sepjax.promotion import as_usual


class DeviceThread:
    """Ends when nobody has it any more."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sepjax-device")
        self._mesh = jax.sharding.get_mesh()

    def ask(self, job: Callable[..., Any], *args: Any) -> Future:
        """Runs a job after those before it. Its result raises what it raised."""
        return self._pool.submit(self._run, job, *args)

    @as_usual()
    def _run(self, job: Callable[..., Any], *args: Any) -> Any:
        with contextlib.nullcontext() if self._mesh.empty else jax.set_mesh(self._mesh):
            return job(*args)


class Sweeper:
    """A thread in which arrays that a program has used up come to their end. Ends when nobody has it any more.

    JAX gives the interpreter away for each array that it frees, and waits to have it back: beside busy threads that
    took half a millisecond an array, 134 ms for the 181 arrays of 256 rows and their pool, while the device was idle.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sepjax-sweeper")

    def clear(self, used: list) -> None:
        """Empties a list, which alone has what is in it."""
        self._pool.submit(used.clear)
