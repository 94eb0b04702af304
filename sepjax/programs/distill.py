"""trains a gate for a frozen model, from the long-range attention of the dense model

    sepjax distill --config=configs/post_gated.py --workdir=runs/distilled --config.data.name=FOLDER_OF_TEXTS

The workdir holds the model of `training.init_from`, unchanged, and the gate. `sepjax evaluate` and `sepjax.load` read
it; to start a training run from it, use --config.training.init_from=runs/distilled.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.command.settings import Settings as _Settings
from sepjax.config import Config
from sepjax.keeping import Lesson


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is learned from, and how much."""

    config: Config  # a config file; --config.SECTION.FIELD=VALUE changes one of its settings
    workdir: str  # folder to write, new or empty
    rows: Annotated[int, AtLeast(1)] = Lesson.rows  # rows of the training split to learn from
    held_out: Annotated[int, AtLeast(1)] = Lesson.held_out  # rows of the evaluation split for the score
    steps: Annotated[int, AtLeast(1)] = Lesson.steps  # Adam steps for each of the three losses
    # initial rate of Adam; a cosine schedule takes it to 0
    learning_rate: Annotated[float, AtLeast(0)] = Lesson.learning_rate
    download: bool = False  # download --config.training.init_from from the Hugging Face hub


def main(settings: Settings) -> None:
    """Observes, learns, grades and writes."""
    from sepjax.keeping.distill import distill

    lesson = Lesson(settings.rows, settings.held_out, settings.steps, settings.learning_rate)
    distill(settings.config, Path(settings.workdir), lesson, download=settings.download)
