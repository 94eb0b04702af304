"""Perplexity and bits per byte of whole texts, under any attention pattern, with the keys kept counted.

Protocol: each document is [BOS] + tokens, cut into windows of T tokens that do not overlap. Every token but BOS is
scored exactly once, given the tokens before it in its window. Each window is a row of its own, so `kv_kept` is what the
last query of a window sees over the window's length.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from sepjax.config import AttentionConfig, layer_windows
from sepjax.data.tokenizer import Tokenizer
from sepjax.model.attend import layer_layouts, run_rows
from sepjax.model.transformer import Transformer, merge, split
from sepjax.separators import configured_table, flag_separators
from sepjax.training.loss import cross_entropy_sums


@dataclasses.dataclass(frozen=True)
class Score:
    """How well one attention pattern predicts a set of documents."""

    pattern: str
    window_size: int  # n; for per-layer windows the largest
    perplexity: float  # per token
    window_perplexity: float  # the mean of each window's own, a convention of other programs; always larger
    bits_per_byte: float  # of the UTF-8 text
    kv_kept: float  # keys of the last row over the row's length, averaged over layers and windows
    attention_fraction: float  # visible over causal pairs, averaged over layers
    tokens: int  # scored
    bytes: int
    tokens_per_second: float  # after compilation


def score_patterns(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    attentions: Iterable[AttentionConfig],
    *,
    length: int,
    batch_size: int = 8,
    max_tokens: int = 0,
    bos: bool = True,
) -> list[Score]:
    """Scores the same documents under each attention config.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      documents: texts; empty ones score nothing.
      attentions: the patterns to compare.
      length: T, tokens of a window.
      batch_size: windows of a forward pass.
      max_tokens: of each document; 0: all.
      bos: whether documents begin with BOS.

    Raises:
      ValueError: when there is no text to score, or a learned position table is shorter than `length`.
    """
    texts = list(documents)
    windows = token_windows(tokenizer, texts, length, bos=bos, max_tokens=max_tokens)
    num_bytes = sum(len(text.encode()) for text in texts)
    if max_tokens:
        num_bytes = sum(len(tokenizer.token_bytes(int(i))) for window in windows for i in window[1:])
    return [
        _total(score_windows(model, tokenizer, windows, attention, length=length, batch_size=batch_size), num_bytes)
        for attention in attentions
    ]


def token_windows(
    tokenizer: Tokenizer, texts: Iterable[str], length: int, *, bos: bool = True, max_tokens: int = 0
) -> list[np.ndarray]:
    """Windows of up to T + 1 token ids: the last of each is only a target, and the first of the next one.

    Args:
      tokenizer: the model's.
      texts: documents.
      length: T.
      bos: whether each begins with BOS, where there is one.
      max_tokens: of each document, BOS included; 0: all.

    Raises:
      ValueError: every document is empty.
    """
    start = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    windows = []
    for text in texts:
        ids = np.array([*start, *tokenizer.encode(text)], np.int32)[: max_tokens or None]
        windows += [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
    if not windows:
        raise ValueError("no text to score: every document is empty")
    return windows


@dataclasses.dataclass(frozen=True)
class WindowScores:
    """One pattern's figures, window by window."""

    attention: AttentionConfig
    nll: Float64[np.ndarray, "W"]  # negative log-likelihood in nats
    tokens: Float64[np.ndarray, "W"]  # scored
    kept: Float64[np.ndarray, "W"]  # keys of the last row over the row's length, averaged over layers
    lengths: list[int]  # tokens of each window
    pairs: tuple[float, float]  # visible, causal; averaged over layers
    separator_fraction: float
    num_layers: int
    seconds: float  # after compilation

    @property
    def kv_kept(self) -> float:
        """Averaged over windows."""
        return float(self.kept.mean())


def score_windows(
    model: Transformer,
    tokenizer: Tokenizer,
    windows: list[np.ndarray],
    attention: AttentionConfig,
    *,
    length: int,
    batch_size: int,
) -> WindowScores:
    """Scores windows of `token_windows` under one pattern; see `score_patterns` for the rest.

    Raises:
      ValueError: a learned position table is shorter than `length`.
    """
    table_rows = model.config.max_positions
    if model.config.position_embedding == "learned" and length > table_rows:
        raise ValueError(
            f"length={length} exceeds the model's {table_rows} learned positions; use {table_rows} or less"
        )
    graph, params = split(model)
    step = jax.jit(functools.partial(_sums, graph, attention))
    table = configured_table(tokenizer, attention)
    rows, totals, seconds = [], np.zeros(3), 0.0
    for number, batch in enumerate(_batches(windows, table, attention, length, batch_size)):
        if number == 0:
            jax.block_until_ready(step(params, *batch))  # compile outside the timing
        began = time.perf_counter()
        by_row, sums = (np.asarray(x, np.float64) for x in step(params, *batch))
        seconds += time.perf_counter() - began
        rows.append(by_row)
        totals += sums
    nll, tokens, kept = np.concatenate(rows, axis=1)[:, : len(windows)]
    return WindowScores(
        attention=attention,
        nll=nll,
        tokens=tokens,
        kept=kept,
        lengths=[len(window) - 1 for window in windows],
        pairs=(float(totals[0]), float(totals[1])),
        separator_fraction=float(totals[2] / tokens.sum()),
        num_layers=model.config.num_layers,
        seconds=seconds,
    )


