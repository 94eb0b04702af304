"""Line charts as SVG within a page: no script, colours by the page's style sheet, dashes for print."""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 34
_MOST = 400  # points of a line: more of them than pixels show
_STEEP = 50.0  # largest over median value from which a chart has a logarithmic axis
DASHES = ("", "6 3", "2 2", "8 3 2 3", "1 3", "10 4")  # one a run, repeated after the colours


@dataclasses.dataclass(frozen=True)
class Line:
    """A run's values; None where there was no finite number."""

    name: str
    steps: Sequence[int]
    values: Sequence[int | float | None]
    number: int  # of the run: its colour and its dashes


def line_chart(title: str, unit: str, lines: Sequence[Line]) -> str:
    """An <svg> of lines over steps; where few values stand far above the rest, the axis is logarithmic and says so."""
    finite = sorted(v for line in lines for v in line.values if v is not None)
    is_log = bool(finite) and finite[0] > 0 and finite[-1] > _STEEP * finite[len(finite) // 2]
    shown = math.log10 if is_log else float
    low, high = (shown(finite[0]), shown(finite[-1])) if finite else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    last = max((line.steps[-1] for line in lines if line.steps), default=1)
    first = min((line.steps[0] for line in lines if line.steps), default=0)
    span = max(last - first, 1)

    def x(step: int | float) -> float:
        return _LEFT + (step - first) / span * (WIDTH - _LEFT - _RIGHT)

    def y(value: int | float) -> float:
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [_grid(y, low, high, is_log), _steps(x, first, last)]
    parts += [_line(line, x, lambda v: y(shown(v))) for line in lines]
    said = "; ".join(f"{line.name}: {_told(line)}" for line in lines)
    heading = f"{title}{f', {unit}' if unit else ''}{', logarithmic' if is_log else ''}"
    return (
        f'<figure class="chart"><figcaption>{html.escape(heading)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{heading}. {said}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _told(line: Line) -> str:
    values = [(step, v) for step, v in zip(line.steps, line.values, strict=True) if v is not None]
    if not values:
        return "nothing"
    (first, begin), (last, end) = values[0], values[-1]
    return f"{number(begin)} at step {first:,}, {number(end)} at step {last:,}"


def _grid(y, low: int | float, high: int | float, is_log: bool) -> str:
    out = []
    for tick in ticks(low, high, 5):
        label = number(10**tick) if is_log else number(tick)
        out.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    return "".join(out)


def _steps(x, first: int, last: int) -> str:
    out = [
        f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>'
        for tick in ticks(first, last, 6)
        if tick == int(tick)
    ]
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return "".join([*out, f'<text class="tick" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'])


def _line(line: Line, x, y) -> str:
    points = thinned(line.steps, line.values)
    runs: list[list[str]] = [[]]
    for step, value in points:
        if value is None:
            runs.append([])  # a gap
        else:
            runs[-1].append(f"{x(step):.1f},{y(value):.1f}")
    colour = f"c{line.number % len(DASHES)}"
    style = f'class="line {colour}" stroke-dasharray="{DASHES[line.number % len(DASHES)]}"'
    drawn = "".join(f'<polyline {style} points="{" ".join(run)}"/>' for run in runs if len(run) > 1)
    few = len(points) <= 40
    dots = [
        f'<circle class="dot {colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"><title>'
        f"{html.escape(line.name)}: {number(value)} at step {step:,}</title></circle>"
        for step, value in points
        if value is not None and few
    ]
    lone = [] if few else [f'<circle class="dot {colour}" r="2" {_at(run[0])}/>' for run in runs if len(run) == 1]
    return drawn + "".join(dots + lone)


def _at(point: str) -> str:
    cx, cy = point.split(",")
    return f'cx="{cx}" cy="{cy}"'


def thinned(steps: Sequence[int], values: Sequence[int | float | None]) -> list[tuple[int, int | float | None]]:
    """At most `_MOST` points, the smallest and the largest of every stretch: spikes stay. A gap stays a gap."""
    points = list(zip(steps, values, strict=True))
    if len(points) <= _MOST:
        return points
    width = -(-len(points) // (_MOST // 3))
    kept: list[tuple[int, int | float | None]] = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        finite = [(v, step) for step, v in stretch if v is not None]
        found = {(step, v) for v, step in (min(finite), max(finite))} if finite else set()
        found |= {next((step, v) for step, v in stretch if v is None)} if len(finite) < len(stretch) else set()
        kept += sorted(found, key=lambda point: point[0])
    return kept


def ticks(low: int | float, high: int | float, most: int) -> list[int | float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, at most so many."""
    if low == high:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: int | float) -> str:
    """Four digits, with commas where there are thousands."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
