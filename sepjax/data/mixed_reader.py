"""Batches of a mixture: each row is of one source, by a fixed order that has them in their shares.

Rows are of equal length, so shares of rows are shares of tokens (of conversations: of tokens and padding). Every source
is read by itself and repeats by itself. Readers take the rows of the order in turn: of `count` readers, number `index`
takes rows index, index + count, ..., so that all readers together have every row once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, override

import grain
import jax
import numpy as np

from sepjax.data.batch import Batch, padded
from sepjax.data.mixture import Part, part_of_row
from sepjax.data.reader import BatchReader


class MixedReader(grain.IterDataset[Batch]):
    """Batches of `rows` rows, for ever."""

    def __init__(self, parts: tuple[Part, ...], readers: Sequence[BatchReader], rows: int):
        """`readers` has one of single rows for each of `parts`, all with the index and count of this reader."""
        super().__init__()
        self.parts = parts
        self.readers = tuple(readers)
        self.rows = rows
        self.batches_per_block = -(-readers[0].batches_per_block // rows)

    @override
    def __iter__(self) -> "_MixedIterator":
        return _MixedIterator(self)


class _MixedIterator(grain.DatasetIterator[Batch]):
    def __init__(self, reader: MixedReader):
        super().__init__()
        self._reader = reader
        self._sources = [iter(x) for x in reader.readers]
        self._taken = 0  # rows, of this reader

    @override
    def __next__(self) -> Batch:
        reader, shard = self._reader, self._reader.readers[0].shard
        numbers = [(self._taken + i) * shard.count + shard.index for i in range(reader.rows)]
        rows = [next(self._sources[part_of_row(number, reader.parts)]) for number in numbers]
        self._taken += reader.rows
        return joined(rows)

    @override
    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken, "sources": [source.get_state() for source in self._sources]}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = state["taken"]
        for source, saved in zip(self._sources, state["sources"], strict=True):
            source.set_state(saved)


def joined(rows: Sequence[Batch]) -> Batch:
    """The rows of several batches as one batch."""
    return jax.tree.map(lambda *x: np.concatenate(x), *rows)


def mixed_pass(parts: tuple[Part, ...], passes: Sequence[Callable[[], Iterator[Batch]]], rows: int) -> Iterator[Batch]:
    """Batches of `rows` rows in the same order, until the source whose turn it is has no more; the last one is padded.

    Args:
      parts: of the mixture.
      passes: for each part, makes one pass over its rows, each a batch.
      rows: of a batch.
    """
    sources, number, batch = [make() for make in passes], 0, []
    while (row := next(sources[part_of_row(number, parts)], None)) is not None:
        batch.append(row)
        number += 1
        if len(batch) == rows:
            yield joined(batch)
            batch = []
    if batch:
        yield padded(joined(batch), rows)
