"""A thread that asks a device for one thing after another, so that nobody else is held up by it.

Whoever starts a program with branches in it may wait until the device has come to them, and the device then waits for
whoever has waited. Jobs run in their order, under the mesh of the thread that made this one.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class DeviceThread:
    """Ends when nobody has it any more."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sepjax-device")
        self._mesh = jax.sharding.get_mesh()

    def ask(self, job: Callable[..., Any], *args: Any) -> Future:
        """Runs a job after those before it. Its result raises what it raised."""
        return self._pool.submit(self._run, job, *args)

    def _run(self, job: Callable[..., Any], *args: Any) -> Any:
        with contextlib.nullcontext() if self._mesh.empty else jax.set_mesh(self._mesh):
            return job(*args)
