"""The attention of one token a row over a bounded cache, as layers ask for it (`sepjax.attention.decode`).

On a GPU with many rows a layer is one kernel between two products: it turns queries and the token's key, attends, and
writes key and value where they will lie.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float
from sepjax.attention import decode
from sepjax.generation.cache.bounded_run import kept_ones, tables_of, taken_up, within_reach
from sepjax.generation.cache.rows import InPlace, next_slots
from sepjax.generation.cache.stored import Quantised, for_products
from sepjax.generation.cache.turning import OWN_ZONE, zones_by_slot
from sepjax.model.layers import Attend, once
from sepjax.model.rope import Table, of_layer, rotate

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache


def attend_one(
    cache: "StreamingCache", active: Bool[Array, "B"], implementation: str | None, in_place: InPlace | None
) -> Attend:
    """Attention of one token a row, whose query is turned to fit each zone; see `bounded_pass.attend_run`.

    Rows that are not `active` see nothing but their token: a kernel then reads nothing of what they hold.
    """
    sizes, positions = cache.sizes, cache.query_positions(1)
    ends: Any = sizes.turned_ends
    if not sizes.turns_in_place:
        positions = positions[-1:]  # at positions of the text all zones have one
    if sizes.turned_by_slot:
        ends, positions = once(zones_by_slot(cache))
    own = OWN_ZONE if sizes.turned_by_slot else -1  # whose queries fit the token's own key, so have its rotation
    tables, codes = once(tables_of(cache, positions)), sizes.cache_dtype != "model"
    seen_in = _who_is_seen(cache, active, implementation)
    writes = in_place is not None and isinstance(cache.k, tuple) and decode.can_write()  # and no layers are scanned
    to = once(next_slots(cache, 1)[2][:, 0]) if writes else None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        k_cache, v_cache, reach, sees_kept, rope, watched, number = layer
        cos, sin = of_layer(tables, rope)
        B, _, N, H = q.shape
        projected = q, k, v
        (new_k, new_v), (k, v) = taken_up(k_cache, k, v, (cos[own], sin[own]))
        shape, is_looked_at = (B, k.shape[2], len(cos), N // k.shape[2], H), counts_looks(watched)
        seen = seen_in(reach, sees_kept).told_to(shape, q.dtype, codes=codes)
        turned_there = not codes and seen.turns(shape, 2 * cos.shape[-1], looks=is_looked_at)
        queries, turn = _queries(projected, shape, (cos[:, :, 0], sin[:, :, 0]), turned_there)

        def told_of(looks: jax.Array | None) -> tuple[Any, ...]:
            if looks is None and watched is not None:
                looks = jnp.zeros((B, shape[1], sizes.slots))  # which would not count
            return () if looks is None else (decode.Looks(looks, seen.place),)

        if turn is not None and to is not None and isinstance(number, np.integer):
            assert in_place is not None
            assert isinstance(ends, tuple), "codes are turned before"
            given = queries, k[:, 0], v[:, 0], k_cache, v_cache, seen, ends, turn, to
            (out, looks), in_place.entries[int(number)] = decode.attend_and_write(*given, looks=is_looked_at)
            return out.reshape(B, 1, N, H), (new_k, new_v, *told_of(looks))  # that nobody writes, so nobody makes
        keys, values, scales = for_products(k_cache, v_cache, v.dtype, kernel=seen.kernel)
        given = queries, k[:, 0], v[:, 0], keys, values, seen, ends, scales
        out, looks = decode.attend(*given, own=own, looks=is_looked_at, turn=turn)

        # The new key must not be there before the cache was read: else XLA writes it into a copy of the cache.
        if B > 1 or isinstance(new_k, Quantised) or isinstance(new_v, Quantised):
            out, *new, looks = jax.lax.optimization_barrier((out, new_k, new_v, looks))
            return out.reshape(B, 1, N, H), (*new, *told_of(looks))
        # Of one row a flag waits for it, and what makes the key is part of the kernel that writes it.
        out, is_read, looks = jax.lax.optimization_barrier((out, cache.next_recent[0] >= 0, looks))
        return out.reshape(B, 1, N, H), (*(jnp.where(is_read, x, 0) for x in (new_k, new_v)), *told_of(looks))

    return attend


def _who_is_seen(
    cache: "StreamingCache", active: Bool[Array, "B"], implementation: str | None
) -> Callable[[Any, Any], decode.Seen]:
    """The function (reach of the layer, whether it sees the second zone) -> what its token sees."""
    sizes = cache.sizes
    reason = decode.unsupported(cache.k[0].dtype, cache.head_dim, sizes.slots, implementation)
    visible = visible_slots(cache, active)
    within, is_kept = within_reach(cache, 1), kept_ones(cache, 0)
    blocks = len(cache.num_sinks) * cache.k[0].shape[-3]
    part = decode.part_of(blocks, codes=sizes.cache_dtype != "model")
    told = functools.partial(decode.seen_slots, kernel=reason is None, part=part)
    seen_by_all = once(told(visible)) if within is None else None
    visible = once(visible)

    def seen_in(reach: Any, sees_kept: Any) -> decode.Seen:
        if seen_by_all is not None and sees_kept is None:
            return seen_by_all
        seen = visible if within is None else visible & within(reach)[:, 0, 0, 0]
        return told(seen if sees_kept is None else seen & ((sees_kept > 0) | ~is_kept))

    return seen_in


def visible_slots(cache: "StreamingCache", active: Bool[Array, "B"]) -> Bool[jax.Array, "B C"]:
    """The slots whose entries the next token of each row sees, where a layer hides none; none of rows not `active`."""
    recent = cache.recent_positions() >= cache.first_recent(1)
    return jnp.concatenate([cache.visible_old(), recent], axis=1) & jnp.asarray(active)[:, None]


def counts_looks(watched: Any) -> bool:
    """Whether a layer's looks are asked for; `watched`: of `pass_inputs`, a number where layers are scanned."""
    return watched is not None and not (isinstance(watched, np.bool_) and not watched)


