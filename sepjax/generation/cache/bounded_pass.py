"""The forward pass over a run of tokens and a bounded cache: one token or hundreds, with the same result.

Between two compactions a cache only grows, so a run of tokens up to a row's next compaction needs one pass. Every token
sees the entries that were there when it came and those of the run before it:

    keys       sinks, separators | ring | the run itself
    visible    all that is there | p >= first_recent            and the run's are not younger than the query

Queries and keys of different zones must be turned to fit each other (`StreamingCache`): one token turns its query three
times, which costs nothing; many tokens turn the few old keys once.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.attention import decode
from sepjax.config import AttentionConfig
from sepjax.generation.cache.stored import Quantised, Vectors, for_products, like, plain
from sepjax.generation.cache.watched import looks_of_many
from sepjax.model.gate import run_with_gate
from sepjax.model.layers import Attend, once
from sepjax.model.rope import Table, layer_numbers, of_layer, rope_tables, rotate
from sepjax.separators import flag_separators

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


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
    attend, inputs = attend_run(cache, T, counts, attention.implementation), pass_inputs(cache)
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
    return _attend_one(cache, implementation) if num_tokens == 1 else _attend_many(cache, num_tokens, counts)


def pass_inputs(cache: "StreamingCache") -> tuple[Any, ...]:
    """What `attend_run` is given in each layer: items with an entry a layer, or None."""
    sizes = cache.sizes
    watched = None if sizes.watch is None else np.array(sizes.watch.layers)  # known where layers are not scanned
    return (
        cache.k, cache.v, layer_numbers(sizes.reach), layer_numbers(sizes.sees_kept), layer_numbers(sizes.layer_ropes),
        watched,
    )  # fmt: skip


def _attend_one(cache: "StreamingCache", implementation: str | None) -> Attend:
    """Attention of one token a row, whose query is turned to fit each zone (`sepjax.attention.decode`)."""
    sizes = cache.sizes
    ends = (sizes.num_sinks, sizes.num_sinks + sizes.max_separators) if sizes.turns_in_place else ()
    zones = slice(None) if sizes.turns_in_place else slice(-1, None)
    lies = sizes.turns_at_reading
    reason = decode.unsupported(
        cache.k[0].dtype, cache.head_dim, sizes.slots, implementation,
        rotated=2 * cache.angles(jnp.int32(0))[0].shape[-1] if lies else None,
    )  # fmt: skip
    turn = _turn_of_slots(cache) if reason else None
    turns = _turns_of_zones(cache) if lies and not reason else None
    tables, turn, turns = once((_tables(cache, cache.query_positions(1)[zones]), turn, turns))
    recent = cache.recent_positions() >= cache.first_recent(1)
    visible = jnp.concatenate([cache.visible_old(), recent], axis=1)
    within, is_kept = _within(cache, 1), _is_kept(cache, 0)
    told = functools.partial(decode.seen_slots, kernel=reason is None)
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
        (new_k, new_v), (k, v) = _taken_up(cache, k_cache, k, v, (cos[-1], sin[-1]))
        queries = rotate(jnp.broadcast_to(q, (len(cos), *q.shape)), (cos, sin))
        queries = jnp.moveaxis(queries.reshape(-1, B, k.shape[2], N // k.shape[2], H), 0, 2)  # [B, K, zone, G, H]
        seen, lying, slots_turn = seen_in(reach, sees_kept).computed_in(q.dtype), None, turn
        if turns is not None and seen.kernel:
            still = plain(new_k, jnp.float32)[:, 0]
            lying = q.reshape(B, k.shape[2], N // k.shape[2], H), still, turns.of_layer(rope)
        elif turns is not None:  # what reads codes is found out here: other types than the kernel's turn them in XLA
            slots_turn = _turn_of_slots(cache)
        slots_turn = slots_turn and of_layer(slots_turn, rope)
        keys, values, scales = for_products(k_cache, v_cache, v.dtype, slots_turn, kernel=seen.kernel)
        given = queries, k[:, 0], v[:, 0], keys, values, seen, ends, scales, lying
        looks = ()
        if watched is None:
            out, _ = decode.attend(*given)
        elif isinstance(watched, np.bool_) and not watched:  # its looks would not count
            out, _ = decode.attend(*given)
            looks = (jnp.zeros(visible.shape[:1] + k_cache.shape[1:3], jnp.float32),)
        else:
            out, *looks = decode.attend(*given, looks=True)
        # The new key must not be there before the cache was read: else XLA writes it into a copy of the cache.
        if B > 1 or isinstance(new_k, Quantised) or isinstance(new_v, Quantised):
            out, *kept = jax.lax.optimization_barrier((out, new_k, new_v, *looks))
            return out.reshape(B, 1, N, H), tuple(kept)
        # Of one row a flag waits for it, and what makes the key is part of the kernel that writes it.
        out, is_read, *looks = jax.lax.optimization_barrier((out, cache.next_recent[0] >= 0, *looks))
        return out.reshape(B, 1, N, H), (*(jnp.where(is_read, x, 0) for x in (new_k, new_v)), *looks)

    return attend


def _attend_many(cache: "StreamingCache", num_tokens: int, counts: Int32[Array, "B"]) -> Attend:
    """Attention of a run of tokens a row, over all keys side by side, the old ones turned to fit the recent ones."""
    old = cache.sizes.num_sinks + cache.sizes.max_separators
    if old and not cache.sizes.max_separators and not cache.sizes.absolute:
        return _attend_past_evictions(cache, num_tokens)
    lying = _turn_of_slots(cache)
    recent_tables = _tables(cache, cache.query_positions(num_tokens)[-1])
    sees_recent = _sees_recent(cache, num_tokens)
    turn, within = cache.recent_turn() if old else None, _within(cache, num_tokens)
    is_kept = _is_kept(cache, num_tokens)
    sees_old = jnp.broadcast_to(cache.visible_old()[:, None], (*sees_recent.shape[:2], old))
    visible = jnp.concatenate([sees_old, sees_recent], axis=-1)[:, None, None]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        k_cache, v_cache, reach, sees_kept, rope, _ = layer
        recent_table = of_layer(recent_tables, rope)
        q = rotate(q, recent_table)
        new, (k, v) = _taken_up(cache, k_cache, k, v, recent_table)
        k_cache, v_cache = plain(k_cache, k.dtype, lying and of_layer(lying, rope)), plain(v_cache, v.dtype)
        old_keys = k_cache[:, :, :old]
        if turn is not None:
            cos, sin = (t[:, None] for t in of_layer(turn, rope))
            old_keys = rotate(old_keys[..., None, :], (cos, sin))[..., 0, :]
        keys = jnp.concatenate([old_keys, k_cache[:, :, old:], jnp.swapaxes(k, 1, 2)], axis=2)
        values = jnp.concatenate([v_cache, jnp.swapaxes(v, 1, 2)], axis=2)
        seen = visible if within is None else visible & within(reach)
        seen = seen if sees_kept is None else seen & ((sees_kept > 0) | ~is_kept)
        weights = jax.nn.softmax(_scores(q, keys, seen), axis=-1)
        looks = (looks_of_many(cache, weights, counts),) if cache.sizes.watch else ()
        return _rows(_einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), values), q), (*new, *looks)

    return attend


def _attend_past_evictions(cache: "StreamingCache", num_tokens: int) -> Attend:
    """The same without separators, where a run goes on past evictions: a query's positions then differ by more than
    constants, and the sinks need one of their own.
    """
    a = cache.sizes.num_sinks
    to_sinks, _, to_recent = (_tables(cache, p) for p in cache.query_positions(num_tokens))
    within = _within(cache, num_tokens)
    sees_recent, sees_sinks = _sees_recent(cache, num_tokens)[:, None, None], cache.visible_old()[:, None, None, None]
    lying = _turn_of_slots(cache, by_zone=True)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        k_cache, v_cache, reach, _, rope, _ = layer
        seen, seen_sinks = sees_recent, sees_sinks
        if within is not None:
            near = within(reach)
            seen, seen_sinks = seen & near[..., a:], seen_sinks & near[..., :a]
        new_ones, (k, v) = _taken_up(cache, k_cache, k, v, of_layer(to_recent, rope))
        k_cache, v_cache = plain(k_cache, k.dtype, lying and of_layer(lying, rope)), plain(v_cache, v.dtype)
        keys, values = (
            jnp.concatenate([x[:, :, a:], jnp.swapaxes(new, 1, 2)], axis=2) for x, new in ((k_cache, k), (v_cache, v))
        )
        recent = _scores(rotate(q, of_layer(to_recent, rope)), keys, seen)
        sinks = _scores(rotate(q, of_layer(to_sinks, rope)), k_cache[:, :, :a], seen_sinks)
        return _rows(_join(recent, values, sinks, v_cache[:, :, :a]), q), new_ones

    return attend


def _tables(cache: "StreamingCache", positions: Int32[Array, "..."]) -> Table:
    tables = rope_tables(positions, cache.sizes.ropes, cache.head_dim)
    assert tables is not None  # `StreamSizes.create` refuses learned positions
    return tables


def _turn_of_slots(cache: "StreamingCache", *, by_zone: bool = False) -> Table | None:
    """Cosine and sine, [(Z,) B, 1, C, R/2], that rotate un-rotated keys where they are read; None: they lie rotated.

    They then fit recent queries, as those of `StreamingCache.recent_turn` do; `by_zone`: each those of its zone.
    """
    if not cache.sizes.turns_at_reading:
        return None
    if by_zone:
        recent, a = cache.recent_positions(), cache.sizes.num_sinks
        sinks = jnp.broadcast_to(jnp.arange(a, dtype=jnp.int32), (len(recent), a))
        return _tables(cache, jnp.concatenate([sinks, recent], axis=1)[:, None])
    return _tables(cache, cache.query_positions(1)[-1][:, None] - cache.distances(1))


def _turns_of_zones(cache: "StreamingCache") -> decode.Turns:
    """`_turn_of_slots` as the kernel takes it.

    Where a ring goes round, its slots before the next and from it on are a zone each: within a zone a query is as far
    from a slot, plus the slot's number, as from any other.

        slots    sinks | separators, this lap and the last | recent, this lap and the last
    """
    sizes = cache.sizes
    a, s, C = sizes.num_sinks, sizes.max_separators, sizes.slots
    laps = a + cache.next_separator % max(s, 1), a + s + cache.next_recent % sizes.ring
    ends = jnp.stack([jnp.full_like(laps[0], a), laps[0], jnp.full_like(laps[0], a + s), laps[1]], axis=1)
    firsts = jnp.pad(ends, ((0, 0), (1, 0)))
    to_first = cache.distances(1)[:, 0] + jnp.arange(C, dtype=jnp.int32)
    to_first = jnp.take_along_axis(to_first, jnp.minimum(firsts, C - 1), axis=1)
    place, first = jnp.arange(decode.TILE, dtype=jnp.int32), jnp.arange(0, C, decode.TILE, dtype=jnp.int32)
    return decode.turns(_tables(cache, place), cache.angles(first), _tables(cache, to_first), ends)


def _taken_up(
    cache: "StreamingCache", layer: Vectors, k: jax.Array, v: jax.Array, table: Table
) -> tuple[tuple[Vectors, Vectors], tuple[jax.Array, jax.Array]]:
    """New keys and values as they will lie in a layer's cache, and as tokens see them already, keys rotated."""
    if not cache.sizes.turns_at_reading:
        new = like(layer, rotate(k, table)), like(layer, v)
        return new, (plain(new[0], k.dtype), plain(new[1], v.dtype))
    new = like(layer, k), like(layer, v)
    return new, (rotate(plain(new[0], jnp.float32), table).astype(k.dtype), plain(new[1], v.dtype))


