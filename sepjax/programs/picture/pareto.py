"""draws quality against the keys kept, one line per pattern, from results of sepjax evaluate compare

sepjax picture pareto --results=a/compare.json,b/compare.json --output=pareto.svg
"""

import dataclasses
from pathlib import Path

from sepjax.command.settings import Settings as _Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """Which results."""

    results: tuple[str, ...]  # files that sepjax evaluate compare wrote, with the same baseline
    output: str = "pareto.png"  # a .png, .svg or .pdf file
    title: str = ""  # title of the figure; default: the files' names


def main(settings: Settings) -> None:
    """Writes the figure."""
    from sepjax.pictures.figures import check_output, draw_pareto, read_points

    check_output(Path(settings.output))
    points, baseline = read_points(map(Path, settings.results))
    draw_pareto(Path(settings.output), points, baseline, settings.title or ", ".join(settings.results))
    print(f"{len(points)} arms, written to {settings.output}")
