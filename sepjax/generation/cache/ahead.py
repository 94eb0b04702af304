"""What a bounded cache will hold once its full rows have been compacted: a step may be told of before they are."""

import jax
import jax.numpy as jnp

from sepjax.array_typing import Bool, Int32
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.mixed import BoundedCache, MixedCache
from sepjax.generation.cache.watched import rivals


def kept_of(cache: BoundedCache) -> Int32[jax.Array, "B"]:
    """Entries between the sinks and the newest; of several sizes averaged over the layers and rounded down."""
    if isinstance(cache, MixedCache):
        return cache.averaged([part.num_separators for part in cache.parts])
    return cache.num_separators


type _Ahead = tuple[Int32[jax.Array, "B"], Bool[jax.Array, "B"], Int32[jax.Array, "B"]]


def after_compaction(cache: BoundedCache) -> _Ahead:
    """`held`, `is_stuck` and `kept_of` as they will be then."""
    if isinstance(cache, MixedCache):
        held, stuck, kept = zip(*map(_after, cache.parts), strict=True)
        return cache.averaged(held), jnp.any(jnp.stack(stuck), axis=0), cache.averaged(kept)
    return _after(cache)


def _after(cache: StreamingCache) -> _Ahead:
    s, w = cache.sizes.max_separators, cache.sizes.window_size
    if not s:  # evictions count at once
        return cache.held(), cache.is_stuck(), cache.num_separators
    full = cache.is_full()
    if cache.sizes.keeps_best:
        kept = jax.lax.cond(jnp.any(full), rivals, lambda cache: cache.num_separators, cache)
    else:
        p, first = cache.recent_positions(), (cache.next_recent - cache.num_recent)[:, None]
        is_past = (p >= first) & (p < first + (cache.num_recent - w)[:, None])
        kept = cache.num_separators + jnp.sum(cache.is_separator & is_past, axis=1, dtype=jnp.int32)
    held = jnp.where(full, cache.num_sinks + jnp.minimum(kept, s) + w, cache.held())
    left = jnp.where(full, jnp.minimum(kept, s), cache.num_separators)
    return held, cache.is_stuck() | (full & (kept > s) & cache.ends_when_stuck), left
