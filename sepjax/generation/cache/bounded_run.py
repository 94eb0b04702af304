"""Attention of a run of tokens over a bounded cache and over one another (`sepjax.attention.runs`).

The keys of sinks and separators are turned to fit recent queries, once for the whole run: in it a query's positions
differ by constants. Who sees what is told in two ways, as a mask to plain XLA, which is the definition, and to the
kernel by numbers:

    key      sink or separator | recent, and of the run        number: `ALL`, or `NOBODY` where nothing is | p
    query    its first: p of the oldest recent entry that it sees

In layers with a reach all entries have numbers, of the place where a recent entry would be as far away.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Int32
from sepjax.attention import decode, runs
from sepjax.generation.cache.stored import Quantised, Vectors, plain, quantised
from sepjax.generation.cache.turning import own_positions
from sepjax.generation.cache.watched import looks_of_many
from sepjax.model.layers import Attend, once
from sepjax.model.rope import Table, of_layer, rope_tables, rotate

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache


def unsupported(cache: "StreamingCache", implementation: str | None = None) -> str | None:
    """Why the kernel cannot serve runs of tokens, or None when it can, of queries of 16 bits (`SeenInRun.computed_in`).

    Codes of 8 bits are numbers again before it reads them. `implementation`: see `sepjax.attention.decode.unsupported`.
    """
    sizes = cache.sizes
    if sizes.reach and not sizes.max_separators:
        return "layers with a reach of their own would need two ends where a run goes on past evictions"
    dtype = jnp.bfloat16 if sizes.cache_dtype != "model" else cache.k[0].dtype
    return decode.unsupported(dtype, cache.head_dim, sizes.slots, implementation)


def attend_many(
    cache: "StreamingCache", num_tokens: int, counts: Int32[Array, "B"], implementation: str | None = None
) -> Attend:
    """Attention of a run of tokens a row; see `sepjax.generation.cache.bounded_pass.attend_run`."""
    old = cache.sizes.num_sinks + cache.sizes.max_separators
    kernel = unsupported(cache, implementation) is None
    if old and not cache.sizes.max_separators and not cache.sizes.absolute:
        return _attend_past_evictions(cache, num_tokens, kernel)
    lying, new_tables = turn_of_slots(cache), tables_of_new(cache, num_tokens)
    recent_tables = tables_of(cache, cache.query_positions(num_tokens)[-1])
    turn = once(_padded(cache.recent_turn(), runs.whole_tiles(old) - old if kernel else 0)) if old else None
    seen_in, by_mask = _seen_in(cache, num_tokens, kernel), _by_mask(cache, num_tokens, cache.visible_old())

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        k_cache, v_cache, reach, sees_kept, rope, watched, _ = layer
        recent_table = of_layer(recent_tables, rope)
        q = rotate(q, recent_table)
        new, (k, v) = taken_up(k_cache, k, v, *of_layers(new_tables, rope, recent_table))
        k_cache, v_cache = plain(k_cache, k.dtype, lying and of_layer(lying, rope)), plain(v_cache, v.dtype)
        turned = None
        if turn is not None:
            cos, sin = (t[:, None] for t in of_layer(turn, rope))
            turned = rotate(_of_rows(cache, k_cache, cos.shape[2])[..., None, :], (cos, sin))[..., 0, :]
        seen = seen_in(q.dtype, reach, sees_kept)
        if not seen.kernel:
            k_cache, v_cache = _of_rows(cache, k_cache), _of_rows(cache, v_cache)
        given = q, k, v, k_cache, v_cache, seen, turned
        if cache.sizes.watch is None:
            return _read(runs.attend(*given)[0], new)
        if seen.kernel:
            out, lse = runs.attend(*given)
            few = _of_rows(cache, k_cache), by_mask(reach, sees_kept)
            weights = runs.weights_of(lse, q, k, *few, turned)
        else:
            out, _, weights = runs.plainly(*given)
        looks = looks_of_many(cache, weights, counts)
        counts_not = isinstance(watched, np.bool_) and not watched  # known where layers are not scanned
        return _read(out, (*new, jnp.zeros_like(looks) if counts_not else looks))

    return attend


def _of_rows(cache: "StreamingCache", x: jax.Array, slots: int | None = None) -> jax.Array:
    """The first slots [B, K, slots, H] of the cache's rows, of keys or values in the order in which they lie."""
    few = x[:, :, :slots]
    return few if cache.through is None else jnp.take(few, cache.through, axis=0, mode="clip")


