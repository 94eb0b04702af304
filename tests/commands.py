"""The command `sepjax` within the test's own process: what it prints, and how it ends."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sepjax import programs
from sepjax.command.settings import AtMost, Flag, OneOf, Settings, flags_of
from sepjax.config import Config


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


def command(capfd: pytest.CaptureFixture[str], *words: str) -> Ended:
    """Runs `sepjax WORDS`."""
    capfd.readouterr()
    code = 0
    try:
        programs.run_here(words)
    except SystemExit as end:
        code = int(end.code or 0)
    return Ended(code, *capfd.readouterr())


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that `sepjax WORDS` ends with."""
    ended = command(capfd, *words)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    return line


class Called(Exception):
    """In place of scores."""


def own_flags(settings: type) -> list[Flag]:
    """What a program itself does something with: not the flags of all programs."""
    return [flag for flag in flags_of(settings) if flag not in flags_of(Settings)]


def unlike(flag: Any, number: int) -> Any:
    """A value that is nobody else's."""
    if flag.mark(OneOf):
        found = next(choice for choice in reversed(flag.mark(OneOf).choices) if choice != flag.default)
        return (found,) if flag.kind == tuple[str, ...] else found
    if flag.kind is bool:
        return not flag.default
    if flag.kind in (int, float):
        return flag.kind(1000 + number)
    if flag.kind is Config:
        return Config()
    most = flag.mark(AtMost)
    if flag.kind == tuple[int, ...] and most is not None:
        return (most.most - number,)
    return {tuple[int, ...]: (2000 + number,), tuple[str, ...]: (f"name{number}",)}.get(flag.kind, f"text{number}")


def leaves(value: Any) -> list[Any]:
    """All values within dictionaries and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Config):
        value = dataclasses.astuple(value)
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [value, *(leaf for item in value for leaf in leaves(item))]
    return [str(value) if isinstance(value, Path) else value]
