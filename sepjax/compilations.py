"""Counting what XLA compiles, with JAX's own counter."""

from collections.abc import Callable
from typing import Any

import jax


class counted_compilations:
    """A context whose value is a list that gets an entry for every program that XLA compiles inside."""

    def __enter__(self) -> list[float]:
        self._compiled: list[float] = []
        self._listen: Callable[..., None] = self._add
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self._compiled

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _add(self, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiled.append(duration)
