"""Settings of JAX that are somebody else's: under strict promotion of dtypes or ranks this package works as usual.

`jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` are for finding faults in one's own code.
They hold for a whole process, and would refuse what is meant here.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import jax

_USUAL = {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}


@contextlib.contextmanager
def as_usual() -> Iterator[None]:
    """Inside, or in a function with this decorator, JAX's own promotion holds, in this thread."""
    found = jax.config
    if found.jax_numpy_dtype_promotion == "standard" and found.jax_numpy_rank_promotion == "allow":
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


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
