"""A token of one row and a bounded cache, all layers in one kernel (`sepjax.model.one_row`)."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.attention import decode
from sepjax.config import AttentionConfig
from sepjax.generation.cache.bounded_run import tables_of
from sepjax.model import one_row
from sepjax.model.layers import once
from sepjax.model.one_row.shape import Shape

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache


def shape_of_one_row(model: Any, cache: "StreamingCache", attention: AttentionConfig) -> Shape | None:
    """What the kernel is made for; None where it does not serve a step of this cache.

    It serves caches of one row in the model's type, an array a layer, in which all layers see the same slots and none
    are watched or scored, of a model whose layers have one rotation.
    """
    sizes = cache.sizes
    differ = sizes.reach or sizes.sees_kept or sizes.layer_ropes or sizes.keeps_best or sizes.turned_by_slot
    if differ or cache.layer_axis or cache.is_in_place or len(cache.num_sinks) > 1 or sizes.cache_dtype != "model":
        return None
    if getattr(model, "by_output", None) is None:
        return None
    ends = (sizes.num_sinks, sizes.num_sinks + sizes.max_separators) if sizes.turns_in_place else ()
    shape = one_row.shape_of(model.config, sizes.slots, ends)
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
    positions = cache.query_positions(1)[-shape.zones :]
    cos, sin = (x.reshape(shape.zones, -1) for x in tables_of(cache, positions))
    recent = cache.recent_positions() >= cache.first_recent(1)
    visible = jnp.concatenate([cache.visible_old(), recent], axis=1) & (jnp.asarray(counts) > 0)[:, None]
    seen = decode.seen_slots(visible, kernel=True)
    is_sink, recent_slot = cache.num_sinks < cache.sizes.num_sinks, cache.next_recent % cache.sizes.ring
    slot = jnp.where(is_sink, cache.num_sinks, cache.sizes.slots - cache.sizes.ring + recent_slot)
    told = once((cos, sin, seen.bias, seen.live, slot))
    x = model.embed(tokens, cache.seen_low[:, None])
    hidden, k, v = one_row.step(shape, model.by_output, x, told, cache.k, cache.v)
    grown = cache.bare().append((), (), is_separator, counts)
    return model.final_norm(hidden), grown.with_entries((*k, *v))
