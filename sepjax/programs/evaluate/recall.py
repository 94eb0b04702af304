"""asks a model trained on data.name="recall" for facts from beyond its window

    sepjax evaluate recall --workdir=runs/recall [--arms="dense; sink_window n=8; separator n=8"]

Without --patterns and --arms: the run's own pattern.
"""

import dataclasses
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.programs.evaluate import common

_JOB = "recall"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Compared):
    """Under which patterns."""

    batch_size: Annotated[int, AtLeast(1)] = 8  # windows per forward pass


def main(settings: Settings) -> None:
    """Prints the table and writes the JSON."""
    settings, output = common.begin(settings, _JOB)
    from sepjax.evaluation import recall

    given = {"arms": settings.arms, "batch_size": settings.batch_size} | settings.loading
    cells = recall.score_run(settings.path, settings.patterns or (), **given)
    print(recall.table(cells))
    common.write(settings, output, _JOB, cells)
