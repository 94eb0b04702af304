"""The forward pass over a run of tokens and a bounded cache: one token or hundreds, with the same result.

Between two compactions a cache only grows, so a run of tokens up to a row's next compaction needs one pass. Every token
sees the entries that were there when it came and those of the run before it:

    keys       sinks, separators | ring | the run itself
    visible    all that is there | p >= first_recent            and the run's are not younger than the query

Queries and keys of different zones must be turned to fit each other (`StreamingCache`): one token turns its query three
times, which costs nothing; many tokens turn the few old keys once.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.attention import decode
from sepjax.config import AttentionConfig
from sepjax.generation.cache.bounded_run import (
    attend_many,
    kept_ones,
    tables_of,
    taken_up,
    within_reach,
)
from sepjax.generation.cache.one_row_pass import one_row_pass, shape_of_one_row
from sepjax.generation.cache.stored import Quantised, for_products
from sepjax.generation.cache.turning import OWN_ZONE, zones_by_slot
from sepjax.model.gate import run_with_gate
from sepjax.model.layers import Attend, once
from sepjax.model.rope import Table, layer_numbers, of_layer, rotate
from sepjax.separators import flag_separators

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache


def stream_pass(
    model: Any,
    cache: "StreamingCache",
    tokens: Tokens,
    counts: Int32[Array, "B"],
    table: Bool[Array, "_"],
    attention: AttentionConfig,
) -> tuple[Float[jax.Array, "B T D"], "StreamingCache"]:
    """Runs the next tokens of every row and takes them up.

    Args:
      model: a `Transformer` or `Layerwise`; or, without a gate, what maps (tokens, positions, attend, layer_inputs) to
        hidden states as they do.
      cache: what came before; no row is due for a compaction. Donate it where this is jitted.
      tokens: int32[B, T], any ids at and beyond a row's count.
      counts: tokens that each row takes up, 0 to `cache.room(T)`. Hidden states beyond mean nothing.
      table: bool over the vocabulary, from `sepjax.separators.configured_table`.
      attention: the pattern that `cache.sizes` were made for.

    Returns:
      Hidden states after the final norm, and the cache, whose rows may be due now: `compact` it before the next pass.
    """
    T = tokens.shape[1]
    offsets = cache.seen_low[:, None] + jnp.arange(T, dtype=jnp.int32)
    is_separator = flag_separators(tokens, offsets, table, attention)
    shape = shape_of_one_row(model, cache, attention) if tokens.size == 1 else None
    if shape is not None:
        return one_row_pass(shape, model, cache, tokens, counts, is_separator)
    attend = attend_run(cache, T, counts, attention.implementation)
    inputs = pass_inputs(cache)
    if attention.pattern == "gated":
        hidden, (k, v), scores = run_with_gate(model, tokens, offsets, attend, inputs, attention)
        return hidden, cache.append(k, v, is_separator, counts, gate_scores=scores)
    hidden, (k, v, *looks) = model(tokens, offsets, attend, inputs)
    return hidden, cache.append(k, v, is_separator, counts, *looks)


def attend_run(
    cache: "StreamingCache", num_tokens: int, counts: Int32[Array, "B"], implementation: str | None = None
) -> Attend:
    """The attention of a run of so many tokens, of which each row takes up `counts`; with `pass_inputs`.

    `implementation`: what the config names for training; see `sepjax.attention.decode.unsupported`.
    """
    if num_tokens > 1:
        return attend_many(cache, num_tokens, counts, implementation)
    assert not cache.is_in_place, "steps have all rows"
    return _attend_one(cache, counts > 0, implementation)


def pass_inputs(cache: "StreamingCache") -> tuple[Any, ...]:
    """What `attend_run` is given in each layer: items with an entry a layer, or None."""
    sizes = cache.sizes
    watched = None if sizes.watch is None else np.array(sizes.watch.layers)  # known where layers are not scanned
    return (
        cache.k, cache.v, layer_numbers(sizes.reach), layer_numbers(sizes.sees_kept), layer_numbers(sizes.layer_ropes),
        watched,
    )  # fmt: skip


def _attend_one(cache: "StreamingCache", active: Bool[Array, "B"], implementation: str | None) -> Attend:
    """Attention of one token a row, whose query is turned to fit each zone (`sepjax.attention.decode`).

    Rows that are not `active` see nothing but their token: a kernel then reads nothing of what they hold.
    """
    sizes, positions = cache.sizes, cache.query_positions(1)
    ends = (sizes.num_sinks, sizes.num_sinks + sizes.max_separators) if sizes.turns_in_place else ()
    if not sizes.turns_in_place:
        positions = positions[-1:]  # at positions of the text all zones have one
    if sizes.turned_by_slot:
        ends, positions = once(zones_by_slot(cache))
    own = OWN_ZONE if sizes.turned_by_slot else -1  # whose queries fit the token's own key, so have its rotation
    reason = decode.unsupported(cache.k[0].dtype, cache.head_dim, sizes.slots, implementation)
    tables = once(tables_of(cache, positions))
    recent = cache.recent_positions() >= cache.first_recent(1)
    visible = jnp.concatenate([cache.visible_old(), recent], axis=1) & jnp.asarray(active)[:, None]
    within, is_kept = within_reach(cache, 1), kept_ones(cache, 0)
    codes, blocks = sizes.cache_dtype != "model", len(cache.num_sinks) * cache.k[0].shape[-3]
    told = functools.partial(decode.seen_slots, kernel=reason is None, part=decode.part_of(blocks, codes=codes))
    seen_by_all = once(told(visible)) if within is None else None
    visible = once(visible)

    def seen_in(reach: Any, sees_kept: Any) -> decode.Seen:
        if seen_by_all is not None and sees_kept is None:
            return seen_by_all
        seen = visible if within is None else visible & within(reach)[:, 0, 0, 0]
        return told(seen if sees_kept is None else seen & ((sees_kept > 0) | ~is_kept))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        k_cache, v_cache, reach, sees_kept, rope, watched = layer
        cos, sin = of_layer(tables, rope)
        B, _, N, H = q.shape
        projected = q, k, v
        (new_k, new_v), (k, v) = taken_up(k_cache, k, v, (cos[own], sin[own]))
        shape, is_looked_at = (B, k.shape[2], len(cos), N // k.shape[2], H), counts_looks(watched)
        seen = seen_in(reach, sees_kept).told_to(shape, q.dtype, codes=codes)
        turned_there = not codes and seen.turns(shape, 2 * cos.shape[-1], looks=is_looked_at)
        queries, turn = _queries(projected, shape, (cos[:, :, 0], sin[:, :, 0]), turned_there)
        keys, values, scales = for_products(k_cache, v_cache, v.dtype, kernel=seen.kernel)
        given = queries, k[:, 0], v[:, 0], keys, values, seen, ends, scales
        out, looks = decode.attend(*given, own=own, looks=is_looked_at, turn=turn)

        def told_of(looks: jax.Array | None) -> tuple[jax.Array, ...]:
            if looks is not None:
                return (seen.in_slots(looks),)
            return () if watched is None else (jnp.zeros((B, shape[1], sizes.slots)),)  # which would not count

        # The new key must not be there before the cache was read: else XLA writes it into a copy of the cache.
        if B > 1 or isinstance(new_k, Quantised) or isinstance(new_v, Quantised):
            out, *new, looks = jax.lax.optimization_barrier((out, new_k, new_v, looks))
            return out.reshape(B, 1, N, H), (*new, *told_of(looks))
        # Of one row a flag waits for it, and what makes the key is part of the kernel that writes it.
        out, is_read, looks = jax.lax.optimization_barrier((out, cache.next_recent[0] >= 0, looks))
        return out.reshape(B, 1, N, H), (*(jnp.where(is_read, x, 0) for x in (new_k, new_v)), *told_of(looks))

    return attend


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
