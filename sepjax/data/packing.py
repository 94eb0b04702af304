"""Documents to rows of T tokens: concatenate and cut, nothing dropped and nothing padded.

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
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sepjax.data.batch import Batch
from sepjax.data.errors import DataError
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

    def start(self) -> tuple[int, int] | None:
        """Document and offset of the first token; None where there is none."""
        return (int(self.documents[0]), int(self.offsets[0])) if len(self) else None

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
        cls, tokenizer: Tokenizer, texts: Sequence[str], first: int = 0, loss_on: re.Pattern[str] | None = None
    ) -> "TokenStream":
        """The stream of `texts`, documents `first`, `first` + 1, ..., divided as those that the model was trained on.

        A text that itself begins or ends with the dividing token has it once.

        Args:
          tokenizer: of the model.
          texts: whole documents.
          first: number of the first of them.
          loss_on: tokens are scored that have a part in its matches (in its first group, if it has one), and the end of
            a document that a match reaches; None: all.

        Raises:
          DataError: with `loss_on`, tokens do not spell a text out, so that nothing tells which of them match.
        """
        bos, eos = tokenizer.document_start, tokenizer.document_end
        ids, lengths = tokenizer.encode_flat(texts)
        scored, ends_scored = _matching(tokenizer, texts, ids, lengths, loss_on)
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


def _matching(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    ids: Int32[np.ndarray, "N"],
    lengths: Int64[np.ndarray, "texts"],
    loss_on: re.Pattern[str] | None,
) -> tuple[Bool[np.ndarray, "N"], Bool[np.ndarray, "texts"]]:
    """Which tokens have a part in a match, and of which texts a match reaches the end."""
    scored, ends = np.full(len(ids), loss_on is None), np.full(len(texts), loss_on is None)
    if loss_on is None:
        return scored, ends
    widths, group = tokenizer.token_widths()[ids], 1 if loss_on.groups else 0
    for number, (text, last) in enumerate(zip(texts, np.cumsum(lengths).tolist(), strict=True)):
        part = slice(last - int(lengths[number]), last)
        stops, at = np.cumsum(widths[part]), _byte_offsets(text)
        size = int(at[-1])
        extra = int(stops[-1]) - size if len(stops) else 0  # a space that encoding puts in front, if there is none
        if extra not in (0, int(tokenizer.starts_with_space and size > 0)) or (size and not len(stops)):
            raise DataError(
                f"data.loss_on={loss_on.pattern!r} finds its tokens by their bytes, but those of text {number}, "
                f"{text[:30]!r}, are {size + extra} for {size}: this tokenizer changes what it reads; leave loss_on out"
            )
        spans = [match.span(group) for match in loss_on.finditer(text)]
        for start, stop in ((at[i] + extra, at[j] + extra) for i, j in spans if i < j):  # not what took no part
            # The tokens that end behind its start and begin before its end.
            first, last = np.searchsorted(stops, start, "right"), np.searchsorted(stops - widths[part], stop, "left")
            scored[part][first:last] = True
            ends[number] |= stop == size + extra
    return scored, ends


def _byte_offsets(text: str) -> Int64[np.ndarray, "C"]:
    """Where each character begins in the text's UTF-8, and where the last one ends."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)


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


def pack_rows(stream: TokenStream, length: int, flag_separators: FlagSeparators) -> Batch:
    """Cuts a stream of N tokens into ceil(N / T) rows of T = `length`, the last of them padded; NumPy arrays."""
    missing = -len(stream) % length
    tokens, targets = (np.pad(x, (0, missing)).reshape(-1, length) for x in (stream.tokens, stream.targets))
    starts, scored = (np.pad(x, (0, missing)).reshape(-1, length) for x in (stream.offsets == 0, stream.scored))
    is_token = (np.arange(tokens.size) < len(stream)).reshape(-1, length)
    starts[:, 0] = True
    index = np.arange(length, dtype=np.int32)
    positions = (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)) * is_token
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=is_token & scored,
        positions=positions,
        segment_ids=np.cumsum(starts, axis=1, dtype=np.int32) * is_token,
        is_separator=flag_separators(tokens, positions) & is_token,
    )
