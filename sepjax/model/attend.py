"""Attention over whole packed rows, as the blocks call it: training, scoring and prefill."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float32

from sepjax.array_typing import Array, Bool, Float, Positions, Queries, SegmentIds, SeparatorFlags, Tokens
from sepjax.attention import dense_attention, separator_attention
from sepjax.attention.context_parallel import (
    ContextPlan,
    context_attention,
    fits,
    from_context_order,
    to_context_order,
)
from sepjax.config import AttentionConfig, ModelConfig, layer_reaches, layer_windows, sees_kept, with_own_window
from sepjax.layout import SeparatorLayout, build_layout
from sepjax.model.gate import keep_best, needs_gate, straight_through
from sepjax.model.layers import Attend
from sepjax.model.rope import layer_numbers, layer_ropes, of_layer, rope_tables, rotate
from sepjax.model.transformer import Transformer
from sepjax.model.unrolled import Layerwise
from sepjax.sharding import constrain, manual_over_mesh, ways


def forward(
    model: Transformer,
    tokens: Tokens,
    positions: Positions,
    is_separator: SeparatorFlags,
    segment_ids: SegmentIds | None = None,
    attention: AttentionConfig | None = None,
    *,
    keep_keys: bool = False,
    context_order: bool = False,
) -> tuple[Float[jax.Array, "B T D"], Any]:
    """Hidden states of packed rows under an attention pattern, and (k, v) or None: the first two of `run_rows`."""
    rows = run_rows(
        model,
        tokens,
        positions,
        is_separator,
        segment_ids,
        attention,
        keep_keys=keep_keys,
        context_order=context_order,
    )
    return rows.hidden, rows.keys


class Rows(NamedTuple):
    """What a forward pass over packed rows gives."""

    hidden: Float[jax.Array, "B T D"]  # for `model.logits`
    keys: Any  # (k, v), each [L, B, T, K, H], where asked for; else None
    is_separator: Bool[Array, "B T"]  # who was kept, sinks aside: the gate's choice, or the flags that were given
    scores: Float32[jax.Array, "B T"] | None  # the gate's, noise left out


def run_rows(
    model: Transformer | Layerwise,
    tokens: Tokens,
    positions: Positions,
    is_separator: SeparatorFlags,
    segment_ids: SegmentIds | None = None,
    attention: AttentionConfig | None = None,
    *,
    keep_keys: bool = False,
    context_order: bool = False,
    gate_noise: Float32[Array, "B T"] | None = None,
) -> Rows:
    """Runs packed rows under an attention pattern.

    Args:
      model: the decoder, in either layout.
      tokens: int32[B, T].
      positions: int32[B, T] within each document.
      is_separator: bool[B, T] from `sepjax.separators.flag_separators`; of no use to a gated pattern.
      segment_ids: int32[B, T], 0 for padding; None: each row is one document.
      attention: the pattern; None: the model's own.
      keep_keys: also return the keys (rotated) and values of every layer, (k, v) each [L, B, T, K, H], for a cache.
      context_order: leave the hidden states in the order in which the mesh's axis `context` splits rows
        (`in_context_order`): they are not sent around once more, and a sum over tokens does not care.
      gate_noise: in training: what is added to the gate's scores for the choice; gradients reach the gate then (zeros
        do). None: neither.

    Raises:
      ConfigError: a gated pattern for a model without a gate.
    """
    attention = attention or model.attention
    if 0 < model.config.sliding_window < tokens.shape[1]:  # else no row is long enough for it
        is_separator = is_separator if attention.pattern != "dense" else jnp.zeros_like(is_separator)
        attention = with_own_window(attention, model.config)
    kinds = layer_kinds(attention, model.config.num_layers, tokens.shape[1])
    positions = in_context_order(positions)
    with_rope = _with_rope(model.config, positions, keep_keys)
    x = model.embed(in_context_order(tokens), positions)
    scores, inputs = None, _layer_inputs(kinds, attention, model.config)
    if attention.pattern == "gated":
        gate, g = needs_gate(model, attention), attention.gate_layer
        none = batch_layout(jnp.zeros(tokens.shape, bool), segment_ids, attention, kinds[0].window)
        keys_below = None
        if g:  # a gate may read the embeddings
            x, keys_below = model.run_layers(x, with_rope(_rows(none, attention, kinds[:g])), inputs, 0, g)
        # What the gate learns is not to move the layers below it: in a model from scratch it tears them apart.
        scores = constrain(_in_text_order(gate(jax.lax.stop_gradient(x))), "batch", None)
        is_separator = keep_best(scores if gate_noise is None else scores + gate_noise, none, attention)
        layout = batch_layout(is_separator, segment_ids, attention, kinds[g].window)
        far_scale = None if gate_noise is None else straight_through(scores)
        x, keys = model.run_layers(x, with_rope(_rows(layout, attention, kinds[g:], far_scale)), inputs, g)
        if keys_below is not None:
            keys = jax.tree.map(lambda below, above: jnp.concatenate([below, above]), keys_below, keys)
    else:
        attend = _whole_pattern(is_separator, segment_ids, attention, kinds)
        x, keys = model.run_layers(x, with_rope(attend), inputs)
    hidden = model.final_norm(x)
    return Rows(hidden if context_order else _in_text_order(hidden), keys, is_separator, scores)


def hidden_before_gate(
    model: Transformer, tokens: Tokens, positions: Positions, segment_ids: SegmentIds, attention: AttentionConfig
) -> Float[jax.Array, "B T D"]:
    """What a gate would read: the hidden states that enter layer g, behind layers that see sinks and window."""
    attention = with_own_window(attention, model.config)
    g, kinds = attention.gate_layer, layer_kinds(attention, model.config.num_layers, tokens.shape[1])
    if not g:
        return model.embed(tokens, positions)
    none = batch_layout(jnp.zeros(tokens.shape, bool), segment_ids, attention, kinds[0].window)
    attend = _with_rope(model.config, positions, False)(_rows(none, attention, kinds[:g]))
    inputs = _layer_inputs(kinds, attention, model.config)
    return model.run_layers(model.embed(tokens, positions), attend, inputs, 0, g)[0]


def in_context_order(x: Array) -> Array:
    """[B, T] as the mesh's axis `context` splits it, so that every device has as much work; else as it is."""
    return x if ways("length") == 1 else constrain(to_context_order(x, ways("length")), "batch", "length")


