"""The patterns that are compared, as a user writes them: `--arms`.

    dense; sink_window n=657; rare: separator n=256 ids=@rare.npy; sink_window n=kv:rare; separator windows=64*29,4096

Arms stand between semicolons or on lines of their own. Each is a pattern and what it changes in the model's own
settings, field=value: any field of `AttentionConfig`, or a short name (`SHORT`). Lists of numbers have commas, `64*29`
is 64 twenty-nine times, and `@FILE` reads them (`sepjax.separators.read_ids`). `NAME:` in front gives an arm a name;
without one its text is its name. Further words:

    n=kv:NAME      the window that keeps as many keys as the arm NAME, further to the front, did
    n=pairs:NAME   the window with as many (query, key) pairs
    model=PATH     other parameters, for example those that were trained with this pattern

In place of an arm `@FILE` has those of a file, a path or the name of one of configs/*.arm. The only arm of a file that
gives it no name has the file's.
"""

import dataclasses
import itertools
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sepjax.config import (
    BOUNDED_PATTERNS,
    AttentionConfig,
    ConfigError,
    nearest,
    under,
    validate_attention,
)
from sepjax.config.checkout import root
from sepjax.separators import read_ids

SHORT = {
    "a": "num_sinks",
    "c": "cache_size",
    "cache": "cache_dtype",
    "every": "interval",
    "ids": "separator_ids",
    "n": "window_size",
    "s": "max_separators",
    "w": "window_size",
    "windows": "layer_windows",
}
_TOLD_BY_THE_TEXT = ("separator", "sink_window", "fixed_interval")
_EQUAL = re.compile(r"(kv|pairs):(.+)")
_TIMES = re.compile(r"(\d+)(?:\*(\d+))?")
_NAMED = re.compile(r"([^\s=]+):\s+")
# What only caches read: where nothing is cached, an arm that changes it is refused.
_OF_CACHES = (
    "cache_size", "cache_dtype", "max_separators", "stream_positions", "keep_all_separators", "watch_layers",
    "kept_set", "watch_after", "separators_first",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One pattern to be compared."""

    name: str
    attention: AttentionConfig
    model: str = ""  # where other parameters are; "": those of the model that is evaluated
    equal: tuple[str, str] = ("", "")  # "kv" or "pairs", and the arm before whose number the window is to match


def plain_arms(attentions: Sequence[AttentionConfig]) -> list[Arm]:
    """Arms that have their pattern's name, numbered where several share it."""
    names = [x.pattern for x in attentions]
    numbers = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    return [
        Arm(name if names.count(name) == 1 else f"{name} {number}", x)
        for name, number, x in zip(names, numbers, attentions, strict=True)
    ]


def parse_arms(text: str, base: AttentionConfig, num_layers: int, *, cached: bool = False) -> list[Arm]:
    """Reads `--arms`.

    Args:
      text: see above.
      base: the settings that arms change.
      num_layers: of the model.
      cached: whether text goes through bounded caches; windows have none, and an arm that changes one is refused.

    Raises:
      ConfigError: names the arm and what is wrong with it, or a file that cannot be read.
    """

    def read(part: str, before: Sequence[str]) -> Arm:
        told = _told(part, before)
        attention = validate_attention(under(base, told.pattern, **told.changes), num_layers)
        if not cached:
            _refuse_caches(attention, base)
        return Arm(told.name, attention, told.model, told.equal)

    return _one_by_one(text, read)


def _one_by_one[A: (Arm, _Told)](text: str, read: Callable[[str, Sequence[str]], A]) -> list[A]:
    """What `read` makes of each arm's words and the names before it; errors get the arm they are about."""
    found: list[A] = []
    for part in _parts(spelled_out(text)):
        try:
            found.append(read(part, [each.name for each in found]))
        except (ConfigError, OSError) as error:
            raise ConfigError(f"arm {len(found) + 1}, {part!r}: {error}") from error
    if not found:
        raise ConfigError('--arms has no arm; expected for example --arms="dense; sink_window n=657"')
    return found


def spelled_out(text: str) -> str:
    """Arms with those of files in the place of `@FILE`: what is scored, whatever becomes of the files.

    Raises ConfigError for a file that cannot be read.
    """
    parts = _parts(text)
    found = list(itertools.chain.from_iterable(map(_of_file, parts)))
    return text if found == parts else "; ".join(found)


def _parts(text: str) -> list[str]:
    return list(filter(None, (" ".join(part.split()) for part in re.split(r"[;\n]", text))))


def _of_file(part: str) -> list[str]:
    """The arms of the file behind an @; of anything else itself."""
    named = _NAMED.match(part)
    name, rest = (named[1], part[named.end() :]) if named else ("", part)
    if not rest.startswith("@"):
        return [part]
    ours = {file.stem: file for file in (root() / "configs").glob("*.arm")}
    file = ours.get(rest[1:], Path(rest[1:]))
    try:
        parts = _parts(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"{error.strerror}{nearest(rest[1:], ours) or f'; sepjax has {", ".join(sorted(ours))}'}"
        raise ConfigError(f"arm {part!r}: cannot read {str(file)!r}: {reason}") from error
    except ValueError as error:
        raise ConfigError(f"arm {part!r}: {str(file)!r} is not a text ({error}); expected arms, a line each") from error
    if not parts:
        raise ConfigError(f"arm {part!r}: {str(file)!r} has no arm; expected some, a line each")
    if name and len(parts) != 1:
        raise ConfigError(f"arm {part!r}: {file} has {len(parts)} arms, which cannot all have one name; leave it out")
    if len(parts) != 1 or (_NAMED.match(parts[0]) and not name):
        return parts
    return [f"{name or re.sub('[ =]', '-', file.stem)}: {_NAMED.sub('', parts[0], count=1)}"]


def _refuse_caches(attention: AttentionConfig, base: AttentionConfig) -> None:
    for field in _OF_CACHES:
        if (value := getattr(attention, field)) != getattr(base, field):
            word = next((short for short, name in SHORT.items() if name == field), field)
            raise ConfigError(f"{word}={value} is for bounded caches, and nothing is cached here; leave it out")


def fixed_arms(text: str, base: AttentionConfig, num_layers: int, *, cached: bool = False) -> list[Arm]:
    """`parse_arms` where arms have one model and windows of their own; raises `ConfigError` for other ones."""
    return _without_windows_of_text(parse_arms(text, base, num_layers, cached=cached))


def check_words(text: str, *, fixed: bool = True) -> int:
    """How many arms there are; raises `ConfigError` for words that are wrong whatever the model is.

    Those of `fixed_arms`, or, not `fixed`, of `parse_arms`: for programs that load a model, which takes minutes.
    """

    def read(part: str, before: Sequence[str]) -> _Told:
        told = _told(part, before)
        if told.pattern not in (known := sorted(BOUNDED_PATTERNS)):
            hint = nearest(told.pattern, known) or f"; expected one of {', '.join(known)}"
            raise ConfigError(f"unknown pattern {told.pattern!r}{hint}")
        return told

    told = _one_by_one(text, read)
    return len(_without_windows_of_text(told) if fixed else told)


def _without_windows_of_text[A: (Arm, _Told)](arms: list[A]) -> list[A]:
    for arm in arms:
        if arm.model or arm.equal[0]:
            word = f"model={arm.model}" if arm.model else f"n={arm.equal[0]}:{arm.equal[1]}"
            raise ConfigError(f"arm {arm.name!r}: {word} is for windows of text; write the number, or leave it out")
    return arms


@dataclasses.dataclass(frozen=True)
class _Told:
    """What an arm's words say."""

    name: str
    pattern: str
    changes: dict[str, Any]
    model: str
    equal: tuple[str, str]


def _told(text: str, before: Sequence[str]) -> _Told:
    named = _NAMED.match(text)
    name, words = (named[1], text[named.end() :].split()) if named else (text, text.split())
    if name in before:
        raise ConfigError(f"there is another arm {name!r}; give one of them a name of its own, like other: {text}")
    if not words or "=" in words[0]:
        raise ConfigError("expected a pattern first, like separator, and then field=value")
    changes: dict[str, Any] = {}
    model, equal = "", ("", "")
    for word in words[1:]:
        key, sign, value = word.partition("=")
        if not sign:
            raise ConfigError(f"{word!r} is not field=value")
        match = _EQUAL.fullmatch(value) if key in ("n", "w", "window_size") else None
        if match:
            equal = match[1], _earlier(match[2], before)
        elif key == "model":
            model = value
        else:
            changes |= _change(key, value)
    if equal[0] and words[0] not in _TOLD_BY_THE_TEXT:
        raise ConfigError(
            f"n={equal[0]}:{equal[1]} needs a pattern whose kept tokens follow from the text "
            f"({', '.join(_TOLD_BY_THE_TEXT)}), and {words[0]!r} lets the model choose or keeps all; give n itself"
        )
    idle = sorted({"num_sinks", "window_size", "layer_windows"} & changes.keys()) if words[0] == "dense" else []
    if idle:
        raise ConfigError(f"{idle[0]} does nothing for the dense pattern, which sees everything; leave it out")
    if "window_size" in changes or equal[0]:
        changes.setdefault("layer_windows", ())
    if "separator_ids" in changes:
        changes.setdefault("separators", "ids")
    return _Told(name, words[0], changes, model, equal)


def _earlier(name: str, before: Sequence[str]) -> str:
    if name not in before:
        known = ", ".join(map(repr, before)) or "none"
        raise ConfigError(f"no arm {name!r} further to the front, only {known}{nearest(name, before)}")
    return name


def _change(key: str, value: str) -> dict[str, Any]:
    """One field's change."""
    kinds = {field.name: field.type for field in dataclasses.fields(AttentionConfig)}
    name = key if key in kinds else SHORT.get(key, key)
    if name not in kinds:
        known = nearest(key, [*kinds, *SHORT]) or f"; expected one of {', '.join(SHORT)}, or a field of attention"
        raise ConfigError(f"unknown field {key!r}{known}")
    try:
        return {name: _value(kinds[name], value)}
    except ValueError as error:
        raise ConfigError(f"{key}={value} is wrong: {error}") from error


def _value(kind: Any, text: str) -> Any:
    """`text` as a field's type has it; raises `ValueError`."""
    if typing.get_origin(kind) is tuple:
        return read_ids(Path(text[1:])) if text.startswith("@") else _numbers(text)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("expected true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected a {'whole ' if kind is int else ''}number") from None
    if kind is not str and type(None) in typing.get_args(kind) and text.lower() == "none":
        return None
    if kind is str or str in typing.get_args(kind):
        return text
    raise ValueError(f"a field of type {kind} cannot be set here")


def _numbers(text: str) -> tuple[int, ...]:
    matches = [_TIMES.fullmatch(item) for item in text.split(",")] if text else []
    if not all(matches):
        raise ValueError("expected whole numbers with commas between them, 64*29 for 64 twenty-nine times, or @FILE")
    return tuple(number for m in matches if m for number in [int(m[1])] * int(m[2] or 1))


def stream_attention(attention: AttentionConfig, pattern: str, budget: str, num_layers: int) -> AttentionConfig:
    """A pattern at a budget. Without separators their slots go to the window: w = c - a, StreamingLLM."""
    attention = under(attention, pattern)
    if budget:
        numbers = budget.split("/")
        if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
            raise ConfigError(f"--budgets takes sinks/separators/window/cache, like 4/64/256/800, got {budget!r}")
        a, s, w, c = map(int, numbers)
        sizes = {"num_sinks": a, "max_separators": s, "window_size": w, "cache_size": c}
        attention = dataclasses.replace(attention, layer_windows=(), **sizes)
    if pattern == "sink_window":
        a, s, w = attention.num_sinks, attention.max_separators, attention.window_size
        c = attention.cache_size or 2 * (a + s + w)
        attention = dataclasses.replace(attention, layer_windows=(), window_size=c - a, cache_size=c)
    return validate_attention(attention, num_layers)


def distances(
    arms: Sequence[AttentionConfig], num_layers: int, length: int = 2**30, near: int = 0, far: int = 0
) -> tuple[int, int]:
    """(near, far) of the slices; 0 stands for the smallest and the largest window that does not see everything.

    Args:
      arms: the patterns.
      num_layers: of the model.
      length: tokens of a row; windows of so many are dense.
      near: what the user asks for.
      far: what the user asks for.

    Raises:
      ConfigError: near exceeds far.
    """
    sparse = [x for x in arms if x.pattern != "dense"]
    windows = [n for x in sparse for n in (x.layer_windows or (x.window_size,) * num_layers) if n < length]
    far = far or max(windows or [length])
    near = near or min([*windows, far])
    if near > far:
        raise ConfigError(f"--near={near} exceeds --far={far}: the slices would overlap; lower one or raise the other")
    return near, far
