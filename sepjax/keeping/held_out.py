"""Texts to choose by and others to check the choice on, and the check: streams beside a plain window of equal bytes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sepjax.config import AttentionConfig, UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.arms import Arm
from sepjax.evaluation.documents import Document, whole_documents
from sepjax.evaluation.slices import Slice
from sepjax.evaluation.streaming import StreamScore, score_streams
from sepjax.model.transformer import Transformer
from sepjax.progress import counted

_FEWEST = 4  # texts that are dealt whole; of fewer each is cut in two
_STRETCHES = 2  # at least, to check on: one has no error


class TooLittleTextError(UserError, ValueError):
    """Too little text to choose layers by, or to check the choice on."""


@dataclasses.dataclass(frozen=True)
class Divided:
    """Token ids to choose by, and stretches of other texts, or of their other halves, to check on."""

    rows: list[np.ndarray]  # of up to `length` + 1 tokens
    documents: list[Document]


@dataclasses.dataclass(frozen=True)
class Check:
    """A choice beside the window of equal bytes, on texts that it was not chosen by."""

    chosen: StreamScore
    window: StreamScore

    def of(self, name: str) -> Slice | None:
        """The choice's slice of this name, with its difference from the window; None: no token is in it."""
        return next((x for x in self.chosen.slices if x.name == name), None)

    @property
    def wins(self) -> bool:
        """Whether the choice loses less than the window by more than the error of that."""
        whole = self.of("all")
        return whole is not None and whole.difference < -(whole.difference_error or 0.0)


def divide(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    others: Sequence[str] = (),
    *,
    length: int,
    max_tokens: int,
    check_length: int,
    check_tokens: int,
    least: int,
    seed: int,
) -> Divided:
    """Deals texts to the two sides at random, and takes stretches of each text in turn.

    Args:
      tokenizer: the model's.
      texts: for the choice; without `others` half of them, of fewer than four texts the first half of each.
      others: to check on.
      length: tokens of a row.
      max_tokens: of all rows; at least one is taken.
      check_length: tokens of a stretch to check on.
      check_tokens: of all of those.
      least: tokens that a stretch to check on has at least; a row has half of `length`.
      seed: of the dealing.

    Raises:
      TooLittleTextError: there is no row, or are fewer than two stretches to check on.
    """
    random = np.random.default_rng(seed)

    def shuffled(texts: Sequence[str]) -> list[np.ndarray]:
        ids = [ids for _, ids in counted(tokenizer.encode_each(texts), "tokenising")]
        return [ids[i] for i in random.permutation(len(ids))]

    ids = shuffled(texts)
    if others:
        sides = ids, shuffled(others)
    elif len(ids) >= _FEWEST:
        sides = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    else:
        sides = [x[: len(x) // 2] for x in ids], [x[len(x) // 2 :] for x in ids]
    first = list(tokenizer.prefix)
    rows = _stretches(sides[0], length, max(1, max_tokens // length), length // 2, random)
    checks = _stretches(sides[1], check_length, max(_STRETCHES, check_tokens // check_length), least, random)
    if not rows or len(checks) < _STRETCHES:
        tokens = sum(map(len, [*sides[0], *sides[1]]))
        raise TooLittleTextError(
            f"the texts have {tokens:,} tokens, of which {len(rows)} stretches of {length // 2:,} or more are "
            f"to choose by and {len(checks)} of {least:,} or more to check on; at least 1 and {_STRETCHES} are needed: "
            "give more or longer texts, or lower --slots"
        )
    rows = [np.concatenate([np.array(first, np.int32), x]) for x in rows]
    return Divided(rows, whole_documents(checks, next(iter(first), None)))


def _stretches(
    texts: Sequence[np.ndarray], length: int, number: int, least: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Up to `number` stretches, one of each text in turn, of each in random order."""
    cut = [[x[i : i + length] for i in range(0, len(x), length)] for x in texts]
    queues = [[some[i] for i in random.permutation(len(some)) if len(some[i]) >= least] for some in cut]
    taken: list[np.ndarray] = []
    for turn in range(max(map(len, queues), default=0)):
        taken += [queue[turn] for queue in queues if turn < len(queue)]
    return taken[:number]


def check(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    attention: AttentionConfig,
    window: AttentionConfig,
    far: int,
) -> Check:
    """Streams the documents through the cache that was chosen and through a plain window.

    Args:
      model: from `sepjax.load`; it is given up, as `score_streams` has it.
      tokenizer: the model's.
      documents: of `divide`.
      attention: of the choice.
      window: of no fewer bytes.
      far: what was last said more tokens ago is in the slice `far`.
    """
    arms = [Arm("window", window), Arm("chosen", attention)]
    beside, chosen = score_streams(model, tokenizer, documents, arms, far=far, consume=True)
    return Check(chosen, beside)
