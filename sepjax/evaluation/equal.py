"""Settings of other patterns that keep as many keys as separators did."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sepjax.config import AttentionConfig


def window_of_equal_kept(attention: AttentionConfig, seen: Sequence[int], kept: float) -> AttentionConfig:
    """The pattern with the window n that keeps, over texts of these lengths, the share nearest to `kept`.

    Args:
      attention: "sink_window" or "fixed_interval".
      seen: tokens of each text.
      kept: keys held at the last token over tokens, averaged over texts.
    """
    lengths = np.asarray(seen)

    def share(window: int) -> float:
        return float(np.mean(kept_keys(attention, lengths, window) / lengths))

    low, high = 1, int(lengths.max())
    while low < high:  # the first window that keeps at least that much
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) >= kept else (middle + 1, high)
    if low > 1 and abs(share(low - 1) - kept) < abs(share(low) - kept):
        low -= 1
    return dataclasses.replace(attention, window_size=low, layer_windows=(), cache_size=0)


def kept_keys(attention: AttentionConfig, lengths: np.ndarray, window: int) -> np.ndarray:
    """Keys that the last of so many tokens sees."""
    out = np.maximum(lengths - window, 0)  # tokens that have left the window
    old = np.minimum(out, attention.num_sinks)
    if attention.pattern == "fixed_interval":  # every interval-th token, those among the sinks counted once
        old = old + out // attention.interval - old // attention.interval
    return old + np.minimum(lengths, window)
