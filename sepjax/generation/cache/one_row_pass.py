"""A token of one row and a cache, all layers in one kernel (`sepjax.model.one_row`)."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.config import AttentionConfig, layer_reaches, layer_windows, sees_kept
from sepjax.generation.cache.bounded_run import tables_of
from sepjax.generation.cache.bounded_step import visible_slots
from sepjax.generation.cache.rows import next_slots
from sepjax.model import one_row
from sepjax.model.one_row.shape import Shape
from sepjax.model.rope import layer_ropes, rope_tables

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache
    from sepjax.generation.cache.growing import SeparatorCache

_MOST_SLOTS = 8192  # of a growing cache


def shape_of_one_row(model: Any, cache: "StreamingCache", attention: AttentionConfig) -> Shape | None:
    """What the kernel is made for; None where it does not serve a step of this cache.

    It serves caches of one row in the model's type, an array a layer, in which all layers see the same slots and none
    are watched or scored, of a model whose layers have one rotation.
    """
    sizes = cache.sizes
    differ = sizes.reach or sizes.sees_kept or sizes.layer_ropes or sizes.keeps_best or sizes.turned_by_slot
    if differ or cache.layer_axis or cache.is_in_place or len(cache.num_sinks) > 1 or sizes.cache_dtype != "model":
        return None
    return _served(model, one_row.shape_of(model.config, sizes.slots, sizes.turned_ends), attention)


def _served(model: Any, shape: Shape, attention: AttentionConfig) -> Shape | None:
    if getattr(model, "by_output", None) is None:  # matrices that lie otherwise, or a model that packs tokens
        return None
    return None if one_row.unsupported(model.config, shape, attention.implementation) else shape


def one_row_pass(
    shape: Shape,
    model: Any,
    cache: "StreamingCache",
    tokens: Tokens,
    counts: Int32[Array, "1"],
    is_separator: Bool[Array, "1 1"],
) -> tuple[Float[jax.Array, "1 1 D"], "StreamingCache"]:
    """`stream_pass` of one token, of `shape_of_one_row`."""
    hidden, entries = hidden_of_one_row(shape, model, cache, tokens, jnp.asarray(counts) > 0)
    grown = cache.bare().append((), (), is_separator, counts)
    return hidden, grown.with_entries(entries)


def hidden_of_one_row(
    shape: Shape, model: Any, cache: "StreamingCache", tokens: Tokens, active: Bool[Array, "1"]
) -> tuple[Float[jax.Array, "1 1 D"], tuple[jax.Array, ...]]:
    """Hidden states of `one_row_pass`, and the cache's `entries` with the token's."""
    positions = cache.query_positions(1)[-shape.zones :]
    cos, sin = (x.reshape(shape.zones, -1) for x in tables_of(cache, positions))
    _, _, slots = next_slots(cache, 1)
    told = cos, sin, _bias(visible_slots(cache, active)), slots[:, 0]
    x = model.embedded(tokens, cache.seen_low[:, None])
    hidden, k, v = one_row.step(shape, model.by_output, x, told, cache.k, cache.v)
    return hidden, (*k, *v)


def shape_of_one_token(model: Any, cache: "SeparatorCache", attention: AttentionConfig) -> Shape | None:
    """What the kernel is made for; None where it does not serve a step of this growing cache.

    As `shape_of_one_row`; and of longer caches the steps of many kernels are faster, which read with all SMs.
    """
    L, C = model.config.num_layers, cache.position.shape[1]
    differ = layer_reaches(attention, L) or layer_ropes(model.config)[1] or attention.pattern == "gated"
    differ = differ or not all(sees_kept(attention, L)) or len(set(layer_windows(attention, L, cache.window_size))) > 1
    if differ or len(cache.length) > 1 or cache.cache_dtype != "model" or C > _MOST_SLOTS:
        return None
    return _served(model, one_row.shape_of(model.config, C, stacked=True), attention)


def one_token_pass(
    shape: Shape,
    model: Any,
    cache: "SeparatorCache",
    tokens: Tokens,
    active: Bool[Array, "1"],
    is_global: Bool[Array, "1"],
    attention: AttentionConfig,
) -> tuple[Float[jax.Array, "1 1 D"], "SeparatorCache"]:
    """`growing_pass` of one token, of `shape_of_one_token`."""
    told = told_of_one_token(shape, model, cache, attention)
    x = model.embedded(tokens, cache.length[:, None])
    hidden, k, v = one_row.step(shape, model.by_output, x, told, cache.k, cache.v, in_place=False)
    return hidden, cache.append(k, v, is_global, active)


def told_of_one_token(
    shape: Shape, model: Any, cache: "SeparatorCache", attention: AttentionConfig
) -> tuple[jax.Array, ...]:
    """What `one_row.step` is told."""
    tables = rope_tables(cache.length[:, None], layer_ropes(model.config)[0], shape.H)
    assert tables is not None  # `one_row.unsupported` refuses learned positions
    window = layer_windows(attention, shape.L, cache.window_size)[0]
    return *(x[0] for x in tables), _bias(cache.visible(window)), next_slot(cache)


def next_slot(cache: "SeparatorCache") -> Int32[jax.Array, "B"]:
    """Where the next token of a growing cache goes, in its ring."""
    return cache.capacity + cache.length % cache.window_size


def _bias(visible: Bool[Array, "1 C"]) -> jax.Array:
    return jnp.where(visible[0], 0.0, -jnp.inf).astype(jnp.float32)
