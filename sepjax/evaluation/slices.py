"""Losses by what the model could have known: how long ago a bigram stood in its row, and how much text came before.

A target that follows the same token as it did before can be copied from there, if the model still sees that place:

    row        ... Miss Bartlett ............ Miss [Bartlett]         ago: tokens from the one to the other
    slices     unseen   the bigram did not stand in the row before
               near     for the last time `near` tokens ago or fewer: in every window
               between
               far      for the last time more than `far` tokens ago: in no window
               far_own  of the far ones those that are in no other document: its own names and terms, which no
                        knowledge of the language gives away

All of that is told from token ids on the host. Losses of several patterns are paired: a document that is hard for one
is hard for all, so the error of a difference over documents is much smaller than the losses' own.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from sepjax.array_typing import Bool, Int32

SLICES = ("all", "unseen", "near", "between", "far", "far_own")
# Half octaves of the number of tokens before the one that is scored.
EDGES = tuple(sorted({1, *(round(2 ** (i / 2)) for i in range(8, 42))}))


@dataclasses.dataclass(frozen=True)
class ScoredTokens:
    """Every token that is scored, row after row. Made by `create`."""

    row: Int32[np.ndarray, "N"]
    document: Int32[np.ndarray, "N"]
    before: Int32[np.ndarray, "N"]  # tokens of the row before it
    ago: Int32[np.ndarray, "N"]  # how long ago its bigram stood in the row for the last time; 0: never
    elsewhere: Bool[np.ndarray, "N"]  # whether the bigram is in another document too

    @classmethod
    def create(
        cls, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray], documents: Sequence[int] | None = None
    ) -> "ScoredTokens":
        """From the rows' token ids, and after each the one to be predicted.

        Args:
          inputs: int32[...] of each row.
          targets: of the same lengths.
          documents: number of each row's document; None: every row is one.
        """
        sizes = np.array([len(x) for x in inputs])
        row = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        document = row if documents is None else np.asarray(documents, np.int32)[row]
        starts = np.cumsum(sizes) - sizes
        before = (np.arange(len(row)) - starts[row] + 1).astype(np.int32)
        pair = np.concatenate(inputs).astype(np.int64) << 32 | np.concatenate(targets)
        bigram = np.unique(pair, return_inverse=True)[1]
        return cls(row, document, before, last_seen(bigram, row), _in_several(bigram, document))

    def where(self, chosen: Bool[np.ndarray, "M"]) -> "ScoredTokens":
        """Some of them; what stood before each is as it was."""
        return ScoredTokens(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    @functools.cached_property
    def number_of_documents(self) -> int:
        """Documents with a scored token, and those before the last of them."""
        return int(self.document[-1]) + 1 if len(self.document) else 0

    def masks(self, near: int, far: int) -> dict[str, Bool[np.ndarray, "N"]]:
        """Which tokens are in each of `SLICES`; `near` may not exceed `far`."""
        is_far = self.ago > far
        return {
            "all": np.ones(len(self.ago), bool),
            "unseen": self.ago == 0,
            "near": (self.ago > 0) & (self.ago <= near),
            "between": (self.ago > near) & ~is_far,
            "far": is_far,
            "far_own": is_far & ~self.elsewhere,
        }


def last_seen(bigram: np.ndarray, row: np.ndarray) -> np.ndarray:
    """int32[N]: how many tokens ago each one's bigram stood in its row for the last time; 0: never.

    Args:
      bigram: int[N], a number for each pair of tokens.
      row: int[N], rows of tokens that lie side by side.
    """
    key = row.astype(np.int64) * (int(bigram.max(initial=0)) + 1) + bigram
    order = np.argsort(key, kind="stable")  # equal ones side by side, in the order of the text
    again = key[order[1:]] == key[order[:-1]]
    ago = np.zeros(len(key), np.int32)
    ago[order[1:]] = np.where(again, order[1:] - order[:-1], 0)
    return ago


def _in_several(bigram: np.ndarray, document: np.ndarray) -> np.ndarray:
    """bool[N]: whether the bigram is in more than one document."""
    documents = int(document.max(initial=0)) + 1
    pairs = np.unique(bigram.astype(np.int64) * documents + document)
    return np.bincount(pairs // documents, minlength=int(bigram.max(initial=0)) + 1)[bigram] > 1


LEAST_GROUPS = 1.5  # `effective_number` from which errors are over documents: two, one of which has up to 79 %


@dataclasses.dataclass(frozen=True)
class Slice:
    """The loss of one pattern in one slice. None: there is nothing to tell it from."""

    name: str  # of SLICES, or "16-22": tokens of the row before the one that is scored
    tokens: int
    loss: float  # nats a token
    difference: float  # nats a token more than the baseline
    difference_error: float | None  # one standard error over documents, paired
    recovered: float | None  # of what a window of about the same memory loses over dense, the share that is won back
    recovered_error: float | None
    document_tokens: tuple[int, ...] = ()  # of each document (of one alone, of each row): pairs runs afterwards
    document_nll: tuple[float, ...] = ()  # in nats


@dataclasses.dataclass(frozen=True)
class References:
    """What a pattern's losses are held against: places in the list of all patterns' losses."""

    baseline: int
    dense: int | None  # sees everything
    window: int | None  # a plain window of about the same memory


def sliced(
    tokens: ScoredTokens, losses: Sequence[np.ndarray], this: int, refer: References, near: int, far: int
) -> tuple[Slice, ...]:
    """The slices of one pattern that have tokens.

    Args:
      tokens: what was scored.
      losses: float[N] of every pattern, in nats.
      this: which of them.
      refer: what it is compared with.
      near: see `SLICES`.
      far: see `SLICES`.
    """
    masks = tokens.masks(near, far)
    return tuple(_slice(tokens, name, mask, losses, this, refer) for name, mask in masks.items() if mask.any())


def by_position(tokens: ScoredTokens, losses: Sequence[np.ndarray], this: int, refer: References) -> tuple[Slice, ...]:
    """The same by half octaves of the tokens of the row before."""
    bucket = np.searchsorted(EDGES, tokens.before, side="right") - 1
    ends = [*EDGES[1:], 2**31]
    found = ((f"{EDGES[i]}-{ends[i] - 1}", bucket == i) for i in np.unique(bucket))
    slices = (_slice(tokens, name, mask, losses, this, refer) for name, mask in found)
    return tuple(dataclasses.replace(x, document_tokens=(), document_nll=()) for x in slices)


def _slice(
    tokens: ScoredTokens, name: str, mask: np.ndarray, losses: Sequence[np.ndarray], this: int, refer: References
) -> Slice:
    groups, count = tokens.document[mask], tokens.number_of_documents
    if effective_number(np.bincount(tokens.document)) < LEAST_GROUPS:  # errors over the rows of the only one
        groups, count = tokens.row[mask], int(tokens.row[-1]) + 1
    counts = np.bincount(groups, minlength=count)

    def nll(which: int) -> np.ndarray:
        return np.bincount(groups, weights=np.asarray(losses[which], np.float64)[mask], minlength=count)

    own = nll(this)
    difference, error = ratio_error(own - nll(refer.baseline), counts)
    recovered = None, None
    if refer.dense is not None and refer.window is not None:
        window = nll(refer.window)
        lost = window - nll(refer.dense)
        recovered = ratio_error(window - own, lost) if lost.sum() > 0 else recovered
    return Slice(
        name, int(mask.sum()), float(own.sum() / counts.sum()), difference, error, *recovered,
        document_tokens=tuple(counts.tolist()), document_nll=tuple(own.tolist()),
    )  # fmt: skip


def spread(x: Slice) -> float | None:
    """One standard error of the loss itself over documents."""
    return ratio_error(np.array(x.document_nll), np.array(x.document_tokens))[1]


def effective_number(counts: np.ndarray) -> float:
    """Of groups of equal size that would tell as much as these (Kish): a book beside a note is hardly more than one."""
    sizes = np.abs(counts.astype(np.float64))
    return float(sizes.sum() ** 2 / max(np.sum(sizes**2), 1e-300))


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) and its standard error over groups (linearised).

    None where that would be of less than two groups, or of hardly more than one: a single group that has nearly all the
    counts has the mean, so that its residual is 0 whatever the error is.
    """
    mean = float(sums.sum() / counts.sum())
    n = int(np.sum((counts != 0) | (sums != 0)))
    if n < 2 or effective_number(counts) < LEAST_GROUPS:
        return mean, None
    residuals = sums - mean * counts
    return mean, math.sqrt(float(np.sum(residuals**2)) * n / (n - 1)) / abs(float(counts.sum()))
