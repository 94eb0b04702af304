"""The keys of a config.json, read with their types checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepjax.config import RopeConfig
from sepjax.hub.errors import HubError


class Fields:
    """The values of one config.json. A missing key has the default of transformers, a wrong one is named."""

    def __init__(self, path: Path | str, values: Mapping[str, Any]):
        self.path, self.values = path, values

    @classmethod
    def read(cls, path: Path) -> "Fields":
        """Reads a JSON file.

        Raises:
          FileNotFoundError: it is not there.
          HubError: it is no JSON object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise HubError(f"{str(path)!r} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise HubError(f"{str(path)!r} holds a {type(values).__name__}, expected a JSON object")
        return cls(path, values)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of 1 or more."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value < 2**31:
            self.refuse(name, "expected a whole number of 1 or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self.refuse(name, "expected a number above 0")
        return float(value)

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
        raise HubError(f"{str(self.path)!r}: {name}={self.values.get(name)!r}: {why}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise HubError(f"{str(self.path)!r} lacks the key {name!r}; it is damaged or of another kind")
        return default if value is None else value

    def rope(
        self, *, base: str = "rope_theta", fraction: str = "partial_rotary_factor", share: float = 1.0
    ) -> RopeConfig:
        """The rotary embedding, in the form of transformers 5 ("rope_parameters") or the older one.

        Args:
          base: the older key of the base.
          fraction: the older key of the rotated share of a head.
          share: what that share is when no key says.
        """
        new, old = (self._section(name) for name in ("rope_parameters", "rope_scaling"))
        values = Fields(self.path, {base: self.values.get(base), fraction: self.values.get(fraction)} | old | new)
        kind = new.get("rope_type") or old.get("rope_type") or old.get("type") or "default"
        rope = RopeConfig(
            base=values.number("rope_theta" if "rope_theta" in new else base, 10_000.0),
            fraction=values.number("partial_rotary_factor" if "partial_rotary_factor" in new else fraction, share),
        )
        if kind == "default":
            return rope
        context = self.values.get("original_max_position_embeddings") or self.values.get("max_position_embeddings")
        return _scaled(rope, kind, values, context)

    def _section(self, name: str) -> dict[str, Any]:
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            self.refuse(name, "expected a JSON object")
        return value


def _scaled(rope: RopeConfig, kind: Any, values: Fields, context: int | None) -> RopeConfig:
    if kind not in ("linear", "llama3", "yarn"):
        raise HubError(f"{str(values.path)!r}: rope type {kind!r}; supported are default, linear, llama3 and yarn")
    rope.scaling, rope.factor = kind, values.number("factor")
    if kind != "linear":
        rope.original_context = values.integer("original_max_position_embeddings", context)
    if kind == "llama3":
        rope.low_frequency_factor = values.number("low_freq_factor")
        rope.high_frequency_factor = values.number("high_freq_factor")
    if kind == "yarn":
        rope.beta_fast, rope.beta_slow = values.number("beta_fast", 32.0), values.number("beta_slow", 1.0)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            values.must_be(name, None, "a temperature of YaRN's own is not supported")
    return rope


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config.json, which old and new versions of transformers read."""
    keys: dict[str, Any] = {"rope_theta": rope.base, "rope_scaling": None}
    if rope.scaling != "none":
        scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
        if rope.scaling != "linear":
            scaling["original_max_position_embeddings"] = rope.original_context
        if rope.scaling == "llama3":
            scaling |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
        if rope.scaling == "yarn":
            scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        keys["rope_scaling"] = scaling
    return keys
