"""The device's side of slots: the rows, and the thread that asks for what happens to them, one thing after another.

What is asked for at once is a launch: rows that begin, then runs of prompts, then some steps of all rows. Reading comes
first, so that a row whose prompt is read goes on at once.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Bool, Int32
from sepjax.clocks import Clocks
from sepjax.generation.device_thread import DeviceThread
from sepjax.generation.packed import Bytes, Packed, PackedState
from sepjax.generation.prepared import Prepared
from sepjax.generation.prompts import row_keys
from sepjax.generation.readers import BoundedReader
from sepjax.generation.sampling import Sampling
from sepjax.generation.slot_programs import Arrival, Before, Record, Rows, SlotPrograms, Wishes, slot_programs

ENDS = 16  # end tokens that the device knows of; the host knows all
_LENGTHS = 64, 192  # tokens of the shorter programs that read
# Tokens, beyond one row's, that a program reads at once. With a short prompt an accelerator is idle for the most part;
# a processor is not, and takes as many times longer as there are rows, whether they are wanted or not.
_AT_ONCE = {"cpu": 1}
_AT_ONCE_ELSEWHERE = 768


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """The next tokens of some prompts, for one program; where there are fewer than M, the last have no row's number."""

    rows: Int32[np.ndarray, "M"]
    tokens: Int32[np.ndarray, "M T"]
    left: Int32[np.ndarray, "M"]
    is_last: Bool[np.ndarray, "M"]


