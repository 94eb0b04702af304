"""Settings that several jobs share, and where their results go."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from sepjax.command.settings import AtLeast, Settings
from sepjax.config import ConfigError, UserError
from sepjax.data.corpora.files import root_of
from sepjax.files import check_file, write_text
from sepjax.programs.common import Loading, refuse_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Loading):
    """Which model, and where the result goes."""

    # JSON file to write; default: evaluations/ in --workdir or the current folder, named by what is scored
    output: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared(Job):
    """A job that scores several patterns side by side."""

    patterns: tuple[str, ...] | None = None  # attention patterns to compare; default: see above
    arms: str = ""  # settings to compare, in place of --patterns; for the syntax see docs/evaluation.md

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

    baseline: str = ""  # arm to take differences from; default: the first
    # slice near: targets seen at most this many tokens ago; 0: the smallest window
    near: Annotated[int, AtLeast(0)] = 0
    # slice far: targets last seen more than this many tokens ago; 0: the largest window, in streams the largest cache
    far: Annotated[int, AtLeast(0)] = 0

    @property
    def slices(self) -> dict[str, Any]:
        """These three, as the functions that score take them."""
        return {"baseline": self.baseline, "near": self.near, "far": self.far}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts(Settings):
    """What is scored: texts in windows."""

    # .txt files or JSON lines ({"text": ...}), as a file or a folder; a dataset as for data.name (of TFDS, hf://...);
    # or a mixture of these; default: the run's corpus
    text: str = ""
    text_key: str = ""  # field of --text's records that holds the text; default: the run's data.text_key, or text
    split: str = ""  # split of the data, in TFDS's syntax; default: all of --text, or validation
    length: Annotated[int, AtLeast(0)] = 0  # tokens per window; default: as in training
    window_size: Annotated[int, AtLeast(0)] = 0  # n, the local window of every layer; default: as in training
    batch_size: Annotated[int, AtLeast(1)] = 8  # windows per forward pass
    max_documents: Annotated[int, AtLeast(0)] = 0  # maximum documents to score; 0: all
    max_tokens: Annotated[int, AtLeast(0)] = 0  # maximum tokens to score of each document; 0: all
    bos: bool = True  # begin each document with BOS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_key and not self.text:
            raise ConfigError("--text_key does nothing for the run's own corpus; add --text, or leave it out")

    @property
    def texts(self) -> dict[str, Any]:
        """These settings, as `sepjax.evaluation.jobs.evaluate` takes them."""
        return {name: getattr(self, name) for name in Texts.__annotations__}


# Where the model is, which has a place of its own in the name, and what changes how fast a score comes, not the score.
_NO_PART_OF_IT = {"workdir", "model", "step", "download", "output", "quiet"}
_NO_PART_OF_IT |= {"batch_size", "batch_tokens", "rows", "chunk"}
_FOLDER = "evaluations"


def begin[S: Job](settings: S, job: str) -> tuple[S, Path]:
    """The settings with the checkpoint that is scored and the arms that files name, and where the result goes.

    Raises before hours of scoring where it cannot be written or would replace a table.
    """
    if isinstance(settings, Compared) and settings.arms:
        from sepjax.evaluation.arms import check_words, spelled_out

        check_words(settings.arms, fixed=job != "windows")
        settings = dataclasses.replace(settings, arms=spelled_out(settings.arms))
    settings = dataclasses.replace(settings, step=_step(settings))
    path = Path(settings.output or _named_by_what_is_scored(settings, job))
    if path.suffix in (".csv", ".png"):
        raise ConfigError(f"--output={path} is where the table or the picture goes; give a .json file")
    is_made_later = not settings.output and not path.parent.exists()
    check_file(path.parent if is_made_later else path)
    return settings, path


def _named_by_what_is_scored(settings: Job, job: str) -> Path:
    """evaluations/JOB_MODEL_TEXT_STEP_DIGEST.json: another job, text, model, step or setting has another name."""
    said, is_run = _what(settings), _is_run(settings)
    text = Path(said.get("text", "")).stem or said.get("split", "") or "-".join(said.get("task", ())) or "corpus"
    place = "" if is_run else _whole(str(settings.path))
    digest = hashlib.sha256(json.dumps([job, said, place]).encode()).hexdigest()[:6]
    model = root_of(settings.path).name.removesuffix(".gguf")
    parts = [job, text, f"step{settings.step}"] if is_run else [job, model, text]
    name = "_".join(re.sub(r"[^\w.]+", "-", part)[:40].strip("-") for part in [*parts, digest])
    return (settings.path if is_run else Path()) / _FOLDER / f"{name}.json"


def _what(settings: Job) -> dict[str, Any]:
    """The settings that say what is scored, without those that are as nobody changed them."""
    fields = [field for field in dataclasses.fields(settings) if field.name not in _NO_PART_OF_IT]
    said = {field.name: getattr(settings, field.name) for field in fields}
    changed = {field.name: said[field.name] for field in fields if said[field.name] != field.default}
    return changed | ({"text": _whole(changed["text"])} if "text" in changed else {})


def _whole(path: str) -> str:
    """The same file however it was written; what is not a file here is a name."""
    return str(root_of(path)) if Path(path).exists() else path


def _is_run(settings: Job) -> bool:
    return (settings.path / "checkpoints").is_dir()


def _step(settings: Job) -> int | None:
    """The checkpoint that is scored, also when another is written meanwhile. A pretrained model has none."""
    if not _is_run(settings):
        return settings.step
    from sepjax.run.checkpoint import step_folder

    return int(step_folder(settings.path, settings.step).name)


_NO_PERPLEXITY = 1e300  # of losses that are infinite; nan is below nothing


def write(settings: Job, output: Path, job: str, scores: Sequence[Any]) -> None:
    """Writes the scores, what they are of and where they come from, as JSON."""
    from sepjax.evaluation.report import plain
    from sepjax.measure import provenance

    result = {"job": job, "workdir": str(settings.path), "step": settings.step}
    result |= {"text": getattr(settings, "text", ""), "settings": _what(settings)}
    result |= {"scores": [dataclasses.asdict(score) for score in scores]}
    output.parent.mkdir(exist_ok=True)
    write_text(output, json.dumps(plain(provenance() | result), indent=2, allow_nan=False) + "\n")
    print(f"written to {output}")


def check_numbers(scores: Sequence[Any]) -> None:
    """Once all is written: raises UserError with the arms whose perplexity is none (nan in the table, null in JSON)."""
    lost = [
        getattr(score, "arm", "") or score.pattern
        for score in scores
        if score.perplexity is not None and not score.perplexity < _NO_PERPLEXITY
    ]
    if lost:
        raise UserError(
            f"{', '.join(lost)}: the model's scores are not numbers (nan) or without bounds; its weights are damaged, "
            "or --dtype has too small a range for it (float32 and bfloat16 have the same)"
        )


def print_slices(scores: Sequence[Any]) -> None:
    """The table of slices below that of perplexities."""
    from sepjax.evaluation.report import slice_table

    first = scores[0]
    print("\n" + slice_table([(s.arm, s.slices) for s in scores], first.near, first.far, first.baseline))
