"""A program's settings: a frozen dataclass that is its command line.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MySettings(Settings):
        \"\"\"What the program does.\"\"\"

        workdir: str  # folder of the run
        rows: Annotated[int, AtLeast(1)] = 32  # documents at a time

Its fields are the flags --workdir=... (required, for it has no default) and --rows=32, their comments are what --help
says, and what they may be is checked whether they come from a command line or from Python. A field `config` of the type
`Config` is --config=FILE with one flag more for every setting in it.
"""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sepjax.config import Config
from sepjax.config.checks import ConfigError, at_least, at_most, check_type, one_of, settings_of, whole_numbers

_WIDTH, _COLUMN = 120, 32  # of --help: where lines end, and where meanings begin


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Of a number, or of each in a tuple of numbers: none may be smaller."""

    least: int


@dataclasses.dataclass(frozen=True)
class AtMost:
    """Of a number: it may not be larger."""

    most: int


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Of a text, or of each in a tuple of texts: nothing else is allowed."""

    choices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Repeated:
    """Of a tuple of texts: one a flag, --stop=a --stop=b, where otherwise commas stand between."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A field of a settings class, as the command line sees it."""

    name: str
    kind: Any  # bool, int, float, str, tuple[int, ...], tuple[str, ...] or Config
    default: Any  # dataclasses.MISSING: the flag is required
    optional: bool  # None is a value: not given
    marks: tuple[Any, ...]  # AtLeast, AtMost, OneOf, Repeated
    meaning: str

    def mark[M](self, kind: type[M]) -> M | None:
        """The mark of this kind, or None."""
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: checks types and ranges. Subclasses are frozen dataclasses, `kw_only` all of them."""

    quiet: bool = False  # show no progress; results, warnings and errors stay

    def __post_init__(self) -> None:
        for flag in flags_of(type(self)):
            _check(flag, getattr(self, flag.name))


@functools.cache
def flags_of(cls: type) -> tuple[Flag, ...]:
    """The fields of a settings class, but those that are no settings (`sepjax.config.checks.NO_SETTING`)."""
    hints, told = typing.get_type_hints(cls, include_extras=True), meanings(cls)
    found = []
    for field in settings_of(cls):
        kind, optional, marks = _read_hint(hints[field.name])
        found.append(Flag(field.name, kind, field.default, optional, marks, told.get(field.name, "")))
    return tuple(found)


def _read_hint(hint: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """(type, whether it may be None, marks) of `Annotated[int, AtLeast(1)] | None` and the like."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, optional, marks = _read_hint(typing.get_args(hint)[0])
        return kind, optional, (*typing.get_args(hint)[1:], *marks)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (one,) = (x for x in typing.get_args(hint) if x is not types.NoneType)
        kind, _, marks = _read_hint(one)
        return kind, True, marks
    return hint, False, ()


def _check(flag: Flag, value: Any) -> None:
    """Raises `ConfigError` for a value that the field cannot have."""
    name = f"--{flag.name}"
    if value is None and flag.optional:
        return
    check_type(name, value, flag.kind)
    if value in ("", (), ("",)) and flag.default is dataclasses.MISSING:
        raise ConfigError(f"{name}= is empty: {flag.meaning}")
    each: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    for item in each:
        if mark := flag.mark(AtLeast):
            at_least(name, item, mark.least)
        if mark := flag.mark(AtMost):
            at_most(name, item, mark.most)
        if mark := flag.mark(OneOf):
            one_of(name, item, mark.choices)


def define(flag: Flag, values: flags.FlagValues, *, default: Any = dataclasses.MISSING) -> None:
    """Defines one field as a flag of absl's; `default` takes the place of its own. A Config is not defined here."""
    if flag.kind is Config:
        return
    given = flag.default if default is dataclasses.MISSING else default
    if given is dataclasses.MISSING:  # whoever reads them says what is required (`sepjax.command.flags`)
        given = None
    given = list(map(str, given)) if isinstance(given, tuple) else given
    if typing.get_origin(flag.kind) is tuple:
        kind: Any = flags.DEFINE_multi_string if flag.mark(Repeated) else flags.DEFINE_list
    else:
        by_kind = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
        kind = by_kind.get(flag.kind, flags.DEFINE_string)
    kind(flag.name, given, flag.meaning, flag_values=values)


