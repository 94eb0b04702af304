"""A profile of some steps of a run: `sepjax train --profile_steps=10:15`.

<workdir>/profile/plugins/profile/<time>/*.xplane.pb               for xprof (TensorBoard's profile page)
                                        /perfetto_trace.json.gz    for Perfetto
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from sepjax.config import ConfigError
from sepjax.console import say

STEP = "train"  # what a step is called in the profile


def parse_steps(text: str, last: int) -> range:
    """The steps of "10:15", both included; of "" none. Raises ConfigError for others than 1 to `last`."""
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) <= last:
        raise ConfigError(
            f"--profile_steps={text} is not FIRST:LAST, steps of this run, which are 1 to {last}; for example "
            f"--profile_steps={min(10, last)}:{min(15, last)}"
        )
    return range(int(found[1]), int(found[2]) + 1)


class Profile:
    """Records these steps; a context manager, which ends a recording that an error cuts short.

    Python's own calls are left out: they would be most of the file.
    """

    def __init__(self, workdir: Path, steps: range, *, done: int = 0, pauses: Sequence[Callable[[], Any]] = ()):
        """What is to be recorded.

        Args:
          workdir: of the run.
          steps: from `parse_steps`.
          done: steps that are behind; a run that is resumed within `steps` records what is left of them.
          pauses: contexts, for clocks that stop while the recording is written.
        """
        self.folder, self._steps, self._on, self._pauses = workdir / "profile", steps, False, pauses
        if steps and steps[-1] <= done:
            say(f"steps {steps[0]} to {steps[-1]} are behind: this start has none to profile")

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The block is this step; the recording begins before the first."""
        if step in self._steps and not self._on:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
            self._on = True
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
            yield

    def end(self, step: int, result: Any) -> None:
        """After the last step: waits for its `result`, ends the recording and says where it is."""
        if not self._on or step < self._steps[-1]:
            return
        jax.block_until_ready(result)
        with ExitStack() as paused:
            for pause in self._pauses:
                paused.enter_context(pause())
            self._stop()
        steps = f"steps {self._steps[0]} to {self._steps[-1]}"
        say(f"profile of {steps} in {self.folder}, for xprof and Perfetto (docs/quickstart.md)", error=False)

    def _stop(self) -> None:
        self._on = False
        jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on:
            self._stop()
