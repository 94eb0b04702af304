"""A stream: text goes in, text comes out, an event a token, over a cache of either kind.

    feed    new input, read by the cache's reader          pending -> cache, scores
    next    the next token is drawn, then decoded          an event a token

What the device holds between two tokens is one `DecodeState`; with a few words of the host's it can be saved at any
token and goes on from there as if nothing had happened. Over a bounded cache a stream has no end, in constant memory.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax import interrupt
from sepjax.array_typing import Int32
from sepjax.config import UserError
from sepjax.generation import lost
from sepjax.generation.ahead import MOST, Ahead, fetched
from sepjax.generation.batch import ready, request_of
from sepjax.generation.cache.view import CacheView
from sepjax.generation.device_loop import DecodeState, Request
from sepjax.generation.prepared import Prepared
from sepjax.generation.prompts import Prompt, encode_prompts, row_keys
from sepjax.generation.readers import Reader
from sepjax.generation.row import CacheUse, Row, RowSettings, StreamEvent
from sepjax.generation.sampling import Sampling
from sepjax.generation.saved import StreamStateError
from sepjax.generation.saved_row import SavedRow
from sepjax.promotion import as_usual, methods_as_usual
from sepjax.separators import warn_of_few_in


@methods_as_usual("__init__", "__deepcopy__", "feed", "view", "saved", "resume", "save", "restore")
class Stream(Iterator[StreamEvent]):
    """An iterator of `StreamEvent`: one text, or the turns of a conversation. Made by `Generator.stream`."""

    def __init__(
        self,
        prepared: Prepared,
        reader: Reader,
        settings: RowSettings,
        sampling: Sampling,
        *,
        seed: int = 0,
        control_tokens: bool = True,
    ):
        """Generates nothing until there is input."""
        self._of, self._reader, self._settings = prepared, reader, settings
        self._control_tokens = control_tokens
        # When a turn ends is the host's to say, and how early it must not: each has as many tokens as the first.
        self._later = dataclasses.replace(
            request_of(prepared, settings, sampling, 1), max_new_tokens=np.int32(-1), min_new_tokens=np.int32(0)
        )
        self._early = dataclasses.replace(self._later, min_new_tokens=np.int32(2**31 - 1))
        self._ahead = Ahead(prepared)
        self._state = reader.empty(row_keys(seed, 1))  # behind what `_ahead` holds; see `_settle`
        self._pending: list[int] = []
        self._has_drawn = self._is_stuck = self._is_closed = self._is_stepping = False
        self._event: StreamEvent | None = None  # that an interruption has held back
        self._nbytes: int | None = None  # of the cache; None: to be counted again
        self._row = self._new_row(continues=False, seen=0)

    def __repr__(self) -> str:
        """Of the host's own numbers: nothing waits for the device."""
        room = "growing" if self.cache_size is None else f"at most {self.cache_size} entries"
        return f"Stream({self._row.seen} tokens seen, {room}; {self._of.attention.in_words()})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stream":
        """Another stream, which goes on from here by itself; they share the model."""
        self._check_is_whole()
        self._settle()
        other = object.__new__(Stream)
        other.__dict__.update(self.__dict__)
        other._ahead = Ahead(self._of)
        other._state = jax.tree.map(lambda x: x.copy(), self._state)
        other._row = copy.deepcopy(self._row, memo | {id(self._of.tokenizer): self._of.tokenizer})
        return other

    def __copy__(self) -> "Stream":
        """The same as a deep copy: a step uses up the arrays of a stream's cache."""
        return copy.deepcopy(self)

    def __reduce__(self) -> Any:
        """Raises TypeError: pickles would hold the model."""
        raise TypeError("a Stream cannot be pickled; use its save(FOLDER), and Generator.stream(resume=FOLDER)")

    def _new_row(self, *, continues: bool, seen: int) -> Row:
        has_end = self._reader.ends_with_positions
        return Row(self._of.tokenizer, self._settings, continues=continues, seen=seen, has_end=has_end)

    def feed(self, prompt: Prompt) -> None:
        """Starts a new turn with further input: a text (with BOS if it is the first and the tokenizer adds it) or ids.

        Raises:
          PromptError: no tokens, or ids outside the vocabulary.
          ConfigError: more tokens than the model has positions for.
        """
        self._check_is_whole()
        tokenizer = self._of.tokenizer
        if isinstance(prompt, str) and (self._row.seen or self._pending):
            prompt = tokenizer.encode(prompt, control_tokens=self._control_tokens)
        (ids,) = encode_prompts(tokenizer, [prompt], control_tokens=self._control_tokens)
        self._settle()
        pending = list(self._pending)
        if self._has_drawn and not pending:  # the last token drawn has not been taken up yet
            pending.append(int(self._state.token[0]))
        pending += ids
        self._reader.check(self._row.seen, [pending], self._settings.max_new_tokens, self._state.cache)
        warn_of_few_in(ids, self._of.table, self._of.attention, "the text fed")
        self._pending, self._is_closed, self._event = pending, False, None
        self._row = self._new_row(continues=any(map(tokenizer.token_bytes, ids)), seen=self._row.seen)

    @property
    def finish_reason(self) -> str | None:
        """Why the turn has ended; None while it runs. `feed` starts a new turn."""
        return self._row.finish_reason

    @property
    def cache(self) -> CacheUse:
        """What the cache holds now."""
        ahead = self._ahead
        held = ahead.record.held[0, ahead.column] if len(ahead) else self._state.cache.held()[0]
        return CacheUse(int(held), self._row.seen, self._state.cache.nbytes)

    @property
    def cache_size(self) -> int | None:
        """Maximum entries of the cache; None: it grows."""
        return self._reader.cache_size

    def view(self) -> CacheView:
        """The entries of a bounded cache by zone, with their positions in the text. Others raise StreamStateError."""
        self._settle()
        return SavedRow(self._state, (), self._has_drawn, self._row.state()).view()

    @property
    def last_token(self) -> int | None:
        """The last sampled token; None before the first."""
        if not self._has_drawn:
            return None
        ahead = self._ahead
        return int(ahead.record.token[0, ahead.column] if len(ahead) else self._state.token[0])

    def __next__(self) -> StreamEvent:
        """Generates the next token.

        Ctrl-C is harmless (`interrupt.Deferred`): the next call continues there. Any other asynchronous exception in
        the middle of a step leaves a stream that has lost its cache.

        Raises:
          StreamStateError: such an exception was raised earlier, or another thread is taking a token.
          ConfigError: a full cache with `keep_all_separators`.
          NotNumbers: the model's scores are NaN or infinite; at each call until there is other input.
        """
        if self._event is None:
            if self._is_closed or self._row.finish_reason is not None or not (self._has_drawn or self._pending):
                lost.check(self._row.finish_reason, self._row.seen)
                raise StopIteration
            self._check_is_whole()
            with interrupt.Deferred() as deferred, as_usual():
                self._event = self._step(deferred)
        event = self._event
        if event.finish_reason == "error":
            self._event = None
            lost.check(event.finish_reason, event.cache.seen)
        self._event = None  # without a call before it is given, nothing interrupts
        return event

    def _check_is_whole(self) -> None:
        interrupt.check("this stream", self._is_stepping, StreamStateError)

    def _step(self, deferred: interrupt.Deferred) -> StreamEvent:
        self._is_stepping = True
        request = self._early if self._row.is_early else self._later
        try:
            if self._is_stuck:
                self._state = dataclasses.replace(self._state, cache=self._state.cache.make_room())
            if self._is_stuck or self._pending:
                self._nbytes = None
            if self._pending:
                record, column = self._read(request, deferred), 0
            else:
                record, column = self._made(request)
        except UserError:
            self._is_stepping = False  # the state is that of before, or after a part of the prompt
            raise
        taken, self._pending, self._has_drawn = len(self._pending) or 1, [], True
        event = self._event_of(record, column, taken)
        self._is_stepping = False
        return event

    def _read(self, request: Request, deferred: interrupt.Deferred) -> Any:
        """Takes up what was fed and draws a token; returns the record."""
        rows, seen, new = [self._pending], self._row.seen, self._settings.max_new_tokens
        given = self._reader.with_room(self._state, rows, seen, new), rows, request, seen, new
        if new != 1:  # else the first token is the last
            ready(self._ahead.program, self._reader, given, functools.partial(self._ahead.programs, request))
        self._state, steps = self._reader.read(*given, functools.partial(self._note, deferred))
        return fetched(steps, told=self._settings.logprobs)

    def _made(self, request: Request) -> tuple[Any, int]:
        """Draws the next token, or takes one that is there; returns the record, and the token's column of it."""
        row, ahead = self._row, self._ahead
        if not len(ahead) and not self._reader.ends_with_positions:
            self._reader.check(row.seen, [[0]], None)
        most = MOST if row.left < 0 else row.left
        most = 1 if row.is_early else min(most, Row.LAST_POSITION - row.seen)
        self._state = ahead.step(self._state, request, most, told=self._settings.logprobs)
        return ahead.record, ahead.column

    def _settle(self) -> None:
        """Puts `_state` behind the last token, where it may be behind tokens that nobody has asked for yet."""
        if len(self._ahead):
            with interrupt.Deferred():  # or the state of before would be used up, and the one after it nowhere
                self._is_stuck = False
                self._state = self._ahead.settled(self._state)

    def _note(self, deferred: interrupt.Deferred, state: DecodeState, read: Int32[np.ndarray, "B"]) -> None:
        """Keeps where the stream stands after a part of a prompt: the arrays of before are used up."""
        self._row.seen += int(read[0])
        self._state, self._pending = state, self._pending[int(read[0]) :]
        if deferred.pressed:
            self._is_stepping = False
            raise KeyboardInterrupt

    def close(self) -> None:
        """Ends the iteration, as of a generator, until `feed` or `resume`. The stream can still be saved."""
        self._is_closed = True

    def _event_of(self, steps: Any, column: int, taken: int) -> StreamEvent:
        self._is_stuck = bool(steps.is_stuck[0]) and not len(self._ahead)
        if self._nbytes is None:
            self._nbytes = self._state.cache.nbytes
        counts: dict[str, Any] = {"taken": taken, "held": int(steps.held[0, column]), "nbytes": self._nbytes}
        if not self._settings.logprobs:
            return self._row.take(int(steps.token[0, column]), **counts)
        top = steps.top_tokens[0, column], steps.top_logprobs[0, column]
        return self._row.take(int(steps.token[0, column]), **counts, logprob=float(steps.logprob[0, column]), top=top)

    # -- saved and resumed ------------------------------------------------------------------------------------------

    def saved(self) -> SavedRow:
        """The state of the stream, for `resume`, here or in `Slots`. Its arrays are copies."""
        self._check_is_whole()
        self._settle()
        return self._saved(jax.tree.map(lambda x: x.copy(), self._state))

    def _saved(self, state: DecodeState) -> SavedRow:
        row = self._row.state()
        if self._event is not None:  # its text comes with the next one's
            row["text"]["held"] = self._event.text + row["text"]["held"]
            row["text"]["passed"] += len(self._event.text)
        return SavedRow(state, tuple(self._pending), self._has_drawn, row)

    def resume(self, row: SavedRow) -> None:
        """Continues from where `saved` was called, token for token, for up to `max_new_tokens` more tokens.

        Raises:
          StreamStateError: a row of another kind of cache than this stream's, or of one of other sizes.
          ConfigError: more tokens than the model has positions for, or memory.
        """
        row.check(self._reader)
        state, new = row.state, self._settings.max_new_tokens
        cache: Any = state.cache
        if self._row.end_of(row.row) is None and (row.pending or row.has_drawn):
            self._reader.check(row.seen, [row.pending or [0]], new, cache)
            if not row.pending:  # else its reader makes room
                cache = self._reader.widened(cache, row.seen + 1, new)
        # A row of slots that ended by its number of tokens is done, as its device sees it.
        done = self._of.placed(np.zeros(1, bool))  # as what a step gives, whose program it then has
        state = dataclasses.replace(state, cache=cache, done=done)
        self._ahead = Ahead(self._of)
        self._state = jax.tree.map(lambda x: jnp.asarray(x).copy(), state)
        self._pending, self._has_drawn, self._is_closed = list(row.pending), row.has_drawn, False
        self._is_stepping, self._event = False, None
        self._row.restore(row.row)
        self._nbytes = None
        self._is_stuck = bool(self._state.cache.is_stuck()[0])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes all that `restore` needs, in place of an older stream. A kill at any moment leaves the old or the new.

        Raises:
          sepjax.files.ForeignFolder: the folder holds something else than a saved stream.
          sepjax.files.WriteError: it cannot be written.
        """
        self._check_is_whole()
        self._settle()
        self._saved(self._state).write(folder, self._reader, self._of.config)

    def restore(self, folder: str | os.PathLike[str]) -> None:
        """Continues from where `save` was called, token for token, for up to `max_new_tokens` more tokens.

        Raises:
          FileNotFoundError: nothing was saved there.
          StreamStateError: the files are damaged, or of a model of another shape, or of a cache of other sizes.
        """
        self.resume(SavedRow.read(folder, self._reader, self._of.config))
