"""A conversation whose last turn can be taken back: what `sepjax chat` keeps, whatever terminal it has.

A bounded cache forgets, so it cannot be wound back: what a turn pushed out is gone. The state of before the turn is
kept instead, a second copy of the cache, and a turn that is taken back leaves everything exactly as it was.
"""

import dataclasses
import time
from collections.abc import Callable, Generator

import jax

from sepjax.config import UserError
from sepjax.generation.cache.view import CacheView
from sepjax.generation.conversation import Conversation
from sepjax.generation.row import CacheUse, StreamEvent
from sepjax.generation.saved_row import SavedRow
from sepjax.generation.stream import Stream
from sepjax.measure import counted_compilations

# From instructions: a stream that nothing was fed to, or one that was restored, and the form of its turns.
type Begin = Callable[[str], tuple[Stream, Conversation]]


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A turn, and all that there was before it."""

    text: str
    row: SavedRow
    form: Conversation
    turns: int
    is_saved: bool


@dataclasses.dataclass
class Measured:
    """Of the last answer."""

    tokens: int = 0
    first: float = 0.0  # seconds to the first token
    seconds: float = 0.0  # from the first token to the last
    compiling: float = 0.0  # seconds of both together
    compiling_later: float = 0.0  # of these, after the first token

    @property
    def rate(self) -> float:
        """Tokens a second after the first; 0 where nothing can be said."""
        seconds = self.seconds - self.compiling_later
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else 0.0


class Talk:
    """One conversation after the other, each over a stream of its own.

    Attributes:
      system: the instructions in front of the first turn.
      events: the stream.
      form: how turns are written.
      turns: of the user so far.
      is_saved: whether nothing was said that is not saved.
      is_asked: whether the last turn waits for its answer.
      measured: of the last answer.
      compiled: seconds of compiling so far.
      is_same: whether the last answer was said again, and came out as it was.
    """

    def __init__(self, begin: Begin, first: tuple[Stream, Conversation] | None = None, *, system: str = ""):
        """Begins.

        Args:
          begin: makes a new conversation.
          first: the one to begin with, such as one that was saved; None: a new one.
          system: its instructions.
        """
        self._begin, self.system, self.compiled = begin, system, 0.0
        self._start(first or begin(system))

    def _start(self, made: tuple[Stream, Conversation]) -> None:
        self.events, self.form = made
        self.turns, self.is_saved, self.is_asked, self.measured = 0, True, False, Measured()
        self._last: _Turn | None = None
        self._answer, self._tries, self.is_same = "", 0, False

    def clear(self, system: str | None = None) -> None:
        """Begins anew, as if nothing had been said; with other instructions, if there are any."""
        system = self.system if system is None else system
        self._start(self._begin(system))
        self.system = system

    def say(self, text: str) -> str:
        """Feeds what the user says; returns what is to be reported. `answer` is next.

        Raises ConfigError, PromptError, HubError where that cannot be fed; nothing was said then.
        """
        self._last = _Turn(text, self.events.saved(), self.form.copy(), self.turns, self.is_saved)
        self._answer, self._tries = "", 0
        return self._feed(text)

    def say_again(self) -> str | None:
        """Takes the last turn back and says it again; the answer is drawn anew. None: there was no turn."""
        if self._last is None:
            return None
        last, tries = self._last, self._tries + 1
        self._restore(last)
        self._last, self._tries = last, tries
        self.events.resume(_drawn_anew(last.row, tries))
        return self._feed(last.text)

    def take_back(self) -> None:
        """Everything as it was before the last turn, exactly."""
        if self._last is not None:
            self._restore(self._last)

    def _restore(self, turn: _Turn) -> None:
        self.events.resume(turn.row)
        self.form, self.turns, self.is_saved = turn.form.copy(), turn.turns, turn.is_saved
        self._last, self.is_asked = None, False

    def _feed(self, text: str) -> str:
        try:
            ids, report = self.form.turn(text, before=self.events.last_token)
            self.events.feed(ids)
        except (KeyboardInterrupt, UserError):
            self.take_back()
            raise
        self.turns, self.is_saved, self.is_asked = self.turns + 1, False, True
        return report

    def answer(self) -> Generator[StreamEvent]:
        """The events of the answer; close it to cut the answer short. An error takes the turn back."""
        texts: list[str] = []
        self.measured, self.is_asked = (measured := Measured()), False
        began = time.perf_counter()
        try:
            with counted_compilations() as compiled:
                for event in self.events:
                    now = time.perf_counter()
                    spent = min(sum(compiled), now - began)  # several compile at the same time
                    if not measured.tokens:
                        measured.first, before = now - began, spent
                    measured.tokens += 1
                    measured.seconds = now - began - measured.first
                    self.compiled += spent - measured.compiling
                    measured.compiling, measured.compiling_later = spent, spent - before
                    texts.append(event.text)
                    yield event
        except (KeyboardInterrupt, UserError):
            self.take_back()
            raise
        finally:
            if self._last is not None:
                text = "".join(texts)
                self.form.answered(text)
                self.is_same, self._answer = bool(self._tries) and text == self._answer, text

    def save(self, folder: str) -> str:
        """Saves the stream; returns what there is to say about it."""
        if not folder:
            return "where to? /save FOLDER"
        try:
            self.events.save(folder)
        except (UserError, OSError) as error:
            return f"not saved: {error}"
        self.is_saved = True
        return f"saved in {folder}; --resume={folder} goes on from here"

    @property
    def cache(self) -> CacheUse:
        """What the cache holds, counted."""
        return self.events.cache

    def view(self) -> CacheView | None:
        """The same by its zones; None for a growing cache."""
        return None if self.events.cache_size is None else self.events.view()

    def stats(self) -> list[str]:
        """What can be told, in lines."""
        use, view, most = self.cache, self.view(), self.events.cache_size
        held = f"{use.held:,} entries" if most is None else f"{use.held:,} of {most:,} slots"
        zones = f" ({view.sinks} sinks, {view.kept} kept, {view.recent} recent)" if view else ""
        lines = [
            f"form       {self.form.name}; instructions: {self.system or 'none'}",
            f"turns      {self.turns}",
            f"cache      {held}{zones}, {use.bytes:,} bytes",
            f"seen       {use.seen:,} tokens, {use.kv_kept:.1%} of them held",
            f"compiled   {self.compiled:.1f} s in all",
        ]
        if self.measured.tokens:
            rate = f", then {self.measured.rate:.1f} tokens/s" if self.measured.rate else ""
            first = self.measured.first
            lines.insert(2, f"answer     {self.measured.tokens} tokens, the first after {first:.2f} s{rate}")
        if self._last is not None:
            size = self._last.row.nbytes
            lines.append(f"regenerate keeps the state before the last turn: {size:,} bytes more")
        return lines


def _drawn_anew(row: SavedRow, tries: int) -> SavedRow:
    """The row with other draws to come, and nothing else changed."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, tries))(row.state.key)
    return dataclasses.replace(row, standing=dataclasses.replace(row.state, key=keys))