def value_of(flag: Flag, values: flags.FlagValues) -> Any:
    """What the parsed command line says of one field."""
    value = values[flag.name].value
    if value is None or typing.get_origin(flag.kind) is not tuple:
        return value
    if typing.get_args(flag.kind)[0] is not int:
        return tuple(value)
    mark = flag.mark(AtLeast)
    return whole_numbers(flag.name, value, least=mark.least if mark else 0)


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """Field -> what the comment at its line says, or the one above it. Without the source there are none."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            try:
                found |= _comments(textwrap.dedent(inspect.getsource(base)))
            except OSError:
                continue
    return found


def _comments(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    (cls,) = ast.parse(source).body
    assert isinstance(cls, ast.ClassDef)
    found = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = [node.end_lineno or node.lineno]
            if lines[0] not in comments:
                above = node.lineno - 1
                lines = []
                while above in comments and source.splitlines()[above - 1].lstrip().startswith("#"):
                    lines.insert(0, above)
                    above -= 1
            found[node.target.id] = " ".join(comments[line] for line in lines)
    return found


def help_text(command: str, about: str, cls: type) -> str:
    """What --help prints: `about`, every field, and every setting of a config if there is one."""
    everywhere = {field.name for field in dataclasses.fields(Settings)}
    own = sorted(flags_of(cls), key=lambda flag: (flag.default is not dataclasses.MISSING, flag.name in everywhere))
    lines = [f"{_called(command, about)}: {about.strip()}", "", "Flags:", *flag_lines(own)]
    if any(flag.kind is Config for flag in own):
        lines += ["", "Settings of --config, each with the value it has where the file says nothing:"]
        lines += flag_lines([dataclasses.replace(flag, name=path) for path, flag in config_flags()])
    return "\n".join(lines)


def _called(command: str, about: str) -> str:
    """The command as users type it: a bench runs as a module, whose file stands in `command`."""
    path = Path(command)
    bench = f"sepjax bench {path.parent.name if path.stem == '__main__' else path.stem}"
    return bench if f"{bench} " in about else command


def flag_lines(flags: Iterable[Flag]) -> list[str]:
    """The lines of --help on these."""
    return [line for flag in flags for line in _line(flag)]


def config_flags(settings: object | None = None, prefix: str = "config.", about: str = "") -> list[tuple[str, Flag]]:
    """("config.model.vocab_size", its description) of every single setting.

    Args:
      settings: the config or a part of it, whose values are the defaults; None: a `Config` as it is made.
      prefix: put in front of names.
      about: put in front of meanings: what the part is for, of two with the same fields.
    """
    settings = Config() if settings is None else settings
    found: list[tuple[str, Flag]] = []
    for flag in flags_of(type(settings)):
        value, meaning = getattr(settings, flag.name), f"{about}: {flag.meaning}" if about else flag.meaning
        if dataclasses.is_dataclass(value):
            found += config_flags(value, f"{prefix}{flag.name}.", meaning)
        else:
            found.append((f"{prefix}{flag.name}", dataclasses.replace(flag, default=value, meaning=meaning)))
    return found


def _line(flag: Flag) -> Sequence[str]:
    """A flag, its form, its meaning and its default, wrapped."""
    choices, least, most = flag.mark(OneOf), flag.mark(AtLeast), flag.mark(AtMost)
    form = "|".join(choices.choices) if choices else "TEXT" if flag.mark(Repeated) else _FORMS.get(flag.kind, "TEXT")
    head = f"  --[no]{flag.name}" if flag.kind is bool else f"  --{flag.name}={form}"
    notes = [f"{least.least} or more"] if least else []
    notes += [f"{most.most} or less"] if most else []
    if flag.default is dataclasses.MISSING:
        notes.append("required")
    elif flag.default not in (None, "", ()):
        notes.append(
            f"default: {','.join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default}"
        )
    if flag.mark(Repeated):
        notes.append("may be given several times")
    text = f"{flag.meaning} [{'; '.join(notes)}]" if notes else flag.meaning
    lines = textwrap.wrap(text, _WIDTH, initial_indent=" " * _COLUMN, subsequent_indent=" " * _COLUMN)
    if len(head) < _COLUMN - 1:
        return [head.ljust(_COLUMN) + lines[0].lstrip(), *lines[1:]] if lines else [head]
    return [head, *lines]


_FORMS = {bool: "", int: "INT", float: "NUMBER", tuple[int, ...]: "INT,INT,...", tuple[str, ...]: "TEXT,TEXT,..."}
_FORMS[Config] = "FILE"
