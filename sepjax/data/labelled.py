"""Batches whose state says what made them, so that another number of processes can take up their place, or refuse it.

A batch is read in shares, one a process or a group of processes that hold the same rows. Where there are others than
when a place was reached, each reads the old shares that its rows are of, and takes these rows of them:

    before   | share 0 of 2  | share 1 of 2  |            before   |          share 0 of 1         |
    now      |          share 0 of 1         |            now      | share 0 of 2  | share 1 of 2  |
             reads 0 and 1, all rows                               reads 0, half of its rows; and so does the other

So the batches are what they would have been. A run that moved goes on with the old shares.
"""

import atexit
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, override

import grain
import jax
from absl import logging

from sepjax.config import ConfigError
from sepjax.data.batch import Batch
from sepjax.data.errors import DataError
from sepjax.data.mixed_reader import joined

_OF_A_SHARE = ("rows", "process_index", "process_count")  # follow from how a batch is shared out


class Labelled(grain.IterDataset[Batch]):
    """Puts what made the batches into the state, so that a state of another pipeline is refused, not misread."""

    def __init__(self, make: Callable[[int, int], grain.IterDataset[Batch]], made_by: dict[str, int | str]):
        """The share that `made_by` names.

        Args:
          make: (index, count) -> the batches of that share, of batch_size / count rows.
          made_by: what is to be the same where a place is taken up, by name; rows, process_index, process_count.
        """
        super().__init__()
        self.make, self.made_by = make, made_by

    @override
    def __iter__(self) -> "LabelledIterator":
        return LabelledIterator(self.make, self.made_by)


class LabelledIterator(grain.DatasetIterator[Batch]):
    """See `Labelled`."""

    def __init__(self, make: Callable[[int, int], grain.IterDataset[Batch]], made_by: dict[str, int | str]):
        """Batches from the beginning."""
        self._make, self.made_by = make, made_by
        self._index, self._count = int(made_by["process_index"]), int(made_by["process_count"])
        self._of = self._count  # shares that batches are read in
        self._shares = {self._index: iter(make(self._index, self._count))}
        super().__init__(list(self._shares.values()))
        _OPEN.add(self)

    @override
    def __next__(self) -> Batch:
        try:
            batches = [next(self._shares[i]) for i in sorted(self._shares)]
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise DataError(
                f"a process that reads data has died: {error} It may have been killed for memory: lower "
                "data.num_workers. The same command goes on from the last checkpoint"
            ) from error
        if self._of == self._count:
            return batches[0]
        rows, first = int(self.made_by["rows"]), min(self._shares)
        begin = self._index * rows - first * len(batches[0].tokens)
        return jax.tree.map(lambda x: x[begin : begin + rows], joined(batches))

    @override
    def get_state(self) -> dict[str, Any]:
        states = {str(i): share.get_state() for i, share in self._shares.items()}
        if self._of == self._count:
            return {"made_by": self.made_by, "state": states[str(self._index)]}
        return {"made_by": self.made_by, "of": self._of, "shares": states}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._check(state, ())
        self._take_up(_shares([state]))

    def set_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Takes up the place of processes of another number, from all of their states.

        Raises:
          ConfigError: other data, or another order of them.
          ValueError: the states of some are missing.
        """
        for state in states:
            self._check(state, _OF_A_SHARE)
            before, now = (int(x["rows"]) * int(x["process_count"]) for x in (state["made_by"], self.made_by))
            if before != now:
                raise ConfigError(f"the checkpoint's place in the data is of batches of {before} rows, now {now}")
        self._take_up(_shares(states))

    def has_moved(self, folder: Path) -> bool:
        """Whether a checkpoint's `data` folder has the places of other shares than are read now."""
        own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        if own.is_file():
            made_by = json.loads(own.read_bytes())["made_by"]
            return any(made_by.get(name) != self.made_by[name] for name in _OF_A_SHARE[1:])
        return any(folder.glob("process_*-of-*.json"))

    def read_moved(self, folder: Path) -> None:
        """Takes up the place that `has_moved`.

        Raises:
          ConfigError: other data, or another order of them.
          OSError, ValueError, KeyError: files are missing or damaged.
        """
        self.set_states([json.loads(file.read_bytes()) for file in sorted(folder.glob("process_*-of-*.json"))])

    def _take_up(self, found: tuple[int, Mapping[int, Any]]) -> None:
        of, states = found
        first, last = self._index * of // self._count, -(-(self._index + 1) * of // self._count)
        missing = [i for i in range(first, last) if i not in states]
        if missing:
            raise ValueError(f"it lacks the place in the data of process {missing[0]} of {of}")
        if (of, {*range(first, last)}) != (self._of, self._shares.keys()):
            for share in self._shares.values():
                share.close()
            self._of, self._shares = of, {i: iter(self._make(i, of)) for i in range(first, last)}
            self._parents = tuple(self._shares.values())
        for i, share in self._shares.items():
            share.set_state(states[i])

    def _check(self, state: Mapping[str, Any], free: Sequence[str]) -> None:
        saved = state["made_by"]
        before, now = saved.get("dataset", self.made_by["dataset"]), self.made_by["dataset"]
        if before != now:  # other files, or the same ones copied: only their contents would tell
            logging.warning("the data are %s, they were %s; the run goes on at the same place in them", now, before)
        before, now = (str(x.get("read_from", "copies")) for x in (saved, self.made_by))
        if before != now:
            raise ConfigError(
                f"the checkpoint's place in the data was reached with JSON lines read from {before}, now from {now}: "
                f"their order is another one; {_the_way_back(before, now)}, or start a new workdir"
            )
        differ = [
            f"{k}={saved.get(k)}, now {v}"
            for k, v in self.made_by.items()
            if k not in ("dataset", *free) and saved.get(k) != v
        ]
        if differ:
            raise ConfigError(
                f"the checkpoint's place in the data was reached with {'; '.join(differ)}; resume with what it was, or "
                "start a new workdir"
            )


_OPEN: weakref.WeakSet[LabelledIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Closes what a program leaves open at its end: a thread that still reads then would abort the process."""
    for each in list(_OPEN):
        each.close()
        each._shares, each._parents = {}, ()  # gone while there is a Python to close them in


def _the_way_back(before: str, now: str) -> str:
    if now.count("files") > before.count("files"):
        return "set data.data_dir to the folder with the copy that an earlier version of sepjax made"
    return "take the copy that an earlier version of sepjax made out of data.data_dir (in its folder `records`)"


def _shares(states: Sequence[Mapping[str, Any]]) -> tuple[int, dict[int, Any]]:
    """How many shares the batches were read in, and the state of each that is known."""
    found: dict[int, Any] = {}
    for state in states:
        if "state" in state:
            found[int(state["made_by"]["process_index"])] = state["state"]
        else:
            found |= {int(i): share for i, share in state["shares"].items()}
    return int(states[0].get("of", states[0]["made_by"]["process_count"])), found
