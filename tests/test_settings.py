"""Dataclasses that are command lines: flags from fields, values back, comments as help, and what fields cannot be."""

import dataclasses
import operator
import re
import types
from typing import Annotated

import pytest
from absl import flags

from sepjax.command.flags import read_settings
from sepjax.command.settings import AtLeast, OneOf, Repeated, Settings, config_flags, flags_of, help_text
from sepjax.config import Config, ConfigError, field_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(Settings):
    folder: str  # where it is
    # how many there are,
    # a pair at a time
    pairs: Annotated[int, AtLeast(1)] = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Base):
    share: float | None = None  # of the # signs; default: all
    color: Annotated[str, OneOf(("red", "green"))] = "red"
    sizes: Annotated[tuple[int, ...], AtLeast(0)] = (3, 4)  # in metres
    names: tuple[str, ...] | None = None  # of people
    words: Annotated[tuple[str, ...], Repeated()] = ()  # said
    loud: bool = True  # whether they are shouted
    calm: bool | None = None  # whether they are not


def read(*arguments: str, cls: type = Example) -> Example:
    return read_settings(cls, ["program", *arguments], flags.FlagValues(), "is an example")


def test_fields_are_flags_and_come_back_with_their_types():
    assert read("--folder=a") == Example(folder="a")
    given = ["--share=0.5", "--color=green", "--sizes=7,8,9", "--names=x,y", "--words=a, b", "--words=c", "--noloud"]
    assert read("--folder", "b", "--pairs=5", *given, "--calm") == Example(
        folder="b", pairs=5, share=0.5, color="green", sizes=(7, 8, 9), names=("x", "y"), words=("a, b", "c"),
        loud=False, calm=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs=3"], "--folder"),
        (["--folder=a", "--pairs=0"], "--pairs=0 must be 1 or more"),
        (["--folder=a", "--pairs=many"], "--pairs=many"),
        (["--folder=a", "--pairs=99999999999"], "--pairs=99999999999 is out of range"),
        (["--folder=a", "--color=gren"], "--color='gren' is not one of 'red', 'green'; did you mean 'green'"),
        (["--folder=a", "--sizes=1,x"], "--sizes takes whole numbers of 0 or more with commas between them, got '1,x'"),
        (["--folder=a", "--colour=red"], "unknown flag --colour; did you mean '--color'"),
        (["--folder=a", "red"], "unexpected argument 'red'"),
    ],
)
def test_what_a_field_cannot_be_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read(*arguments)


def test_settings_made_in_python_are_checked_too():
    for changes, message in (({"pairs": 0}, "--pairs=0 must be"), ({"color": "blue"}, "--color='blue' is not one of")):
        with pytest.raises(ConfigError, match=message):
            Example(folder="a", **changes)


def test_comments_are_the_help(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("program: is an example\n\nFlags:\n  --folder=TEXT ")
    assert {flag.name: flag.meaning for flag in flags_of(Example)} == {
        "folder": "where it is",
        "pairs": "how many there are, a pair at a time",
        "share": "of the # signs; default: all",
        "color": "",
        "sizes": "in metres",
        "names": "of people",
        "words": "said",
        "loud": "whether they are shouted",
        "calm": "whether they are not",
        "quiet": "show no progress; results, warnings and errors stay",
    }
    assert "--[no]quiet" in said.splitlines()[-1]  # what all have comes last
    assert "how many there are, a pair at a time [1 or more; default: 2]" in said
    assert "in metres [0 or more; default: 3,4]" in said
    assert "--color=red|green " in said
    assert "[default: red]" in said


def test_every_setting_of_a_config_has_a_meaning_and_is_in_the_help():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithConfig(Settings):
        config: Config  # a file

    found = dict(config_flags())
    assert set(found) == {f"config.{path}" for path in field_types()}
    assert not [path for path, flag in found.items() if not flag.meaning]
    defaults = {path: operator.attrgetter(path)(types.SimpleNamespace(config=Config())) for path in found}
    assert {path: flag.default for path, flag in found.items()} == defaults  # sliding_rope.base is not rope.base
    assert found["config.model.sliding_rope.base"].meaning.startswith("layers with the window")
    heads = [line for line in help_text("program", "runs", WithConfig).splitlines() if line.startswith("  --")]
    assert {re.split("[= ]", line.split("--")[1])[0].removeprefix("[no]") for line in heads} == {
        "config",
        "quiet",
        *found,
    }
