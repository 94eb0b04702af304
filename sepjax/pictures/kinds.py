"""Far attention received by kinds of tokens, as bars with their errors."""

from collections.abc import Sequence
from pathlib import Path

from sepjax.keeping.kinds import KindShare
from sepjax.pictures.figures import COLOURS, axes_of, save


def draw_kinds(path: Path, kinds: Sequence[KindShare], title: str) -> None:
    """A bar for each kind, on a logarithmic axis around the mean token; `path` ends in .png, .svg or .pdf.

    Args:
      path: the file.
      kinds: from `sepjax.keeping.kinds.far_attention_by_kind`.
      title: above the figure: model, text and window.

    Raises:
      FigureError: another ending.
    """
    figure, axes = axes_of(title)
    places = range(len(kinds))[::-1]
    values = [max(x.relative, 1e-6) for x in kinds]
    axes.barh(
        places, [value - 1 for value in values], left=1, xerr=[x.error or 0.0 for x in kinds], capsize=3,
        color=[COLOURS[0] if value >= 1 else COLOURS[4] for value in values], edgecolor="0.3", linewidth=0.6,
    )  # fmt: skip
    low, high = min([0.5, *values]), max([2.0, *(x.relative + (x.error or 0.0) for x in kinds)])
    axes.set_xscale("log")
    axes.axvline(1, color="0.2", linewidth=0.8)
    axes.set_xlim(low / 1.3, high * 1.3)
    for place, x in zip(places, kinds, strict=True):
        said = f"{_percent(x.tokens)} of tokens,\n{_percent(x.attention)} of far attention"
        axes.text(1.02, place, said, va="center", fontsize=7.5, transform=axes.get_yaxis_transform())
    axes.set_yticks(places, [x.kind for x in kinds])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("far attention a token receives, over the mean token's (sinks aside)")
    axes.grid(visible=False, axis="y")
    save(figure, path)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
