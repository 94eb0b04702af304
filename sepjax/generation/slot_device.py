"""The device's side of slots: the rows, and the thread that asks for what happens to them, one thing after another."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.clocks import Clocks
from sepjax.generation.device_thread import DeviceThread
from sepjax.generation.prepared import Prepared
from sepjax.generation.prompts import row_keys
from sepjax.generation.readers import BoundedReader
from sepjax.generation.sampling import Sampling
from sepjax.generation.slot_programs import Before, Record, Rows, SlotPrograms, Wishes, slot_programs

ENDS = 16  # end tokens that the device knows of; the host knows all
_SHORT = 64  # tokens of the shorter of two programs that read

type Read = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of a prompt: row, tokens, how many, is it the last


class SlotDevice:
    """n rows. All but `nothing` and the sizes belongs to its thread; what it is asked for happens in that order.

    Attributes:
      runs: tokens of the programs that read, the shortest first.
      nothing: a row that nobody has.
      row_bytes: of a row's cache.
      clocks: where its thread spends its time.
    """

    def __init__(self, prepared: Prepared, reader: BoundedReader, rows: int, clocks: Clocks):
        """Makes room, and compiles all that will ever run."""
        self._of, self._reader, self.clocks, self._num_rows = prepared, reader, clocks, rows
        self.programs: SlotPrograms = slot_programs(prepared.graph, prepared.attention)
        self._thread = DeviceThread()
        self.runs = sorted({min(_SHORT, reader.sizes.chunk), reader.sizes.chunk})
        self.rows = self._empty(rows)
        self.nothing = self._empty(1)
        cache: Any = self.nothing.state.cache
        self.row_bytes: int = cache.nbytes
        self._warm_up()

    def _empty(self, rows: int) -> Rows:
        state = self._reader.empty(row_keys(0, rows))
        state = dataclasses.replace(state, done=jnp.ones(rows, bool))
        sampling = jax.device_put(Sampling.of_rows([Sampling.create()] * rows, rows))
        none, asks = jnp.full((rows, ENDS), -1, jnp.int32), (jnp.zeros(rows, bool) for _ in range(2))
        wishes = Wishes(sampling, none, jnp.full(rows, -1, jnp.int32), *asks)
        before = jax.tree.map(jnp.copy, Before.of(state, state.token, np.zeros(rows, bool)))
        return self._of.placed(Rows(state, wishes, before))

    def _warm_up(self) -> None:
        """Runs every program on rows that nobody has: what is compiled later would be somebody's wait."""
        for job in self._each_alone().values():
            self.ask(lambda job=job: jax.block_until_ready(job())).result()

    def ask(self, job: Callable[..., Any], *args: Any) -> Future:
        """Has the thread do a job, after all before it."""
        return self._thread.ask(job, *args)

    def launch(
        self, coming: Sequence[tuple[int, Rows]], ended: np.ndarray | None, reads: Sequence[Read]
    ) -> Future[list[Record | None]]:
        """Rows that begin; then a step, if there are rows that have `ended` or not; then the next runs of prompts.

        Returns records of the step, or None, and of the runs, on their way to the host.
        """
        return self.ask(self._launch, coming, ended, reads)

    def take(self, i: int, back: bool) -> Future:
        """A copy of row i (`SlotPrograms.take`)."""
        return self.ask(self._copied, "take", i, back)

    def look(self, i: int, back: bool) -> Future:
        """What row i holds (`SlotPrograms.look`)."""
        return self.ask(self._copied, "look", i, back)

    def _launch(
        self, coming: Sequence[tuple[int, Rows]], ended: np.ndarray | None, reads: Sequence[Read]
    ) -> list[Record | None]:
        clocks, params, table = self.clocks, self._of.params, self._of.table_on_device
        records: list[Record | None] = [None]
        for i, row in coming:
            with clocks("device thread: place"):
                self._place(i, row)
        if ended is not None:
            with clocks("device thread: step"):
                self.rows, records[0] = self.programs.step(params, self.rows, ended, table)
        for read in reads:
            with clocks(f"device thread: read {read[1].shape[1]}"):
                self.rows, record = self.programs.read(params, self.rows, *read, table)
                records.append(record)
        for record in records:
            if record is not None:
                record.numbers.copy_to_host_async()
        return records

    def _place(self, i: int, row: Rows) -> None:
        self.rows = self.programs.place(self.rows, _number(i), self._of.placed(row))

    def _copied(self, how: str, i: int, back: bool) -> Any:
        with self.clocks(f"device thread: {how}"):
            return getattr(self.programs, how)(self.rows, _number(i), np.array(back))

    # -- by themselves ----------------------------------------------------------------------------------------------

    def _each_alone(self) -> dict[str, Callable[[], Any]]:
        """All that is ever asked for, as it is asked for, on rows that nobody has."""
        ended = np.ones(self._num_rows, bool)
        on_host = dataclasses.replace(
            self.nothing, state=dataclasses.replace(jax.device_get(dataclasses.replace(self.nothing.state, key=None)),
            key=self.nothing.state.key),
        )  # fmt: skip

        def place(row: Rows) -> Any:
            self._place(0, row)
            return self.rows.state.token

        jobs: dict[str, Callable[[], Any]] = {
            "place, from the device": lambda: place(self.nothing),
            "place, from the host": lambda: place(on_host),
            "step": lambda: self._launch([], ended, [])[0],
        }
        for length in self.runs:
            read = _number(0), np.zeros((1, length), np.int32), np.zeros(1, np.int32), np.zeros((), bool)
            jobs[f"read {length}"] = lambda read=read: self._launch([], None, [read])[1]
        jobs["take"] = lambda: self._copied("take", 0, False)
        jobs["take, to the host"] = lambda: jax.device_get(
            dataclasses.replace(self._copied("take", 0, False), key=None)
        )
        jobs["look"] = lambda: self._copied("look", 0, False)
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


def _number(i: int) -> np.ndarray:
    return np.array(i, np.int32)
