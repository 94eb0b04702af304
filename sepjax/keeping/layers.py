"""Which layers make use of the distant past, and a cache's memory split among layers by it.

Letting every layer see kept tokens wastes memory on those that make nothing of them. Here the layers that gain most by
seeing far get a kept zone and a wide window, and the others a narrower window alone; averaged over the layers the
slots are those that were asked for (`sepjax.generation.cache.mixed`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sepjax.config import AttentionConfig, ConfigError, ModelConfig, validate_attention

_OTHERS = 0.75  # of the average number of slots, what the other layers have
_BETWEEN = 32  # a cache is compacted whenever so large a part of it is new: docs/keeping.md


def best_layers(gains: np.ndarray, number: int) -> tuple[int, ...]:
    """The numbers of the layers with the largest gains, in order."""
    return tuple(sorted(np.argsort(-gains, kind="stable")[:number].tolist()))


def split_memory(
    config: ModelConfig, layers: Sequence[int], slots: int, base: AttentionConfig | None = None
) -> AttentionConfig:
    """Settings of a cache of `slots` entries a layer on average, watched tokens kept by these layers alone.

    Args:
      config: of the model.
      layers: that keep, at least one and not all.
      slots: on average over the layers.
      base: whose number of sinks and other settings are taken over.

    Raises:
      ConfigError: no such layers, or too few slots for sinks and windows.
    """
    base, L = base or AttentionConfig(), config.num_layers
    if L < 2:
        raise ConfigError("a model of one layer has nothing to be split among layers")
    if not 0 < len(layers) < L:
        raise ConfigError(f"{len(layers)} of the model's {L} layers cannot be those that keep; choose 1 to {L - 1}")
    others = int(slots * _OTHERS)
    kept = (slots * L - others * (L - len(layers))) // len(layers)
    between = max(16, kept // _BETWEEN)
    most = kept // 2
    window = kept + 1 - base.num_sinks - between - most
    if min(window - base.watch_after, others - base.num_sinks) < 1:
        raise ConfigError(
            f"{slots} slots a layer leave no room for {base.num_sinks} sinks, kept tokens and a window of more than "
            f"watch_after={base.watch_after}; give more"
        )
    windows = tuple(window if i in layers else others - base.num_sinks for i in range(L))
    split = dataclasses.replace(
        base, pattern="watched", max_separators=most, window_size=window, cache_size=kept, layer_windows=windows,
        kept_layers=tuple(layers), watch_layers=(), keep_all_separators=False,
    )  # fmt: skip
    return validate_attention(split, L)


def as_arm(attention: AttentionConfig) -> str:
    """Settings of `split_memory` as `--arm` and `--arms` take them."""
    x = attention
    windows = ",".join(map(str, x.layer_windows))
    layers = ",".join(map(str, x.kept_layers))
    sizes = f"a={x.num_sinks} s={x.max_separators} w={x.window_size} c={x.cache_size}"
    own = "watch_layers= keep_all_separators=false"  # whatever the model's own settings are
    return f"{x.pattern} {sizes} windows={windows} kept_layers={layers} {own}"
