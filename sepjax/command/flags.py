"""The command line of the entry points: typed config overrides, and mistakes answered in one line.

    if __name__ == "__main__":
        run_settings(MySettings, main, __doc__)  # a dataclass that is the command line: sepjax.command.settings

`--config=FILE` names a config file, `--config.section.field=value` changes one field of what it returns.
"""

import contextlib
import dataclasses
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from sepjax import interrupt, progress
from sepjax.command import compile_cache
from sepjax.command.settings import Settings, define, flags_of, help_text, value_of
from sepjax.config import Config, ConfigError, UserError, field_types, first_line, load_config, nearest, validate
from sepjax.config.attention import TABLES
from sepjax.console import say

_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells have it
# Of the environment; tests/test_flags.py holds this against what the code reads.
VARIABLES = ("SEPJAX_API_KEY", "SEPJAX_CACHE", "SEPJAX_GRAPHS", "SEPJAX_ONE_ROW")
_OF_TESTS = ("SEPJAX_FUZZ_", "SEPJAX_SMOLLM", "SEPJAX_TEST_", "SEPJAX_TORCH_PYTHON")
FLAG = re.compile(r"--?([A-Za-z_][\w.-]*)")


def run_program(
    read: Callable[[Sequence[str]], Any],
    main: Callable[[Any], None],
    argv: Sequence[str] = (),
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Reads the command line, runs `main` and ends the program.

    A `UserError` (a wrong flag or setting), an `OSError` (a missing file, a full disk), a lack of memory or a malformed
    command line ends it with `error: ...` on stderr and exit code 2; `--verbosity=1` shows where it was raised. Ctrl-C
    ends it with `interrupted` and 130. Anything else is a bug and keeps its traceback.

    It runs under absl, which Grain's readers of data need.

    Args:
      read: makes of the command line, program name first, what `main` is called with.
      main: the program.
      argv: the command line; default: this process's.
      begin: called before `main`, and before anything touches a device: what only a process of its own may do.
    """

    def parser(argv: Sequence[str]) -> Any:
        with one_line_errors():
            return read(argv)

    def run(settings: Any) -> None:
        if not flags.FLAGS["verbosity"].present:  # absl's own default lets Orbax and TFDS narrate every file
            logging.set_verbosity(logging.WARNING)
        try:
            with one_line_errors():
                begin()
                _tell_unknown_variables()
                compile_cache.keep()
                from sepjax import promotion  # here, for JAX comes with it

                promotion.of_this_process()
                main(settings)
        except SystemExit as end:
            if end.code == _BROKEN_PIPE:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python has yet to print
            if isinstance(end.code, int) and end.code:
                interrupt.end_unless_done(end.code)
            raise

    app.run(run, argv=list(argv) or None, flags_parser=parser)


def run_settings[S: Settings](
    cls: type[S], main: Callable[[S], None], about: str, begin: Callable[[], None] = lambda: None
) -> None:
    """`run_program` with the settings that `cls` describes; `about` is what --help says of the program."""
    run_program(lambda argv: read_settings(cls, argv, flags.FLAGS, about), functools.partial(call, main), begin=begin)


def call[S: Settings](main: Callable[[S], None], settings: S) -> None:
    """`main(settings)`, quiet if that is one of them."""
    with progress.quietly(settings.quiet):
        main(settings)


def read_settings[S: Settings](cls: type[S], argv: Sequence[str], flag_values: flags.FlagValues, about: str) -> S:
    """The settings that a command line asks for; --help prints them all and ends the program. Raises as `parse` does.

    Args:
      cls: the class of the settings.
      argv: the command line, program name first.
      flag_values: where its flags are defined.
      about: what --help says of the program.
    """
    if asks_help(argv):
        print(help_text(argv[0], about, cls))
        raise SystemExit(0)
    found = flags_of(cls)
    for flag in found:
        define(flag, flag_values)
    configs = parse(argv, flag_values, with_config=any(flag.kind is Config for flag in found))
    values: dict[str, Any] = {flag.name: value_of(flag, flag_values) for flag in found if flag.kind is not Config}
    for flag in found:
        if flag.default is dataclasses.MISSING and flag.name in values and values[flag.name] is None:
            raise ConfigError(f"--{flag.name}=... is required: {flag.meaning}")
    if configs:
        values["config"] = configs[0]
    return cls(**values)


def asks_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks what the program takes."""
    return any(argument in ("-h", "-help", "--help", "--helpshort") for argument in argv[1:])


def parse(argv: Sequence[str], flag_values: flags.FlagValues, *, with_config: bool) -> list[Config]:
    """Parses `argv`, program name first, into `flag_values`; returns the arguments of `main`: [config] or [].

    Raises:
      ConfigError: an unknown flag or config field (with the nearest name), a value of the wrong type, a config that
        cannot work, an argument that is no flag, or no `--config`.
      flags.Error: the command line is wrong in another way.
    """
    asks_help = any(re.match(r"--?help", argument) for argument in argv[1:])
    argv = _config_first([*argv[:1], *flag_values.read_flags_from_files(argv[1:])])
    check_flags(argv, [*flag_values, *flags.FLAGS], with_config=with_config)
    if with_config and not asks_help and not any(re.match(r"--?config(=|$)", argument) for argument in argv[1:]):
        raise ConfigError("flag --config is required: a config file, for example --config=configs/sep_tiny.py")
    holders = [_define_config(argv, flag_values)] if with_config else []
    try:
        positional = flag_values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        raise ConfigError(_without_python(f"{error}{_expected_type(str(error))}")) from error
    _check_sizes(flag_values)
    if positional:
        raise ConfigError(f"unexpected argument {positional[0]!r}; everything is a flag here: --name=value")
    if not asks_help:
        _tell_repeats(argv, flag_values)
    return [validate(_with_table(_divided(holder.value))) for holder in holders]


def _tell_unknown_variables() -> None:
    """Names what is set in the environment for sepjax, and nothing reads."""
    for name in sorted(os.environ):
        if name.startswith("SEPJAX_") and name not in VARIABLES and not name.startswith(_OF_TESTS):
            say(f"warning: the environment has {name}, which nothing reads{nearest(name, VARIABLES)}")


def _tell_repeats(argv: Sequence[str], flag_values: flags.FlagValues) -> None:
    """Says which flags are given again with another value: the last one counts, so that scripts can be overridden."""
    found: dict[str, list[str]] = {}
    words = iter(argv[1 : argv.index("--") if "--" in argv else len(argv)])
    for word in words:
        if not (match := FLAG.match(word)):
            continue
        off = match[1] not in flag_values and match[1].startswith("no")
        name, equals, value = match[1].removeprefix("no") if off else match[1], *word.partition("=")[1:]
        if name not in flag_values or isinstance(flag_values[name], flags.MultiFlag):
            continue
        if flag_values[name].boolean:
            value = str(value.lower() in ("true", "t", "1") if equals else not off).lower()
        found.setdefault(name, []).append(value if equals or flag_values[name].boolean else next(words, ""))
    for name, values in found.items():
        if len(set(values)) > 1:
            last = "" if name.endswith("key") else f", --{name}={values[-1]}"  # nobody's key on a screen
            say(f"warning: --{name} is given {len(values)} times; the last one counts{last}: leave the others out")


def _config_first(argv: Sequence[str]) -> list[str]:
    """The same with --config=FILE in front, as ml_collections wants it; raises ConfigError for two of them."""
    place = argv.index("--") if "--" in argv else len(argv)
    starts = [i for i in range(1, place) if re.match(r"--?config(=|$)", argv[i])]
    if len(starts) > 1:
        raise ConfigError(
            f"--config is given {len(starts)} times; give one file, and --config.SECTION.FIELD=VALUE for what is to be "
            "different"
        )
    if not starts:
        return list(argv)
    first, end = starts[0], starts[0] + (1 if "=" in argv[starts[0]] else 2)
    return [argv[0], *argv[first:end], *argv[1:first], *argv[end:]]


def _divided(section: Any) -> Any:
    """A config whose lists of texts are divided at commas: ml_collections takes `query,value` for one text."""
    changes = {}
    for field in dataclasses.fields(section):
        value = new = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            new = _divided(value)
        elif field.type == tuple[str, ...] and isinstance(value, tuple) and all(isinstance(x, str) for x in value):
            new = tuple(part.strip() for text in value for part in text.split(","))
        if new != value:
            changes[field.name] = new
    return dataclasses.replace(section, **changes) if changes else section


def _with_table(config: Config) -> Config:
    """attention.separators=FILE becomes the ids in it: a run is whole without the file."""
    if Path(config.attention.separators).suffix not in TABLES:
        return config
    from sepjax.separators import with_ids  # here, for JAX comes with it, which mistakes in flags need not wait for

    return dataclasses.replace(config, attention=with_ids(config.attention))


def check_flags(argv: Sequence[str], known: Sequence[str], *, with_config: bool) -> None:
    """Raises `ConfigError` with the nearest name for flags that are neither `known` nor fields of the config.

    Args:
      argv: the command line, program name first.
      known: names of the program's own flags, without dashes.
      with_config: whether `config` and its fields are flags too.
    """
    names = [*known, "help", "helpshort", "helpfull", "helpxml", "flagfile", "undefok"]  # the last are absl's
    if with_config:
        names += ["config", *(f"config.{path}" for path in field_types())]
    for argument in argv[1:]:
        if argument == "--":
            return
        match = FLAG.match(argument)
        if match and match[1] not in names and match[1].removeprefix("no") not in names:
            raise ConfigError(f"unknown flag --{match[1]}{_meant(match[1], names)}")


def _meant(name: str, names: Sequence[str]) -> str:
    """What to say of the flag that an unknown one is most like: the same with other dashes, or another word."""
    plain = name.replace("-", "_")
    for same in (plain, plain.removeprefix("no_"), plain.removeprefix("no")):
        if same in names:
            return f"; words are joined by underscores: --{'no' * (plain != same)}{same}"
    modules = flags.FLAGS.flags_by_module_dict().items()
    of_absl = {flag.name for module, its in modules if module.startswith("absl.") for flag in its} | {"v", "undefok"}
    own = [f"--{known}" for known in names if known not in of_absl - {"verbosity"}]
    return nearest(f"--{plain}", own)


def one_of_two(first: str, first_value: str | None, second: str, second_value: str | None) -> str:
    """The value of the one of two flags that is given; raises `ConfigError` for none or both."""
    if bool(first_value) == bool(second_value):
        given = "got both" if first_value else "got neither"
        raise ConfigError(f"give --{first} or --{second}, one of them: {given}")
    return str(first_value or second_value)


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Which of a program's flags each of its jobs takes. A flag that a job would ignore is an error, not a surprise.

    A new flag goes into `common` or into one job at least; tests/test_flags.py holds this against the flags defined.
    """

    common: str  # names, with spaces between, that every job takes
    takes: Mapping[str, str]  # job, as its user writes it ("--task=streaming") -> names of its own

    def names(self, job: str) -> frozenset[str]:
        """The flags that a job takes."""
        return frozenset(f"{self.common} {self.takes[job]}".split())

    def check(self, job: str, flag_values: flags.FlagValues = flags.FLAGS) -> None:
        """Raises `ConfigError` for a flag on the command line that other jobs take and `job` does not."""
        known = frozenset().union(*map(self.names, self.takes))
        for name in sorted(known - self.names(job)):
            if name in flag_values and flag_values[name].present:
                others = ", ".join(other for other in self.takes if name in self.names(other))
                raise ConfigError(
                    f"--{name} does nothing for {job}; it is for {others}: leave it out or change the job"
                )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the user's mistakes inside the block into `error: ...` on stderr and exit code 2, or the error's own."""
    try:
        yield
    except KeyboardInterrupt:
        interrupt.say()
        raise SystemExit(interrupt.EXIT_CODE) from None
    except BrokenPipeError:  # whoever read what is printed has gone, as `head` does
        raise SystemExit(_BROKEN_PIPE) from None
    except Exception as error:
        if interrupt.is_pressed():
            interrupt.say()
            raise SystemExit(interrupt.EXIT_CODE) from None
        message = _message(error)
        if message is None:
            raise
        logging.debug("The error below was raised here:", exc_info=True)
        print(f"{getattr(error, 'label', 'error')}: {message}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from None


def _message(error: Exception) -> str | None:
    """What to tell the user; None: it is a bug."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]:  # NumPy's and Python's, the device's
        return f"not enough memory: {first_line(error)}; make the sizes smaller (window, cache, batch, length)"
    if isinstance(error, OSError) and error.errno and error.strerror:
        where = "" if error.filename is None else f"{os.fspath(error.filename)!r}: "
        return f"{where}{error.strerror}{_REMEDIES.get(error.errno, '')}"
    return " ".join(str(error).split("\n")) if isinstance(error, (UserError, OSError, flags.Error)) else None


_REMEDIES = {  # of the system's errors of files
    errno.ENOENT: "; check the path",
    errno.EEXIST: "; it is a file, where a folder is needed: choose another path",
    errno.ENOTDIR: "; a part of it is a file, where a folder is needed: choose another path",
    errno.EISDIR: "; name a file in it",
    errno.EACCES: "; change who may use it, or choose another path",
    errno.EPERM: "; change who may use it, or choose another path",
    errno.EROFS: "; choose another path",
    errno.ENOSPC: "; make room, and start the same command again",
}


def _check_sizes(flag_values: flags.FlagValues) -> None:
    """Sizes and positions are int32 on the device; a seed has a range of its own."""
    for name in flag_values:
        value = flag_values[name].value
        if name != "seed" and type(value) is int and not -(2**31) <= value < 2**31:
            raise ConfigError(f"--{name}={value} is out of range: whole numbers end at 2^31 - 1 = {2**31 - 1}")


def _define_config(argv: Sequence[str], flag_values: flags.FlagValues) -> flags.FlagHolder[Config]:
    sections = ", ".join(field.name for field in dataclasses.fields(Config))
    holder = config_flags.DEFINE_config_dataclass(
        "config",
        Config(),
        f"config file; --config.SECTION.FIELD=VALUE after it changes one field. Sections: {sections}.",
        flag_values,
        sys_argv=list(argv),
        parse_fn=load_config,
    )
    flag_values["config"].default_as_str = ""  # --help would print every field
    flag_values.register_key_flag_for_module(argv[0], flag_values["config"])  # so that --help lists it
    return holder


def _without_python(message: str) -> str:
    """What absl says of a value of the wrong type, in the words of whoever wrote the command line."""
    for said, expected in (("invalid literal for int", "a whole number"), ("could not convert string to", "a number")):
        message = re.sub(rf": {said}.*", f": expected {expected}", message)
    return re.sub(r": \('Non-boolean argument to boolean flag', .*", ": expected true or false, or no value", message)


def _expected_type(message: str) -> str:
    """What a config field takes, for absl's message "flag --config.a.b=value: ..."."""
    match = re.match(r"flag --config\.([\w.]+)=", message)
    return f"; expected {field_types()[match[1]]}" if match else ""
