"""compiles a training step for devices you do not have here: memory, collectives and largest arrays

    sepjax plan --config=configs/llama3_8b.py --topology=v5p:8x8x16 [--largest=12]
    sepjax plan --config=configs/llama3_8b.py --topology=h100:8x8    8 hosts of 8 GPUs
    sepjax plan --config=configs/post_8b.py --topology=h100:1x8 --config.training.init_from=FOLDER

FOLDER needs only a config.json.

What to know before paying for a pod. Needs the package libtpu but no TPU, or JAX's CUDA plugin but no GPU.
"""

import dataclasses
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.command.settings import Settings as _Settings
from sepjax.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """Which step, for which devices."""

    config: Config  # a config file; --config.SECTION.FIELD=VALUE changes one of its settings
    topology: str  # devices: v5e:16x16, v5p:8x8x16, h100:8x8 (8 hosts of 8)
    largest: Annotated[int, AtLeast(0)] = 12  # number of largest arrays to list


def begin() -> None:
    """Lets the compilers run without their devices."""
    from sepjax.training.plan import compile_here

    compile_here()


def main(settings: Settings) -> None:
    """Prints the plan."""
    from sepjax.begin import planned
    from sepjax.training import plan

    plan.main(planned(settings.config), settings.topology, settings.largest)