def _queries(
    projected: tuple[jax.Array, jax.Array, jax.Array], shape: tuple[int, ...], tables: Table, turned_there: bool
) -> tuple[jax.Array, decode.Turn | None]:
    """Queries [B, K, Z, G, H], as `shape` has it, turned to fit each zone; or what `decode.attend` turns itself.

    projected: queries, key and value before their rotation, [B, 1, heads, H]; tables: cosine and sine [Z, B, R/2].
    """
    B, K, _, G, H = shape
    queries = projected[0].reshape(B, K, 1, G, H)
    if not turned_there:
        return _turned_to_zones(queries[:, :, 0], tables), None
    # As they were projected, side by side: of all that was cut out of an array XLA makes that array, without a copy.
    flat = jnp.concatenate([x.reshape(B, 1, -1) for x in projected], axis=-1)
    return queries, decode.Turn(*tables, flat.reshape(B, -1, H))


def _turned_to_zones(q: Float[Array, "B K G H"], table: Table) -> Float[jax.Array, "B K Z G H"]:
    """`rotate` by tables [Z, B, R/2] of zones.

    Of whole heads as a sum of two products, the second of halves that have changed places: of what `rotate` does in
    that order XLA makes a kernel that asks at every number which half it is of, three times as slow.
    """
    q, half = jnp.asarray(q), table[0].shape[-1]
    if 2 * half != q.shape[-1]:
        cos, sin = (x[:, :, None] for x in table)
        return jnp.moveaxis(rotate(jnp.broadcast_to(q, (len(cos), *q.shape)), (cos, sin)), 0, 2)
    cos, sin = (jnp.swapaxes(x, 0, 1)[:, None, :, None, None] for x in table)  # [B, 1, Z, 1, 1, R/2]
    x = q.reshape(*q.shape[:2], 1, -1, 2, half).astype(jnp.float32)
    turned = x * cos + x[..., ::-1, :] * (sin * jnp.array([[-1.0], [1.0]]))
    return turned.reshape(*turned.shape[:-2], -1).astype(q.dtype)
