"""Generation on the device: a prompt fills the cache, then one step a token.

    prefill   the prompts in one pass, with the layout and attention of training   -> logits of the next token, cache
    decode_step   one token of every row against the cache                         -> logits of the next token, cache

A decode step's attention is the last row of the training mask (METHOD section 3), so both give the same scores.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.config import AttentionConfig, ModelConfig, layer_windows, sees_kept
from sepjax.model.attend import run_rows
from sepjax.model.gate import needs_gate
from sepjax.model.layers import once
from sepjax.model.rope import rope_table, rotate
from sepjax.model.transformer import Params
from sepjax.model.unrolled import runner
from sepjax.separators import flag_separators
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.bounded_pass import stream_pass


def prefill(
    graph: nnx.GraphDef,
    params: Params,
    tokens: Tokens,
    lengths: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
    *,
    window_size: int,
    capacity: int,
) -> tuple[Float[jax.Array, "B V"], SeparatorCache]:
    """Runs right-padded prompts, each row one document.

    Args:
      graph: from `sepjax.model.transformer.split`.
      params: the parameters that came with it, or those of `sepjax.model.unrolled.by_layer`.
      tokens: int32[B, T], any ids beyond a row's length.
      lengths: tokens of each prompt, 1 to T.
      table: bool over the vocabulary, from `sepjax.separators.configured_table`.
      attention: the pattern.
      window_size: W of the cache: the largest window of any layer, or a length that no row will pass.
      capacity: S of the cache, at least the sinks and separators before any row's last W tokens.

    Returns:
      float32 scores of the token after each prompt, and the cache.
    """
    model = runner(graph, params, scan=True)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    is_separator = flag_separators(tokens, positions, table, attention)
    segment_ids = None  # the padding comes last, where causality alone hides it
    if attention.pattern != "dense":
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    rows = run_rows(model, tokens, positions, is_separator, segment_ids, attention, keep_keys=True)
    is_global, scores = _is_global(tokens, positions, table, attention), rows.scores
    sizes = {"window_size": window_size, "capacity": capacity}
    if scores is not None:
        scores = jnp.where(is_global, -jnp.inf, scores)
        is_global |= rows.is_separator
        sizes |= {"stretch": attention.gate_stretch, "keep": attention.gate_keep}
    k, v = rows.keys
    cache = SeparatorCache.from_prompt(k, v, is_global, lengths, scores, **sizes)
    return model.logits(rows.hidden[jnp.arange(len(lengths)), lengths - 1]), cache


def decode_step(
    graph: nnx.GraphDef,
    params: Params,
    cache: SeparatorCache,
    tokens: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
    active: Bool[Array, "B"] | None = None,
) -> tuple[Float[jax.Array, "B V"], SeparatorCache]:
    """Runs the next token of every row and appends it to the cache.

    Args:
      graph: from `sepjax.model.transformer.split`.
      params: the parameters that came with it, or those of `sepjax.model.unrolled.by_layer`.
      cache: what came before. Donate it where this is jitted.
      tokens: one token a row.
      table: as for `prefill`.
      attention: as for `prefill`.
      active: rows that the cache shall take up, the others stay as they are and their scores mean nothing; None: all.

    Returns:
      float32 scores of the token after this one, and the cache with this one. `SeparatorCache.append` says what
      happens to a full row.
    """
    model = runner(graph, params)
    positions = cache.length[:, None]
    inputs = (*_what_layers_see(attention, model.config.num_layers, cache.window_size), cache.k, cache.v)
    is_global, score = _is_global(tokens, cache.length, table, attention), None
    attend = _attend_cache(model.config, cache)
    if attention.pattern == "gated":
        gate, g = needs_gate(model, attention), attention.gate_layer
        x = model.embed(tokens[:, None], positions)
        x, below = model.run_layers(x, attend, inputs, 0, g)
        score = jnp.where(is_global, -jnp.inf, gate(x)[:, 0])
        x, keys = model.run_layers(x, attend, inputs, g)
        hidden, (k, v) = model.final_norm(x), keys if g == 0 else jax.tree.map(_joined, below, keys)
    else:
        hidden, (k, v) = model(tokens[:, None], positions, attend, inputs)
    return model.logits(hidden[:, 0]), cache.append(k[:, :, 0], v[:, :, 0], is_global, active, score)


def _what_layers_see(attention: AttentionConfig, num_layers: int, window_size: int) -> tuple[jax.Array, jax.Array]:
    """Of every layer its window n, and the position from which on tokens do not stay visible to it: none, or sinks."""
    stays = [jnp.iinfo(jnp.int32).max if sees else attention.num_sinks for sees in sees_kept(attention, num_layers)]
    windows = layer_windows(attention, num_layers, window_size)
    return jnp.asarray(windows, jnp.int32), jnp.asarray(stays, jnp.int32)


def _joined(below: jax.Array, above: jax.Array) -> jax.Array:
    return jnp.concatenate([below, above])


def stream_step(
    graph: nnx.GraphDef,
    params: Params,
    cache: StreamingCache,
    tokens: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
    active: Bool[Array, "B"],
) -> tuple[Float[jax.Array, "B V"], StreamingCache]:
    """`decode_step` over a bounded cache, which is compacted where that is due. See there for the arguments."""
    model = runner(graph, params)
    hidden, cache = stream_pass(model, cache, tokens[:, None], active.astype(jnp.int32), table, attention)
    return model.logits(hidden[:, 0]), cache.compact()


def _is_global(tokens: Array, positions: Array, table: Array, attention: AttentionConfig) -> jax.Array:
    """Which tokens stay visible for ever. A dense pattern evicts nothing, so it needs none."""
    if attention.pattern == "dense":
        return jnp.zeros(tokens.shape, bool)
    return flag_separators(tokens, positions, table, attention) | (positions < attention.num_sinks)


def _attend_cache(config: ModelConfig, cache: SeparatorCache) -> Callable[..., tuple[jax.Array, Any]]:
    """Attention of one token a row over the slots it sees and itself; returns its rotated key and its value.

    The layers only read the cache: the new keys of all of them are written at once, in place, by `append`. (Written in
    the scan over layers they would make it copy the whole cache every token.)
    """
    uses_rope = config.position_embedding == "rope"
    angles = once(rope_table(cache.length[:, None], config.rope, config.head_dim)) if uses_rope else None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        window, num_sinks, k_cache, v_cache = layer
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        B, _, N, H = q.shape
        q = q.reshape(B, config.num_kv_heads, -1, H)
        out = _attend_slots(q, k[:, 0], v[:, 0], k_cache, v_cache, cache.visible(window, num_sinks))
        return out.astype(v.dtype).reshape(B, 1, N, H), (k, v)

    return attend


def _attend_slots(
    q: Float[jax.Array, "B K G H"],
    k: Float[jax.Array, "B K H"],
    v: Float[jax.Array, "B K H"],
    k_cache: Float[jax.Array, "B K C H"],
    v_cache: Float[jax.Array, "B K C H"],
    visible: Bool[jax.Array, "B C"],
) -> Float[jax.Array, "B K G H"]:
    """Attention of G queries a key head over the visible slots and the token's own key; scores, softmax in float32."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], einsum("BKGH,BKCH->BKGC", q, k_cache), -jnp.inf)
    own = einsum("BKGH,BKH->BKG", q, k)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1) * q.shape[-1] ** -0.5, axis=-1)
    out = einsum("BKGC,BKCH->BKGH", weights[..., :-1].astype(v.dtype), v_cache)
    return out + weights[..., -1:] * v[:, :, None]
