"""writes a run as a Hugging Face folder, or a pretrained model as a workdir

    sepjax convert --source=runs/tiny --target=exported [--dtype=bfloat16]
    sepjax convert --source=models/pythia-160m --target=runs/pythia

Bit for bit, unless --dtype asks for another type (`sepjax.hub.convert`).
"""

import dataclasses
from pathlib import Path

from sepjax.command.settings import Settings as _Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """From where to where."""

    source: str  # a workdir, a Hugging Face folder, a GGUF file
    target: str  # folder to write, new or empty
    dtype: str | None = None  # of the tensors of a Hugging Face folder; default: the origin's
    step: int | None = None  # checkpoint of a workdir; default: the newest


def main(settings: Settings) -> None:
    """Converts."""
    from sepjax.hub.convert import convert

    print(convert(Path(settings.source), Path(settings.target), dtype=settings.dtype, step=settings.step))
