"""Datasets of lm-eval's tasks from local files, in place of the hub's.

    FOLDER/gsm8k/test.jsonl            a folder a dataset, a file a split; `mmlu_test.jsonl` is `test` too
    FOLDER/mmlu/mmlu_dev.jsonl         rows of several configurations have the key "subject"

A folder serves a dataset if the last part of its hub name, or the name of its configuration, is the folder's name or
begins with it and "_": openai/gsm8k, cais/mmlu, EleutherAI/lambada_openai (lambada), allenai/ai2_arc ARC-Easy
(arc_easy). Rows are those of the hub; the short form {"query", "choices", "gold"} or {"context_options",
"continuation", "gold"} is spelt out for ARC, PIQA and WinoGrande.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from sepjax.config import UserError

type Row = dict[str, Any]


class TaskDataError(UserError, ValueError):
    """A local dataset that is not there or not readable."""


@contextlib.contextmanager
def local_datasets(folder: Path | None) -> Iterator[None]:
    """Inside, `datasets.load_dataset` reads from `folder` and nothing comes from the network; None: changes nothing.

    Raises:
      TaskDataError: there is no such folder; inside, a dataset or split that is not there, or a damaged file.
    """
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise TaskDataError(f"no folder {str(folder)!r} with a task's datasets")
    original = datasets.load_dataset
    read = functools.cache(_rows)  # MMLU asks for one file 57 times

    def load_dataset(path: str, name: str | None = None, **_: Any) -> "_Splits":
        return _splits(_home(folder, path, name), path, name, read)

    datasets.load_dataset = load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        datasets.load_dataset = original


class _Splits(dict):
    """Split -> dataset. One that is not there has no rows; asked for a row, it says so."""

    def __init__(self, home: Path, splits: dict[str, Any]):
        super().__init__(splits)
        self._home = home

    def __missing__(self, split: str) -> Any:
        return _Missing(self._home, split)


class _Missing(list):
    def __init__(self, home: Path, split: str):
        super().__init__()
        self._home, self._split = home, split

    @property
    def features(self) -> dict[str, Any]:
        return {}

    def __getitem__(self, index: Any) -> Any:
        there = ", ".join(sorted(path.name for path in self._home.glob("*.jsonl")))
        raise TaskDataError(f"{str(self._home)!r} has no split {self._split!r}, only {there}")


def _splits(home: Path, path: str, name: str | None, read: Callable[[Path], list[Row]]) -> _Splits:
    splits = {}
    for file in sorted(home.glob("*.jsonl")):
        rows = read(file)
        if name and name != "all" and rows and "subject" in rows[0]:
            rows = [row for row in rows if row["subject"] == name]
        if rows:
            spelt = [_spelt_out(file, row) for row in rows]
            splits[file.stem.rpartition("_")[2]] = datasets.Dataset.from_list(spelt)
    if not splits:
        raise TaskDataError(f"{str(home)!r} has no rows of {path} {name or ''}".rstrip())
    return _Splits(home, splits)


def _home(folder: Path, path: str, name: str | None) -> Path:
    names = [part.lower().replace("-", "_") for part in (path.rpartition("/")[2], name or "") if part]
    homes = sorted(home for home in folder.iterdir() if home.is_dir())
    for home in homes:
        if any(candidate == home.name or candidate.startswith(f"{home.name}_") for candidate in names):
            return home
    there = ", ".join(home.name for home in homes) or "nothing"
    raise TaskDataError(
        f"{str(folder)!r} has no folder for the dataset {path} {name or ''}".rstrip() + f"; it has {there}"
    )


def _rows(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskDataError(f"{str(file)!r}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TaskDataError(f"{str(file)!r}, line {number}, is a {type(row).__name__}, expected an object")
        rows.append(row)
    return rows


def _spelt_out(file: Path, row: Row) -> Row:
    """A row as the hub has it."""
    kind, keys = file.parent.name, set(row)
    try:
        if kind.startswith(("arc", "ai2_arc")) and keys >= {"query", "choices", "gold"}:
            labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
            choices = {"text": row["choices"], "label": labels}
            return {"question": _question(row), "choices": choices, "answerKey": labels[row["gold"]]}
        if kind.startswith("piqa") and keys >= {"query", "choices", "gold"}:
            first, second = row["choices"]
            return {"goal": _question(row), "sol1": first, "sol2": second, "label": row["gold"]}
        if kind.startswith("winogrande") and keys >= {"context_options", "continuation", "gold"}:
            first, second = row["context_options"]
            return _winogrande(first, second, row["continuation"], row["gold"])
    except (IndexError, TypeError, ValueError, KeyError) as error:
        raise TaskDataError(f"{str(file)!r} has a row that is not in its short form: {str(row)[:80]}") from error
    return row


def _question(row: Row) -> str:
    return row["query"].removeprefix("Question: ")


def _winogrande(first: str, second: str, continuation: str, gold: int) -> Row:
    """The sentence with "_" in place of what differs: it begins with a word and reaches to the end."""
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    common = first[: first.rfind(" ", 0, same) + 1]
    options = {"option1": first[len(common) :], "option2": second[len(common) :]}
    return {"sentence": f"{common}_ {continuation}", **options, "answer": str(gold + 1)}
