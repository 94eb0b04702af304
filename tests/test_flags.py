"""Which flags each job takes, sizes out of range, and Ctrl-C: one line, whatever the program is doing."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

import evaluate
from sepjax import interrupt
from sepjax.command import flags as our_flags
from sepjax.command.flags import one_line_errors, parse
from sepjax.command.settings import Settings
from sepjax.config import ConfigError
from sepjax.programs.evaluate import compare, needle, recall, stream, tasks, windows

ROOT = Path(__file__).parents[1]
JOBS = evaluate.jobs()


def given(name: str) -> flags.FlagValues:
    """A command line with this one flag."""
    values = flags.FlagValues()
    flags.DEFINE_string(name, None, "", flag_values=values)
    values(["evaluate.py", f"--{name}=1"])
    return values


def test_every_flag_of_evaluate_is_taken_or_refused_by_every_job() -> None:
    names = set(evaluate.own_flags())
    assert len(names) > 30
    assert names == set().union(*map(JOBS.names, JOBS.takes))
    for name in names:
        takers = [job for job in JOBS.takes if name in JOBS.names(job)]
        for job in JOBS.takes:
            if job in takers:
                JOBS.check(job, given(name))
                continue
            with pytest.raises(ConfigError, match=f"^--{name} does nothing for {job}; it is for ") as error:
                JOBS.check(job, given(name))
            assert ", ".join(takers) in str(error.value)


def test_a_flag_given_again_with_another_value_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """The last one counts, so that scripts can be overridden; what is given again alike says nothing."""
    for words, told in (
        ("--rows=3 --rows 4", "--rows is given 2 times; the last one counts, --rows=4: "),
        ("--api_key=a --api_key=b", "--api_key is given 2 times; the last one counts: "),
        ("--stream --nostream", "--stream is given 2 times; the last one counts, --stream=false: "),
        ("--config.data.batch_size=8 --rows=2 --config.data.batch_size=16", "counts, --config.data.batch_size=16: "),
        ("--rows=3 --rows=3 --stream --stream=true --stop=a --stop=b", ""),
    ):
        values = flags.FlagValues()
        flags.DEFINE_integer("rows", 1, "", flag_values=values)
        flags.DEFINE_string("api_key", "", "", flag_values=values)
        flags.DEFINE_bool("stream", False, "", flag_values=values)
        flags.DEFINE_multi_string("stop", [], "", flag_values=values)
        parse(["program", "--config=configs/sep_tiny.py", *words.split()], values, with_config=True)
        said = capsys.readouterr().err
        assert told in said if told else not said, (words, said)


def test_a_flag_of_a_file_that_is_given_again_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_integer("rows", 1, "", flag_values=values)
    (tmp_path / "mine").write_text("# kept\n--rows=3\n")
    parse(["program", f"--flagfile={tmp_path / 'mine'}", "--rows=4"], values, with_config=False)
    assert "--rows is given 2 times; the last one counts, --rows=4: " in capsys.readouterr().err
    assert values["rows"].value == 4
    (tmp_path / "mine").write_text("--row=3\n")
    with pytest.raises(ConfigError, match="unknown flag --row; did you mean '--rows'"):
        parse(["program", f"--flagfile={tmp_path / 'mine'}"], values, with_config=False)


def test_variables_that_nothing_reads_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [path.read_text() for path in (ROOT / "sepjax").rglob("*.py") if path.name != "flags.py"]
    assert set(our_flags.VARIABLES) == {name for text in sources for name in re.findall(r"SEPJAX_[A-Z_]+", text)}
    monkeypatch.setenv("SEPJAX_CACHE", "/tmp")
    monkeypatch.setenv("SEPJAX_APIKEY", "secret")
    our_flags._tell_unknown_variables()
    said = capsys.readouterr().err
    assert said == ("warning: the environment has SEPJAX_APIKEY, which nothing reads; did you mean 'SEPJAX_API_KEY'?\n")


def test_flags_that_jobs_of_evaluate_ignored_are_refused() -> None:
    for job, ignored in (
        (evaluate.STREAMING, "window_size length batch_size max_documents bos limit"),
        (f"{evaluate.PERPLEXITY} --arms", "patterns compare compare_at"),
        (f"{evaluate.STREAMING} --arms", "patterns budgets"),
        (evaluate.NEEDLE, "length split batch_size max_tokens budgets compare"),
        (evaluate.EQUAL_KV, "patterns arms budgets rows lengths limit"),
        (evaluate.PERPLEXITY, "rows chunk line_wise trials task_data num_fewshot batch_tokens"),
        (evaluate.TASKS, "text split length max_documents max_tokens bos budgets"),
    ):
        assert not JOBS.names(job) & set(ignored.split()), job


def test_the_job_of_evaluate_follows_from_the_flags() -> None:
    job_of = evaluate.job_of
    assert job_of(["perplexity"], compare=True, arms=True) == evaluate.EQUAL_KV  # refuses --arms
    assert job_of(["streaming"], compare=True, arms=False) == evaluate.STREAMING  # which refuses --compare
    assert job_of(["piqa", "arc_easy"], compare=False, arms=True) == evaluate.TASKS
    for job in (evaluate.PERPLEXITY, evaluate.STREAMING, evaluate.NEEDLE, evaluate.RECALL):
        assert job_of([job.removeprefix("--task=")], compare=False, arms=True) == f"{job} --arms"
    for names in ([], [""], ["streaming", "piqa"], ["perplexity", "needle"]):
        with pytest.raises(ConfigError, match="give one of perplexity, streaming, needle, recall, or tasks of lm-eval"):
            job_of(names, compare=False, arms=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--workdir=a", windows.Settings(workdir="a")),
        ("--model=a --patterns=dense,gated --far=9", windows.Settings(model="a", patterns=("dense", "gated"), far=9)),
        ("--model=a --compare --compare_at=pairs", compare.Settings(model="a", compare_at="pairs")),
        ("--model=a --compare --nobos", compare.Settings(model="a", bos=False)),
        ("--model=a --task=streaming --budgets=1/2/3/9", stream.Settings(model="a", budgets=("1/2/3/9",))),
        ("--model=a --task=needle --lengths=5,6", needle.Settings(model="a", lengths=(5, 6))),
        ("--workdir=a --task=recall --arms=dense", recall.Settings(workdir="a", arms="dense")),
        ("--model=a --task=piqa,arc --limit=0.5", tasks.Settings(model="a", task=("piqa", "arc"), limit=0.5)),
    ],
)
def test_evaluate_runs_the_programs_of_the_command(arguments: str, expected: Settings) -> None:
    program, settings = evaluate.read(["evaluate.py", *arguments.split()], flags.FlagValues())
    assert settings == expected
    assert sys.modules[type(settings).__module__] is program


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workdr=a", "unknown flag --workdr; did you mean '--workdir'"),
        ("--workdir=a --model=b", "give --workdir or --model, one of them: got both"),
        ("--model=a --budgets=1/2/3/9", "--budgets does nothing for --task=perplexity; it is for --task=streaming"),
        ("--model=a --patterns=dense --window_size=64", "--window_size does nothing for the dense pattern"),
        ("--model=a --batch_size=0", "--batch_size=0 must be 1 or more"),
        ("--workdir=a --task=recall --length=3", "--length does nothing for --task=recall"),
    ],
)
def test_mistakes_in_flags_of_evaluate_are_named(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate.read(["evaluate.py", *arguments.split()], flags.FlagValues())


def test_sizes_end_where_the_devices_numbers_do() -> None:
    values = flags.FlagValues()
    for name in ("window_size", "seed"):
        flags.DEFINE_integer(name, 1, "", flag_values=values)
    assert parse(["program", "--seed=4294967295", "--window_size=2147483647"], values, with_config=False) == []
    with pytest.raises(ConfigError, match=r"--window_size=99999999999 is out of range: .* 2147483647"):
        parse(["program", "--window_size=99999999999"], values, with_config=False)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("Unable to allocate 931. GiB"), 2, "error: not enough memory: Unable to allocate 931. GiB; make"),
        (
            OSError(errno.ENOSPC, "No space left"),
            2,
            "error: No space left; make room, and start",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nmany lines"), 2, "error: not enough memory: RESOURCE_EXHAU"),
    ],
)
def test_what_ends_a_program_is_one_line(error, code, line, capfd) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == code
    (found,) = capfd.readouterr().err.splitlines()
    assert found.startswith(line)


def test_what_a_library_makes_of_ctrl_c_is_ctrl_c(capfd, monkeypatch) -> None:
    """SentencePiece has a RuntimeError of its own for what is raised while it asks for the next text."""
    for name, value in (("presses", 1), ("said", 0)):
        monkeypatch.setitem(interrupt._state, name, value)
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise RuntimeError("INTERNAL: KeyboardInterrupt: <EMPTY MESSAGE>\n\nAt:\n  data.py(73): read")
    assert (end.value.code, capfd.readouterr().err.strip()) == (130, "interrupted")


def test_a_reader_that_has_gone_is_told_nothing(capfd) -> None:
    """`sepjax generate --stream ... | head` ends as programs do that a broken pipe kills."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert (end.value.code, capfd.readouterr().err) == (141, "")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors():
        raise RuntimeError("a bug")


def interrupted(process: subprocess.Popen) -> str:
    """What a process printed that Ctrl-C has ended as it should."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n"), err[-2000:]
    return out


SWALLOWS = """
from sepjax import interrupt
interrupt._PATIENCE = 0.2
interrupt.end_in_one_line()
import ctypes, time
class Odd:
    def __del__(self):
        time.sleep(60)  # an exception in here is swallowed by Python itself
print("ready", flush=True)
try:
    Odd()
    {busy}
except KeyboardInterrupt:
    time.sleep(60)
"""


@pytest.mark.parametrize("busy", ["time.sleep(60)", "[ctypes.CDLL(None).usleep(10**6) for _ in range(60)]"])
def test_ctrl_c_that_is_swallowed_ends_the_program_all_the_same(busy: str) -> None:
    program = [sys.executable, "-c", SWALLOWS.format(busy=busy)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(program, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    interrupted(process)


@pytest.mark.parametrize("program", ["train.py", "-m sepjax plan --topology=v5e:4x4"])
def test_ctrl_c_while_a_program_is_still_being_imported(program: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, *program.split(), "--config=configs/sep_tiny.py"]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and "jaxlib" not in maps.read_text():
        time.sleep(0.01)
    assert interrupted(process) == ""
