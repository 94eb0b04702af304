"""Settings that several jobs share, and where their results go."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from sepjax.command.settings import AtLeast, Settings
from sepjax.config import ConfigError
from sepjax.files import check_file, write_text
from sepjax.programs.common import Loading, refuse_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Loading):
    """Which model, and where the result goes."""

    output: str = ""  # JSON file; default: evaluation.json, or that of the job, in --workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared(Job):
    """A job that scores several patterns side by side."""

    patterns: tuple[str, ...] | None = None  # attention patterns to compare; default: see the job
    arms: str = ""  # what to compare, freely, in place of --patterns: see sepjax/evaluation/arms.py

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patterns", "budgets"):
            if self.arms and getattr(self, name, None) is not None:
                raise ConfigError(f"--{name} does nothing beside --arms, which takes its place; leave one of them out")
        if getattr(self, "window_size", 0) and self.patterns and set(self.patterns) == {"dense"}:
            refuse_window("dense", ["window_size"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliced(Settings):
    """A job that tells the loss by how long ago a bigram stood in the text."""

    baseline: str = ""  # the arm that differences are from; default: the first
    # tokens of the slice of near repetitions; 0: the smallest window
    near: Annotated[int, AtLeast(0)] = 0
    # tokens beyond which a repetition is far; 0: the largest window, of streams the largest cache
    far: Annotated[int, AtLeast(0)] = 0

    @property
    def slices(self) -> dict[str, Any]:
        """These three, as the functions that score take them."""
        return {"baseline": self.baseline, "near": self.near, "far": self.far}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts(Settings):
    """What is scored: texts in windows."""

    # .txt files, or JSON lines that are texts ({"text": ...}): a file or a folder; or a TFDS dataset; default: the
    # run's corpus
    text: str = ""
    split: str = ""  # of that data, as TFDS names it; default: all of --text, or validation
    length: Annotated[int, AtLeast(0)] = 0  # tokens of a window; default: as in training
    window_size: Annotated[int, AtLeast(0)] = 0  # n of every layer; default: as in training
    batch_size: Annotated[int, AtLeast(1)] = 8  # windows of a forward pass
    max_documents: Annotated[int, AtLeast(0)] = 0  # score only the first so many; 0: all
    max_tokens: Annotated[int, AtLeast(0)] = 0  # score only the first so many of a document; 0: all
    bos: bool = True  # whether each document begins with BOS

    @property
    def texts(self) -> dict[str, Any]:
        """These settings, as `sepjax.evaluation.jobs.evaluate` takes them."""
        return {name: getattr(self, name) for name in Texts.__annotations__}


def output_of(settings: Job, name: str) -> Path:
    """Where the result goes; raises before hours of scoring where it cannot be written or would replace a table."""
    folder = settings.path if (settings.path / "checkpoints").is_dir() else Path()
    path = Path(settings.output or folder / f"{name}.json")
    if path.suffix in (".csv", ".png"):
        raise ConfigError(f"--output={path} is where the table or the picture goes; give a .json file")
    check_file(path)
    return path


def write(settings: Job, output: Path, scores: Sequence[Any]) -> None:
    """Writes the scores, and where they come from, as JSON."""
    from sepjax.evaluation.report import plain
    from sepjax.measure import provenance

    result = {"workdir": str(settings.path), "text": getattr(settings, "text", "")}
    result |= {"scores": [dataclasses.asdict(score) for score in scores]}
    write_text(output, json.dumps(plain(provenance() | result), indent=2, allow_nan=False) + "\n")
    print(f"written to {output}")


def print_slices(scores: Sequence[Any]) -> None:
    """The table of slices below that of perplexities."""
    from sepjax.evaluation.report import slice_table

    first = scores[0]
    print("\n" + slice_table([(s.arm, s.slices) for s in scores], first.near, first.far, first.baseline))
