"""The command `python -m sepjax.bench.mesh`; see `sepjax.bench.mesh`."""

import dataclasses
from typing import Annotated

from sepjax.bench import mesh
from sepjax.bench.mesh import PARTS, Settings
from sepjax.bench.mesh.training import AXES
from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast, OneOf
from sepjax.command.settings import Settings as _Settings

_DEFAULT = Settings()
_TRAINING = _DEFAULT.training


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine(_Settings):
    """What is measured."""

    parts: Annotated[tuple[str, ...], OneOf(PARTS)] = PARTS[:-1]  # of the bench
    configs: tuple[str, ...] = _TRAINING.configs  # files in configs/, without .py
    axes: Annotated[tuple[str, ...], OneOf(AXES)] = _TRAINING.axes  # meshes, each of one axis over all devices
    length: Annotated[int, AtLeast(1)] = _TRAINING.length  # tokens of a row in training
    long_length: Annotated[int, AtLeast(1)] = _TRAINING.long_length  # the same on the mesh `context`
    tokens: Annotated[int, AtLeast(1)] = _TRAINING.tokens  # tokens of a device's micro-batch
    lengths: Annotated[tuple[int, ...], AtLeast(1)] = _DEFAULT.attention.lengths  # tokens of a row of attention
    longest: Annotated[tuple[int, ...], AtLeast(1)] = _TRAINING.longest  # tokens of a row in the part of that name
    seconds: Annotated[float, AtLeast(0)] = _TRAINING.seconds  # for the loops of a figure
    scan_layers: bool = _TRAINING.scan_layers  # compile one layer; --noscan_layers: as configs say
    json: str | None = None  # file for all figures and settings

    def settings(self) -> Settings:
        """The same, part by part."""
        names = ("configs", "axes", "length", "long_length", "longest", "tokens", "seconds", "scan_layers")
        training = dataclasses.replace(_TRAINING, **{name: getattr(self, name) for name in names})
        attention = dataclasses.replace(_DEFAULT.attention, lengths=self.lengths)
        return Settings(training, attention, dataclasses.replace(_DEFAULT.generation, config=self.configs[-1]))


def main(given: CommandLine) -> None:
    """Measures the parts that are asked for."""
    mesh.main(given.parts, given.settings(), given.json)


if __name__ == "__main__":
    run_settings(CommandLine, main, str(mesh.__doc__))
