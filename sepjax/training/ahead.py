"""What a start waits for, side by side: compiling, reading a checkpoint, the first batch of readers that start."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from sepjax import interrupt


def beside[T](function: Callable[..., T], *args: Any) -> Callable[[], T]:
    """Begins a call in a thread of its own. What is returned waits for its result, or raises what it raised.

    An error meanwhile ends the program without waiting for it.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    begun = pool.submit(function, *args)
    interrupt.need_not_wait_for(begun.done)
    pool.shutdown(wait=False)
    return begun.result


def compile_ahead(mesh: Mesh, calls: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    """Begins to compile jitted functions, each in a thread of its own.

    The functions keep what is compiled: a call with such arguments finds it.

    Args:
      mesh: what the calls will run under (`jax.set_mesh`).
      calls: each a jitted function and its arguments, as `jax.ShapeDtypeStruct` with shardings.

    Returns:
      What waits until all are done, and raises what went wrong. On GPUs call it before anything runs that takes long:
      compilers time kernels on the device, and should have it to themselves.
    """

    def compiled(function: Any, *args: Any) -> None:
        with jax.set_mesh(mesh):  # a thread has its own
            function.lower(*args).compile()

    begun = [beside(compiled, *call) for call in calls]

    def wait() -> None:
        for finish in begun:
            finish()

    return wait