def _in_text_order(x: jax.Array) -> jax.Array:
    return x if ways("length") == 1 else from_context_order(x, ways("length"))


def batch_layout(
    is_separator: SeparatorFlags, segment_ids: SegmentIds | None, attention: AttentionConfig, window_size: int
) -> SeparatorLayout:
    """The layout of a batch under an attention config, seen through one window n.

    A dense pattern has neither sinks nor separators: its layout is the causal mask, whatever the flags say.
    """
    if attention.pattern == "dense":
        is_separator, window_size = jnp.zeros_like(is_separator), is_separator.shape[1]
    # Every device of the axis `context` has the layout of whole rows: a few bytes a token, once for all layers.
    is_separator = constrain(jnp.asarray(is_separator), "batch", None)
    segment_ids = None if segment_ids is None else constrain(jnp.asarray(segment_ids), "batch", None)
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
    """The distinct layouts of the layers, each with its share of the layers: for statistics averaged over layers.

    is_separator: of a gated pattern the gate's choice (`Rows.is_separator`), which the layers below it do not see.
    """
    kinds = collections.Counter(layer_kinds(attention, num_layers, is_separator.shape[1]))
    layouts: dict[bool, SeparatorLayout] = {}
    for sees, n, _ in kinds:
        flags = is_separator if sees else jnp.zeros_like(is_separator)
        if sees not in layouts:
            layouts[sees] = batch_layout(flags, segment_ids, attention, n)
    seen = {kind: layouts[kind.sees_kept].with_window(kind.window) for kind in kinds}
    return [
        (layout if kind.reach is None else layout.with_reach(kind.reach), kinds[kind] / num_layers)
        for kind, layout in seen.items()
    ]


