"""Losses of whole texts, token by token, under any attention pattern, with the keys kept counted.

Protocol: each document is [BOS] + tokens, cut into windows of T tokens that do not overlap; of a run's it is what its
documents began with in training. Every token but BOS is scored exactly once, given the tokens before it in its window.
Each window is a row of its own, so `kept` is what the last query of a window sees over the window's length.
`sepjax.evaluation.compare` makes figures of them.

Of a conversation (`sepjax.data.scored`: a text with marks) only what is marked is scored, what an assistant says; as in
training nothing stands in front of it.
"""

import collections
import dataclasses
import functools
import itertools
import operator
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Bool, Float, Int32
from sepjax.config import AttentionConfig, UserError, with_own_window
from sepjax.data.marks import OPEN
from sepjax.data.scored import Spans, matched, scored_tokens, unmarked
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.passes import rows_of_pass
from sepjax.evaluation.token_loss import token_nll
from sepjax.model.attend import layer_kinds, layer_layouts, run_rows
from sepjax.model.transformer import Transformer, merge, split
from sepjax.model.unrolled import working_copy
from sepjax.progress import counted, working
from sepjax.separators import configured_table, flag_separators, warn_of_few_in

_STEP = 256  # rows have a multiple of so many tokens: few shapes, of which each is compiled


