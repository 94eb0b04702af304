"""What `sepjax generate --prompts` writes: JSON Lines, an answer each, in the order of the prompts.

    answers.jsonl            whole or not at all
    answers.jsonl.partial    until then: what was asked for, and the answers of each batch that has ended, with numbers

A second start with the same prompts and settings answers what is missing; one with others is refused by name.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sepjax.config import ConfigError
from sepjax.console import say
from sepjax.files import WriteError, check_file, lock, replacing

_OTHERS = {"prompts": "other prompts", "model": "a model of other weights"}  # what is told by a digest


class Answers:
    """The answers so far. Without a file they are kept here alone.

    Attributes:
      found: objects for JSON, by the numbers of their prompts.
    """

    def __init__(self, ids: Sequence[str | int | None], file: IO[bytes] | None = None):
        """`ids`: names of the prompts, if they have any. `file`: what answers are added to."""
        self.found: dict[int, dict[str, Any]] = {}
        self._ids, self._file = ids, file

    def add(self, new: Mapping[int, dict[str, Any]]) -> None:
        """Takes the answers of a batch; where there is a file, they are on the disk when this returns."""
        self.found |= new
        if self._file is not None:
            self._file.write(b"".join(_encode({"number": number} | answer) for number, answer in new.items()))
            self._file.flush()
            os.fsync(self._file.fileno())

    def lines(self) -> Iterator[bytes]:
        """All of them, in the order of the prompts."""
        for number, name in enumerate(self._ids):
            yield _encode(({} if name is None else {"id": name}) | self.found[number])


def check_output(path: str) -> None:
    """Raises ConfigError or WriteError where answers cannot be written to a file, or it is there already."""
    output = Path(path)
    if output.exists() and not stat.S_ISREG(output.stat().st_mode) and not output.is_dir():
        raise ConfigError(f"--output={path} is no regular file; leave it out to have the answers on stdout")
    check_file(output)
    if output.exists() and not _partial_of(path).exists():
        raise ConfigError(f"--output={path} is there already; choose another, or remove it to have it made anew")


@contextlib.contextmanager
def answers_at(path: str, asked: Mapping[str, Any], ids: Sequence[str | int | None]) -> Iterator[Answers]:
    """The answers of a file that is begun, or gone on with; at the end of the block it is whole.

    Args:
      path: of the file.
      asked: what would give other answers, by names of settings; plain JSON.
      ids: see `Answers`.

    Raises:
      ConfigError: what is there was begun with other prompts or settings, or the file is there.
      WriteError: it cannot be written, or another process writes it.
    """
    partial = _partial_of(path)
    with contextlib.closing(_opened(partial)) as file:
        lock(file.fileno(), Path(path))
        answers = Answers(ids, file)
        answers.found |= _begun(file, partial, json.loads(json.dumps(asked)), len(ids))
        if Path(path).exists() and len(answers.found) < len(ids):
            raise ConfigError(f"--output={path} is there, and {str(partial)!r} is not whole; remove one of them")
        try:
            yield answers
        except BaseException:
            if answers.found:
                counts = f"{len(answers.found):,} of {len(ids):,} answers"
                say(f"{counts} are kept in {str(partial)!r}; the same command goes on from there")
            else:
                partial.unlink()
            raise
        with replacing(path) as place, place.open("wb") as output:
            output.writelines(answers.lines())
        partial.unlink()


def _partial_of(path: str) -> Path:
    return Path(path).with_name(f"{Path(path).name}.partial")


def _opened(partial: Path) -> IO[bytes]:
    try:
        return os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise WriteError(partial, error.strerror or str(error)) from error


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _begun(file: IO[bytes], partial: Path, asked: dict[str, Any], total: int) -> dict[int, dict[str, Any]]:
    """The answers in a file, which is cut where a kill tore it. One without answers is begun anew."""
    before, whole = _object(file.readline()), file.tell()
    found: dict[int, dict[str, Any]] = {}
    for line in file:
        answer = _object(line)
        number = answer.pop("number", None)
        if type(number) is not int:
            break
        found[number] = answer
        whole += len(line)
    if found:
        _compare(before, asked, partial)
    else:
        whole = 0
    file.seek(whole)
    file.truncate()
    if not found:
        file.write(_encode(asked))
    return {number: answer for number, answer in found.items() if 0 <= number < total}


def _object(line: bytes) -> dict[str, Any]:
    """Of a whole line; empty where it is none."""
    with contextlib.suppress(ValueError):
        if line.endswith(b"\n") and isinstance(found := json.loads(line), dict):
            return found
    return {}


def _compare(before: Mapping[str, Any], asked: Mapping[str, Any], partial: Path) -> None:
    """Raises ConfigError where answers that are there were asked for otherwise."""
    for name in dict.fromkeys([*asked, *before]):
        if before.get(name) != asked.get(name):
            was = _OTHERS.get(name) or f"{name}={before.get(name)!r}, now {asked.get(name)!r}"
            raise ConfigError(
                f"{str(partial)!r} was begun with {was}: give the same, choose another --output, or remove it to begin "
                "anew"
            )
