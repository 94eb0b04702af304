"""The command itself: which program runs, what each says of itself, and what is refused before anything is loaded."""

import dataclasses
import importlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sepjax import programs
from sepjax.command import moved
from sepjax.command.settings import flags_of, help_text
from sepjax.config import Config, ConfigError, TrainingConfig, checkout, load_config
from sepjax.hub import convert
from sepjax.keeping import distill
from sepjax.programs import COMMANDS, bench
from sepjax.training import plan
from tests.commands import Called, command, leaves, own_flags, refusal, unlike

ROOT = Path(__file__).parents[2]
DRAWN = ("kinds", "mask", "slots")  # whose figures are of work that would be lost


@pytest.mark.parametrize("name", COMMANDS)
def test_every_program_tells_its_flags_and_what_they_mean(name, capfd):
    module = programs.program(name)
    ended = command(capfd, *name.split(), "--help")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"sepjax {name}: {module.__doc__.splitlines()[0]}")
    assert dataclasses.fields(module.Settings)
    for flag in flags_of(module.Settings):
        assert flag.meaning, flag.name
        assert f"--{flag.name}=" in ended.out or f"--[no]{flag.name} " in ended.out
    with pytest.raises(dataclasses.FrozenInstanceError):
        object.__new__(module.Settings).step = 1


@pytest.mark.parametrize("name", bench.BENCHES)
def test_every_flag_of_a_bench_has_a_meaning(name):
    module = importlib.import_module(bench.BENCHES[name] + (".__main__" if name == "mesh" else ""))
    cls = getattr(module, "CommandLine", None) or module.Settings
    assert [flag.name for flag in flags_of(cls) if not flag.meaning] == []
    about = str(importlib.import_module(bench.BENCHES[name]).__doc__)
    assert help_text(str(module.__file__), about, cls).startswith(f"sepjax bench {name}: ")


