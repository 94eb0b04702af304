"""Figures drawn by matplotlib: quality against the keys kept, and the losses of several runs."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sepjax.config import UserError
from sepjax.files import check_file
from sepjax.pictures.canvas import blank, plain

# Okabe and Ito's colours, which colour-blind readers tell apart, each with a marker of its own for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))  # as many colours again in print
_MARKS = 8  # shares of keys that are written at the axis, at most
_WIDE = 8.0  # largest over smallest share of keys from which the axis is logarithmic


class FigureError(UserError, ValueError):
    """Results of which no figure can be made."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One arm of an evaluation: what it kept and how well it did."""

    pattern: str
    arm: str
    kept: float  # keys held over keys of dense attention
    loss: float  # nats a token over the baseline arm's
    error: float | None  # one standard error of it; None: of one window it is not known


def read_points(files: Iterable[Path]) -> tuple[list[Point], str]:
    """The arms of results of `sepjax evaluate compare` and what they were compared with.

    Raises:
      FigureError: a file that holds no such results, or files with different baselines.
    """
    points, baselines = [], set()
    for file in files:
        try:
            scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
            for score in scores:
                names = ("pattern", "arm", "kv_kept", "difference", "difference_error")
                points.append(Point(*(score[name] for name in names)))
                baselines.add(score["baseline"])
        except (KeyError, TypeError, ValueError) as error:
            raise FigureError(
                f"{file} holds no results of sepjax evaluate compare ({type(error).__name__}: {error}); give what it "
                "wrote"
            ) from error
    if len(baselines) != 1:
        raise FigureError(
            f"the results have {len(baselines)} baselines, {sorted(baselines)}; compare each with the same arm"
        )
    return points, baselines.pop()


def draw_pareto(path: Path, points: Sequence[Point], baseline: str, title: str) -> None:
    """Loss against keys kept, a line for each pattern; `path` ends in .png, .svg or .pdf."""
    figure, axes = axes_of(title)
    by_pattern: dict[str, list[Point]] = {}
    for point in points:
        by_pattern.setdefault(point.pattern, []).append(point)
    for (pattern, some), colour, marker in zip(by_pattern.items(), _cycle(COLOURS), _cycle(_MARKERS), strict=False):
        some = sorted(some, key=lambda x: x.kept)
        errors = [math.nan if x.error is None else x.error for x in some]
        axes.errorbar(
            [100 * x.kept for x in some], [x.loss for x in some], yerr=errors,
            label=pattern, color=colour, marker=marker, capsize=3, linewidth=1.2,
        )  # fmt: skip
        for x in some:
            axes.annotate(plain(x.arm), (100 * x.kept, x.loss), textcoords="offset points", xytext=(6, 4), fontsize=8)
    shares = [x.kept for x in points]
    if max(shares) > _WIDE * min(shares) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
        if len(marks := sorted({round(100 * x, 1) for x in shares})) <= _MARKS:
            axes.set_xticks(marks, [f"{x:g}" for x in marks])
        else:
            axes.xaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(
        xlabel="keys held, % of dense attention's",
        ylabel=f"nats per token over {plain(repr(baseline))}: lower is better",
    )
    axes.legend(frameon=False)
    save(figure, path)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; raises FigureError where there is no such file."""
    file = workdir / "metrics.jsonl"
    if not file.is_file():
        raise FigureError(f"{workdir} has no metrics.jsonl; give folders of runs of sepjax train")
    rows: list[Any] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line that a run was writing when it was killed
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def read_curves(workdirs: Iterable[Path], metric: str) -> Mapping[str, tuple[list[int], list[float]]]:
    """Steps and values of a metric from the `metrics.jsonl` of each workdir.

    A run that was resumed has a step's newest value. Raises FigureError where there is none.
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    workdirs = list(workdirs)
    names = short_names(workdirs)
    for workdir in workdirs:
        rows = read_metrics(workdir)
        # What was not finite is null in the file, and a gap in a curve.
        found = {row["step"]: math.nan if row[metric] is None else row[metric] for row in rows if metric in row}
        if not found:
            known = sorted({name for row in rows for name in row} - {"step", "time"})
            raise FigureError(f"{workdir / 'metrics.jsonl'} has no {metric!r}; it has {', '.join(known)}")
        curves[names[workdir]] = (sorted(found), [found[step] for step in sorted(found)])
    return curves


def short_names(workdirs: Sequence[Path]) -> dict[Path, str]:
    """The last parts of each path, as few as tell them apart."""
    parts = {workdir: workdir.parts for workdir in workdirs}
    for count in range(1, max((len(x) for x in parts.values()), default=0) + 1):
        names = {workdir: os.path.join(*x[-count:]) for workdir, x in parts.items() if x}
        if len(set(names.values())) == len(parts):
            return names
    return {workdir: str(workdir) for workdir in workdirs}


def draw_curves(path: Path, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], metric: str) -> None:
    """A metric over steps, a line for each run; `path` ends in .png, .svg or .pdf."""
    figure, axes = axes_of(f"{metric} of {', '.join(curves)}")
    for (name, (steps, values)), colour in zip(curves.items(), _cycle(COLOURS), strict=False):
        axes.plot(steps, values, label=plain(name), color=colour, linewidth=1.2, marker="." if len(steps) < 30 else "")
    axes.set(xlabel="step", ylabel=metric)
    axes.legend(frameon=False)
    save(figure, path)


def _cycle(items: Sequence[str]) -> Iterable[str]:
    while True:
        yield from items


def axes_of(title: str) -> tuple[Any, Any]:
    """An empty figure with this title, and its axes."""
    figure = blank(7.0, 4.4, "the figure")
    axes = figure.add_subplot()
    axes.set_title(plain(title), fontsize=10, loc="left", wrap=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def check_output(path: Path) -> None:
    """Before the work that a figure is of, raises what `save` would after it: FigureError, WriteError, PictureError."""
    _kind(path)
    blank(1.0, 1.0, "the figure")
    check_file(path)


def save(figure: Any, path: Path) -> None:
    """Writes the figure as its name ends, the same bytes for the same figure. Raises FigureError for other endings."""
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, format=_kind(path), dpi=150, metadata=metadata)


def _kind(path: Path) -> str:
    kinds = {".png": "png", ".svg": "svg", ".pdf": "pdf"}
    if path.suffix not in kinds:
        raise FigureError(f"--output={path} is to end in .png, .svg or .pdf")
    return kinds[path.suffix]