def _read[Out](out: jax.Array, new: Out) -> tuple[jax.Array, Out]:
    """What is new must not be there before the cache was read: else XLA writes it into a copy of the cache."""
    return jax.lax.optimization_barrier((out, new))


def _padded(turn: Table | None, more: int) -> Table | None:
    """A turn [..., A, R/2] of so many more slots, by 0, which changes no bit."""
    if turn is None:
        return None
    cos, sin = ([(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)] for x in turn)
    return jnp.pad(turn[0], cos, constant_values=1), jnp.pad(turn[1], sin)


def _seen_in(
    cache: "StreamingCache", num_tokens: int, kernel: bool, *, old: bool = True
) -> Callable[..., runs.SeenInRun]:
    """The function (dtype of queries, reach of the layer, whether it sees the second zone) -> who sees what.

    old: whether sinks and separators are seen.
    """
    sees_old = cache.visible_old() & old
    by_mask = _by_mask(cache, num_tokens, sees_old)
    if not kernel:
        return lambda dtype, *layer: by_mask(*layer)
    by_numbers = _by_numbers(cache, num_tokens, sees_old)
    return lambda dtype, *layer: by_numbers(*layer) if runs.computes_in(dtype) else by_mask(*layer)


def _by_mask(cache: "StreamingCache", num_tokens: int, old: jax.Array) -> Callable[[Any, Any], runs.SeenInRun]:
    within, is_kept = within_reach(cache, num_tokens), kept_ones(cache, num_tokens)
    recent = _sees_recent(cache, num_tokens)
    old = jnp.broadcast_to(old[:, None], (*recent.shape[:2], old.shape[1]))
    visible = jnp.concatenate([old, recent], axis=-1)

    def seen_in(reach: Any, sees_kept: Any) -> runs.SeenInRun:
        seen = visible if within is None else visible & within(reach)[:, 0, 0]
        return runs.SeenInRun(seen if sees_kept is None else seen & ((sees_kept > 0) | ~is_kept))

    return seen_in


def _by_numbers(cache: "StreamingCache", num_tokens: int, old: jax.Array) -> Callable[[Any, Any], runs.SeenInRun]:
    first, own = cache.first_recent(num_tokens), cache.query_positions(num_tokens)[-1]
    recent, is_kept = cache.recent_positions(), kept_ones(cache, num_tokens)
    of_old = runs.ALL
    if cache.sizes.reach:  # then there are separators, and nothing is evicted during a run
        recent = jnp.where(recent >= first[:, :1], recent, runs.NOBODY)
        of_old = own[:, :1] - cache.distances(1)[:, 0, : old.shape[1]]
    numbers = once(jnp.concatenate([jnp.where(old, of_old, runs.NOBODY), recent, own], axis=1))
    places = cache.through if cache.through is None else jnp.minimum(cache.through, cache.k[0].shape[0] - 1)
    by_all = None if cache.sizes.reach else once(runs.seen_by_numbers(numbers, first, places))

    def seen_in(reach: Any, sees_kept: Any) -> runs.SeenInRun:
        if by_all is not None and sees_kept is None:
            return by_all
        seen = numbers if sees_kept is None else jnp.where((sees_kept > 0) | ~is_kept, numbers, runs.NOBODY)
        return runs.seen_by_numbers(seen, first if reach is None else own - reach + 1, places)

    return seen_in


