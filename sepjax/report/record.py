"""What a workdir holds of a run, read without JAX and without the model: whatever is there, in part or whole."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sepjax.config import Config, UserError
from sepjax.pictures.figures import read_metrics, short_names

EVALUATIONS, SAMPLES = "evaluations", "samples"
_ABSENT = object()


class ReportError(UserError, ValueError):
    """A folder of which no report can be made."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A file of results of `sepjax evaluate`."""

    file: Path
    job: str
    text: str
    step: int | None
    settings: Mapping[str, Any]  # that were not as nobody changed them
    scores: tuple[Mapping[str, Any], ...]
    made: str  # where and when

    @property
    def of_what(self) -> str:
        """Equal for evaluations of the same thing, of whatever run and step, by whatever path its text was named."""
        text = "" if "text" in self.settings else self.text
        return json.dumps([self.job, text, dict(self.settings)], sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Texts that a run has written: `sepjax report --samples`."""

    step: int | None
    settings: Mapping[str, Any]
    texts: tuple[Mapping[str, str], ...]  # "prompt" and "text"


@dataclasses.dataclass(frozen=True)
class Record:
    """All that is known of a run."""

    name: str
    workdir: Path
    config: Mapping[str, Any]  # "data.batch_size" -> 8
    curves: Mapping[
        str, tuple[Sequence[int], Sequence[int | float | None]]
    ]  # metric -> steps and values; None: not finite
    times: Sequence[float]  # of the first and the last line of metrics, seconds since 1970
    meta: Mapping[str, Any]  # run_meta.json
    evaluations: Sequence[Evaluation]
    samples: Sequence[Samples]  # the newest step first

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Setting -> (its value, the default), where they differ."""
        plain = defaults()
        return {
            name: (value, plain.get(name, _ABSENT))
            for name, value in self.config.items()
            if plain.get(name, _ABSENT) != value
        }


def defaults() -> dict[str, Any]:
    """Every setting of a config where nobody says anything."""
    return flat(json.loads(json.dumps(dataclasses.asdict(Config()))))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"name": "x"}} -> {"data.name": "x"}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def read_records(workdirs: Sequence[Path]) -> list[Record]:
    """The records of these folders, named by the last parts of their paths.

    Raises:
      ReportError: a folder that no run has, or a file in it that is not what sepjax writes.
    """
    names = short_names([workdir.resolve() for workdir in workdirs])
    return [_record(workdir, names[workdir.resolve()]) for workdir in workdirs]


def _record(workdir: Path, name: str) -> Record:
    if not (workdir / "config.json").is_file():
        raise ReportError(f"{workdir} has no config.json; give the --workdir of a run of sepjax train")
    rows = read_metrics(workdir) if (workdir / "metrics.jsonl").is_file() else []
    meta = workdir / "run_meta.json"
    return Record(
        name=name,
        workdir=workdir,
        config=defaults() | flat(_object(workdir / "config.json")),  # an older version had not all that there is
        curves=_curves(rows),
        times=[x["time"] for x in (rows[0], rows[-1])] if rows and all("time" in x for x in rows) else (),
        meta=_object(meta) if meta.is_file() else {},
        evaluations=_evaluations(workdir),
        samples=_samples(workdir),
    )


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{file} is not JSON ({error}); bring back a copy, or move it away") from error
    if not isinstance(found, dict):
        raise ReportError(f"{file} is not a JSON object; bring back a copy, or move it away")
    return found


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[int | float | None]]]:
    """Each metric over the steps at which it was told; a step's newest value counts."""
    found: dict[str, dict[int, int | float | None]] = {}
    for row in rows:
        for name in row.keys() - {"step", "time"}:
            if (value := row[name]) is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                known = value is not None and math.isfinite(value)
                found.setdefault(name, {})[int(row["step"])] = value if known else None
    return {name: (sorted(x), [x[step] for step in sorted(x)]) for name, x in found.items()}


def _evaluations(workdir: Path) -> list[Evaluation]:
    """Those of evaluations/, and what --output has put beside it: any JSON file with scores. Others are the user's."""
    found = []
    for file in [*sorted((workdir / EVALUATIONS).glob("*.json")), *sorted(workdir.glob("*.json"))]:
        try:
            data = _object(file)
        except ReportError:
            if file.parent == workdir:
                continue
            raise
        scores = data.get("scores")
        if not isinstance(scores, list) or not all(isinstance(x, dict) for x in scores) or not scores:
            continue
        source = [str(data[name]) for name in ("device", "date") if data.get(name)]
        commit = [f"commit {data['commit'][:9]}"] if data.get("commit") else []
        found.append(
            Evaluation(
                file=file,
                job=str(data.get("job", file.stem)),
                text=str(data.get("text", "")),
                step=data.get("step"),
                settings=data.get("settings") or {},
                scores=tuple(scores),
                made=", ".join([*source[:1], *commit, *source[1:]]),
            )
        )
    return found


def _samples(workdir: Path) -> list[Samples]:
    found = [_object(file) for file in sorted((workdir / SAMPLES).glob("step*.json"))]
    found.sort(key=lambda data: -int(data.get("step") or 0))
    return [Samples(data.get("step"), data.get("settings", {}), tuple(data.get("samples", ()))) for data in found]
