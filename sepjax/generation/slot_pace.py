"""How launches of slots go by: what `sepjax bench serve` and /metrics tell of them."""

import dataclasses
import time


@dataclasses.dataclass
class Pace:
    """Sums over all launches so far. Written by the thread that steps, read by any."""

    launches: int = 0
    steps: int = 0  # of rows that generate
    tokens: int = 0  # that rows drew in these: over steps times rows, the share of rows that generate
    waiting: int = 0  # rows that had something left to read, when a launch was asked for
    seconds_before: float = 0.0  # for rows that begin and for prompts, until the device was done with them
    seconds_steps: float = 0.0  # then for steps, likewise
    _last: float = 0.0  # when the device was last seen to be done with something

    def asked(self, steps: int, waiting: int) -> None:
        """A launch was asked for."""
        self.launches, self.steps, self.waiting = self.launches + 1, self.steps + steps, self.waiting + waiting

    def begins(self) -> None:
        """Nothing was asked for before: what comes takes from now on."""
        self._last = time.perf_counter()

    def read(self) -> None:
        """The device is done with the prompts of a launch."""
        self.seconds_before += self._since()

    def stepped(self, tokens: int) -> None:
        """The device is done with the steps of a launch, which drew so many."""
        self.tokens += tokens
        self.seconds_steps += self._since()

    def _since(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before
