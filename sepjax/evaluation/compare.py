"""Perplexity of dense, separators, StreamingLLM and fixed intervals at equal KV, with standard errors.

Every pattern scores the same tokens of the same windows. The error of a difference is taken from paired windows: one
that is hard for one pattern is hard for all, so it is much smaller than the errors of the perplexities themselves.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from sepjax.config import AttentionConfig, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.equal import window_of_equal_kept
from sepjax.evaluation.perplexity import WindowScores, score_windows, token_windows
from sepjax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Compared:
    """One pattern. Errors are one standard error over windows."""

    pattern: str
    num_sinks: int
    window_size: int
    interval: int
    kv_kept: float  # keys of each window's last row over its length, averaged over layers and windows
    perplexity: float
    perplexity_error: float
    difference: float  # nats a token more than the first pattern
    difference_error: float  # paired over windows
    tokens: int
    windows: int
    tokens_per_second: float


def compare(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    attention: AttentionConfig,
    *,
    length: int,
    batch_size: int = 8,
    max_tokens: int = 0,
    bos: bool = True,
) -> list[Compared]:
    """Scores documents under each pattern; the windows of the last two keep what the separators kept.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      documents: texts.
      attention: the settings of the separators; the others take their sinks, and a fixed interval takes every
        `interval`-th token, the number nearest to the separators' own density.
      length: T, tokens of a window.
      batch_size: windows of a forward pass.
      max_tokens: of each document; 0: all.
      bos: whether documents begin with BOS.

    Raises:
      ValueError: there is nothing to score.
    """
    windows = token_windows(tokenizer, documents, length, bos=bos, max_tokens=max_tokens)

    def score(changed: AttentionConfig) -> WindowScores:
        changed = validate_attention(dataclasses.replace(changed, cache_size=0), model.config.num_layers)
        return score_windows(model, tokenizer, windows, changed, length=length, batch_size=batch_size)

    separators = score(dataclasses.replace(attention, pattern="separator"))
    lengths = [len(window) - 1 for window in windows]
    interval = max(1, round(1 / max(separators.separator_fraction, 1e-3)))
    others = [
        window_of_equal_kept(
            dataclasses.replace(attention, pattern=pattern, interval=interval), lengths, separators.kv_kept
        )
        for pattern in ("sink_window", "fixed_interval")
    ]
    scores = [score(dataclasses.replace(attention, pattern="dense")), separators, *map(score, others)]
    return [_compared(x, scores[0]) for x in scores]


def _compared(x: WindowScores, first: WindowScores) -> Compared:
    mean, error = ratio_error(x.nll, x.tokens)
    difference, difference_error = ratio_error(x.nll - first.nll, x.tokens)
    a = x.attention
    return Compared(
        pattern=a.pattern,
        num_sinks=0 if a.pattern == "dense" else a.num_sinks,
        window_size=int(max(x.lengths)) if a.pattern == "dense" else a.window_size,
        interval=a.interval if a.pattern == "fixed_interval" else 0,
        kv_kept=x.kv_kept,
        perplexity=math.exp(mean),
        perplexity_error=math.exp(mean) * error,
        difference=difference,
        difference_error=difference_error,
        tokens=int(x.tokens.sum()),
        windows=len(x.tokens),
        tokens_per_second=float(x.tokens.sum()) / x.seconds,
    )


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """sum(sums) / sum(counts) and its standard error over windows (linearised); NaN for a single window."""
    mean = float(sums.sum() / counts.sum())
    n = len(sums)
    if n < 2:
        return mean, math.nan
    residuals = sums - mean * counts
    return mean, math.sqrt(float(np.sum(residuals**2)) * n / (n - 1)) / float(counts.sum())


def table(scores: Sequence[Compared]) -> str:
    """The comparison as a text table."""
    lines = [
        f"{'pattern':<16}{'a':>3}{'n':>7}{'every':>7}{'KV kept':>9}{'perplexity':>12}{'+-':>8}"
        f"{'nats/token over dense':>24}{'+-':>9}{'tokens/s':>11}"
    ]
    lines += [
        f"{s.pattern:<16}{s.num_sinks:>3}{s.window_size:>7}{s.interval or '':>7}{s.kv_kept:>9.1%}{s.perplexity:>12.3f}"
        f"{s.perplexity_error:>8.3f}{s.difference:>24.4f}{s.difference_error:>9.4f}{s.tokens_per_second:>11,.0f}"
        for s in scores
    ]
    return "\n".join([*lines, f"{scores[0].tokens:,} tokens in {scores[0].windows} windows; one standard error each"])
