"""Text tables of compared patterns, and what JSON cannot say."""

import math
from collections.abc import Sequence
from typing import Any

from sepjax.evaluation.compare import Score
from sepjax.evaluation.slices import Slice


def table(scores: Sequence[Score]) -> str:
    """A row an arm: what it keeps and computes, and what it loses."""
    wide = _width([s.arm for s in scores])
    lines = [
        f"{'arm':<{wide}}{'n':>7}{'KV kept':>9}{'pairs':>8}{'perplexity':>12}{'+-':>8}{'bits/byte':>11}"
        f"{'nats/token':>12}{'+-':>9}{'tokens/s':>11}"
    ]
    lines += [
        f"{s.arm:<{wide}}{s.window_size:>7}{s.kv_kept:>9.1%}{s.attention_fraction:>8.1%}{s.perplexity:>12.3f}"
        f"{_number(s.perplexity_error, 8, 3)}{s.bits_per_byte:>11.4f}{s.difference:>12.4f}"
        f"{_number(s.difference_error, 9, 4)}{s.tokens_per_second:>11,.0f}"
        for s in scores
    ]
    first = scores[0]
    is_over_windows = len(first.slices[0].document_tokens) == first.windows != first.documents or first.documents == 1
    over = f"over the {first.windows} windows" if is_over_windows else f"over {first.documents} documents"
    return "\n".join(
        [*lines, f"{first.tokens:,} tokens; nats/token more than {first.baseline!r}; one standard error {over}, paired"]
    )


def slice_table(arms: Sequence[tuple[str, Sequence[Slice]]], near: int, far: int, baseline: str) -> str:
    """A row for each slice and arm: loss, difference to the baseline, and what is recovered of the far one."""
    wide = _width([name for name, _ in arms])
    lines = [
        f"{'slice':<10}{'arm':<{wide}}{'tokens':>10}{'loss':>9}{'nats/token':>12}{'+-':>9}{'recovered':>11}{'+-':>7}"
    ]
    for name in dict.fromkeys(x.name for _, slices in arms for x in slices):
        for arm, slices in arms:
            lines += [
                f"{name:<10}{arm:<{wide}}{x.tokens:>10,}{x.loss:>9.4f}{x.difference:>12.4f}"
                f"{_number(x.difference_error, 9, 4)}{_percent(x.recovered, 11)}{_percent(x.recovered_error, 7)}"
                for x in slices
                if x.name == name
            ]
    return "\n".join(
        [
            *lines,
            f"near: the bigram stood in the row {near} tokens ago or fewer; far: more than {far}; far_own: and in no "
            f"other document",
            f"nats/token more than {baseline!r}; recovered: (window - arm) / (window - dense)",
        ]
    )


def plain(value: Any) -> Any:
    """`value` of dicts, lists and numbers as JSON has it: a number that is none becomes null."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _width(names: Sequence[str]) -> int:
    return max(16, *(len(name) + 2 for name in names))


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'' if value is None else f'{value:.{digits}f}':>{width}}"


def _percent(value: float | None, width: int) -> str:
    return f"{'' if value is None else f'{value:.1%}':>{width}}"
