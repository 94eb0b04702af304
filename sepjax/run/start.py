"""Where the seconds of a start go: one line for whoever waits for the first step."""

import time
from collections.abc import Sequence

_LEAST = 0.05  # seconds; what takes less is not worth a word


class Start:
    """The parts of a start, in turn.

    Attributes:
      seconds: since it began.
    """

    def __init__(self, began: float | None = None):
        """`began`: when, by `time.monotonic()`; until now were imports then. None: now."""
        self._began = self._last = time.monotonic() if began is None else began
        self._parts: dict[str, float] = {}
        self.done("imports")

    def done(self, part: str) -> None:
        """All since the last part was done went into `part`, which may come several times."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """From the beginning to the last part."""
        return self._last - self._began

    def in_words(self, programs: Sequence[object] = ()) -> str:
        """The parts, and what went on beside them.

        first step after 27.4 s: imports 4.1, data 2.3, compiling 19.6, step 0.8; programs (lowering + compiling): ...
        """
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._parts.items() if seconds >= _LEAST)
        words = f"first step after {self.seconds:.1f} s: {parts or 'nothing that takes long'}"
        return words + (f"; programs, lowering + compiling: {', '.join(map(str, programs))}" if programs else "")
