"""Settings of JAX that are somebody else's: under strict promotion of dtypes or ranks this package works as usual.

`jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` are for finding faults in one's own code.
They hold for a whole process, and would refuse what is meant here.
"""

import contextlib
import os
from collections.abc import Callable

import jax

_USUAL = {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}


class as_usual(contextlib.ContextDecorator):
    """Inside, or in a function with this decorator, JAX's own promotion holds, in this thread."""

    def __init__(self) -> None:
        self._set: contextlib.ExitStack | None = None

    def _recreate_cm(self) -> "as_usual":
        """One for each call of a decorated function, as `contextlib.contextmanager` has it."""
        return as_usual()

    def __enter__(self) -> None:
        found = jax.config
        if found.jax_numpy_dtype_promotion != "standard" or found.jax_numpy_rank_promotion != "allow":
            self._set = contextlib.ExitStack()
            self._set.enter_context(jax.numpy_dtype_promotion("standard"))
            self._set.enter_context(jax.numpy_rank_promotion("allow"))

    def __exit__(self, *_: object) -> None:
        if self._set is not None:
            self._set.close()


def methods_as_usual[C](*names: str) -> Callable[[type[C]], type[C]]:
    """A class whose methods of these names run `as_usual`."""

    def change(cls: type[C]) -> type[C]:
        for name in names:
            setattr(cls, name, as_usual()(getattr(cls, name)))
        return cls

    return change


def of_this_process() -> None:
    """JAX's own promotion for the whole process: that of a command, in which nobody else's code runs."""
    for name, value in _USUAL.items():
        if os.environ.get(name, value) != value:
            os.environ[name] = value  # of processes that this one begins
            jax.config.update(name.lower(), value)
