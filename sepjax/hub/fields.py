"""The keys of a config.json, read with their types checked."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepjax.data.special_tokens import POINTER
from sepjax.hub.errors import HubError

_MOST = 100_000_000  # bytes of a JSON file; the index of a model of 600 GB has 10 million
_SHOWN = 200  # characters of a value in a message


class Fields:
    """The values of one config.json. A missing key has the default of transformers, a wrong one is named."""

    def __init__(self, path: Path | str, values: Mapping[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    @classmethod
    def read(cls, path: Path) -> "Fields":
        """Reads a JSON file.

        Raises:
          FileNotFoundError: it is not there.
          HubError: it is no JSON object, or no file of a size that one has.
        """
        try:
            values = json.loads(read_bytes(path, _MOST))
        except (ValueError, RecursionError) as error:
            raise HubError(f"{str(path)!r} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise HubError(f"{str(path)!r} holds a {type(values).__name__}, expected a JSON object")
        return cls(path, values)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of 1 or more."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value < 2**31:
            self.refuse(name, "expected a whole number of 1 or more, below 2^31")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e300:
            self.refuse(name, "expected a number above 0")
        return float(value)

    def head_dim(self, heads: str = "num_attention_heads", width: str = "hidden_size") -> int:
        """The size of heads that make up the width, where no key says it or it says the same."""
        parts, whole = self.integer(heads), self.integer(width)
        if whole % parts:
            self.refuse(width, f"not a multiple of {heads}={parts}")
        if self.values.get("head_dim") is not None and self.integer("head_dim") != whole // parts:
            self.refuse("head_dim", f"in this architecture it is {width} / {heads}, {whole // parts} here")
        return whole // parts

    def flag(self, name: str, default: bool) -> bool:
        """True or False."""
        value = self._value(name, default)
        if type(value) is not bool:
            self.refuse(name, "expected true or false")
        return value

    def choice(self, name: str, default: str, choices: Mapping[str, str]) -> str:
        """What stands for the value in `choices`."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, f"supported are {', '.join(map(repr, choices))}")
        return choices[value]

    def must_be(self, name: str, value: Any, why: str) -> None:
        """Refuses any value but the one that is supported; a missing key is that one."""
        if self.values.get(name, value) != value:
            self.refuse(name, why)

    def refuse(self, name: str, why: str) -> None:
        """Raises HubError about a key."""
        value = repr(self.values.get(name))
        value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
        raise HubError(f"{str(self.path)!r}: {self.prefix}{name}={value}: {why}")

    def section(self, name: str) -> "Fields":
        """The values of an object within this one; none where the key is missing."""
        return Fields(self.path, self.values.get(name) or {}, f"{self.prefix}{name}.")

    def alias(self, **names: str) -> "Fields":
        """The same values, where keys may have other names too (alias=key). Both with different values are refused."""
        values = dict(self.values)
        for name, key in names.items():
            if values.get(name) is not None and values.setdefault(key, values[name]) != values[name]:
                self.refuse(name, f"contradicts {key}={values[key]!r}; keep the right one")
        return Fields(self.path, values, self.prefix)

    def with_defaults(self, **values: Any) -> "Fields":
        """The same values, and these for keys that are missing."""
        return Fields(self.path, {**values, **self.values}, self.prefix)

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise HubError(f"{str(self.path)!r} lacks the key {self.prefix + name!r}; it is damaged or of another kind")
        return default if value is None else value


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content.

    Raises:
      FileNotFoundError: it is not there.
      HubError: it is a pipe, a device or a folder, which may never end, or has more than `most` bytes.
    """
    check_file(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise HubError(f"{str(path)!r} has {path.stat().st_size} bytes; at most {most} are read")
    return content


def check_file(path: Path) -> None:
    """Raises HubError for a path that is no ordinary file (reading a pipe or a device may never end), or a pointer."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise HubError(f"{str(path)!r} is not an ordinary file; put the file itself there")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise HubError(f"{str(path)!r} is a pointer of Git LFS, not the file itself: git lfs pull fetches that")