class Kind(NamedTuple):
    """How a layer sees a layout."""

    sees_kept: bool  # whether it sees the tokens that are kept, sinks aside
    window: int  # n
    reach: int | None  # how far back it sees, kept tokens included; None: without end


def layer_kinds(attention: AttentionConfig, num_layers: int, length: int) -> list[Kind]:
    """Every layer's kind.

    `layer_layouts` has a layout for each distinct one, in the order in which they come first.
    """
    reaches = layer_reaches(attention, num_layers) or (None,) * num_layers
    return list(map(Kind, sees_kept(attention, num_layers), layer_windows(attention, num_layers, length), reaches))


class _Seen(NamedTuple):
    """What a layer's attention gets; for all layers stacked along L."""

    window: jax.Array
    most_far: jax.Array  # global keys that it sees far away, at most
    reach: jax.Array | None  # None: no layer has an end of it
    rope: jax.Array | None  # number of its rotation; None: all layers have the same


type _Attend = Callable[[jax.Array, jax.Array, jax.Array, _Seen], jax.Array]


def _layer_inputs(kinds: Sequence[Kind], attention: AttentionConfig, config: ModelConfig) -> _Seen:
    """Of every layer what it sees: of far keys all if it sees kept tokens, else the sinks."""
    most = [jnp.iinfo(jnp.int32).max // 2 if kind.sees_kept else attention.num_sinks for kind in kinds]
    windows = jnp.asarray([kind.window for kind in kinds], jnp.int32)
    reach = layer_numbers(layer_reaches(attention, len(kinds)))
    return _Seen(windows, jnp.asarray(most, jnp.int32), reach, layer_numbers(layer_ropes(config)[1]))


def _as_seen(layout: SeparatorLayout, kinds: Sequence[Kind], seen: _Seen) -> SeparatorLayout:
    """The layout as one layer of these kinds sees it; it was built for the first one's window."""
    if len({kind.window for kind in kinds}) > 1:
        layout = layout.with_window(seen.window)
    if not all(kind.sees_kept for kind in kinds):
        layout = layout.with_most_far(seen.most_far)
    return layout if seen.reach is None else layout.with_reach(seen.reach)


def _whole_pattern(
    is_separator: Array, segment_ids: Array | None, attention: AttentionConfig, kinds: Sequence[Kind]
) -> _Attend:
    """Attention of patterns that flags alone describe."""
    if attention.pattern == "dense" and ways("length") == 1:
        return _dense(segment_ids if attention.document_mask else None)
    return _rows(batch_layout(is_separator, segment_ids, attention, kinds[0].window), attention, kinds)


def _rows(
    layout: SeparatorLayout, attention: AttentionConfig, kinds: Sequence[Kind], far_scale: jax.Array | None = None
) -> _Attend:
    """Attention of layers of these kinds, all of which see one layout."""
    if ways("length") > 1:
        return _over_context(layout, attention, kinds, far_scale)
    return _packed(layout, attention, kinds, far_scale)


def _packed(
    layout: SeparatorLayout, attention: AttentionConfig, kinds: Sequence[Kind], far_scale: jax.Array | None
) -> _Attend:
    def op(q: jax.Array, k: jax.Array, v: jax.Array, layout: SeparatorLayout, far_scale: jax.Array | None) -> Queries:
        return separator_attention(q, k, v, layout, far_scale=far_scale, implementation=attention.implementation)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: _Seen) -> jax.Array:
        heads, rows = PartitionSpec("batch", None, "heads", None), PartitionSpec("batch")
        args = q, k, v, _as_seen(layout, kinds, seen), far_scale
        return manual_over_mesh(op, (heads, heads, heads, rows, rows), heads)(*args)

    return attend


