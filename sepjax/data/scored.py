"""Which tokens of a document are scored: those that have a part in spans of its text.

Spans come from a regular expression over the text (`data.loss_on`), or from marks in it: a conversation is stored as
what its chat template writes, with OPEN and CLOSE around what an assistant says.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sepjax.data.errors import DataError
from sepjax.data.marks import CLOSE, OPEN
from sepjax.data.tokenizer import Tokenizer

type Spans = list[tuple[int, int]]  # [first, last) characters


def matched(text: str, pattern: re.Pattern[str]) -> Spans:
    """The matches of a pattern, or of its first group, if it has one."""
    group = 1 if pattern.groups else 0
    return [match.span(group) for match in pattern.finditer(text) if match.start(group) >= 0]  # not what took no part


def unmarked(text: str) -> tuple[str, Spans]:
    """A marked text without its marks, and the spans between them."""
    parts, spans, at = [], [], 0
    for number, part in enumerate(re.split(f"[{OPEN}{CLOSE}]", text)):
        if number % 2:
            spans.append((at, at + len(part)))
        parts.append(part)
        at += len(part)
    return "".join(parts), spans


def marked(text: str, spans: Spans) -> str:
    """The inverse of `unmarked`, of spans in order that do not overlap."""
    parts, at = [], 0
    for start, stop in spans:
        parts += [text[at:start], OPEN, text[start:stop], CLOSE]
        at = stop
    return "".join([*parts, text[at:]])


def scored_tokens(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    ids: Int32[np.ndarray, "N"],
    lengths: Int64[np.ndarray, "texts"],
    spans: Sequence[Spans],
) -> tuple[Bool[np.ndarray, "N"], Bool[np.ndarray, "texts"]]:
    """Which tokens have a part in a span of their text, and of which texts a span reaches the end.

    Args:
      tokenizer: of the model.
      texts: documents.
      ids: `tokenizer.encode_flat(texts)`, as are `lengths`.
      lengths: of each text.
      spans: of each text.

    Raises:
      DataError: nothing tells which characters of a text each token stands for.
    """
    scored, ends = np.zeros(len(ids), bool), np.zeros(len(texts), bool)
    widths = tokenizer.token_widths()[ids]
    for number, (text, last) in enumerate(zip(texts, np.cumsum(lengths).tolist(), strict=True)):
        part = slice(last - int(lengths[number]), last)
        if not spans[number]:
            continue
        starts, stops, at = _places(tokenizer, text, widths[part], number)
        for i, j in spans[number]:
            if i < j:  # the tokens that end behind its start and begin before its end
                scored[part][np.searchsorted(stops, at[i], "right") : np.searchsorted(starts, at[j], "left")] = True
                ends[number] |= j == len(text)
    return scored, ends


def _places(
    tokenizer: Tokenizer, text: str, widths: Int32[np.ndarray, "n"], number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each token begins and ends, and where each character and the text's end are, in the same unit."""
    stops, at = np.cumsum(widths), _byte_offsets(text)
    size = int(at[-1])
    extra = int(stops[-1]) - size if len(stops) else 0  # a space that encoding puts in front, if there is none
    if extra in (0, int(tokenizer.starts_with_space and size > 0)) and not (size and not len(stops)):
        return stops - widths, stops, at + extra
    # The tokens' bytes are not the text's: it was normalised, or has spaces of its own before control tokens.
    offsets = tokenizer.offsets(text)
    if offsets is None or len(offsets) != len(widths):
        raise DataError(
            f"tokens to be scored are found by their bytes, but those of text {number}, {text[:30]!r}, are "
            f"{size + extra} for {size}: this tokenizer changes what it reads and does not say where; leave "
            "data.loss_on out, or train on all tokens"
        )
    return *np.maximum.accumulate(offsets.T, axis=1), np.arange(len(text) + 1)


def _byte_offsets(text: str) -> Int64[np.ndarray, "C"]:
    """Where each character begins in the text's UTF-8, and where the last one ends."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
