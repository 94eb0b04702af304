"""Attention over whole packed rows, as the blocks call it: training, scoring and prefill."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sepjax.array_typing import Float, Positions, Queries, SegmentIds, SeparatorFlags, Tokens
from sepjax.attention import dense_attention, separator_attention
from sepjax.config import AttentionConfig, ModelConfig, layer_windows
from sepjax.layout import SeparatorLayout, build_layout
from sepjax.model.layers import Attend
from sepjax.model.rope import rope_table, rotate
from sepjax.model.transformer import Transformer
from sepjax.sharding import manual_over_batch_and_heads


def forward(
    model: Transformer,
    tokens: Tokens,
    positions: Positions,
    is_separator: SeparatorFlags,
    segment_ids: SegmentIds | None = None,
    attention: AttentionConfig | None = None,
    *,
    keep_keys: bool = False,
) -> tuple[Float[jax.Array, "B T D"], Any]:
    """Hidden states of packed rows under an attention pattern.

    Args:
      model: the decoder.
      tokens: int32[B, T].
      positions: int32[B, T] within each document.
      is_separator: bool[B, T] from `sepjax.separators.flag_separators`.
      segment_ids: int32[B, T], 0 for padding; None: each row is one document.
      attention: the pattern; None: the model's own.
      keep_keys: also return the keys (rotated) and values of every layer, (k, v) each [L, B, T, K, H], for a cache.

    Returns:
      Hidden states [B, T, D] for `model.logits`, and (k, v) or None.
    """
    attention = attention or model.attention
    windows = layer_windows(attention, model.config.num_layers, tokens.shape[1])
    if attention.pattern == "dense":
        attend_rows = _dense(segment_ids if attention.document_mask else None)
    else:
        layout = batch_layout(is_separator, segment_ids, attention, windows[0])
        attend_rows = _packed(layout, attention, one_window=len(set(windows)) == 1)
    attend = _with_rope(model.config, positions, attend_rows, keep_keys)
    return model(tokens, positions, attend, jnp.asarray(windows, jnp.int32))


def batch_layout(
    is_separator: SeparatorFlags, segment_ids: SegmentIds | None, attention: AttentionConfig, window_size: int
) -> SeparatorLayout:
    """The layout of a batch under an attention config, seen through one window n.

    A dense pattern has neither sinks nor separators: its layout is the causal mask, whatever the flags say.
    """
    if attention.pattern == "dense":
        is_separator, window_size = jnp.zeros_like(is_separator), is_separator.shape[1]
    return build_layout(
        is_separator,
        window_size=window_size,
        num_sinks=0 if attention.pattern == "dense" else attention.num_sinks,
        segment_ids=segment_ids,
        capacity=min(attention.capacity, is_separator.shape[1]) or None,
        document_mask=attention.document_mask,
    )


def layer_layouts(
    is_separator: SeparatorFlags, segment_ids: SegmentIds | None, attention: AttentionConfig, num_layers: int
) -> list[tuple[SeparatorLayout, float]]:
    """The distinct layouts of the layers, each with its share of the layers: for statistics averaged over layers."""
    windows = layer_windows(attention, num_layers, is_separator.shape[1])
    layout = batch_layout(is_separator, segment_ids, attention, windows[0])
    return [(layout.with_window(n), times / num_layers) for n, times in collections.Counter(windows).items()]


type _Rows = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _packed(layout: SeparatorLayout, attention: AttentionConfig, *, one_window: bool) -> _Rows:
    def op(q: jax.Array, k: jax.Array, v: jax.Array, layout: SeparatorLayout) -> Queries:
        return separator_attention(q, k, v, layout, implementation=attention.implementation)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array) -> jax.Array:
        seen = layout if one_window else layout.with_window(window)
        heads = PartitionSpec("batch", None, "heads", None)
        return manual_over_batch_and_heads(op, (heads, heads, heads, PartitionSpec("batch")), heads)(q, k, v, seen)

    return attend


def _dense(segment_ids: SegmentIds | None) -> _Rows:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array) -> jax.Array:
        heads = PartitionSpec("batch", None, "heads", None)
        if segment_ids is None:
            return manual_over_batch_and_heads(dense_attention, (heads, heads, heads), heads)(q, k, v)
        specs = (heads, heads, heads, PartitionSpec("batch"))
        return manual_over_batch_and_heads(dense_attention, specs, heads)(q, k, v, segment_ids)

    return attend


def _with_rope(config: ModelConfig, positions: Positions, attend_rows: _Rows, keep_keys: bool) -> Attend:
    uses_rope = config.position_embedding == "rope"
    table = rope_table(positions, config.rope, config.head_dim) if uses_rope else None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array) -> tuple[jax.Array, Any]:
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        return attend_rows(q, k, v, window), (k, v) if keep_keys else None

    return attend
