"""Which flags each job takes, sizes out of range, and Ctrl-C: one line, whatever the program is doing."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from sepjax.config import ConfigError
from sepjax.evaluation import jobs as evaluation
from sepjax.flags import Jobs, one_line_errors, parse
from sepjax.generation import jobs as generation

ROOT = Path(__file__).parents[1]
PROGRAMS = {"evaluate.py": evaluation.JOBS, "sepjax/generate.py": generation.JOBS}


def defined(program: str) -> set[str]:
    """The flags that a program defines."""
    calls = [node for node in ast.walk(ast.parse((ROOT / program).read_text())) if isinstance(node, ast.Call)]
    names = [call.args[0] for call in calls if ast.unparse(call.func).startswith("flags.DEFINE_")]
    return {name.value for name in names if isinstance(name, ast.Constant)}


def given(program: str, name: str) -> flags.FlagValues:
    """A command line with this one flag."""
    values = flags.FlagValues()
    flags.DEFINE_string(name, None, "", flag_values=values)
    values([program, f"--{name}=1"])
    return values


@pytest.mark.parametrize(("program", "jobs"), PROGRAMS.items(), ids=list(PROGRAMS))
def test_every_flag_is_taken_or_refused_by_every_job(program: str, jobs: Jobs) -> None:
    names = defined(program)
    assert len(names) > 20
    assert names == set().union(*map(jobs.names, jobs.takes))
    for name in names:
        takers = [job for job in jobs.takes if name in jobs.names(job)]
        for job in jobs.takes:
            if job in takers:
                jobs.check(job, given(program, name))
                continue
            with pytest.raises(ConfigError, match=f"^--{name} does nothing for {job}; it is for ") as error:
                jobs.check(job, given(program, name))
            assert ", ".join(takers) in str(error.value)


def test_flags_that_jobs_ignored_are_refused() -> None:
    for job, ignored in (
        (evaluation.STREAMING, "window_size length batch_size max_documents bos limit"),
        (evaluation.PERPLEXITY_ARMS, "patterns compare compare_at"),
        (evaluation.STREAMING_ARMS, "patterns budgets"),
        (evaluation.NEEDLE, "length split batch_size max_tokens budgets compare"),
        (evaluation.EQUAL_KV, "patterns arms budgets rows lengths limit"),
        (evaluation.PERPLEXITY, "rows chunk line_wise trials task_data num_fewshot batch_tokens"),
        (evaluation.TASKS, "text split length max_documents max_tokens bos budgets"),
    ):
        assert not evaluation.JOBS.names(job) & set(ignored.split()), job
    for job, ignored in (
        (generation.ANSWER, "save system resume max_repeats cache_size max_separators"),
        (generation.CHAT, "prompt prompt_file save stream apply_chat_template"),
        (generation.STREAM, "system chat"),
    ):
        assert not generation.JOBS.names(job) & set(ignored.split()), job


def test_the_job_follows_from_the_flags() -> None:
    assert evaluation.job_of(["perplexity"], compare=True, arms=True) == evaluation.EQUAL_KV  # refuses --arms
    assert evaluation.job_of(["streaming"], compare=True, arms=False) == evaluation.STREAMING  # which refuses --compare
    assert evaluation.job_of(["piqa", "arc_easy"], compare=False, arms=True) == evaluation.TASKS
    for job in (evaluation.PERPLEXITY, evaluation.STREAMING, evaluation.NEEDLE, evaluation.RECALL):
        assert evaluation.job_of([job.removeprefix("--task=")], compare=False, arms=True) == f"{job} --arms"
    for tasks in ([], [""], ["streaming", "piqa"], ["perplexity", "needle"]):
        with pytest.raises(ConfigError, match="give one of perplexity, streaming, needle, recall, or tasks of lm-eval"):
            evaluation.job_of(tasks, compare=False, arms=False)
    assert generation.job_of(stream=True, chat=True, resume=True) == generation.CHAT
    assert generation.job_of(stream=False, chat=False, resume=True) == generation.RESUME


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
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nmany lines"), 2, "error: not enough memory: RESOURCE_EXHAU"),
    ],
)
def test_what_ends_a_program_is_one_line(error, code, line, capfd) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == code
    (found,) = capfd.readouterr().err.splitlines()
    assert found.startswith(line)


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


@pytest.mark.parametrize("program", ["train.py", "-m sepjax.sharding plan"])
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_k=3"], "--top_k does nothing where the best token is always taken"),
        (["--min_p=0.1", "--temperature=0"], "--min_p does nothing"),
        (["--top_k=3", "--temperature=1"], None),
        (["--top_p=0.9", "--sampling_defaults"], None),
        (["--pattern=dense", "--window_size=3"], "--window_size does nothing for --pattern=dense"),
        (["--pattern=separator", "--window_size=3"], None),
    ],
)
def test_flags_without_effect_are_named(arguments: list[str], message: str | None) -> None:
    values = flags.FlagValues()
    for name in ("top_k", "window_size"):
        flags.DEFINE_integer(name, None, "", flag_values=values)
    for name in ("temperature", "top_p", "min_p"):
        flags.DEFINE_float(name, None, "", flag_values=values)
    flags.DEFINE_bool("sampling_defaults", False, "", flag_values=values)
    flags.DEFINE_string("pattern", None, "", flag_values=values)
    values(["program", *arguments])
    if message is None:
        generation.check_sense(values)
    else:
        with pytest.raises(ConfigError, match=message):
            generation.check_sense(values)
