"""writes a run as a Hugging Face folder, or a pretrained model as a workdir

    sepjax convert --source=runs/tiny --target=exported [--dtype=bfloat16]
    sepjax convert --source=models/pythia-160m --target=runs/pythia
    sepjax convert --source=runs/lora --target=adapter --adapter_only        PEFT's files of a run with adapters
    sepjax convert --source=models/llama --adapter=adapter --target=runs/adapted

Bit for bit, unless --dtype asks for another type (`sepjax.hub.convert`). A run's adapters are merged into its model.
"""

import dataclasses
from pathlib import Path

from sepjax.command.settings import Settings as _Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """From where to where."""

    source: str  # a workdir, a Hugging Face folder, a GGUF file
    target: str  # folder to write, new or empty
    dtype: str | None = None  # dtype of the tensors in a Hugging Face folder; default: the source model's
    step: int | None = None  # checkpoint of a workdir; default: the newest
    adapter: str | None = None  # a PEFT adapter folder to merge into a pretrained model
    adapter_only: bool = False  # for a run with config.lora.rank: write only its adapters, in PEFT's format


def main(settings: Settings) -> None:
    """Converts."""
    from sepjax.hub.convert import convert

    options = {"dtype": settings.dtype, "step": settings.step, "adapter_only": settings.adapter_only}
    adapter = Path(settings.adapter) if settings.adapter else None
    print(convert(Path(settings.source), Path(settings.target), adapter=adapter, **options))
