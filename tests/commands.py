"""The command `sepjax` within the test's own process: what it prints, and how it ends."""

import dataclasses

import pytest

from sepjax import programs


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