# Of a device's tokens the share that has room among the global keys that it sends, unless attention.capacity says
# otherwise: twice the density of separators in English prose. More is answered exactly, by sending all keys.
_ROOM_FOR_GLOBAL_KEYS = 0.25


def _over_context(
    layout: SeparatorLayout, attention: AttentionConfig, kinds: Sequence[Kind], far_scale: jax.Array | None
) -> _Attend:
    """Attention over rows that the axis `context` splits; q, k and v arrive and leave in context order."""
    T, C = layout.length, ways("length")
    room = attention.capacity or round(T * _ROOM_FOR_GLOBAL_KEYS)
    capacity = min(max(-(-room // C), 1), T // C)
    windows = [kind.window for kind in kinds]
    sparse = [n for n in windows if n < T]
    plans = [ContextPlan(C, halo=max(sparse) - 1, capacity=capacity)] if sparse else []
    plans += [ContextPlan(C, halo=T, capacity=capacity, dense=True)] if len(sparse) < len(windows) else []
    is_roomy = fits(layout, C, capacity)
    heads, rows = PartitionSpec("batch", "length", "heads", None), PartitionSpec("batch")

    def run(plan: ContextPlan, *args: Any) -> jax.Array:
        def op(*args: Any) -> Queries:
            settings = {"plan": plan, "implementation": attention.implementation}
            return context_attention(*args[:-1], far_scale=args[-1], **settings)[0]

        return manual_over_mesh(op, (heads, heads, heads, rows, PartitionSpec(), rows), heads)(*args)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: _Seen) -> jax.Array:
        args = q, k, v, _as_seen(layout, kinds, seen), is_roomy, far_scale
        if len(plans) == 1:
            return run(plans[0], *args)
        sparse_plan, dense_plan = (functools.partial(run, plan) for plan in plans)
        return jax.lax.cond(seen.window >= T, dense_plan, sparse_plan, *args)

    return attend


def _dense(segment_ids: SegmentIds | None) -> _Attend:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: _Seen) -> jax.Array:
        heads = PartitionSpec("batch", None, "heads", None)
        if segment_ids is None:
            return manual_over_mesh(dense_attention, (heads, heads, heads), heads)(q, k, v)
        specs = (heads, heads, heads, PartitionSpec("batch"))
        return manual_over_mesh(dense_attention, specs, heads)(q, k, v, segment_ids)

    return attend


def _with_rope(config: ModelConfig, positions: Positions, keep_keys: bool) -> Callable[[_Attend], Attend]:
    """What makes the attention that blocks call of one over rows."""
    tables = rope_tables(positions, layer_ropes(config)[0], config.head_dim)

    def attend(attend_rows: _Attend, q: jax.Array, k: jax.Array, v: jax.Array, seen: _Seen) -> tuple[jax.Array, Any]:
        if tables is not None:
            table = of_layer(tables, seen.rope)
            q, k = rotate(q, table), rotate(k, table)
        kept = tuple(_in_text_order(x) for x in (k, v)) if keep_keys else None
        k, v = (_for_each_device(x, q.shape[2]) for x in (k, v))
        return attend_rows(q, k, v, seen), kept

    return lambda attend_rows: functools.partial(attend, attend_rows)


def _for_each_device(x: jax.Array, num_heads: int) -> jax.Array:
    """Key heads repeated as often as it takes for the axis that splits the query heads to split them too.

    With more devices than key heads, each has one that it shares with others. Nothing is sent: what the axis does not
    divide lies on all of its devices. The gradients of the copies are added up.
    """
    parts, K = ways("heads"), x.shape[2]
    if K % parts == 0 or num_heads % parts:
        return x
    times = next(n for n in range(1, num_heads // K + 1) if num_heads // K % n == 0 and K * n % parts == 0)
    return constrain(jnp.repeat(x, times, axis=2), "batch", "length", "heads", None)
