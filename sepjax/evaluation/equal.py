"""Settings of other patterns that keep as many keys, or compute as many pairs, as a given one did."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sepjax.config import AttentionConfig, ConfigError
from sepjax.data.tokenizer import Tokenizer
from sepjax.separators import configured_table, flag_separators


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

    return _with_nearest_window(attention, share, int(lengths.max()), kept)


def _with_nearest_window(
    attention: AttentionConfig, share: Callable[[int], float], high: int, want: float
) -> AttentionConfig:
    """`attention` with the window n of 1 to `high` whose share, which grows with n, is nearest to `want`."""
    low = 1
    while low < high:  # the first window that keeps at least that much
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) >= want else (middle + 1, high)
    if low > 1 and abs(share(low - 1) - want) < abs(share(low) - want):
        low -= 1
    return dataclasses.replace(attention, window_size=low, layer_windows=(), cache_size=0)


def kept_keys(attention: AttentionConfig, lengths: np.ndarray, window: int) -> np.ndarray:
    """Keys that the last of so many tokens sees."""
    out = np.maximum(lengths - window, 0)  # tokens that have left the window
    old = np.minimum(out, attention.num_sinks)
    if attention.pattern == "fixed_interval":  # every interval-th token, those among the sinks counted once
        old = old + out // attention.interval - old // attention.interval
    return old + np.minimum(lengths, window)


def window_of_equal(
    attention: AttentionConfig, tokenizer: Tokenizer, windows: Sequence[np.ndarray], kind: str, want: float
) -> AttentionConfig:
    """The pattern with the window n, the same in all layers, that comes nearest to a share of keys or of pairs.

    Args:
      attention: any pattern whose kept tokens follow from the text.
      tokenizer: the model's.
      windows: rows of token ids, the last of each a target only.
      kind: "kv": keys that the last token sees over the tokens, averaged over rows; "pairs": visible over causal
        pairs, of all rows together.
      want: the share.

    Raises:
      ConfigError: the pattern is a gated one.
    """
    if attention.pattern == "gated":
        raise ConfigError(
            "what a gate keeps does not follow from the text, so no equal window is found for a gated arm; give it a "
            "window_size, and other arms n=kv: of it"
        )
    counts = [_count_kept(flags, attention) for flags in _flags(attention, tokenizer, windows)]

    def share(n: int) -> float:
        if kind == "kv":
            return float(np.mean([_keys(count, n)[-1] / (len(count) - 1) for count in counts]))
        return sum(_keys(count, n).sum() for count in counts) / causal

    causal = sum((len(count) - 1) * len(count) // 2 for count in counts)
    return _with_nearest_window(attention, share, max(map(len, counts)), want)


def density(attention: AttentionConfig, tokenizer: Tokenizer, windows: Sequence[np.ndarray]) -> float:
    """Separators, or whatever the pattern keeps, a token of the windows' inputs."""
    return float(np.mean(np.concatenate(_flags(attention, tokenizer, windows))))


def _flags(attention: AttentionConfig, tokenizer: Tokenizer, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """bool[T] of each window: which inputs stay visible for ever, sinks aside."""
    table = configured_table(tokenizer, attention)
    inputs = [ids[:-1] for ids in windows]
    return [flag_separators(ids, np.arange(len(ids), dtype=np.int32), table, attention) for ids in inputs]


def _count_kept(flags: np.ndarray, attention: AttentionConfig) -> np.ndarray:
    """int[T + 1]: how many of the first 0, 1, ... T tokens stay visible for ever."""
    return np.concatenate([[0], np.cumsum(flags | (np.arange(len(flags)) < attention.num_sinks))])


def _keys(counts: np.ndarray, n: int) -> np.ndarray:
    """int[T]: keys that each token sees: those that stay, of what has left its window, and its window."""
    seen = np.arange(1, len(counts))
    return counts[np.maximum(seen - n, 0)] + np.minimum(seen, n)
