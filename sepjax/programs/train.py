"""trains a model, or goes on from the newest checkpoint of a run

    sepjax train --config=sep_tiny --workdir=runs/tiny [--config.training.steps=100 ...]

The same as `python train.py` in a checkout; --config takes a file, or the name of a config that comes with sepjax.
"""

import dataclasses
from typing import Annotated

from sepjax.command.settings import AtLeast, OneOf
from sepjax.command.settings import Settings as _Settings
from sepjax.config import Config, checkout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is trained, where."""

    config: Config  # a config file; --config.SECTION.FIELD=VALUE changes one of its settings
    workdir: str  # folder of the run: made if missing, resumed if not
    new_data: bool = False  # go on with another data section, from its beginning
    download: bool = False  # fetch --config.training.init_from from the Hugging Face hub
    step_timeout: Annotated[float, AtLeast(0)] = 1800.0  # seconds after which a step that hangs ends the run; 0: never
    # also give the metrics to these; needs the extra of the same name
    log_to: Annotated[tuple[str, ...], OneOf(("wandb", "trackio"))] = ()
    profile_steps: str = ""  # FIRST:LAST, steps to record for xprof and Perfetto, in <workdir>/profile


def begin() -> None:
    """Joins the other processes of a cluster."""
    from sepjax.sharding import join_cluster

    join_cluster()


def main(settings: Settings) -> None:
    """Trains."""
    checkout.program("train").main(settings)