def test_what_there_is(capfd):
    for words in ("--help", "help"):
        ended = command(capfd, words)
        assert ended.code == 0
        assert all(f"sepjax {name} " in ended.out for name in (*COMMANDS, "bench"))
    ended = command(capfd, "evaluate", "--help")
    assert ended.out.count("sepjax evaluate ") == 6
    assert command(capfd, "help", "picture", "mask").out == command(capfd, "picture", "mask", "--help").out
    assert command(capfd).code == 2
    assert command(capfd, "--version").out == "sepjax 0.1.0\n"
    with pytest.raises(SystemExit):
        programs.main(["bench", "--help"])
    said = capfd.readouterr().out
    assert all(f"  {name} " in said for name in bench.BENCHES)
    assert "Tokens per second of the input pipeline alone." in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "expected a command, one of train, evaluate, .*: got 'trian'; did you mean 'train'"),
        ("picture pareto --results= --output=x.svg", "--results= is empty: files that sepjax evaluate compare wrote"),
        ("bench steps", "sepjax bench measures processes of their own; run it in a terminal"),
        ("evaluate", "expected a job of evaluate, one of windows, compare, .*: got none"),
        ("evaluate needles", "got 'needles'; did you mean 'needle'"),
        ("generate --model=m --prompt=a --chat", "unknown flag --chat; it is a command: sepjax chat"),
        ("evaluate windows --model=m --compare", "--compare; it is a command: sepjax evaluate compare"),
        (
            "evaluate windows --model=m --budgets=1/2/3/9",
            "--budgets does nothing for sepjax evaluate windows; it is for sepjax evaluate stream: leave it out",
        ),
        ("chat --model=m --noapply_chat_template", "--noapply_chat_template does nothing for sepjax chat; it is for "),
        (
            "plan --config=sep_tiny --topology=v5e:4x4 --workdir=w",
            r"sepjax train, (.*, ){4}sepjax \w+ \w+ and \d+ more:",
        ),
        ("convert --source=a --target=b --config.training.steps=3", "it is for sepjax train, sepjax plan, sepjax dis"),
        ("generate --model=m --prompt=a --temprature=1", "unknown flag --temprature; did you mean '--temperature'"),
        (
            "serve --model=m --max-new-tokens=5",
            "flag --max-new-tokens; words are joined by underscores: --max_new_tokens$",
        ),
        ("generate --model=m --prompt=a --no-quiet", "words are joined by underscores: --noquiet$"),
        ("generate --model=m --prompt=a --Stop_token-ids=3", "did you mean '--stop_token_ids'"),
        ("generate --model=m --pdp=a", "unknown flag --pdp(?!.*pdb)"),  # absl's own, which nobody means
        ("train --config=sep_tiny --workdir=w --config.modle.num_layers=3", "did you mean '--config.model.num_layers"),
        ("train --config=sep_tny --workdir=w", "no config file 'sep_tny'; did you mean 'sep_tiny'"),
        ("train --workdir=w", "flag --config is required"),
        ("train --config=sep_tiny --workdir=w --config sep_small", "--config is given 2 times; give one file"),
        ("train --config.training.steps=x --config sep_tiny --workdir=w", "steps=x: expected a whole number$"),
        ("train --config=sep_tiny --workdir=w --download", "does nothing without --config.training.init_from="),
        ("generate --model=m --prompt=a --quiet=maybe", "--quiet=maybe: expected true or false, or no value$"),
        ("train --config=sep_tiny", r"--workdir=\.\.\. is required: folder of the run"),
        ("train --config=sep_tiny --workdir=", "--workdir= is empty: folder of the run"),  # not the folder it is run in
        ("train --config=zzzzzz --workdir=w", "no config file 'zzzzzz'; sepjax has books_50m, .*sep_tiny"),
        ("train --config=sep_tiny --workdir=w --step_timeout=-3", "--step_timeout=-3.0 must be 0 or more"),
        ("distill --config=sep_tiny --workdir=w --learning_rate=-1", "--learning_rate=-1.0 must be 0 or more"),
        ("distill --config=sep_tiny --workdir=w --learning_rate=x", "--learning_rate=x: expected a number$"),
        ("plan --config=sep_tiny --topologi=v5e:4x4", "unknown flag --topologi; did you mean '--topology'"),
        ("plan --config=sep_tiny --topology=v5e:4x4 --largest=-1", "--largest=-1 must be 0 or more"),
        ("distill --config=sep_tiny --workdir=w --rows=0", "--rows=0 must be 1 or more"),
        ("keeping --model=m --text=t --by=magic", "--by='magic' is not one of 'rarity'"),
        ("generate --prompt=a", "give --workdir or --model, one of them: got neither"),
        ("generate --prompt=a --workdir=w --download", "--download does nothing for a run"),
        ("chat --model=m --resume=x --system=y", "--system does nothing beside --resume"),
        ("serve --model=m --host=0.0.0.0", "lets others than this machine ask, which needs a key: set SEPJAX_API_KEY"),
        ("serve --model=m --port=70000", "--port=70000 must be at most 65535"),
        ("serve --model=m --state=s --cache_memory=0", "--state keeps nothing where --cache_memory=0"),
        ("serve --model=m --drain_seconds=-1", "--drain_seconds=-1.0 must be 0 or more"),
        ("serve --model=m --pattern=dense --window_size=9", "--window_size does nothing for the dense pattern"),
        ("evaluate needle --model=m --depths=120", "--depths=120 must be 100 or less"),
        ("evaluate needle --model=m --lengths=1,x", "--lengths takes whole numbers of 1 or more"),
        ("evaluate stream --model=m --arms=dense --budgets=1/2/3/9", "--budgets does nothing beside --arms"),
        ("picture kinds --model=m --text=t --length=9 --window_size=9", "--length=9 is not more than --window_size=9"),
        *((f"picture {x} --model=m --text=t --output=x.txt", "--output=x.txt is to end in") for x in DRAWN),
        ("evaluate stream --model=/no --text=t --arms=seperator", "unknown pattern 'seperator'; did you mean"),
        ("evaluate windows --model=/no --text=t --arms=dense;seperator", "arm 2, 'seperator': unknown pattern"),
        ("evaluate recall --workdir=w --arms=dense --patterns=dense", "--patterns does nothing beside --arms"),
        ("evaluate windows --model=m --patterns=dense --window_size=64", "--window_size does nothing for the dense"),
        ("evaluate needle --model=m --patterns=dense --window_size=64", "--window_size does nothing for the dense"),
        ("evaluate tasks --model=m --task=a --patterns=dense --window_size=64", "--window_size does nothing for the "),
        ("evaluate tasks --model=m --task=a,", "--task=a,: expected names of tasks"),
        ("evaluate windows --model=m --output=a.png", "--output=a.png is where the table or the picture goes"),
        ("evaluate windows --workdir=/nowhere", "no such folder: '/nowhere'"),
    ],
)
def test_mistakes_are_one_line(words, message, capfd):
    assert re.search(message, refusal(capfd, *words.split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chat --model=m --resume=none", "none' has no saved stream: there is no stream.json in it"),
        ("generate --model=m --stream --resume=none", "none' has no saved stream: there is no stream.json in it"),
        (
            "generate --model=m --stream --prompt=a --save=file",
            "file' is a file; choose a folder that is new",
        ),
        ("evaluate stream --model=m --text=none.txt", "'none.txt': No such file"),
        ("evaluate stream --model=m --text=empty", "'empty' has no .txt files"),
        ("evaluate stream --model=m --text=file --split=train", "--split=train is of a run's own corpus"),
        ("evaluate needle --model=m --text=none.txt", "'none.txt': No such file"),
        ("keeping --model=m --text=none.txt --output=o.json --by=rarity", "'none.txt': No such file"),
        ("layers --model=m --text=file --check_text=none.txt", "'none.txt': No such file"),
        ("picture kinds --model=m --text=none.txt", "'none.txt': No such file"),
    ],
)
def test_what_needs_no_model_is_told_before_one_is_loaded(words, message, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a")
    (tmp_path / "empty").mkdir()
    for place in ("sepjax.loading.load", "sepjax.evaluation.jobs.load"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("a model was loaded first"))
    assert re.search(message, refusal(capfd, *words.split()))


def test_a_config_that_comes_with_sepjax_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_config(ROOT / "configs" / "sep_tiny.py")
    assert load_config("sep_tiny") == load_config("sep_tiny.py") == expected
    (tmp_path / "sep_tiny.py").write_text("from sepjax.config import Config\ndef get_config():\n    return Config()\n")
    assert load_config("sep_tiny.py") != expected  # a file that is here counts more
    with pytest.raises(ConfigError, match=r"no config file 'configs/sep_tiny.py'; did you mean 'sep_tiny'"):
        load_config("configs/sep_tiny.py")


def test_a_bench_runs_as_a_program_with_its_own_flags(monkeypatch, capfd):
    for module in bench.BENCHES.values():
        assert importlib.util.find_spec(f"{module}.__main__" if module.endswith("mesh") else module), module
    assert bench.choose(["attention", "--lengths=1"]) == ("sepjax.bench.attention", ["--lengths=1"])
    with pytest.raises(SystemExit):
        bench.main(["atention"])
    assert "got 'atention'; did you mean 'attention'" in capfd.readouterr().err
    ran = []
    monkeypatch.setattr(runpy, "run_module", lambda *found, **how: ran.append((found, how, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["sepjax", "bench", "data", "--seconds=1"])
    programs.main(sys.argv[1:])
    assert ran == [(("sepjax.bench.data",), {"run_name": "__main__", "alter_sys": True}, ["--seconds=1"])]


@pytest.mark.parametrize("name", ["train", "convert", "plan", "distill"])
def test_no_setting_is_lost_on_its_way(name, monkeypatch):
    seen: list[object] = []

    def spy(*arguments, **named):
        seen.extend([arguments, named])
        raise Called

    callee = {"train": checkout.program("train"), "convert": convert, "plan": plan, "distill": distill}[name]
    monkeypatch.setattr(callee, "main" if name == "plan" else name, spy)
    module = programs.program(name)
    values = {flag.name: unlike(flag, i) for i, flag in enumerate(own_flags(module.Settings))}
    if name == "train":
        values["config"] = Config(training=TrainingConfig(init_from="model"))  # without it, --download is refused
    with pytest.raises(Called):
        module.main(module.Settings(**values))
    reached = leaves(seen)
    assert not [field for field, value in values.items() if value not in reached]


def test_old_commands_name_the_new_ones(capfd):
    for module in moved._NOW:
        with pytest.raises(SystemExit) as end:
            moved.refuse(module)
        assert end.value.code == 2
        assert f"python -m {module} is another command now: python -m sepjax " in capfd.readouterr().err
    moved.refuse("sepjax.bench.attention")
    done = subprocess.run([sys.executable, "-m", "sepjax.generate"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: python -m sepjax.generate is another command now: python -m sepjax generate")


def test_the_command_as_a_process_of_its_own():
    """What the tests above do not run: absl around it, and the exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "sepjax", "convert", "--source=/nowhere", "--target=/nowhere/else"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]*/nowhere[^\n]*\n", done.stderr)


def test_help_and_mistakes_come_before_jax_is_imported():
    """They take a fraction of a second that way, and several otherwise."""
    code = "import sys; from sepjax import programs; [programs.program(x).Settings for x in programs.COMMANDS]; "
    code += "programs.read('generate', ['g', '--model=m', '--prompt=a'], programs.flags.FlagValues()); "
    code += "print([x for x in ('jax', 'numpy', 'grain') if x in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
