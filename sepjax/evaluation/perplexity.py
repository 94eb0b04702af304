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

from sepjax.config import AttentionConfig, layer_windows
from sepjax.data.tokenizer import Tokenizer
from sepjax.model.attend import forward, layer_layouts
from sepjax.model.transformer import Transformer, merge, split
from sepjax.separators import configured_table, flag_separators
from sepjax.training.loss import cross_entropy_sums


@dataclasses.dataclass(frozen=True)
class Score:
    """How well one attention pattern predicts a set of documents."""

    pattern: str
    window_size: int  # n; for per-layer windows the largest
    perplexity: float  # per token
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
) -> list[Score]:
    """Scores the same documents under each attention config.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      documents: texts; empty ones score nothing.
      attentions: the patterns to compare.
      length: T, tokens of a window.
      batch_size: windows of a forward pass.

    Raises:
      ValueError: when there is no text to score, or a learned position table is shorter than `length`.
    """
    table = model.config.max_positions
    if model.config.position_embedding == "learned" and length > table:
        raise ValueError(f"length={length} exceeds the model's {table} learned positions; use {table} or less")
    texts = list(documents)
    windows = list(_windows(tokenizer, texts, length))
    if not windows:
        raise ValueError("no text to score: every document is empty")
    num_bytes = sum(len(text.encode()) for text in texts)
    return [_score(model, tokenizer, windows, attention, length, batch_size, num_bytes) for attention in attentions]


def _windows(tokenizer: Tokenizer, texts: Iterable[str], length: int) -> Iterator[np.ndarray]:
    """Windows of up to T + 1 token ids: the last of each is only a target, and the first of the next one."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in texts:
        ids = np.array([*start, *tokenizer.encode(text)], np.int32)
        for i in range(0, len(ids) - 1, length):
            yield ids[i : i + length + 1]


def _score(
    model: Transformer,
    tokenizer: Tokenizer,
    windows: list[np.ndarray],
    attention: AttentionConfig,
    length: int,
    batch_size: int,
    num_bytes: int,
) -> Score:
    graph, params = split(model)
    step = jax.jit(functools.partial(_sums, graph, attention))
    table = configured_table(tokenizer, attention)
    sums, seconds = np.zeros(6), 0.0
    for number, batch in enumerate(_batches(windows, table, attention, length, batch_size)):
        if number == 0:
            jax.block_until_ready(step(params, *batch))  # compile outside the timing
        began = time.perf_counter()
        sums += np.asarray(step(params, *batch), np.float64)
        seconds += time.perf_counter() - began
    nll, tokens, kept, rows, visible, causal = sums.tolist()
    return Score(
        pattern=attention.pattern,
        window_size=max(layer_windows(attention, model.config.num_layers, length)),
        perplexity=math.exp(min(nll / tokens, 700.0)),
        bits_per_byte=nll / math.log(2) / num_bytes,
        kv_kept=kept / rows,
        attention_fraction=visible / causal,
        tokens=int(tokens),
        bytes=num_bytes,
        tokens_per_second=tokens / seconds,
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
) -> jax.Array:
    """float32[6]: negative log-likelihood, tokens, kv_kept times rows, rows, visible pairs, causal pairs."""
    model = merge(graph, params)
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    hidden, _ = forward(model, tokens, positions, is_separator, segment_ids, attention)
    _, nll = cross_entropy_sums(hidden, model.output_embedding(), targets, segment_ids != 0)
    layers = layer_layouts(is_separator, segment_ids, attention, model.config.num_layers)
    rows = jnp.sum(segment_ids[:, 0] != 0)
    kept = sum((layout.kv_kept() * share for layout, share in layers), jnp.zeros(())) * rows
    pairs = [(jnp.sum(layout.num_pairs(), dtype=jnp.float32), share) for layout, share in layers]
    visible = sum((count * share for count, share in pairs), jnp.zeros(()))
    causal = jnp.sum(layers[0][0].with_window(T).num_pairs(), dtype=jnp.float32)
    return jnp.stack([nll, jnp.sum(segment_ids != 0), kept, rows, visible, causal])


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
