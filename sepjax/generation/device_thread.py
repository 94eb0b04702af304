"""Programs compiled side by side; a thread that asks a device for one thing after another; and one that frees.

Whoever starts a program with branches in it may wait until the device has come to them, and the device then waits for
whoever has waited: a thread that asks holds nobody else up. Jobs run in their order, under the mesh of the thread that
made this one.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax import interrupt
from sepjax.promotion import as_usual

log = logging.getLogger("sepjax.slots")


def compile_all(programs: Mapping[str, tuple[Any, ...]]) -> None:
    """Compiles programs of `jax.jit` side by side, by name, each for what it is given behind it; runs none.

    Those that take longest should come first. `jit` keeps what is compiled so: the first call finds it. The first error
    is raised at once; what compiles beside it is not waited for, nor by the end of the program.
    """
    mesh, begin = jax.sharding.get_mesh(), time.perf_counter()

    def make(name: str, lowered: Any, traced: float) -> None:
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
            lowered.compile()
        log.info("compiled: %s, after %.1f s (traced after %.1f)", name, time.perf_counter() - begin, traced)

    threads = ThreadPoolExecutor(len(programs), "sepjax-compile")
    begun = []
    try:
        for name, (program, *given) in programs.items():
            # One after another: Python traces one at a time, and the first is compiled while the next is traced.
            lowered = program.lower(*given)
            begun.append(threads.submit(make, name, lowered, time.perf_counter() - begin))
            interrupt.need_not_wait_for(begun[-1].done)
        for done in as_completed(begun):
            done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


_ready: set[Hashable] = set()  # keys of what `make_ready` has compiled


def make_ready(key: Hashable, programs: Callable[[], Mapping[str, tuple[Any, ...]]]) -> None:
    """`compile_all` of the programs that a text will need, once for each key: so nobody waits for one after the other.

    Over a mesh of several devices nothing is done: programs are compiled when they are called, as ever. A wrong guess
    of what they will be given costs time, and never a result.
    """
    if key in _ready or jax.config.jax_disable_jit or jax.sharding.get_abstract_mesh().size > 1:
        return
    found = {(program, *shapes_of(given)): (name, program, *given) for name, (program, *given) in programs().items()}
    more = {name: tuple(of) for key, (name, *of) in found.items() if key not in _ready}
    if len(more) > 1:  # one by itself its call compiles
        compile_all(more)
    _ready.update(found, [key])


def shapes_of(tree: Any) -> tuple[Any, ...]:
    """Shapes and types of all arrays, for a key."""
    return tuple((np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree))


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
