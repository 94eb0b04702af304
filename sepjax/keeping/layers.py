"""A cache's memory split among layers: some keep watched tokens, the others have a window alone.

Letting every layer see kept tokens wastes memory on those that make nothing of them. Which ones do, and how the memory
is best split, `sepjax.keeping.search` finds; here a split becomes the settings of a cache that takes no more bytes than
a plain window of the slots that were asked for (`sepjax.generation.cache.mixed`).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax

from sepjax.config import AttentionConfig, ConfigError, ModelConfig, under, validate_attention
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.mixed import MixedSizes, bounded_sizes
from sepjax.generation.cache.sizes import ALIGN, StreamSizes

_BETWEEN = 32  # a cache is compacted whenever so large a part of it is new: docs/keeping.md


def row_bytes(config: ModelConfig, attention: AttentionConfig) -> int:
    """Bytes of one row of the bounded cache that these settings ask for."""
    sizes = bounded_sizes(config, attention)
    if isinstance(sizes, MixedSizes):
        return sum(_bytes(config, part, len(sizes.layers(i))) for i, part in enumerate(sizes.parts))
    return _bytes(config, sizes, config.num_layers)


@functools.lru_cache(512)
def _bytes(config: ModelConfig, sizes: StreamSizes, layers: int) -> int:
    alone = dataclasses.replace(config, num_layers=layers, full_layers=(), no_rope_layers=())
    cache = jax.eval_shape(lambda: StreamingCache.create(alone, 1, sizes))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))


def plain_window(slots: int, base: AttentionConfig, num_layers: int) -> AttentionConfig:
    """StreamingLLM in the memory of so many slots: sinks and a window, and what is left of the last tile of slots."""
    if slots <= base.num_sinks:
        raise ConfigError(f"{slots} slots a layer leave no room for {base.num_sinks} sinks and a window; give more")
    slots = tiles_of(slots) * ALIGN - 1
    windows = {"window_size": slots - base.num_sinks, "cache_size": slots, "layer_windows": ()}
    plain = {"kept_layers": (), "watch_layers": (), "keep_all_separators": False}
    return validate_attention(under(base, "sink_window", **windows, **plain), num_layers)


def tiles_of(slots: int) -> int:
    """Memory is given in tiles of slots; a cache has one more slot than entries."""
    return -(-(slots + 1) // ALIGN)


def split_memory(
    config: ModelConfig,
    layers: Sequence[int],
    slots: int,
    base: AttentionConfig | None = None,
    *,
    others: float = 0.75,
    zone: float = 0.5,
) -> AttentionConfig:
    """Settings of a cache in the bytes of a window of `slots`, watched tokens kept by these layers alone.

    Args:
      config: of the model.
      layers: that keep, at least one and not all.
      slots: of a plain window in all layers that takes at least as many bytes.
      base: whose number of sinks and other settings are taken over.
      others: slots of a layer that does not keep, a share of `slots`.
      zone: kept entries of a layer that does, a share of its own.

    Raises:
      ConfigError: no such layers, or too few slots for sinks and windows.
    """
    base, L = base or AttentionConfig(), config.num_layers
    if L < 2:
        raise ConfigError("a model of one layer has nothing to be split among layers")
    if not 0 < len(layers) < L:
        raise ConfigError(f"{len(layers)} of the model's {L} layers cannot be those that keep; choose 1 to {L - 1}")
    budget = row_bytes(config, plain_window(slots, base, L))
    tiles = tiles_of(slots)
    narrow = max(1, min(round(tiles * others), tiles - 1))
    for wide in range((tiles * L - narrow * (L - len(layers))) // len(layers), narrow, -1):
        split = _split(layers, narrow * ALIGN - 1, wide * ALIGN - 1, zone, base, L)
        if split is not None and row_bytes(config, split) <= budget:
            return split
    raise ConfigError(
        f"{slots} slots a layer leave no room for {base.num_sinks} sinks, kept tokens and a window of more than "
        f"watch_after={base.watch_after}; give more"
    )


def _split(
    layers: Sequence[int], narrow: int, wide: int, zone: float, base: AttentionConfig, L: int
) -> AttentionConfig | None:
    """The settings with so many slots in layers that keep and in others; None: there is no room."""
    between = max(16, wide // _BETWEEN)
    most = int(wide * zone)
    window = wide + 1 - base.num_sinks - between - most
    if min(most, window - base.watch_after, narrow - base.num_sinks) < 1:
        return None
    windows = tuple(window if i in layers else narrow - base.num_sinks for i in range(L))
    split = dataclasses.replace(
        base, pattern="watched", max_separators=most, window_size=window, cache_size=wide, layer_windows=windows,
        kept_layers=tuple(layers), watch_layers=(), keep_all_separators=False,
    )  # fmt: skip
    return validate_attention(split, L)


def as_arm(attention: AttentionConfig) -> str:
    """Settings of `split_memory` or `plain_window` as `--arm` and `--arms` take them."""
    x = attention
    own = "watch_layers= keep_all_separators=false"  # whatever the model's own settings are
    if x.pattern == "sink_window":
        return f"{x.pattern} a={x.num_sinks} n={x.window_size} c={x.cache_size} kept_layers= {own}"
    windows = ",".join(map(str, x.layer_windows))
    layers = ",".join(map(str, x.kept_layers))
    sizes = f"a={x.num_sinks} s={x.max_separators} w={x.window_size} c={x.cache_size}"
    return f"{x.pattern} {sizes} windows={windows} kept_layers={layers} {own}"