class SlotDevice:
    """n rows. What it is asked for happens in that order, in its own thread, which `rows` belong to.

    Attributes:
      most_steps: of a launch.
      lengths: tokens of the programs that read, the shortest first, and of how many rows each.
      row_bytes: of a row's cache.
      form: of rows that are taken and placed.
      arrivals: of what rows that begin are told.
      clocks: where its thread spends its time.
    """

    def __init__(
        self, prepared: Prepared, reader: BoundedReader, rows: int, most_steps: int, clocks: Clocks, together: int = 0
    ):
        """Makes room, and compiles all that will ever run. `together`: rows that are read at once; 0: as fits."""
        self._of, self._reader, self.clocks, self._num_rows = prepared, reader, clocks, rows
        self.most_steps, self.form = most_steps, reader.form
        chunk, tokens = reader.sizes.chunk, _AT_ONCE.get(jax.default_backend(), _AT_ONCE_ELSEWHERE)
        self.lengths = {
            length: min(rows, together or max(1, tokens // length))
            for length in sorted({min(length, chunk) for length in (*_LENGTHS, chunk)})
        }
        self.rows = self._empty(rows)
        cache: Any = self.rows.state.cache
        self.row_bytes: int = cache.nbytes // rows
        self.arrivals = Bytes(arrival(prepared, None, (), -1, False, False, None, is_reading=False))
        self.programs: SlotPrograms = slot_programs(
            prepared.graph, prepared.attention, self.form, self.arrivals, most_steps
        )
        self._thread = DeviceThread()
        self._warm_up()

    def _empty(self, rows: int) -> Rows:
        state = self._reader.empty(row_keys(0, rows))
        state = dataclasses.replace(state, done=jnp.ones(rows, bool))
        sampling = jax.device_put(Sampling.of_rows([Sampling.create()] * rows, rows))
        none, asks = jnp.full((rows, ENDS), -1, jnp.int32), (jnp.zeros(rows, bool) for _ in range(2))
        wishes = Wishes(sampling, none, jnp.full(rows, -1, jnp.int32), *asks)
        before = jax.tree.map(jnp.copy, Before.of(state, state.token, np.zeros(rows, bool)))
        return self._of.placed(Rows(state, wishes, before))

    def ask(self, job: Callable[..., Any], *args: Any) -> Future:
        """Has the thread do a job, after all before it."""
        return self._thread.ask(job, *args)

    def launch(
        self, coming: Sequence[tuple[int, np.ndarray, PackedState | None]], reads: Sequence[Read],
        ended: Bool[np.ndarray, "B"] | None, first: Int32[np.ndarray, "B"], steps: int,
    ) -> tuple[Future[list[Record]], Future[Record] | None]:  # fmt: skip
        """Asks for what comes next.

        Args:
          coming: rows that begin: number, bytes of an `Arrival`, where it stands (None: nothing was read).
          reads: runs of prompts, one a row at most.
          ended: rows that the host has ended; None: no steps.
          first: number of the step from which a row takes part.
          steps: up to `most_steps`.

        Returns:
          Records of the reads, and of the steps if there are any, on their way to the host. Those of the reads are
          there before the steps are made.
        """
        found = self.ask(self._read, coming, reads)
        return found, None if ended is None else self.ask(self._step, ended, first, steps)

    def take(self, i: int, *, back: bool, undrawn: bool) -> PackedState:
        """A copy of row i, to come (`SlotPrograms.take`)."""
        return PackedState(self.form, self.ask(self._take, i, back, undrawn))

    def look(self, i: int, *, back: bool) -> Any:
        """What row i holds (`SlotPrograms.look`)."""
        return self.ask(lambda: self.programs.look(self.rows, _number(i), np.array(back))).result()

    def _read(
        self, coming: Sequence[tuple[int, np.ndarray, PackedState | None]], reads: Sequence[Read]
    ) -> list[Record]:
        clocks, params, table = self.clocks, self._of.params, self._of.table_on_device
        records: list[Record] = []
        for each in coming:
            with clocks("device thread: begin" if each[2] is None else "device thread: place"):
                self._begin(*each)
        for read in reads:
            with clocks(f"device thread: read {read.tokens.shape[1]}"):
                args = read.rows, read.tokens, read.left, read.is_last
                self.rows, record = self.programs.read(params, self.rows, *args, table)
                record.numbers.copy_to_host_async()
                records.append(record)
        return records

    def _step(self, ended: np.ndarray, first: np.ndarray, steps: int) -> Record:
        args = ended, first, _number(steps), self._of.table_on_device
        with self.clocks("device thread: steps"):
            self.rows, record = self.programs.steps(self._of.params, self.rows, *args)
            record.numbers.copy_to_host_async()
        return record

    def _begin(self, i: int, told: np.ndarray, saved: PackedState | None) -> None:
        if saved is None:
            self.rows = self.programs.begin(self.rows, _number(i), told)
        else:
            self.rows = self.programs.place(self.rows, _number(i), self._of.placed(saved.packed), told)

    def _take(self, i: int, back: bool, undrawn: bool) -> Packed:
        with self.clocks("device thread: take"):
            return self.programs.take(self.rows, _number(i), np.array(back), np.array(undrawn))

    # -- by themselves ----------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Runs every program on rows that nobody has: what is compiled later would be somebody's wait."""
        for job in self._each_alone().values():
            self.ask(lambda job=job: jax.block_until_ready(job())).result()

    def _each_alone(self) -> dict[str, Callable[[], Any]]:
        """All that is ever asked for, as it is asked for, on rows that nobody has."""
        told = np.zeros(self.arrivals.nbytes, np.uint8)
        told = self.arrivals.of_host(dataclasses.replace(self.arrivals.tree_on_host(told), done=np.ones(1, bool)))

        def begin(how: Callable[[], PackedState | None]) -> Any:
            self._begin(0, told, how())
            return self.rows.state.token

        def taken() -> PackedState:
            return PackedState(self.form, self._take(0, False, False))

        jobs: dict[str, Callable[[], Any]] = {
            "begin": lambda: begin(lambda: None),
            "take": lambda: taken().packed,
            "take, to the host": lambda: taken().on_host().packed,
            "take, place": lambda: begin(taken),
            "take, to the host, place": lambda: begin(lambda: taken().on_host()),
            "look": lambda: self.programs.look(self.rows, _number(0), np.array(False)),
        }
        first = np.zeros(self._num_rows, np.int32)
        for length, together in self.lengths.items():
            none = np.arange(self._num_rows, self._num_rows + together, dtype=np.int32)
            read = Read(none, np.zeros((together, length), np.int32), np.zeros_like(none), np.zeros(together, bool))
            jobs[f"read {together} x {length}"] = lambda read=read: self._read([], [read])[0].numbers
        ended, most = np.ones(self._num_rows, bool), self.most_steps
        jobs["no step: all have ended"] = lambda: self._step(ended, first, most).numbers
        return jobs

    def alone(self, repeats: int = 10) -> dict[str, float]:
        """Median milliseconds of each thing that the device is asked for, by itself and waited for. For idle rows."""
        found: dict[str, float] = {}
        for name, job in self._each_alone().items():
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                self.ask(lambda job=job: jax.block_until_ready(job())).result()
                times.append(time.perf_counter() - begin)
            found[name] = 1e3 * sorted(times)[repeats // 2]
        return found


def arrival(
    prepared: Prepared, sampling: Sampling | None, ends: Sequence[int], limit: int, logprobs: bool, top_logprobs: bool,
    seed: int | None, *, is_reading: bool,
) -> Arrival:  # fmt: skip
    """What a row that begins is told.

    Args:
      prepared: the model.
      sampling: how it draws; None: the best token.
      ends: tokens that end it; the device knows the first 16.
      limit: tokens that it draws; -1: no limit.
      logprobs: whether it asks how probable its tokens were.
      top_logprobs: whether it asks for the most probable ones.
      seed: of its draws; None: those of a saved row go on.
      is_reading: whether it has something to read first.

    Raises ConfigError: a bias of a token that there is not.
    """
    known = np.full((1, ENDS), -1, np.int32)
    known[0, : len(ends[:ENDS])] = ends[:ENDS]
    asks: Any = (np.array([bool(x)]) for x in (logprobs, top_logprobs))
    sampling = Sampling.of_rows([sampling or Sampling.create()], 1).check(prepared.tokenizer.vocab_size)
    limits: Any = np.full(1, limit, np.int32)
    wishes = Wishes(sampling, known, limits, *asks)  # pyright: ignore[reportArgumentType]
    return Arrival(wishes, np.array([seed or 0], np.uint32), np.array([seed is not None]), np.array([is_reading]))


def _number(i: int) -> np.ndarray:
    return np.array(i, np.int32)
