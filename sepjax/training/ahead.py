"""What a start waits for, side by side: compiling, reading a checkpoint, the first batch of readers that start."""

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from sepjax import interrupt
from sepjax.attention.kernels_ahead import kernels_of

_KEPT = "/jax/compilation_cache/cache_hits"


def beside[T](function: Callable[..., T], *args: Any) -> Callable[[], T]:
    """Begins a call in a thread of its own. What is returned waits for its result, or raises what it raised.

    An error meanwhile ends the program without waiting for it.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    begun = pool.submit(function, *args)
    seen = weakref.ref(begun)  # what is told here is kept to the end of the program, and is not to keep the result
    interrupt.need_not_wait_for(lambda: (future := seen()) is None or future.done())
    pool.shutdown(wait=False)
    return begun.result


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one of the functions took, in seconds.

    Attributes:
      name: what it is called in words.
      lowering: in Python: tracing, and writing the program down. One function after the other does it.
      compiling: by XLA, in threads; or reading what an earlier start has kept.
      is_kept: whether it was an earlier start's.
    """

    name: str
    lowering: float
    compiling: float
    is_kept: bool

    def __str__(self) -> str:
        return f"{self.name} {self.lowering:.1f} + {self.compiling:.1f}{' (kept)' if self.is_kept else ''}"


class Ahead:
    """Compilations that have begun (`compile_ahead`)."""

    def __init__(self, mesh: Mesh, calls: Mapping[str, tuple[Any, ...]]):
        """Begins; arguments as `compile_ahead` has them."""
        self._mesh = mesh
        self._kernels: list[Callable[[], Any]] = []  # nobody waits for them: a program that needs one makes it itself
        self._begun = beside(self._lower, calls) if calls else list

    def wait_for_lowering(self) -> None:
        """Waits until Python's part is done, which goes on at half its speed beside other work in Python.

        Raises what went wrong.
        """
        self._begun()

    def wait(self) -> list[Compiled]:
        """Waits until all are done; what each took. Raises what went wrong."""
        return [finish() for finish in self._begun()]

    def _lower(self, calls: Mapping[str, tuple[Any, ...]]) -> list[Callable[[], Compiled]]:
        begun = []
        for name, (function, *args) in calls.items():
            start = time.monotonic()
            with jax.set_mesh(self._mesh):  # a thread has its own
                lowered = function.lower(*args)
            begun.append(beside(self._compile, name, time.monotonic() - start, lowered))
            self._kernels += [beside(kernel.compile) for kernel in kernels_of(lowered)]
        return begun

    def _compile(self, name: str, lowering: float, lowered: Any) -> Compiled:
        start, mine, kept = time.monotonic(), threading.get_ident(), []

        def note(event: str, **_: Any) -> None:
            if event == _KEPT and threading.get_ident() == mine:
                kept.append(event)

        jax.monitoring.register_event_listener(note)
        try:
            with jax.set_mesh(self._mesh):
                lowered.compile()
        finally:
            jax.monitoring.unregister_event_listener(note)
        return Compiled(name, lowering, time.monotonic() - start, bool(kept))


def compile_ahead(mesh: Mesh, calls: Mapping[str, tuple[Any, ...]]) -> Ahead:
    """Begins to compile jitted functions, each in a thread of its own once it is lowered.

    The functions keep what is compiled: a call with such arguments finds it.

    Args:
      mesh: what the calls will run under (`jax.set_mesh`).
      calls: by name, each a jitted function and its arguments, as `jax.ShapeDtypeStruct` with shardings; what takes
        longest comes first.

    Returns:
      What waits for them. On GPUs call it before anything runs that takes long: compilers time kernels on the device,
      and should have it to themselves.
    """
    return Ahead(mesh, calls)
