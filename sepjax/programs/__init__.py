"""The command `sepjax`: one subcommand a job.

A program is a file with a docstring, `Settings`, a dataclass that is its command line (`sepjax.command.settings`), and
`main(settings)`. It imports JAX and what is built on it when it runs, so that --help and mistakes take no seconds. What
only a process of its own may do, before anything touches a device, is in `begin()`.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

from absl import flags

from sepjax.command.flags import FLAG, call, one_line_errors, read_settings, run_program
from sepjax.command.settings import Settings, flags_of
from sepjax.config import ConfigError, nearest
from sepjax.programs import bench

COMMANDS = {  # what the user writes after `sepjax` -> its file in this folder
    "train": "train",
    "evaluate windows": "evaluate.windows",
    "evaluate compare": "evaluate.compare",
    "evaluate stream": "evaluate.stream",
    "evaluate needle": "evaluate.needle",
    "evaluate recall": "evaluate.recall",
    "evaluate tasks": "evaluate.tasks",
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "convert": "convert",
    "plan": "plan",
    "distill": "distill",
    "keeping": "keeping",
    "layers": "layers",
    "report": "report",
    "picture kept": "picture.kept",
    "picture pareto": "picture.pareto",
    "picture curves": "picture.curves",
    "picture mask": "picture.mask",
    "picture slots": "picture.slots",
    "picture kinds": "picture.kinds",
}
_BENCH = "bench"
_HELP = ("-h", "-help", "--help", "help")
_NAMED = 6  # commands that a mistake names


def main(words: Sequence[str]) -> None:
    """Runs `sepjax WORDS` as a process of its own: ends it with an exit code, and errors in one line."""
    with one_line_errors():
        command, rest = choose(words)
    if command == _BENCH:
        bench.main(rest)
    else:
        module = program(command)
        begin = getattr(module, "begin", lambda: None)
        main_of = functools.partial(call, module.main)
        run_program(lambda argv: read(command, argv, flags.FLAGS), main_of, [f"sepjax {command}", *rest], begin)


def run_here(words: Sequence[str]) -> None:
    """The same within this process, for tests and notebooks: with flags of its own, and not under absl."""
    with one_line_errors():
        command, rest = choose(words)
        if command == _BENCH:
            raise ConfigError("sepjax bench measures processes of their own; run it in a terminal")
        call(program(command).main, read(command, [f"sepjax {command}", *rest], flags.FlagValues()))


def choose(words: Sequence[str]) -> tuple[str, list[str]]:
    """(command, its arguments). Prints what there is and ends the program where that is asked for, or nothing is."""
    first, second = [*words, "", ""][:2]
    if first in _HELP and second and second not in _HELP:  # sepjax help COMMAND
        return choose([*words[1:], "--help"])
    if first in ("", *_HELP):
        print(overview(COMMANDS))
        raise SystemExit(0 if first else 2)
    if first == "--version":
        import sepjax

        print(f"sepjax {sepjax.__version__}")
        raise SystemExit(0)
    if first in COMMANDS or first == _BENCH:
        return first, list(words[1:])
    jobs = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if f"{first} {second}" in jobs:
        return f"{first} {second}", list(words[2:])
    if jobs and second in _HELP:
        print(overview(jobs))
        raise SystemExit(0)
    known = [name.split()[1] for name in jobs] or [*dict.fromkeys(name.split()[0] for name in (*COMMANDS, _BENCH))]
    wrong = second if jobs else first
    said = f"got {wrong!r}{nearest(wrong, known)}" if wrong else "got none"
    raise ConfigError(f"expected {f'a job of {first}' if jobs else 'a command'}, one of {', '.join(known)}: {said}")


def overview(commands: Sequence[str] | dict[str, str]) -> str:
    """A line for each of these commands."""
    lines = [(f"sepjax {name}", (program(name).__doc__ or "").splitlines()[0]) for name in commands]
    if commands is COMMANDS:
        lines.append((f"sepjax {_BENCH}", (bench.__doc__ or "").splitlines()[0]))
    width = max(len(name) for name, _ in lines) + 2
    rows = [f"  {name:<{width}}{about}" for name, about in lines]
    return "\n".join(["Commands; each has --help:", *rows])


def program(command: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"{__name__}.{COMMANDS[command]}")


def read(command: str, argv: Sequence[str], flag_values: flags.FlagValues) -> Settings:
    """The settings that a command line asks for; raises `ConfigError` for flags of other commands too, by name."""
    module = program(command)
    _refuse_others(command, argv)
    return read_settings(module.Settings, argv, flag_values, module.__doc__ or "")


def names(command: str) -> frozenset[str]:
    """The flags of a command."""
    return frozenset(flag.name for flag in flags_of(program(command).Settings))


def _refuse_others(command: str, argv: Sequence[str]) -> None:
    own = names(command)
    for argument in argv[1:]:
        match = FLAG.match(argument)
        name = match[1].split(".")[0] if match else ""
        if not match or {name, name.removeprefix("no")} & own:
            continue
        takers = [other for other in COMMANDS if {name, name.removeprefix("no")} & names(other)]
        if takers:
            others = ", ".join(f"sepjax {other}" for other in takers[:_NAMED])
            others += f" and {len(takers) - _NAMED} more" if len(takers) > _NAMED else ""
            raise ConfigError(f"--{match[1]} does nothing for sepjax {command}; it is for {others}: leave it out")
        meant = [other for other in (*COMMANDS, _BENCH) if name in other.split()]
        if meant:
            raise ConfigError(f"unknown flag --{name}; it is a command: sepjax {meant[0]}")