def _is_kept(cache: "StreamingCache", num_tokens: int) -> Bool[np.ndarray, "S"]:
    """Which of the C slots and the tokens of a run are the second zone's: those that some layers do not see."""
    i, a = np.arange(cache.sizes.slots + num_tokens), cache.sizes.num_sinks
    return (a <= i) & (i < a + cache.sizes.max_separators)


def _within(
    cache: "StreamingCache", num_tokens: int
) -> Callable[[Int32[Array, ""]], Bool[jax.Array, "B 1 1 T S"]] | None:
    """Which of the C entries and the T tokens of the run are within a layer's reach of each of the latter.

    None where every layer sees all of them. Of one token without itself.
    """
    if not cache.sizes.reach:
        return None
    distances = cache.distances(num_tokens)
    if num_tokens > 1:
        i = jnp.arange(num_tokens, dtype=jnp.int32)
        own = jnp.broadcast_to(i[:, None] - i, (len(distances), num_tokens, num_tokens))
        distances = jnp.concatenate([distances, own], axis=-1)
    distances = once(distances)[:, None, None]
    return lambda reach: distances < reach


def _sees_recent(cache: "StreamingCache", num_tokens: int) -> Bool[jax.Array, "B T S"]:
    """Which of the R entries of the ring and the T tokens of the run each of the latter sees."""
    own = cache.query_positions(num_tokens)[-1]
    p = jnp.concatenate([cache.recent_positions(), own], axis=1)[:, None]
    return (cache.first_recent(num_tokens)[..., None] <= p) & (p <= own[..., None])


def _scores(q: jax.Array, k: jax.Array, visible: jax.Array) -> jax.Array:
    """Scores of q[B, T, N, H] against k[B, K, S, H], float32[B, K, G, T, S]; -inf where a key is not visible."""
    return jnp.where(visible, decode.scores_of_run(q, k), -jnp.inf)


def _rows(out: jax.Array, q: jax.Array) -> jax.Array:
    """[B, K, G, T, H] to the shape and type of q[B, T, N, H]."""
    return jnp.moveaxis(out.astype(q.dtype), 3, 1).reshape(q.shape)


def _join(scores: jax.Array, v: jax.Array, other_scores: jax.Array, other_v: jax.Array) -> jax.Array:
    """One softmax over two sets of keys, without laying them side by side. Every query sees itself in the first."""
    top = jnp.maximum(jnp.max(scores, axis=-1), jnp.max(other_scores, axis=-1))[..., None]
    weights, other_weights = jnp.exp(scores - top), jnp.exp(other_scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.sum(other_weights, axis=-1, keepdims=True)
    out = _einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v)
    return (out + _einsum("BKGTS,BKSH->BKGTH", other_weights.astype(v.dtype), other_v)) / total