def _attend_past_evictions(cache: "StreamingCache", num_tokens: int, kernel: bool) -> Attend:
    """The same without separators, where a run goes on past evictions: a query's positions then differ by more than
    constants, and the sinks need one of their own.
    """
    a = cache.sizes.num_sinks
    to_sinks, _, to_recent = (tables_of(cache, p) for p in cache.query_positions(num_tokens))
    within, sees_sinks = within_reach(cache, num_tokens), cache.visible_old()[:, None]
    lying, new_tables = turn_of_slots(cache, by_zone=True), tables_of_new(cache, num_tokens)
    seen_in = _seen_in(cache, num_tokens, kernel, old=False)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        k_cache, v_cache, reach, _, rope, _, _ = layer
        seen = sees_sinks if within is None else sees_sinks & within(reach)[:, 0, 0, :, :a]
        new, (k, v) = taken_up(k_cache, k, v, *of_layers(new_tables, rope, of_layer(to_recent, rope)))
        k_cache, v_cache = plain(k_cache, k.dtype, lying and of_layer(lying, rope)), plain(v_cache, v.dtype)
        told, few = seen_in(q.dtype, reach, None), (_of_rows(cache, k_cache, a), _of_rows(cache, v_cache, a), seen)
        if not told.kernel:
            k_cache, v_cache = _of_rows(cache, k_cache), _of_rows(cache, v_cache)
        recent = runs.attend(rotate(q, of_layer(to_recent, rope)), k, v, k_cache, v_cache, told)
        return _read(runs.joined(*recent, rotate(q, of_layer(to_sinks, rope)), *few), new)

    return attend


def tables_of(cache: "StreamingCache", positions: Int32[Array, "..."]) -> Table:
    """`rope_tables` of the cache's layers."""
    tables = rope_tables(positions, cache.sizes.ropes, cache.head_dim)
    assert tables is not None  # `StreamSizes.create` refuses learned positions
    return tables


def turn_of_slots(cache: "StreamingCache", *, by_zone: bool = False) -> Table | None:
    """Cosine and sine, [(Z,) B, 1, C, R/2], that turn keys from their slots' numbers; None: they lie otherwise.

    They then fit recent queries, as those of `StreamingCache.recent_turn` do; `by_zone`: each those of its zone.
    """
    if not cache.sizes.turned_by_slot:
        return None
    sizes = (cache.sizes.num_sinks, cache.sizes.max_separators, cache.sizes.ring)
    numbers = jnp.concatenate([jnp.arange(size, dtype=jnp.int32) for size in sizes])
    if by_zone:
        recent = cache.recent_positions()
        sinks = jnp.broadcast_to(numbers[: sizes[0]], (len(recent), sizes[0]))
        return cache.angles((jnp.concatenate([sinks, recent], axis=1) - numbers)[:, None])
    return cache.angles(cache.query_positions(1)[-1][:, None] - cache.distances(1) - numbers)


def tables_of_new(cache: "StreamingCache", num_tokens: int) -> tuple[Table, Table] | None:
    """What rotates the keys of a run's tokens by their slots' numbers, and what turns these to fit recent queries.

    None: keys lie as they are rotated to fit them.
    """
    if not cache.sizes.turned_by_slot:
        return None
    own, recent = own_positions(cache, num_tokens), cache.query_positions(num_tokens)[-1]
    return once((tables_of(cache, own), cache.angles(recent - own)))


def of_layers(tables: tuple[Table, Table] | None, rope: Any, usual: Table) -> tuple[Table, Table | None]:
    """A layer's own of `tables_of_new`, or the usual rotation and no turn; `rope` as for `of_layer`."""
    return (usual, None) if tables is None else (of_layer(tables[0], rope), of_layer(tables[1], rope))


def taken_up(
    layer: Vectors, k: jax.Array, v: jax.Array, table: Table, turn: Table | None = None
) -> tuple[tuple[Vectors, Vectors], tuple[jax.Array, jax.Array]]:
    """New keys and values as they will lie in a layer's cache, and as tokens see them already; see `tables_of_new`."""
    k = rotate(k, table)
    if not isinstance(layer, Quantised):
        return (k, v), (k, v)
    both = quantised(jnp.stack([k, v]))  # at once: fewer kernels
    seen = plain(both[0], jnp.float32)
    return (both[0], both[1]), ((seen if turn is None else rotate(seen, turn)).astype(k.dtype), plain(both[1], v.dtype))


def kept_ones(cache: "StreamingCache", num_tokens: int) -> Bool[np.ndarray, "S"]:
    """Which of the C slots and the tokens of a run are the second zone's: those that some layers do not see."""
    i, a = np.arange(cache.sizes.slots + num_tokens), cache.sizes.num_sinks
    return (a <= i) & (i < a + cache.sizes.max_separators)


def within_reach(
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
