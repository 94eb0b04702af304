"""Scores a run or a pretrained model, under several attention patterns side by side. "KV kept" is counted.

The jobs are also commands, whose --help has fewer flags: `sepjax evaluate windows|compare|stream|needle|recall|tasks`.

    python evaluate.py --workdir=runs/tiny                          the validation split of its corpus
    python evaluate.py --workdir=runs/tiny --text=book.txt          a file, or a folder of .txt files
    python evaluate.py --workdir=runs/tiny --split=train[:1%]       another split of the corpus, as TFDS writes it
    python evaluate.py --workdir=runs/tiny --patterns=separator,dense --window_size=64 --length=1024
    python evaluate.py --model=smollm2-135m --text=books/ --compare           at equal KV (--compare_at=pairs: pairs)
    python evaluate.py --model=smollm2-135m --text=books/ --far=600 --arms="dense; sink_window n=657; separator n=256;
        rare: separator n=256 ids=@rare.npy; sink_window n=kv:rare; separator windows=64*29,4096"

Prints a table of perplexities and one by slice (bigrams that did not stand in the row before, that stood near, far:
sepjax/evaluation/slices.py), with errors paired over documents, and writes all of it to a file that is named by what
was scored, in <workdir>/evaluations (or --output).

    python evaluate.py --task=streaming --model=smollm2-135m --text=books/ --budgets=4/64/256/800,4/64/224/324

streams whole documents through bounded caches of sinks/separators/window/cache slots (docs/streaming.md), and prints
perplexity, the slots that were held, bytes and tokens/s. "separator" is scored beside "sink_window" at equal slots
(w = c - a). The curve by position goes beside the output, as .csv and .png. --text may be an .npz of token ids, one
array a document.

    python evaluate.py --task=needle --model=smollm2-135m --text=books/ --lengths=512,1024 --depths=0,50,100
    python evaluate.py --task=gsm8k_cot,mmlu --model=smollm2-135m --patterns=dense,separator,sink_window

hides a number in long texts (a heat map goes beside the output), or runs tasks of EleutherAI's lm-eval
(docs/pretrained.md), from the hub or from local files (--task_data).
"""

from sepjax import interrupt  # isort: skip

if __name__ == "__main__":  # first, for the imports below take seconds
    interrupt.end_in_one_line()

import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags

from sepjax.command.flags import Jobs, asks_help, call, one_of_two, parse, run_program
from sepjax.command.settings import Flag, Settings, define, flag_lines, flags_of, value_of
from sepjax.config import ConfigError
from sepjax.programs.evaluate import compare, needle, recall, stream, tasks, windows

PERPLEXITY, EQUAL_KV = "--task=perplexity", "--task=perplexity --compare"
STREAMING, NEEDLE, RECALL = "--task=streaming", "--task=needle", "--task=recall"
TASKS = "the tasks of lm-eval"
PROGRAMS: Mapping[str, ModuleType] = {
    PERPLEXITY: windows,
    EQUAL_KV: compare,
    STREAMING: stream,
    NEEDLE: needle,
    RECALL: recall,
    TASKS: tasks,
}
OURS = {"perplexity": PERPLEXITY, "streaming": STREAMING, "needle": NEEDLE, "recall": RECALL}


def jobs() -> Jobs:
    """Which flags each job takes: the settings of its program, and --arms in place of what it replaces."""
    takes: dict[str, set[str]] = {}
    for job, program in PROGRAMS.items():
        names = {flag.name for flag in flags_of(program.Settings)} | {"task"}
        if "arms" in names:
            takes[job], takes[f"{job} --arms"] = names - {"arms"}, names - {"patterns", "budgets"}
        else:
            takes[job] = names | {"compare"} if job == EQUAL_KV else names
    return Jobs("", {job: " ".join(sorted(names)) for job, names in takes.items()})


def job_of(tasks: Sequence[str], *, compare: bool, arms: bool) -> str:
    """The job of --task, --compare and --arms; raises `ConfigError` for several tasks of which one is ours."""
    if not all(tasks) or not tasks or (len(tasks) > 1 and OURS.keys() & set(tasks)):
        raise ConfigError(f"--task={','.join(tasks)}: give one of {', '.join(OURS)}, or tasks of lm-eval")
    job = OURS.get(tasks[0], TASKS)
    if job == PERPLEXITY and compare:
        return EQUAL_KV
    return f"{job} --arms" if arms and job != TASKS else job


def own_flags() -> dict[str, Flag]:
    """What says which job it is, and every field of every job, each of them left out unless given."""
    fields: dict[str, Flag] = {}
    for program in PROGRAMS.values():
        for flag in flags_of(program.Settings):
            said = fields[flag.name].meaning if flag.name in fields else ""
            meaning = flag.meaning if said in ("", flag.meaning) else f"{said} | {flag.meaning}"
            fields[flag.name] = dataclasses.replace(flag, meaning=meaning)
    about = "perplexity (of windows), streaming (of documents), needle, recall, or tasks of lm-eval"
    compare = Flag("compare", bool, False, False, (), "perplexity of all patterns at equal KV")
    return fields | {"task": Flag("task", tuple[str, ...], ("perplexity",), False, (), about), "compare": compare}


def read(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> tuple[ModuleType, Settings]:
    """The program that a command line asks for, and its settings."""
    if asks_help(argv):
        print(__doc__, "Flags:", *flag_lines(own_flags().values()), sep="\n")
        raise SystemExit(0)
    for flag in own_flags().values():
        define(flag, values, default=flag.default if flag.name in ("task", "compare") else None)
    parse(argv, values, with_config=False)
    one_of_two("workdir", values["workdir"].value, "model", values["model"].value)
    asked: Any = {name: values[name].value for name in ("task", "compare", "arms")}
    job = job_of(asked["task"], compare=asked["compare"], arms=bool(asked["arms"]))
    jobs().check(job, values)
    program = PROGRAMS[job.removesuffix(" --arms")]
    found = [flag for flag in flags_of(program.Settings) if values[flag.name].present]
    return program, program.Settings(**{flag.name: value_of(flag, values) for flag in found})


if __name__ == "__main__":
    run_program(read, lambda found: call(found[0].main, found[1]))
