"""What a program is at, and for how long: everything that may take more than two seconds says so here.

    with working("loading smollm2-135m"): ...
    for batch in counted(batches, "scoring dense", total=12, unit="batches"): ...

On a terminal it is shown while it lasts, and then one line with the time it took. A log (stderr is a file or a pipe)
gets a line of what takes longer than ten seconds: after 10, 20, 40, 80 s and so on, and one at its end. Nothing where
another program takes its lines (`console.given_to`), after `--quiet`, or before two seconds are over. rich draws it,
and is imported then: what is quick does not wait for it.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from sepjax import console

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_PATIENCE = 2.0  # seconds that nobody minds
LOG_PATIENCE = 10.0  # seconds before a log has a first line
_EVERY = 0.125  # seconds between two looks
_BAR = 24  # columns


class Work:
    """Something that takes time."""

    def __init__(self, what: str, total: int | float | None, unit: str, patience: float):
        self.what, self.total, self.unit, self.patience = what, total, unit, patience
        self.done, self.begun, self.is_shown = 0.0, time.monotonic(), False
        self.logged_at = 0.0  # seconds after which a log had its last line

    def add(self, amount: int | float = 1) -> None:
        """So much more of `total` is done."""
        self.done += amount

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun

    def note(self) -> str:
        """How far it is, in words."""
        words = [_duration(self.seconds)]
        if self.total:
            words.insert(0, f"{min(self.done / self.total, 1):.0%} of {_amount(self.total, self.unit)}")
            if 0 < self.done < self.total:
                words.append(f"{_duration(self.seconds / self.done * (self.total - self.done))} left")
        return ", ".join(words)


@contextlib.contextmanager
def working(what: str, total: int | float | None = None, unit: str = "", patience: float = _PATIENCE) -> Iterator[Work]:
    """Shows that the block is at work, and how far it is where it tells by `add`.

    Args:
      what: "loading smollm2-135m".
      total: of what there is to do; None: nobody knows.
      unit: of `total`, in the plural; "bytes" are shown as MB or GB.
      patience: seconds before anything is shown.
    """
    work = Work(what, total, unit, patience)
    if not _is_told():
        yield work
        return
    _display.begin(work)
    done = False
    try:
        yield work
        done = True
    finally:
        _display.end(work, done=done)


def counted[T](
    items: Iterable[T],
    what: str,
    total: int | float | None = None,
    unit: str = "",
    size: Callable[[T], int | float] = lambda item: 1,
) -> Iterator[T]:
    """The items; each adds its `size` to what is done once the next one is asked for. See `working`."""
    with working(what, total, unit) as work:
        for item in items:
            yield item
            work.add(size(item))


def is_shown() -> bool:
    """Whether anybody sees progress: stderr is a terminal, its lines go nowhere else, and nobody asked for quiet."""
    return _is_told() and _is_terminal()


def _is_told() -> bool:
    """The same for a terminal or a log."""
    return not _quiet and not console.is_taken() and sys.stderr is not None


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Inside, no progress is shown if `quiet`."""
    if quiet:
        _quiet.append(None)
    try:
        yield
    finally:
        if quiet:
            _quiet.pop()


_quiet: list[None] = []


class _Display:
    """The lines of all that is being done. One thread draws them; `end` has them gone when it returns."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._works: list[Work] = []
        self._live: Live | None = None
        self._is_drawn = False  # by a thread

    def begin(self, work: Work) -> None:
        with self._lock:
            self._works.append(work)
            if not self._is_drawn:
                self._is_drawn = True
                threading.Thread(target=self._draw, name="progress", daemon=True).start()

    def end(self, work: Work, *, done: bool) -> None:
        with self._lock:
            self._works.remove(work)
            if not _is_terminal():
                work.is_shown = work.seconds >= max(LOG_PATIENCE, work.patience)
            self._refresh()
            if work.is_shown and done:
                amount = f"{_amount(work.total, work.unit)}, " if work.total and work.unit else ""
                console.say(f"{work.what}: {amount}{_duration(work.seconds)}")

    def _draw(self) -> None:
        while True:
            with self._lock:
                if not self._works:
                    self._is_drawn = False
                    return
                self._refresh()
            time.sleep(_EVERY)

    def _refresh(self) -> None:
        """`_show`; a terminal that has gone must not end the run."""
        try:
            self._show()
        except OSError:
            self._live = None

    def _show(self) -> None:
        """Draws what has taken longer than its patience; ends the drawing where that is nothing."""
        if not _is_terminal():
            self._log()
            return
        for work in self._works:
            work.is_shown |= work.seconds >= work.patience
        if not any(work.is_shown for work in self._works):
            if self._live is not None:
                self._live.stop()
                self._live = None
            return
        if self._live is None:
            self._live = _live()
            self._live.start()
        self._live.update(self._table(), refresh=True)

    def _log(self) -> None:
        """Lines of what has taken twice as long as when it had its last one."""
        for work in self._works:
            if work.seconds >= max(2 * work.logged_at, LOG_PATIENCE, work.patience):
                work.logged_at = work.seconds
                console.say(f"{work.what}: {work.note()}")

    def _table(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for work in (work for work in self._works if work.is_shown):
            bar = ProgressBar(total=work.total, completed=work.done, width=_BAR) if work.total else Text("...")
            table.add_row(Text(work.what, no_wrap=True, overflow="ellipsis"), bar, Text(work.note()))
        return table


def _live() -> "Live":
    from rich.console import Console
    from rich.live import Live

    class Screen(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False  # a program that is ended by Ctrl-C could not bring it back

    # What others print meanwhile goes above; what goes into a file or a pipe stays with it.
    return Live(
        console=Screen(file=sys.stderr), auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty()
    )


_display = _Display()


def _amount(total: int | float, unit: str) -> str:
    if unit == "bytes":
        return f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"
    return f"{total:,.0f} {unit}".rstrip()


def _duration(seconds: float) -> str:
    """Seconds as people write them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
