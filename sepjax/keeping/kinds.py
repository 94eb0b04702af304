"""What distant tokens of each kind are looked at: separators, names, numbers, frequent words and the rest.

Kinds are told by a token's text alone, so they are the same for any model that writes words with the space in front.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sepjax.array_typing import Int32
from sepjax.config import AttentionConfig
from sepjax.data.tokenizer import Tokenizer
from sepjax.keeping.measure import far_looks
from sepjax.model.transformer import Transformer
from sepjax.separators import separator_table, token_texts

KINDS = ("sink", "separator", "number", "capitalised", "frequent word", "other word", "rest of a word", "other")
_FREQUENT = 100  # ids of word beginnings that count as frequent: articles, prepositions and the like


@dataclasses.dataclass(frozen=True)
class KindShare:
    """One kind of token in a text."""

    kind: str
    tokens: float  # share of the tokens that could be looked at from afar
    attention: float  # share of the far attention that they receive
    relative: float  # far attention a token, over that of the mean token that is not a sink
    error: float | None  # one standard error of `relative`, over rows; None: of a single row it is not known


def kinds_of_ids(tokenizer: Tokenizer, counts: np.ndarray) -> np.ndarray:
    """int[V]: the place in KINDS of every id, by its text; `counts` int[V] says which words are frequent."""
    separators = separator_table(tokenizer)
    kinds = np.full(len(separators), KINDS.index("other"))
    for i, text in enumerate(token_texts(tokenizer)):
        if i < len(kinds) and text and text.strip():
            kinds[i] = KINDS.index(_kind(text, is_separator=bool(separators[i])))
        elif i < len(kinds) and separators[i]:
            kinds[i] = KINDS.index("separator")
    words = np.flatnonzero(kinds == KINDS.index("other word"))
    known = counts[words[words < len(counts)]]
    frequent = words[np.argsort(-known, kind="stable")[:_FREQUENT]]
    kinds[frequent[counts[frequent] > 0]] = KINDS.index("frequent word")
    return kinds


def _kind(text: str, *, is_separator: bool) -> str:
    bare = text.strip()
    if is_separator:
        return "separator"
    if bare[0].isdigit():
        return "number"
    if not bare[0].isalpha():
        return "other"
    if bare[0].isupper():
        return "capitalised"
    return "other word" if text[0].isspace() else "rest of a word"


def far_attention_by_kind(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[Int32[np.ndarray, "_"]],
    *,
    window_size: int,
    num_sinks: int = AttentionConfig().num_sinks,
) -> list[KindShare]:
    """Squared attention weights that tokens receive from `window_size` or more tokens later, by kind.

    A place is worth what a query that could look at it gives it on average, over all heads and layers. Kinds that do
    not occur are left out.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      rows: token ids, of more than `window_size` + 1 tokens each; the last of each is not looked at.
      window_size: n; nearer than that every token is seen anyway.
      num_sinks: first tokens of each row, a kind of their own.
    """
    counts = np.bincount(np.concatenate(list(rows)), minlength=model.config.vocab_size)
    of_id = kinds_of_ids(tokenizer, counts)
    of_id = np.pad(of_id, (0, max(0, len(counts) - len(of_id))), constant_values=KINDS.index("other"))
    received, tokens = np.zeros((len(rows), len(KINDS))), np.zeros((len(rows), len(KINDS)))
    for number, (ids, looks) in enumerate(far_looks(model, rows, window_size=window_size)):
        places = len(ids) - 1 - window_size  # the others have no query that is far
        kinds = np.where(np.arange(places) < num_sinks, KINDS.index("sink"), of_id[ids[:places]])
        queries = places - np.arange(places)
        np.add.at(received[number], kinds, looks[:places] / queries)
        np.add.at(tokens[number], kinds, 1)
    return [_share(received, tokens, kind) for kind in range(len(KINDS)) if tokens[:, kind].any()]


def _share(received: np.ndarray, tokens: np.ndarray, kind: int) -> KindShare:
    """Sums over rows, [R, kinds] each; the error of the ratio of ratios is linearised, as in `evaluation.slices`."""
    sink = KINDS.index("sink")
    others = np.arange(len(KINDS)) != sink
    mine, count = received[:, kind], tokens[:, kind]
    all_received, all_count = received[:, others].sum(1), tokens[:, others].sum(1)
    mean, overall = mine.sum() / count.sum(), all_received.sum() / all_count.sum()
    relative = mean / overall
    parts = (mine - mean * count) / (count.sum() * overall)
    parts -= relative * (all_received - overall * all_count) / (all_count.sum() * overall)
    R = len(parts)
    error = float(np.sqrt(R / (R - 1) * (parts**2).sum())) if R > 1 else None
    share = float(mine.sum() / received.sum())
    return KindShare(KINDS[kind], float(count.sum() / tokens.sum()), share, float(relative), error)