class TextError(UserError, ValueError):
    """Texts that cannot be scored as asked."""


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """Rows to score. The last token of a window is only a target, and the first of the next one."""

    ids: list[Int32[np.ndarray, "_"]]  # up to T + 1 tokens each
    documents: Int32[np.ndarray, "W"]  # of which document each window is
    num_bytes: int  # of the scored tokens' text
    scored: tuple[Bool[np.ndarray, "_"], ...] | None = None  # which targets of each are scored; None: all

    @property
    def lengths(self) -> Int32[np.ndarray, "W"]:
        """Tokens of each, the last target left out."""
        return np.array([len(window) - 1 for window in self.ids], np.int32)

    def first(self, count: int, tokenizer: Tokenizer) -> "TextWindows":
        """The first so many."""
        if count >= len(self.ids):
            return self
        ids, scored = self.ids[:count], None if self.scored is None else self.scored[:count]
        kept = TextWindows(ids, self.documents[:count], 0, scored)
        targets = kept.of_scored([window[1:] for window in ids])
        return dataclasses.replace(kept, num_bytes=sum(len(tokenizer.token_bytes(int(i))) for i in targets))

    @classmethod
    def join(cls, parts: Sequence["TextWindows"]) -> "TextWindows":
        """Those of several sources, one source after the other."""
        starts = np.cumsum([0, *(int(part.documents.max(initial=-1)) + 1 for part in parts)])
        documents = [part.documents + start for part, start in zip(parts, starts, strict=False)]
        scored = None
        if any(part.scored is not None for part in parts):
            every = (part.scored or [np.ones(len(window) - 1, bool) for window in part.ids] for part in parts)
            scored = tuple(itertools.chain(*every))
        ids = list(itertools.chain(*(part.ids for part in parts)))
        return cls(ids, np.concatenate(documents).astype(np.int32), sum(part.num_bytes for part in parts), scored)

    def of_scored(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Of values for every target, window by window, those of scored ones, side by side."""
        chosen = values if self.scored is None else [x[at] for x, at in zip(values, self.scored, strict=True)]
        return np.concatenate(chosen)


def token_windows(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    length: int,
    *,
    bos: bool = True,
    max_tokens: int = 0,
    start: int | None = None,
    loss_on: str = "",
) -> TextWindows:
    """Tokenises texts and cuts them.

    Args:
      tokenizer: the model's.
      texts: documents; empty ones have no windows. Of texts with marks what is marked is scored, and windows without
        any such token are left out.
      length: T.
      bos: whether each begins with BOS, where the model's tokenizer puts one.
      max_tokens: of each document, BOS included; 0: all.
      start: a token that each begins with in place of BOS, if `bos`: a run's own documents begin with
        `document_start`, whether or not its tokenizer puts it there.
      loss_on: what of texts is scored, a regular expression as `data.loss_on`; "": all of it, or what is marked.

    Raises:
      TextError: every document is empty, or none has anything that is to be scored.
      sepjax.data.errors.DataError: nothing tells which tokens of a marked text are marked.
    """
    windows, documents, num_bytes, scored, in_part = [], [], 0, [], bool(loss_on)
    front = ([start] if start is not None else tokenizer.prefix) if bos else []
    read = tokenizer.encode_each(((text, *unmarked(text)) for text in texts), text=operator.itemgetter(1))
    for number, ((text, plain, spans), own) in enumerate(counted(read, "tokenising")):
        is_conversation = OPEN in text
        in_part |= is_conversation
        spans = matched(plain, re.compile(loss_on, re.DOTALL)) if loss_on else spans
        starts = is_conversation or own[:1].tolist() == front
        whole = own if starts else np.concatenate([np.array(front, np.int32), own])
        is_whole = not (is_conversation or loss_on)
        marks = np.ones(len(whole), bool) if is_whole else _marks(tokenizer, plain, own, spans, len(whole))
        ids = whole[: max_tokens or None]
        complete = len(ids) == len(whole) and ids[:1].tolist() == (front or tokenizer.prefix) and is_whole
        if complete:  # all of the text is scored
            num_bytes += len(text.encode())
        else:
            num_bytes += sum(len(tokenizer.token_bytes(int(i))) for i in ids[1:][marks[1 : len(ids)]])
        for i in range(0, len(ids) - 1, length):
            if (at := marks[i + 1 : min(i + length + 1, len(ids))]).any():
                windows.append(ids[i : i + length + 1])
                scored.append(at)
                documents.append(number)
    if not windows:
        empty = "loss_on matches nothing" if loss_on else "no assistant says anything"
        raise TextError("no text to score: every document is empty" + f", or {empty}" * in_part)
    return TextWindows(windows, np.array(documents, np.int32), num_bytes, tuple(scored) if in_part else None)


def _marks(tokenizer: Tokenizer, text: str, ids: np.ndarray, spans: Spans, size: int) -> np.ndarray:
    """bool[size]: which tokens have a part in a span; `size` counts what was put in front of `ids`."""
    own = scored_tokens(tokenizer, [text], ids, np.array([len(ids)]), [spans])[0]
    return np.concatenate([np.zeros(size - len(ids), bool), own])


@dataclasses.dataclass(frozen=True)
class WindowLosses:
    """One pattern's figures."""

    attention: AttentionConfig
    nll: Float[np.ndarray, "N"]  # in nats, of every scored token, window after window (`TextWindows.scored`)
    kept: Float[np.ndarray, "L W"]  # keys that each window's last query sees over its length
    pairs: tuple[float, float]  # visible, causal; averaged over layers
    seconds: float  # after compilation

    @property
    def kv_kept(self) -> float:
        """Averaged over layers and windows."""
        return float(self.kept.mean())

    @property
    def attention_fraction(self) -> float:
        """Visible over causal pairs, averaged over layers."""
        return self.pairs[0] / self.pairs[1]


def score_windows(
    model: Transformer,
    tokenizer: Tokenizer,
    windows: TextWindows,
    attention: AttentionConfig,
    *,
    length: int,
    batch_size: int,
) -> WindowLosses:
    """Scores windows of `token_windows` under one pattern.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      windows: of up to `length` tokens.
      attention: the pattern.
      length: T, tokens of a row; less where all windows are shorter.
      batch_size: rows of a forward pass, at most (`rows_of_pass`).

    Raises:
      TextError: a learned position table is shorter than `length`.
    """
    table_rows = model.config.max_positions
    if model.config.position_embedding == "learned" and length > table_rows:
        raise TextError(f"length={length} exceeds the model's {table_rows} learned positions; use {table_rows} or less")
    length = min(length, -(-int(windows.lengths.max()) // _STEP) * _STEP)  # what is longer than the texts is padding
    graph, params = split(model)
    seen = with_own_window(attention, model.config)
    step, params = _make_step(graph, seen), working_copy(params, model.config)
    table = configured_table(tokenizer, seen)
    warn_of_few_in(np.concatenate(windows.ids), table, seen, "the text to score")
    nll, kept, totals, seconds = [], [], np.zeros(2), 0.0
    with working(f"scoring {seen.pattern}", len(windows.ids), "windows") as work:
        for number, (batch, rows) in enumerate(_batches(windows.ids, table, seen, length, batch_size)):
            if number == 0:
                with working(f"compiling for {seen.pattern}"):
                    step.lower(params, *batch).compile()  # outside the timing
            began = time.perf_counter()
            losses, keys, sums = (np.asarray(x) for x in step(params, *batch))
            seconds += time.perf_counter() - began
            nll += [losses[i, : len(window) - 1] for i, window in enumerate(rows)]
            kept.append(keys[:, : len(rows)])
            totals += sums
            work.add(len(rows))
    per_layer = _of_each_layer(seen, model.config.num_layers, length)
    return WindowLosses(
        attention=attention,
        nll=windows.of_scored(nll),
        kept=np.concatenate(kept, axis=1)[per_layer] / windows.lengths,
        pairs=(float(totals[0]), float(totals[1])),
        seconds=seconds,
    )


def _of_each_layer(attention: AttentionConfig, num_layers: int, length: int) -> list[int]:
    """For each layer the number of its layout in `layer_layouts`."""
    kinds = layer_kinds(attention, num_layers, length)
    distinct = list(collections.Counter(kinds))
    return [distinct.index(kind) for kind in kinds]


def _batches(
    windows: list[np.ndarray], table: np.ndarray, attention: AttentionConfig, length: int, batch_size: int
) -> Iterator[tuple[tuple[np.ndarray, ...], list[np.ndarray]]]:
    """tokens, targets, segment_ids, is_separator, each [B, T], and the windows in them; missing rows are padding."""
    positions = np.arange(length, dtype=np.int32)
    size = rows_of_pass(len(windows), batch_size)
    for i in range(0, len(windows), size):
        rows = windows[i : i + size]
        ids = np.full((size, length + 1), -1, np.int32)
        for row, window in enumerate(rows):
            ids[row, : len(window)] = window
        scored = ids[:, 1:] >= 0
        tokens, targets = np.where(scored, ids[:, :-1], 0), np.where(scored, ids[:, 1:], 0)
        flags = flag_separators(tokens, positions, table, attention) & scored
        yield (tokens, targets, scored.astype(np.int32), flags), rows


@functools.cache
def _make_step(graph: Any, attention: AttentionConfig) -> Any:
    """`_losses` compiled for one model and pattern."""
    return jax.jit(functools.partial(_losses, graph, attention))


def _losses(
    graph: Any,
    attention: AttentionConfig,
    params: Any,
    tokens: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array,
    is_separator: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32[B, T]: losses in nats; int32[U, B]: keys that the last token of each row sees in each of the distinct
    layouts; float32[2]: visible and causal pairs.
    """
    model = merge(graph, params)
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    rows = run_rows(model, tokens, positions, is_separator, segment_ids, attention)
    nll = token_nll(rows.hidden, model.output_embedding(), targets, model.config)
    layers = layer_layouts(rows.is_separator, segment_ids, attention, model.config.num_layers)
    last = jnp.maximum(jnp.sum(segment_ids != 0, axis=1) - 1, 0)
    keys = [jnp.take_along_axis(layout.keys_per_query(), last[:, None], axis=1)[:, 0] for layout, _ in layers]
    pairs = [(jnp.sum(layout.num_pairs(), dtype=jnp.float32), share) for layout, share in layers]
    visible = sum((pair * share for pair, share in pairs), jnp.zeros(()))
    causal = jnp.sum(layers[0][0].with_window(T).num_pairs(), dtype=jnp.float32)
    return nll, jnp.stack(keys), jnp.stack([visible, causal])
