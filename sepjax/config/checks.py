"""Mistakes that the user can mend, and the small checks that find most of them."""

import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

_LONGEST = 160  # characters of a value in a message


class UserError(Exception):
    """A mistake that the user can mend: entry points print the message alone, without a traceback."""

    exit_code = 2  # of the program (docs/reliability.md)
    label = "error"  # before the message


class ConfigError(UserError, ValueError):
    """A setting that cannot work: the message says which, what was given, what is expected and how to fix it."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a message of one line: its first line, or else its kind."""
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError for a value that is none of the choices, with the nearest of them."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}{nearest(value, choices)}")


def whole_number(name: str, value: Any, least: int = 0, most: int = 2**31 - 1, *, about: str = "") -> int:
    """The value as an int, of NumPy and JAX too. Raises ConfigError for another type, and outside least to most.

    `about`: what the least means, as in "0 (none)".
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r:.80} has the wrong type, expected a whole number")
    if found < least:
        raise ConfigError(f"{name}={found} must be {least}{about} or more")
    if found > most:
        raise ConfigError(f"{name}={found} must be at most {most}")
    return found


def number(name: str, value: Any) -> float:
    """The value as a float, of NumPy and JAX too. Raises ConfigError for another type."""
    try:
        if not isinstance(value, (bool, str, bytes)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{name}={value!r:.80} has the wrong type, expected a number")


def at_least(name: str, value: int | float, least: int) -> None:
    """Raises ConfigError for a value below `least`, for NaN, and for whole numbers beyond int32, as devices count."""
    if not value >= least:
        raise ConfigError(f"{name}={value} must be {least} or more")
    if isinstance(value, int) and value >= 2**31:
        raise ConfigError(f"{name}={value} is out of range: whole numbers end at 2^31 - 1 = {2**31 - 1}")


def at_most(name: str, value: int | float, most: int) -> None:
    """Raises ConfigError for a value above `most`, and for NaN."""
    if not value <= most:
        raise ConfigError(f"{name}={value} must be {most} or less")


def whole_numbers(flag: str, values: Sequence[str], *, least: int = 1) -> tuple[int, ...]:
    """The entries of a list flag as whole numbers of `least` or more; raises `ConfigError` for anything else."""
    if not all(value.isdecimal() and int(value) >= least for value in values):
        raise ConfigError(
            f"--{flag} takes whole numbers of {least} or more with commas between them, got {','.join(values)!r}"
        )
    return tuple(map(int, values))


NO_SETTING = types.MappingProxyType({"setting": False})  # metadata of a field that runs have at its default


def settings_of(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass, but those of `NO_SETTING`."""
    return [field for field in dataclasses.fields(cls) if field.metadata.get("setting", True)]


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`: raises ValueError for a name that an object has twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is there twice in one object")
    return values


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?" with the one of `names` that `name` resembles most, or nothing when none does."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_types(section: Any, path: str) -> None:
    """Raises ConfigError where a field of a dataclass, or of one in it, has another type than it says."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), path + field.name
        check_type(name, value, field.type)
        if dataclasses.is_dataclass(value):
            check_types(value, f"{name}.")


def check_type(name: str, value: object, kind: Any) -> None:
    """Raises ConfigError for a value of another type: an int is a float too, a bool is neither."""
    if not _is_a(value, kind):
        said = " ".join(repr(value).split())  # in one line, whatever it is
        said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
        raise ConfigError(f"{name}={said} has the wrong type, expected {type_name(kind)}")


def _is_a(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, typing.get_args(kind)[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def type_name(kind: Any) -> str:
    """What a type is called in messages: "int", "tuple[int, ...]", "str | None"."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_origin(kind) else str(kind)
