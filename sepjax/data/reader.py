"""Endless training batches of one reader, as a Grain dataset whose state is four integers.

A reader takes its share of the documents of every epoch, in an order that changes with the epoch, and packs them into
one stream (`packing.py`). The rows of a book are neighbours in that stream, so a batch is not cut from it directly: the
stream is cut into *blocks* of several batches, and the rows of a block are dealt out in random order.

    stream   | block 0: rows 0..R-1        | block 1: rows R..2R-1       |
    batches  | rows 5 0 | 3 1 | 4 2        | rows 8 7 | ...

The state is where the block starts (document, offset in it), its number, and the batches already dealt. Restoring reads
the block again, so the same batches follow, bit for bit.
"""

import dataclasses
import re
from typing import override

import grain
import jax
import numpy as np
from absl import logging

from sepjax.data.batch import Batch
from sepjax.data.errors import DataError
from sepjax.data.packing import FlagSeparators, TokenStream, WholeRows, fitting, pack_rows
from sepjax.data.texts import BadDocuments, TextSource
from sepjax.data.tokenizer import Tokenizer

_BLOCK_TOKENS = 2**19  # rows are mixed over about so many tokens: several books
_BLOCK_BATCHES = 64  # at most, so that the first batch does not wait for long


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which documents one of `count` readers takes, and when: shard[i] is the index of its i-th document, without end.

    In every epoch the readers' documents are disjoint and together complete; `len` is the documents of an epoch.
    """

    num_documents: int  # of all readers, at least `count`
    index: int  # of this reader
    count: int  # of readers: processes times workers
    seed: int

    def __len__(self) -> int:
        return len(range(self.index, self.num_documents, self.count))

    def __getitem__(self, i: int) -> int:
        epoch, k = divmod(i, len(self))
        return grain.experimental.index_shuffle(
            self.index + k * self.count,
            max_index=self.num_documents - 1,
            seed=(self.seed + epoch) % 2**32,
            rounds=4,
        )


class LongDocuments:
    """Documents that no row has room for: cut or left out, counted, and told when there are 1, 10, 100, ..."""

    def __init__(self, name: str, length: int, *, skip: bool, tells: bool = True):
        """`name` is the source's, `length` a row's; `skip` leaves them out; `tells`: whether anything is said."""
        self._name, self._length, self._skip, self._tells = name, length, skip, tells
        self._found = self._read = 0
        self._tell_at = 1

    def fitted(self, stream: TokenStream) -> TokenStream:
        """The documents of a stream, each in `length` tokens."""
        self._read += len(stream.begins())
        stream, found = fitting(stream, self._length, skip=self._skip)
        self._found += found
        if self._tells and self._found >= self._tell_at:
            self._tell_at = 10 ** len(str(self._found))
            logging.warning(
                "%d of %d conversations of %s so far have more than data.sequence_length=%d tokens and were %s.",
                *(self._found, self._read, self._name, self._length),
                "left out (data.too_long)" if self._skip else "cut at their ends (data.too_long)",
            )
        return stream


class BatchReader(grain.IterDataset[Batch]):
    """Batches of `rows` rows of `length` tokens, for ever."""

    def __init__(
        self,
        source: TextSource,
        tokenizer: Tokenizer,
        flag_separators: FlagSeparators,
        shard: Shard,
        *,
        rows: int,
        length: int,
        max_bad: int = 0,
        loss_on: re.Pattern[str] | None = None,
        skip_long: bool = False,
        batch_rows: int = 0,
    ):
        """`batch_rows`: of the batches that these are made into later, if that is so."""
        super().__init__()
        self.source = source
        self.tokenizer = tokenizer
        self.flag_separators = flag_separators
        self.shard = shard
        self.rows = rows
        self.length = length
        self.max_bad = max_bad
        self.loss_on = loss_on
        self.skip_long = skip_long
        most = _BLOCK_BATCHES * max(batch_rows // rows, 1)
        self.batches_per_block = min(max(_BLOCK_TOKENS // (rows * length), 1), most)

    @override
    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator[Batch]):
    def __init__(self, reader: BatchReader):
        super().__init__()
        self._reader = reader
        self._is_small = False  # and has said so
        self._bad = BadDocuments(reader.max_bad)
        self._long = LongDocuments(reader.source.name, reader.length, skip=reader.skip_long)
        self.set_state({"document": 0, "offset": 0, "block": 0, "batch": 0})

    @override
    def get_state(self) -> dict[str, int]:
        return dict(self._state)

    @override
    def set_state(self, state: dict[str, int]) -> None:
        self._state = dict(state)
        self._rest = TokenStream.empty()  # what has been read from the block's start on, before the block is made
        self._unread = state["document"]
        self._block: Batch | None = None

    @override
    def __next__(self) -> Batch:
        reader, batch = self._reader, self._state["batch"]
        if self._block is None:
            self._read_block()
        chosen = self._order[batch * reader.rows : (batch + 1) * reader.rows]
        rows = jax.tree.map(lambda x: x[chosen], self._block)
        self._state["batch"] += 1
        if self._state["batch"] == reader.batches_per_block:
            self._leave_block()
        return rows

    def _read_block(self) -> None:
        reader = self._reader
        num_rows = reader.rows * reader.batches_per_block
        self._block = self._whole_documents(num_rows) if reader.source.conversations else self._cut_stream(num_rows)
        if not self._block.loss_mask.any() and (reader.loss_on is not None or reader.source.conversations):
            pattern = reader.loss_on and reader.loss_on.pattern
            what = "no answer is" if pattern is None else f"data.loss_on={pattern!r} matches nothing"
            raise DataError(
                f"{what} in {num_rows * reader.length:,} tokens of {reader.source.name}, so that there is nothing to "
                "learn; correct it, or leave it out"
            )
        self._order = np.random.default_rng([reader.shard.seed, self._state["block"]]).permutation(num_rows)

    def _whole_documents(self, num_rows: int) -> Batch:
        """Rows of documents that stay whole, until one finds no room: the block after this one begins with it."""
        rows, read = WholeRows(num_rows, self._reader.length), len(self._rest)
        while not len(rest := rows.add(self._rest)):
            self._rest = self._read_on(rows.free)
            read += len(self._rest)
            if self._unread - self._state["document"] >= len(self._reader.shard):
                self._check_epoch(read)
        self._rest = rest
        return rows.batch(self._reader.flag_separators)

    def _cut_stream(self, num_rows: int) -> Batch:
        """Rows cut from the stream of all documents."""
        reader = self._reader
        missing = num_rows * reader.length - len(self._rest)
        parts = [self._rest]
        while missing > 0:
            parts.append(self._read_on(missing))
            missing -= len(parts[-1])
            if self._unread - self._state["document"] >= len(reader.shard):
                self._check_epoch(sum(map(len, parts)))
        stream = TokenStream.join(parts) if len(parts) > 1 else self._rest
        self._rest = stream[num_rows * reader.length :]
        return pack_rows(stream[: num_rows * reader.length], reader.length, reader.flag_separators)

    def _read_on(self, num_tokens: int) -> TokenStream:
        """The next documents, about `num_tokens` of them; right after a restore from the block's first token on."""
        reader, first = self._reader, self._unread
        count = reader.source.documents_for(num_tokens)
        texts = self._bad.read(reader.source, [reader.shard[i] for i in range(first, first + count)])
        self._unread += count
        is_whole = reader.source.conversations
        read = TokenStream.encode(reader.tokenizer, texts, first, reader.loss_on, conversations=is_whole)
        if is_whole:
            return self._long.fitted(read)
        return read[self._state["offset"] :] if first == self._state["document"] else read

    def _leave_block(self) -> None:
        document, offset = self._rest.start() or (self._unread, 0)
        self._state = {"document": document, "offset": offset, "block": self._state["block"] + 1, "batch": 0}
        self._block = None

    def _check_epoch(self, num_tokens: int) -> None:
        """An epoch without a token would be read for ever; one that does not fill a batch is odd, but can."""
        reader = self._reader
        if not num_tokens:
            raise DataError(f"{reader.source.name} has no tokens in the {len(reader.shard)} documents of this reader")
        if num_tokens < reader.rows * reader.length and not self._is_small:
            logging.warning(
                "An epoch of %s gives this reader %d tokens, less than one batch of %d rows of %d: documents repeat "
                "within a batch. Use more text, or a smaller data.batch_size or data.sequence_length.",
                *(reader.source.name, num_tokens, reader.rows, reader.length),
            )
            self._is_small = True