def _total(x: WindowScores, num_bytes: int) -> Score:
    nll, tokens = float(x.nll.sum()), float(x.tokens.sum())
    return Score(
        pattern=x.attention.pattern,
        window_size=max(layer_windows(x.attention, x.num_layers, max(x.lengths))),
        perplexity=math.exp(min(nll / tokens, 700.0)),
        window_perplexity=float(np.mean(np.exp(np.minimum(x.nll / x.tokens, 700.0)))),
        bits_per_byte=nll / math.log(2) / num_bytes,
        kv_kept=x.kv_kept,
        attention_fraction=x.pairs[0] / x.pairs[1],
        tokens=int(tokens),
        bytes=num_bytes,
        tokens_per_second=tokens / x.seconds,
    )


def _batches(
    windows: list[np.ndarray], table: np.ndarray, attention: AttentionConfig, length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """tokens, targets, segment_ids, is_separator, each [batch_size, T]; missing rows are padding."""
    positions = np.arange(length, dtype=np.int32)
    for i in range(0, len(windows), batch_size):
        ids = np.full((batch_size, length + 1), -1, np.int32)
        for row, window in enumerate(windows[i : i + batch_size]):
            ids[row, : len(window)] = window
        scored = ids[:, 1:] >= 0
        tokens, targets = np.where(scored, ids[:, :-1], 0), np.where(scored, ids[:, 1:], 0)
        yield tokens, targets, scored.astype(np.int32), flag_separators(tokens, positions, table, attention) & scored


def _sums(
    graph: Any,
    attention: AttentionConfig,
    params: Any,
    tokens: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array,
    is_separator: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """float32[3, B]: negative log-likelihood, tokens, kv_kept of each row; float32[3]: visible and causal pairs,
    separators.
    """
    model = merge(graph, params)
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    rows = run_rows(model, tokens, positions, is_separator, segment_ids, attention)
    scored = segment_ids != 0

    def row(inputs: tuple[jax.Array, ...]) -> jax.Array:
        hidden, targets, scored = (x[None] for x in inputs)
        return cross_entropy_sums(hidden, model.output_embedding(), targets, scored)[1]

    nll = jax.lax.map(row, (rows.hidden, targets, scored))
    layers = layer_layouts(rows.is_separator, segment_ids, attention, model.config.num_layers)
    count = jnp.sum(scored, axis=1)
    last = jnp.maximum(count - 1, 0)
    keys = [(jnp.take_along_axis(x.keys_per_query(), last[:, None], axis=1)[:, 0], share) for x, share in layers]
    kept = sum((seen * share for seen, share in keys), jnp.zeros(B)) / jnp.maximum(count, 1)
    pairs = [(jnp.sum(layout.num_pairs(), dtype=jnp.float32), share) for layout, share in layers]
    visible = sum((pair * share for pair, share in pairs), jnp.zeros(()))
    causal = jnp.sum(layers[0][0].with_window(T).num_pairs(), dtype=jnp.float32)
    separators = jnp.sum(rows.is_separator, dtype=jnp.float32)
    return jnp.stack([nll, count.astype(jnp.float32), kept]), jnp.stack([visible, causal, separators])


def table(scores: Iterable[Score]) -> str:
    """The scores as a text table."""
    header = (
        f"{'pattern':<16}{'n':>7}{'perplexity':>12}{'bits/byte':>11}{'KV kept':>9}{'attention':>11}{'tokens/s':>11}"
    )
    rows = [
        f"{s.pattern:<16}{s.window_size:>7}{s.perplexity:>12.3f}{s.bits_per_byte:>11.4f}{s.kv_kept:>9.1%}"
        f"{s.attention_fraction:>11.1%}{s.tokens_per_second:>11,.0f}"
        for s in scores
    ]
    return "\n".join([header, *rows])
