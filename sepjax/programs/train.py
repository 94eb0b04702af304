"""trains a model, or resumes a run from its newest checkpoint

    sepjax train --config=sep_tiny --workdir=runs/tiny [--config.training.steps=100 ...]

The same as `python train.py` in a checkout; --config takes a file, or the name of a config that comes with sepjax.
"""

import dataclasses
from typing import Annotated

from sepjax.command.settings import AtLeast, OneOf
from sepjax.command.settings import Settings as _Settings
from sepjax.config import Config, ConfigError, checkout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is trained, where."""

    config: Config  # a config file; --config.SECTION.FIELD=VALUE changes one of its settings
    workdir: str  # folder of the run; created if missing, resumed if it has a checkpoint
    new_data: bool = False  # resume with other data, from their beginning
    download: bool = False  # download --config.training.init_from from the Hugging Face hub
    step_timeout: Annotated[float, AtLeast(0)] = 1800.0  # seconds after which a step that hangs ends the run; 0: never
    # also send metrics there; needs the extra of the same name
    log_to: Annotated[tuple[str, ...], OneOf(("wandb", "trackio"))] = ()
    profile_steps: str = ""  # FIRST:LAST, steps to profile for xprof and Perfetto, into <workdir>/profile

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.download and not self.config.training.init_from:
            raise ConfigError(
                "--download does nothing without --config.training.init_from=OWNER/NAME; add that, or leave it out"
            )


def begin() -> None:
    """Joins the other processes of a cluster."""
    from sepjax.sharding import join_cluster

    join_cluster()


def main(settings: Settings) -> None:
    """Trains."""
    checkout.program("train").main(settings)
