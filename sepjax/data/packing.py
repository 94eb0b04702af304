"""Documents to rows of T tokens. Texts are concatenated and cut, nothing dropped and nothing padded.

A document is [BOS] + ids + [EOS]; its inputs are all but the last of these, its targets all but the first. The inputs
of all documents follow each other in one stream, cut every T tokens:

    documents     B a b c E   B d E   B e f g h i E          T = 4
    rows          B a b c | B d B e | f g h i
    targets       a b c E | d E e f | g h i E
    segment_ids   1 1 1 1 | 1 1 2 2 | 1 1 1 1
    positions     0 1 2 3 | 0 1 0 1 | 0 1 2 3

A document that crosses a row's end goes on in the next row as a new piece: a new segment whose positions restart from
0, so that it has sinks of its own. What stood before is out of its sight, but its first token still has its target.
With `data.loss_on`, a regular expression, only targets that it matches in their document's text are scored.

Conversations stay whole (`WholeRows`): each goes into the first row with room for it, and what is left is padding.
Their tokens are those of the chat template alone, and those that an assistant says are scored.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sepjax.data.batch import Batch
from sepjax.data.scored import matched, scored_tokens, unmarked
from sepjax.data.tokenizer import Tokenizer

# is_separator, bool[B, T], from tokens and positions
type FlagSeparators = Callable[
    [Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]],
    Bool[np.ndarray, "B T"],
]


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """Inputs and targets of consecutive documents, and where each token comes from."""

    tokens: Int32[np.ndarray, "N"]
    targets: Int32[np.ndarray, "N"]
    documents: Int64[np.ndarray, "N"]  # index of the document
    offsets: Int32[np.ndarray, "N"]  # position within the document
    scored: Bool[np.ndarray, "N"]  # whether the target counts

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "TokenStream":
        return TokenStream(*(getattr(self, field.name)[part] for field in dataclasses.fields(self)))

    def where(self, kept: Bool[np.ndarray, "N"]) -> "TokenStream":
        """The tokens that are kept."""
        return TokenStream(*(getattr(self, field.name)[kept] for field in dataclasses.fields(self)))

    def start(self) -> tuple[int, int] | None:
        """Document and offset of the first token; None where there is none."""
        return (int(self.documents[0]), int(self.offsets[0])) if len(self) else None

    def begins(self) -> Int64[np.ndarray, "D"]:
        """Where documents begin, those without a token left out."""
        return np.flatnonzero(self.offsets == 0)

    @classmethod
    def empty(cls) -> "TokenStream":
        """A stream of no tokens."""
        return cls(*(np.zeros(0, dtype) for dtype in (np.int32, np.int32, np.int64, np.int32, np.bool_)))

    @classmethod
    def join(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """The streams, one after the other; at least one."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(stream, name) for stream in streams]) for name in names))

    @classmethod
    def encode(
        cls,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        first: int = 0,
        loss_on: re.Pattern[str] | None = None,
        *,
        conversations: bool = False,
    ) -> "TokenStream":
        """The stream of `texts`, documents `first`, `first` + 1, ..., divided as those that the model was trained on.

        A text that itself begins or ends with the dividing token has it once.

        Args:
          tokenizer: of the model.
          texts: whole documents.
          first: number of the first of them.
          loss_on: tokens are scored that have a part in its matches (in its first group, if it has one), and the end of
            a document that a match reaches; None: all.
          conversations: whether the texts are of chat templates, with marks around what is scored
            (`sepjax.data.scored`): nothing stands before or behind them.

        Raises:
          DataError: some are to be scored, but tokens do not spell a text out, so that nothing tells which.
        """
        bos, eos = (None, None) if conversations else (tokenizer.document_start, tokenizer.document_end)
        spans = None
        if conversations:
            texts, spans = zip(*map(unmarked, texts), strict=True) if texts else ((), ())
        if loss_on is not None:
            spans = [matched(text, loss_on) for text in texts]
        ids, lengths = tokenizer.encode_flat(texts)
        if spans is None:
            scored, ends_scored = np.ones(len(ids), bool), np.ones(len(texts), bool)
        else:
            scored, ends_scored = scored_tokens(tokenizer, texts, ids, lengths, spans)
        kept, lengths = _without(ids, lengths, bos, eos)
        ids, scored = ids[kept], scored[kept]
        lengths = lengths + (bos is not None) + (eos is not None)
        starts, ends = np.cumsum(lengths) - lengths, np.cumsum(lengths)
        documents = np.repeat(np.arange(first, first + len(texts)), lengths)
        offsets = (np.arange(len(documents)) - np.repeat(starts, lengths)).astype(np.int32)
        is_first, is_last = offsets == 0, np.zeros(len(documents), bool)
        is_last[ends[lengths > 0] - 1] = True
        special = (is_first & (bos is not None)) | (is_last & (eos is not None))
        full, counts = np.empty(len(documents), np.int32), np.zeros(len(documents), bool)
        full[~special], counts[~special] = ids, scored
        if bos is not None:
            full[is_first] = bos
        if eos is not None:
            full[is_last], counts[is_last] = eos, ends_scored[lengths > 0]
        return cls(full[~is_last], full[~is_first], documents[~is_last], offsets[~is_last], counts[~is_first])


