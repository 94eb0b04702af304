"""The device's side of slots: the rows, and the thread that asks for what happens to them, one thing after another.

What is asked for at once is a launch: rows that begin, then runs of prompts, then some steps of all rows. Reading comes
first, so that a row whose prompt is read goes on at once.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Bool, Int32
from sepjax.clocks import Clocks
from sepjax.generation.device_loop import compile_all
from sepjax.generation.device_thread import DeviceThread, Sweeper
from sepjax.generation.packed import COPIES, Bytes, Copying, Packed, PackedState
from sepjax.generation.prepared import Prepared
from sepjax.generation.prompts import row_keys
from sepjax.generation.readers import BoundedReader
from sepjax.generation.sampling import Sampling
from sepjax.generation.slot_arrival import ENDS, arrival
from sepjax.generation.slot_mesh import spread
from sepjax.generation.slot_pool import Pool, PooledState
from sepjax.generation.slot_programs import SlotPrograms, slot_programs
from sepjax.generation.slot_rows import Before, Exchange, Record, Rows, Wishes
from sepjax.generation.slot_turns import Read, shapes_of

log = logging.getLogger("sepjax.slots")
_LEAST, _MOST = 4, 40  # rows that one program has leave and begin: an eighth of all within these bounds


class Leaving(NamedTuple):
    """A row that goes to the pool."""

    row: int
    place: int  # there
    back: bool  # as it was before the last step
    undrawn: bool  # see `SlotPrograms.take`


# A row that begins: its number, bytes of an `Arrival`, where it stands (None: nothing was read).
type Coming = tuple[int, np.ndarray, PackedState | None]


class SlotDevice:
    """n rows. What it is asked for happens in that order, in its own thread, which `rows` belong to.

    Attributes:
      most_steps: of a launch.
      shapes: rows and tokens of the programs that read.
      reads_at_once: how many of them a launch has, at most.
      pool: of rows that have ended and stay.
      row_bytes: of a row's cache.
      form: of rows that are taken and placed.
      arrivals: of what rows that begin are told.
      clocks: where its thread spends its time.
    """

    def __init__(
        self, prepared: Prepared, reader: BoundedReader, rows: int, most_steps: int, clocks: Clocks, together: int = 0,
        pool: int = 0,
    ):  # fmt: skip
        """Makes room, and compiles all that will ever run.

        Args:
          prepared, reader, rows, most_steps, clocks: see `Slots`.
          together: rows that are read at once; 0: as fits.
          pool: rows that have ended and may stay.
        """
        self._of, self._reader, self.clocks, self._num_rows = prepared, reader, clocks, rows
        self.most_steps, self.form = most_steps, reader.form
        self.shapes, self.reads_at_once = shapes_of(jax.default_backend(), rows, reader.sizes.chunk, together)
        self.rows, self.pool = self._empty(rows), Pool(pool)
        self._at_once = max(_LEAST, min(rows // 8, _MOST))
        self._pool = spread(self._of.placed(reader.empty(row_keys(0, max(1, pool)))))
        cache: Any = self.rows.state.cache
        self.row_bytes: int = cache.nbytes // rows
        self.arrivals = Bytes(arrival(prepared, None, (), -1, 0, False, False, None, is_reading=False))
        self.programs: SlotPrograms = slot_programs(
            prepared.graph, prepared.attention, self.form, self.arrivals, most_steps
        )
        self._thread, self._sweeper, self._lock = DeviceThread(), Sweeper(), threading.RLock()
        self._leaving: list[Leaving] = []  # that were not asked for yet
        self._error: BaseException | None = None  # that left the rows as nobody knows
        self._warm_up()

    def _empty(self, rows: int) -> Rows:
        state = self._reader.empty(row_keys(0, rows))
        state = dataclasses.replace(state, done=jnp.ones(rows, bool))
        sampling = jax.device_put(Sampling.of_rows([Sampling.create()] * rows, rows))
        none, asks = jnp.full((rows, ENDS), -1, jnp.int32), (jnp.zeros(rows, bool) for _ in range(2))
        wishes = Wishes(sampling, none, jnp.full(rows, -1, jnp.int32), *asks, min_new_tokens=jnp.zeros(rows, jnp.int32))
        before = jax.tree.map(jnp.copy, Before.of(state, state.token, np.zeros(rows, bool)))
        return spread(self._of.placed(Rows(state, wishes, before)))

    def ask(self, job: Callable[..., Any], *args: Any) -> Future:
        """Has the thread do a job, after all before it. It fails where one that changes rows has failed before."""
        return self._thread.ask(self._do, False, job, *args)

    def _change(self, job: Callable[..., Any], *args: Any) -> Future:
        """The same, of a job that changes rows. Nobody may look at what it returns: so all later ones fail with it."""
        return self._thread.ask(self._do, True, job, *args)

    def _do(self, changes: bool, job: Callable[..., Any], *args: Any) -> Any:
        if self._error is not None:
            raise self._error  # a row that did not begin has another one's text
        try:
            return job(*args)
        except BaseException as error:
            self._error = error if changes else None
            raise

    def launch(
        self, coming: Sequence[Coming], reads: Sequence[Read], ended: Bool[np.ndarray, "B"] | None,
        first: Int32[np.ndarray, "B"], steps: int,
    ) -> tuple[Future[list[Record]], Future[Record] | None]:  # fmt: skip
        """Asks for what comes next.

        Args:
          coming: rows that begin, once those that `leave` have done so.
          reads: runs of prompts, one a row at most.
          ended: rows that the host has ended; None: no steps.
          first: number of the step from which a row takes part.
          steps: up to `most_steps`.

        Returns:
          Records of the reads, and of the steps if there are any, on their way to the host. Those of the reads are
          there before the steps are made.
        """
        self._exchange_all(coming)
        found = self._change(self._read, reads)
        return found, None if ended is None else self._change(self._step, ended, first, steps)

    def leave(self, i: int, *, back: bool, undrawn: bool) -> PackedState | None:
        """Row i, which has ended, as `take` gives it, but in the pool; None: that is full.

        It goes there together with others: before the next launch, or when somebody wants its arrays.
        """
        place = self.pool.take()
        if place is None:
            return None
        with self._lock:  # nobody has what was there, if that has yet to come
            self._leaving = [each for each in self._leaving if each.place != place]
            self._leaving.append(Leaving(i, place, back, undrawn))
        return PooledState(self.form, self.pool, place, self._fetch)

    def _fetch(self, place: int) -> Future[Packed]:
        """A copy of what is in a place of the pool. For any thread."""
        with self._lock:
            if any(each.place == place for each in self._leaving):
                self._exchange_all([])
            return self.ask(lambda: self.programs.fetch(self._pool, _number(place)))

    def _exchange_all(self, coming: Sequence[Coming]) -> None:
        """Has rows go to the pool, and then others begin."""
        pooled, others = [], []
        for i, told, saved in coming:
            if saved is None:
                pooled.append((i, told, -1))
            elif isinstance(saved, PooledState) and saved.pool is self.pool:
                pooled.append((i, told, saved.place))  # whoever asks has it until this was asked
            else:
                others.append((i, told, saved))
        with self._lock:
            leaving, self._leaving = self._leaving, []
            if leaving or pooled:
                self._change(self._exchange, leaving, pooled)
        for each in others:
            self._change(self._place, *each)

    def take(self, i: int, *, back: bool, undrawn: bool) -> PackedState:
        """A copy of row i, to come (`SlotPrograms.take`)."""
        return PackedState(self.form, self.ask(self._take, i, back, undrawn))

    def look(self, i: int, *, back: bool) -> Any:
        """What row i holds (`SlotPrograms.look`)."""
        return self.ask(lambda: self.programs.look(self.rows, _number(i), np.array(back))).result()

    def _exchange(self, leaving: Sequence[Leaving], coming: Sequence[tuple[int, np.ndarray, int]]) -> None:
        """`coming`: with places in the pool; -1: empty. All that leave do so before others have their rows."""
        with self.clocks("device thread: exchange"):
            M = self._at_once
            early = max(0, -(-len(leaving) // M) - 1)  # programs before the one with the last that leave
            for k in range(early + max(1, -(-len(coming) // M))):
                those = coming[(k - early) * M : (k - early + 1) * M] if k >= early else ()
                which, used = self._which(leaving[k * M : (k + 1) * M], those), [self.rows, self._pool]
                self.rows, self._pool = self.programs.exchange(*used, which.sent())
                self._sweeper.clear(used)

    def _which(self, leaving: Sequence[Leaving], coming: Sequence[tuple[int, np.ndarray, int]]) -> Exchange:
        n, places, M = self._num_rows, max(1, self.pool.size), self._at_once
        told = np.zeros((M, self.arrivals.nbytes), np.uint8)
        which = Exchange(
            np.arange(n, n + M, dtype=np.int32), np.arange(places, places + M, dtype=np.int32), np.zeros(M, bool),
            np.zeros(M, bool), np.arange(n, n + M, dtype=np.int32), np.full(M, -1, np.int32), told,
        )  # fmt: skip
        for j, each in enumerate(leaving):
            which.leaving[j], which.to[j], which.back[j], which.undrawn[j] = each
        for j, (i, its, source) in enumerate(coming):
            which.coming[j], which.source[j], told[j] = i, source, its
        return which

    def _read(self, reads: Sequence[Read]) -> list[Record]:
        records: list[Record] = []
        for read in reads:
            with self.clocks(f"device thread: read {len(read.rows)} x {read.tokens.shape[1]}"):
                records.append(self._run(self.programs.read, read.sent(), read.most))
        return records

    def _step(self, ended: np.ndarray, first: np.ndarray, steps: int) -> Record:
        with self.clocks("device thread: steps"):
            return self._run(self.programs.steps, np.append(np.where(ended, np.int32(-1), first), np.int32(steps)))

    def _run(self, program: Callable[..., tuple[Rows, Record]], sent: np.ndarray, *most: int) -> Record:
        """Runs the model on the rows. Whoever looks at what came of it copies it to the host: not this thread, for
        which the device waits.
        """
        used = [self.rows]
        self.rows, record = program(self._of.params, *used, sent, self._of.table_on_device, *most)
        self._sweeper.clear(used)
        return record

    def _place(self, i: int, told: np.ndarray, saved: PackedState) -> None:
        with self.clocks("device thread: place"):
            used = [self.rows]
            self.rows = self.programs.place(*used, _number(i), self._of.placed(saved.packed), told)
            self._sweeper.clear(used)

    def _take(self, i: int, back: bool, undrawn: bool) -> Packed:
        with self.clocks("device thread: take"):
            return self.programs.take(self.rows, _number(i), np.array(back), np.array(undrawn))

    # -- by themselves ----------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Runs every program on rows that nobody has: what is compiled later would be somebody's wait."""
        compile_all(self._to_compile())
        for name, job in self._each_alone().items():
            begin = time.perf_counter()
            self.ask(lambda job=job: jax.block_until_ready(job())).result()
            log.debug("first run: %s, %.1f s", name, time.perf_counter() - begin)

    def _to_compile(self) -> dict[str, tuple[Any, ...]]:
        """Programs, and what they are given: all but `place`, which is given what `take` gives. The longest first."""
        programs, rows, i, yes = self.programs, self.rows, _number(0), np.array(False)
        model, table = (self._of.params, rows), self._of.table_on_device
        found: dict[str, tuple[Any, ...]] = {}
        for shape in reversed(self.shapes):
            sent = Read.none(shape, self._num_rows).sent()
            found[f"read {shape.rows} x {shape.length}"] = programs.read, *model, sent, table, shape.tokens
        found["steps"] = programs.steps, *model, np.zeros(self._num_rows + 1, np.int32), table
        found["exchange"] = programs.exchange, rows, self._pool, self._which((), ()).sent()
        found["take"], found["look"] = (programs.take, rows, i, yes, yes), (programs.look, rows, i, yes)
        return found | {"fetch": (programs.fetch, self._pool, i)}

    def _each_alone(self) -> dict[str, Callable[[], Any]]:
        """All that is ever asked for, as it is asked for, on rows that nobody has."""
        told = np.zeros(self.arrivals.nbytes, np.uint8)
        told = self.arrivals.of_host(dataclasses.replace(self.arrivals.tree_on_host(told), done=np.ones(1, bool)))

        def placed(how: Callable[[], PackedState]) -> Any:
            self._place(0, told, how())
            return self.rows.state.token

        def exchanged() -> Any:
            self._exchange((), [(0, told, -1)])
            return self.rows.state.token

        def all_exchanged() -> Any:
            places = [
                place for _ in range(min(self._at_once, self._num_rows)) if (place := self.pool.take()) is not None
            ]
            leaving = [Leaving(i, place, False, False) for i, place in enumerate(places)]
            self._exchange(leaving, [(i, told, place) for i, place in enumerate(places)])
            for place in places:
                self.pool.give(place)
            return self.rows.state.token

        def taken() -> PackedState:
            return PackedState(self.form, self._take(0, False, False))

        def many_copied() -> Any:
            copies = [Copying(taken()) for _ in range(COPIES)]
            for copy in copies:
                copy.send()
            return [copy.result().packed for copy in copies]

        jobs: dict[str, Callable[[], Any]] = {
            "exchange": exchanged,
            "exchange, as many as there may be": all_exchanged,
            "fetch": lambda: self.programs.fetch(self._pool, _number(0)),
            "take": lambda: taken().packed,
            "take, to the host": lambda: taken().on_host().packed,
            "take, place": lambda: placed(taken),
            f"{COPIES} taken, to the host": many_copied,
            "take, to the host, place": lambda: placed(lambda: taken().on_host()),
            "look": lambda: self.programs.look(self.rows, _number(0), np.array(False)),
        }
        first = np.zeros(self._num_rows, np.int32)
        for shape in self.shapes:
            read = Read.none(shape, self._num_rows)
            jobs[f"read {shape.rows} x {shape.length}"] = lambda read=read: self._read([read])[0].numbers
        ended, most = np.ones(self._num_rows, bool), self.most_steps
        jobs["no step: all have ended"] = lambda: self._step(ended, first, most).numbers
        return jobs

    def alone(self, at_once: int, repeats: int = 10) -> dict[str, tuple[float, float]]:
        """Median milliseconds of each thing that the device is asked for, by itself. For idle rows, which lose all.

        Until it was done; and until it was asked for, which is less where the host need not wait. `at_once`: rows that
        take part in a step.
        """
        found = {name: self._timed(job, repeats) for name, job in self._each_alone().items()}
        n, most = self._num_rows, self.most_steps
        ended, first = np.arange(n) >= at_once, np.zeros(n, np.int32)

        def go_on() -> Any:
            return self._step(ended, first, most).numbers

        for name, bias in ((f"{at_once} rows", None), (f"{at_once} rows, with a bias", {0: 1.0})):
            told = arrival(self._of, Sampling.create(logit_bias=bias), (), -1, 0, False, False, 0, is_reading=False)
            begun = [(i, self.arrivals.of_host(told), -1) for i in range(n)]
            self.ask(self._exchange, (), begun).result()
            found[f"{most} steps of {name}"] = self._timed(go_on, repeats)
        for name, job in self._each_behind_others().items():
            found[f"the same, then {name}"] = self._timed(lambda job=job: (go_on(), job()), repeats)
        self.ask(self._step, np.ones(n, bool), first, most).result()
        return found

    def _each_behind_others(self) -> dict[str, Callable[[], Any]]:
        """What a launch has beside steps, to be asked for while the device is busy: what it takes of its time alone."""
        jobs = {name: job for name, job in self._each_alone().items() if name.startswith("exchange")}
        for shape in self.shapes:
            read = Read.none(shape, self._num_rows)
            read.rows[:], read.left[:] = np.arange(shape.rows), shape.tokens // shape.rows
            name = f"read {shape.rows} x {shape.length}, {shape.tokens} tokens"
            jobs[name] = lambda read=read: self._read([read])[0].numbers
        return jobs

    def _timed(self, job: Callable[[], Any], repeats: int) -> tuple[float, float]:
        def once() -> tuple[float, float]:
            begin = time.perf_counter()
            made = job()
            asked = time.perf_counter() - begin
            jax.block_until_ready(made)
            return 1e3 * (time.perf_counter() - begin), 1e3 * asked

        done, asked = zip(*(self.ask(once).result() for _ in range(repeats)), strict=True)
        return sorted(done)[repeats // 2], sorted(asked)[repeats // 2]


def _number(i: int) -> np.ndarray:
    return np.array(i, np.int32)
