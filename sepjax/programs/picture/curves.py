"""draws a metric of several runs over their steps

sepjax picture curves --workdirs=runs/a,runs/b --metric=train/loss --output=curves.png
"""

import dataclasses
from pathlib import Path

from sepjax.command.settings import Settings as _Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """Which runs."""

    workdirs: tuple[str, ...]  # folders of training runs
    metric: str = "train/loss"  # name of the metric in metrics.jsonl
    output: str = "curves.png"  # a .png, .svg or .pdf file


def main(settings: Settings) -> None:
    """Writes the figure."""
    from sepjax.pictures.figures import check_output, draw_curves, read_curves

    check_output(Path(settings.output))
    curves = read_curves(map(Path, settings.workdirs), settings.metric)
    draw_curves(Path(settings.output), curves, settings.metric)
    print(f"{len(curves)} runs, written to {settings.output}")
