"""The forward pass over a run of tokens and a growing cache: one token or many, with the same result.

A token sees the slots that the last row of the training mask shows it (METHOD section 3), and itself; of a run of
tokens each sees those before it besides. What a run pushes out of the ring goes after the pass: the cache as it was
before has all that any of them sees.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.attention import decode, runs
from sepjax.config import AttentionConfig, ModelConfig, layer_reaches, layer_windows, sees_kept, with_own_window
from sepjax.generation.cache.one_row_pass import one_token_pass, shape_of_one_token
from sepjax.generation.cache.stored import for_products, like, plain
from sepjax.model.gate import run_with_gate
from sepjax.model.layers import once
from sepjax.model.rope import layer_numbers, layer_ropes, of_layer, rope_tables, rotate
from sepjax.separators import flag_separators

if TYPE_CHECKING:
    from sepjax.generation.cache.growing import SeparatorCache


def growing_pass(
    model: Any,
    cache: "SeparatorCache",
    tokens: Tokens,
    counts: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
) -> tuple[Float[jax.Array, "B T D"], "SeparatorCache"]:
    """See `sepjax.generation.cache.protocol.Cache.take_up`.

    With a gate a run is read token by token: what a token sees depends on the scores of those just before it.
    """
    attention = with_own_window(attention, model.config)
    if tokens.shape[1] == 1:
        return _one_token(model, cache, tokens, counts > 0, table, attention)
    if attention.pattern == "gated":
        return _one_by_one(model, cache, tokens, counts, table, attention)
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    is_global = is_global_token(tokens, positions, table, attention)
    inputs = (*_what_layers_see(attention, model.config, cache.window_size), cache.k, cache.v)
    attend = _attend_run(model.config, cache, positions, is_global, attention.implementation)
    if model.config.position_embedding == "learned":  # of what stands beyond the counts there may be none
        positions = jnp.minimum(positions, model.config.max_positions - 1)
    hidden, (k, v) = model(tokens, positions, attend, inputs)
    return hidden, cache.append_run(k, v, is_global, counts)


def _one_by_one(
    model: Any, cache: "SeparatorCache", tokens: Array, counts: Array, table: Array, attention: AttentionConfig
) -> tuple[jax.Array, "SeparatorCache"]:
    def step(cache: "SeparatorCache", i: jax.Array) -> tuple["SeparatorCache", jax.Array]:
        token = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
        hidden, cache = _one_token(model, cache, token, counts > i, table, attention)
        return cache, hidden[:, 0]

    cache, hidden = jax.lax.scan(step, cache, jnp.arange(tokens.shape[1]))
    return jnp.swapaxes(hidden, 0, 1), cache


def _one_token(
    model: Any, cache: "SeparatorCache", tokens: Array, active: Array, table: Array, attention: AttentionConfig
) -> tuple[jax.Array, "SeparatorCache"]:
    positions = cache.length[:, None]
    inputs = (*_what_layers_see(attention, model.config, cache.window_size), cache.k, cache.v)
    is_global, score = is_global_token(tokens[:, 0], cache.length, table, attention), None
    shape = shape_of_one_token(model, cache, attention)
    if shape is not None:
        return one_token_pass(shape, model, cache, tokens, active, is_global, attention)
    attend = _attend_cache(model.config, cache, attention.implementation)
    if attention.pattern == "gated":
        hidden, (k, v), scores = run_with_gate(model, tokens, positions, attend, inputs, attention)
        score = jnp.where(is_global, -jnp.inf, scores[:, 0])
    else:
        hidden, (k, v) = model(tokens, positions, attend, inputs)
    return hidden, cache.append(k[:, :, 0], v[:, :, 0], is_global, active, score)


def _what_layers_see(attention: AttentionConfig, config: ModelConfig, window_size: int) -> tuple[jax.Array | None, ...]:
    """Of every layer its window n, the position from which on tokens do not stay visible to it (none, or the sinks),
    how far back it sees and the number of its rotation; None: no layer has an end, all have the same.
    """
    L = config.num_layers
    stays = [jnp.iinfo(jnp.int32).max if sees else attention.num_sinks for sees in sees_kept(attention, L)]
    windows = jnp.asarray(layer_windows(attention, L, window_size), jnp.int32)
    reach, rope = layer_numbers(layer_reaches(attention, L)), layer_numbers(layer_ropes(config)[1])
    return windows, jnp.asarray(stays, jnp.int32), reach, rope


def is_global_token(tokens: Array, positions: Array, table: Array, attention: AttentionConfig) -> jax.Array:
    """Which tokens stay visible for ever. A dense pattern evicts nothing, so it needs none."""
    if attention.pattern == "dense":
        return jnp.zeros(tokens.shape, bool)
    return flag_separators(tokens, positions, table, attention) | (positions < attention.num_sinks)


def _attend_cache(
    config: ModelConfig, cache: "SeparatorCache", implementation: str | None
) -> Callable[..., tuple[jax.Array, Any]]:
    """Attention of one token a row over the slots it sees and itself; returns its rotated key and its value.

    The layers only read the cache: the new keys of all of them are written at once, in place, by `append`. (Written in
    the scan over layers they would make it copy the whole cache every token.)
    """
    angles = rope_tables(cache.length[:, None], layer_ropes(config)[0], config.head_dim)
    angles = angles and once(angles)
    C = cache.position.shape[1]
    kernel = decode.unsupported(cache.k.dtype, config.head_dim, C, implementation) is None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        window, num_sinks, reach, rope, k_cache, v_cache = layer
        if angles is not None:
            turn = of_layer(angles, rope)
            q, k = rotate(q, turn), rotate(k, turn)
        B, _, N, H = q.shape
        queries = q.reshape(B, config.num_kv_heads, 1, -1, H)
        codes = cache.k.dtype == jnp.int8
        part, visible = decode.part_of(B * config.num_kv_heads, codes=codes), cache.visible(window, num_sinks, reach)
        seen = decode.seen_slots(visible, kernel=kernel, part=part)
        seen = seen.told_to(queries.shape, queries.dtype, codes=codes)
        dtype, new = v.dtype, (like(k_cache, k), like(v_cache, v))
        k, v = (plain(x, dtype)[:, 0] for x in new)
        keys, values, scales = for_products(k_cache, v_cache, dtype, kernel=seen.kernel)
        out, _ = decode.attend(queries, k, v, keys, values, seen, scales=scales)
        return out.reshape(B, 1, N, H), new

    return attend


def _attend_run(
    config: ModelConfig, cache: "SeparatorCache", positions: Int32[Array, "B T"], is_global: Bool[Array, "B T"],
    implementation: str | None,
) -> Callable[..., tuple[jax.Array, Any]]:  # fmt: skip
    """Attention of a run of tokens a row over the slots and one another; an `Attend`, as `_attend_cache` is."""
    angles = rope_tables(positions, layer_ropes(config)[0], config.head_dim)
    of_keys = jnp.concatenate([cache.position, positions], axis=1)
    stays = jnp.concatenate([cache.is_global, is_global], axis=1)
    numbers = jnp.bfloat16 if cache.k.dtype == jnp.int8 else cache.k.dtype  # what codes are, before it reads them
    kernel = decode.unsupported(numbers, config.head_dim, cache.position.shape[1], implementation) is None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        window, num_sinks, reach, rope, k_cache, v_cache = layer
        if angles is not None:
            turn = of_layer(angles, rope)
            q, k = rotate(q, turn), rotate(k, turn)
        taken_up = like(k_cache, k), like(v_cache, v)
        tell = _by_numbers if kernel and runs.computes_in(q.dtype) else _by_mask
        seen = tell(of_keys, positions, stays & (of_keys < num_sinks), window, reach)
        k, v, keys, values = (plain(x, v.dtype) for x in (*taken_up, k_cache, v_cache))
        out, _ = runs.attend(q, k, v, keys, values, seen)
        return out, taken_up

    return attend


def _by_mask(of_keys: jax.Array, positions: Array, stays: jax.Array, window: Any, reach: Any) -> runs.SeenInRun:
    """Who sees what in a layer; `stays`: which of its keys stay visible for ever."""
    distance = positions[..., None] - of_keys[:, None]
    visible = (of_keys[:, None] >= 0) & (distance >= 0) & (stays[:, None] | (distance < window))
    return runs.SeenInRun(visible if reach is None else visible & (distance < reach))


def _by_numbers(of_keys: jax.Array, positions: Array, stays: jax.Array, window: Any, reach: Any) -> runs.SeenInRun:
    """The same for the kernel: where a layer's reach ends what stays, later than its window does, its keys are told as
    so much younger.
    """
    if reach is None:
        of_those = runs.ALL
    else:
        window = jnp.minimum(window, reach)
        of_those = of_keys + jnp.minimum(reach - window, runs.ALL - jnp.maximum(of_keys, 0))
    numbers = jnp.where(of_keys >= 0, jnp.where(stays, of_those, of_keys), runs.NOBODY)
    return runs.seen_by_numbers(numbers, positions - window + 1)