def _without(
    ids: Int32[np.ndarray, "N"], lengths: Int64[np.ndarray, "texts"], first: int | None, last: int | None
) -> tuple[Bool[np.ndarray, "N"], Int64[np.ndarray, "texts"]]:
    """Which ids stay when texts lose a leading `first` and a trailing `last`, and the new lengths."""
    kept = np.ones(len(ids), bool)
    begins, lengths = np.cumsum(lengths) - lengths, lengths.copy()
    for token, is_first in ((first, True), (last, False)):
        if token is None or not len(ids):
            continue
        places = np.where(lengths > 0, begins if is_first else begins + lengths - 1, 0)
        has = (ids[places] == token) & (lengths > 0)
        kept[places[has]] = False
        lengths -= has
        begins += has if is_first else 0
    return kept, lengths


def fitting(stream: TokenStream, length: int, *, skip: bool) -> tuple[TokenStream, int]:
    """Documents of up to `length` tokens, longer ones cut at their ends or left out, and how many those are."""
    begins = stream.begins()
    sizes = np.diff([*begins, len(stream)])
    kept = np.repeat(sizes <= length, sizes) if skip else stream.offsets < length
    return (stream if kept.all() else stream.where(kept)), int((sizes > length).sum())


def pack_rows(stream: TokenStream, length: int, flag_separators: FlagSeparators) -> Batch:
    """Cuts a stream of N tokens into ceil(N / T) rows of T = `length`, the last of them padded; NumPy arrays."""
    missing = -len(stream) % length
    tokens, targets = (np.pad(x, (0, missing)).reshape(-1, length) for x in (stream.tokens, stream.targets))
    starts, scored = (np.pad(x, (0, missing)).reshape(-1, length) for x in (stream.offsets == 0, stream.scored))
    is_token = (np.arange(tokens.size) < len(stream)).reshape(-1, length)
    return _batch(tokens, targets, starts, scored, is_token, flag_separators)


class WholeRows:
    """Rows of T tokens that documents go into whole, each into the first one that has room."""

    def __init__(self, rows: int, length: int):
        """`rows` empty rows of `length` tokens."""
        self._free = np.full(rows, length)
        self._tokens, self._targets = np.zeros((2, rows, length), np.int32)
        self._starts, self._scored = np.zeros((2, rows, length), bool)

    @property
    def free(self) -> int:
        """Tokens that all rows together have room for."""
        return int(self._free.sum())

    def add(self, stream: TokenStream) -> TokenStream:
        """Places documents of up to T tokens in their order; returns the rest from the first that fits nowhere."""
        length = self._tokens.shape[1]
        begins = [*stream.begins().tolist(), len(stream)]
        for begin, end in itertools.pairwise(begins):
            size = end - begin
            row = int(np.argmax(self._free >= size))
            if self._free[row] < size:
                return stream[begin:]
            at = length - int(self._free[row])
            place = row, slice(at, at + size)
            self._tokens[place], self._targets[place] = stream.tokens[begin:end], stream.targets[begin:end]
            self._starts[row, at], self._scored[place] = True, stream.scored[begin:end]
            self._free[row] -= size
        return stream[len(stream) :]

    def batch(self, flag_separators: FlagSeparators) -> Batch:
        """The rows, padded at their ends; NumPy arrays."""
        length = self._tokens.shape[1]
        is_token = np.arange(length) < (length - self._free)[:, None]
        return _batch(self._tokens, self._targets, self._starts, self._scored, is_token, flag_separators)


def _batch(
    tokens: Int32[np.ndarray, "B T"],
    targets: Int32[np.ndarray, "B T"],
    starts: Bool[np.ndarray, "B T"],
    scored: Bool[np.ndarray, "B T"],
    is_token: Bool[np.ndarray, "B T"],
    flag_separators: FlagSeparators,
) -> Batch:
    """Rows with positions and segments counted from where pieces start, which the first token of a row does."""
    starts[:, 0] = True
    index = np.arange(tokens.shape[1], dtype=np.int32)
    positions = (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)) * is_token
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=is_token & scored,
        positions=positions,
        segment_ids=np.cumsum(starts, axis=1, dtype=np.int32) * is_token,
        is_separator=flag_separators(tokens, positions) & is_token,
    )
