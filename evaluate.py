"""Scores a run or a pretrained model, under several attention patterns side by side. "KV kept" is counted.

    python evaluate.py --workdir=runs/tiny                          the validation split of its corpus
    python evaluate.py --workdir=runs/tiny --text=book.txt          a file, or a folder of .txt files
    python evaluate.py --workdir=runs/tiny --split=train[:1%]       another split of the corpus, as TFDS writes it
    python evaluate.py --workdir=runs/tiny --patterns=separator,dense --window_size=64 --length=1024
    python evaluate.py --model=smollm2-135m --text=books/ --compare           at equal KV (--compare_at=pairs: pairs)
    python evaluate.py --model=smollm2-135m --text=books/ --far=600 --arms="dense; sink_window n=657; separator n=256;
        rare: separator n=256 ids=@rare.npy; sink_window n=kv:rare; separator windows=64*29,4096"

Prints a table of perplexities and one by slice (bigrams that did not stand in the row before, that stood near, far:
sepjax/evaluation/slices.py), with errors paired over documents, and writes all of it to <workdir>/evaluation.json (or
--output).

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
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import sepjax
from sepjax import files
from sepjax.config import PATTERNS, AttentionConfig, ConfigError
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation import compare, curves, jobs, needle, perplexity, recall, report, streaming, tasks
from sepjax.evaluation.arms import Arm, fixed_arms, parse_arms, plain_arms, stream_attention
from sepjax.evaluation.documents import read_documents, read_texts
from sepjax.evaluation.equal import density as window_density
from sepjax.evaluation.inputs import config_of, corpus_of, texts_of, with_pattern
from sepjax.flags import one_of_two, run_main, whole_numbers
from sepjax.hub.chat_template import ChatTemplate
from sepjax.loading import locate
from sepjax.measure import provenance
from sepjax.model.transformer import Transformer


def evaluate(
    workdir: Path,
    patterns: Sequence[str] = (),
    *,
    arms: str = "",
    equal: str = "",
    step: int | None = None,
    text: str = "",
    split: str = "",
    length: int = 0,
    window_size: int = 0,
    max_documents: int = 0,
    max_tokens: int = 0,
    bos: bool = True,
    batch_size: int = 8,
    baseline: str = "",
    near: int = 0,
    far: int = 0,
    **settings: Any,
) -> list[compare.Score]:
    """Scores a run or a pretrained model under each of `patterns`, or all that it can run; 0 and "": its own settings.

    `arms` (`sepjax.evaluation.arms`) take the place of `patterns`, and so does `equal`: all patterns at the separators'
    "kv" or "pairs". Further `settings` are those of `sepjax.load`.
    """
    model, tokenizer = sepjax.load(workdir, step=step, **settings)
    config = config_of(workdir, model)
    patterns = patterns or [pattern for pattern in PATTERNS if pattern != "gated" or model.gate is not None]
    attentions = [with_pattern(config, pattern, window_size) for pattern in ["separator", *patterns]]
    documents = texts_of(workdir, config, text, split, max_documents)
    length = length or config.data.sequence_length
    windows = perplexity.token_windows(tokenizer, documents, length, bos=bos, max_tokens=max_tokens)
    if arms:
        compared = parse_arms(arms, dataclasses.replace(attentions[0], cache_size=0), config.model.num_layers)
    elif equal:
        density = window_density(attentions[0], tokenizer, windows.ids)
        compared = compare.at_equal_kv(attentions[0], density, equal)
    else:
        compared = plain_arms(attentions[1:])

    def load(path: str) -> tuple[Transformer, Tokenizer]:
        return sepjax.load(path, **settings) if path else (model, tokenizer)

    cut = {"length": length, "batch_size": batch_size}
    return compare.score_arms(load, windows, compared, baseline=baseline, near=near, far=far, **cut)


def stream(
    path: Path,
    patterns: Sequence[str],
    budgets: Sequence[str],
    *,
    step: int | None = None,
    text: str = "",
    split: str = "",
    line_wise: bool = False,
    max_tokens: int = 0,
    arms: str = "",
    loading: Mapping[str, Any] = types.MappingProxyType({}),
    **options: Any,
) -> list[streaming.StreamScore]:
    """Streams text through the bounded cache of each pattern and budget "a/s/w/c"; no budget: the model's own.

    `arms` take the place of patterns and budgets. `loading` is for `sepjax.load`, `options` for `score_streams`.
    """
    model, tokenizer = sepjax.load(path, **{"step": step, **loading})
    attentions: list[AttentionConfig | Arm] = [
        stream_attention(model.attention, pattern, budget, model.config.num_layers)
        for budget in budgets or [""]
        for pattern in patterns
    ]
    if arms:
        attentions = [*fixed_arms(arms, model.attention, model.config.num_layers)]
    cut = {"line_wise": line_wise, "max_tokens": max_tokens}
    if text and split:
        raise ConfigError(f"--split={split} is of a run's own corpus; a stream of --text takes all of it")
    documents = read_documents(Path(text), tokenizer, **cut) if text else corpus_of(path, split, tokenizer, **cut)
    return streaming.score_streams(model, tokenizer, documents, attentions, **options)


def find_needles(
    path: Path,
    patterns: Sequence[str],
    *,
    text: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    tails: Sequence[int] = (0,),
    arms: str = "",
    window_size: int = 0,
    trials: int = 10,
    batch_tokens: int = 65_536,
    **settings: Any,
) -> list[needle.Cell]:
    """Hides needles in the joined texts of `text`; further `settings` are those of `sepjax.load`."""
    if not text:
        raise ConfigError("--task=needle hides its needles in --text: a .txt file or a folder of them")
    model, tokenizer = sepjax.load(path, **settings)
    compared = plain_arms([with_pattern(config_of(path, model), pattern, window_size) for pattern in patterns])
    if arms:
        compared = fixed_arms(arms, model.attention, model.config.num_layers)
    haystack = "\n\n".join(read_texts(Path(text)))
    grid = {"lengths": lengths, "depths": depths, "tails": tails, "trials": trials, "batch_tokens": batch_tokens}
    return needle.needle_grid(model, tokenizer, haystack, compared, **grid)


def run_tasks(
    path: Path, names: Sequence[str], patterns: Sequence[str], *, window_size: int = 0, **options: Any
) -> list[tasks.TaskScore]:
    """Runs tasks of lm-eval; `options` are those of `sepjax.evaluation.tasks.run_tasks` and `sepjax.load`."""
    loading = {name: options.pop(name) for name in ("step", "dtype", "download") if name in options}
    model, tokenizer = sepjax.load(path, **loading)
    attentions = [
        dataclasses.replace(with_pattern(config_of(path, model), pattern, window_size), cache_size=0)
        for pattern in patterns
    ]
    template = ChatTemplate.of_model(locate(path), tokenizer) if options.get("apply_chat_template") else None
    scores = []
    for score in tasks.run_tasks(model, tokenizer, names, attentions, chat_template=template, **options):
        scores.append(score)
        print(tasks.table([score]), flush=True)
    return scores


def write_files(output: Path, what: Any, scores: Sequence[Any]) -> str:
    """Writes `what`'s CSV and picture beside `output`; returns what to say about it."""
    with files.replacing(output.with_suffix(".csv")) as partial:
        what.write_csv(partial, scores)
    try:
        with files.replacing(output.with_suffix(".png")) as partial:
            what.write_png(partial, scores)
    except curves.PictureError as error:
        return f"{output.with_suffix('.csv')} (no picture: {error})"
    return f"{output.with_suffix('.csv')}, {output.with_suffix('.png')}"


def write_curve(output: Path, scores: Sequence[streaming.StreamScore]) -> str:
    """Writes the curve by position beside `output`; returns what to say about it."""
    return write_files(output, curves, scores)


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run of train.py")
    MODEL = flags.DEFINE_string(
        "model", None, "a pretrained model: smollm2-135m, a Hugging Face folder, a GGUF file, an id on the hub"
    )
    DOWNLOAD = flags.DEFINE_bool("download", False, "with --model=OWNER/NAME: fetch it from the Hugging Face hub")
    DTYPE = flags.DEFINE_string("dtype", None, "with --model: of the arithmetic; default: bfloat16, on a CPU float32")
    TASK = flags.DEFINE_list(
        "task", ["perplexity"], "perplexity (of windows), streaming (of documents), needle, recall, or tasks of lm-eval"
    )
    STEP = flags.DEFINE_integer("step", None, "checkpoint to score; default: the newest")
    TEXT = flags.DEFINE_string("text", "", "a .txt file, a folder of them or a TFDS dataset; default: the run's corpus")
    SPLIT = flags.DEFINE_string("split", "", "of that data, as TFDS names it; default: all of --text, or validation")
    PATTERN = flags.DEFINE_list(
        "patterns", None, "attention patterns to compare; default: all, or for streams separator,sink_window"
    )
    ARMS = flags.DEFINE_string(
        "arms", "", "what to compare, freely: see sepjax/evaluation/arms.py; in place of --patterns"
    )
    COMPARE = flags.DEFINE_bool("compare", False, "perplexity of all patterns at equal KV")
    COMPARE_AT = flags.DEFINE_enum("compare_at", "kv", ["kv", "pairs"], "what --compare makes equal")
    BASELINE = flags.DEFINE_string("baseline", "", "the arm that differences are from; default: the first")
    NEAR = flags.DEFINE_integer(
        "near", 0, "tokens of the slice of near repetitions; 0: the smallest window", lower_bound=0
    )
    FAR = flags.DEFINE_integer(
        "far", 0, "tokens beyond which a repetition is far; 0: the largest window, of streams the largest cache",
        lower_bound=0,
    )  # fmt: skip
    LENGTH = flags.DEFINE_integer("length", 0, "tokens of a window; default: as in training", lower_bound=0)
    WINDOW = flags.DEFINE_integer("window_size", 0, "n of every layer; default: as in training", lower_bound=0)
    BATCH = flags.DEFINE_integer("batch_size", 8, "windows of a forward pass, answers of a task", lower_bound=1)
    MAXIMUM = flags.DEFINE_integer("max_documents", 0, "score only the first so many; 0: all", lower_bound=0)
    BOS = flags.DEFINE_bool("bos", True, "whether each document begins with BOS")
    BUDGETS = flags.DEFINE_list("budgets", [], "of streams: sinks/separators/window/cache, each; default: the model's")
    TOKENS = flags.DEFINE_integer(
        "max_tokens", 0, "stream only the first so many, or of windows score only so many a document; 0: all",
        lower_bound=0,
    )  # fmt: skip
    ROWS = flags.DEFINE_integer("rows", 32, "documents streamed at a time, at most", lower_bound=1)
    CHUNK = flags.DEFINE_integer("chunk", 0, "tokens of a pass; 0: as many as fit; 1: token by token", lower_bound=0)
    LINES = flags.DEFINE_bool("line_wise", False, "the official protocol: a BOS a line, its last token left out")
    LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048"], "of needle texts: tokens")
    DEPTHS = flags.DEFINE_list("depths", ["0", "25", "50", "75", "100"], "of needles: percent of the text before it")
    TAILS = flags.DEFINE_list("tails", ["0"], "words after a needle's number in its sentence")
    TRIALS = flags.DEFINE_integer("trials", 10, "needle texts of each length and depth", lower_bound=1)
    DATA = flags.DEFINE_string("task_data", None, "folder of local datasets for tasks; default: the hub's")
    LIMIT = flags.DEFINE_float("limit", 0, "documents of each task; below 1: their share; 0: all", lower_bound=0)
    SHOTS = flags.DEFINE_integer("num_fewshot", None, "examples before each question; default: the task's own number")
    EQUAL = flags.DEFINE_bool("equal_kv", True, "in tasks: other patterns keep as many keys as the separators did")
    CHAT = flags.DEFINE_bool("apply_chat_template", False, "in tasks: prompts in the model's chat template")
    FORWARD = flags.DEFINE_integer("batch_tokens", 65_536, "tokens of a pass that scores tasks", lower_bound=1)
    OUTPUT = flags.DEFINE_string("output", "", "JSON file; default: <workdir>/evaluation.json or <task>.json")

    def _loading() -> dict[str, Any]:
        return {"step": STEP.value, "dtype": DTYPE.value, "download": DOWNLOAD.value}

    def _slices() -> dict[str, Any]:
        return {"baseline": BASELINE.value, "near": NEAR.value, "far": FAR.value}

    def _print_slices(scores: Sequence[Any]) -> None:
        first = scores[0]
        print("\n" + report.slice_table([(s.arm, s.slices) for s in scores], first.near, first.far, first.baseline))

    def _windows(path: Path, output: Path) -> Sequence[Any]:
        scores = evaluate(
            path,
            PATTERN.value or (),
            arms=ARMS.value,
            equal=COMPARE_AT.value if COMPARE.value else "",
            text=TEXT.value,
            split=SPLIT.value,
            length=LENGTH.value,
            window_size=WINDOW.value,
            batch_size=BATCH.value,
            max_documents=MAXIMUM.value,
            max_tokens=TOKENS.value,
            bos=BOS.value,
            **_slices(),
            **_loading(),
        )
        print(report.table(scores))
        _print_slices(scores)
        return scores

    def _streams(path: Path, output: Path) -> Sequence[Any]:
        scores = stream(
            path,
            PATTERN.value or ("separator", "sink_window"),
            BUDGETS.value,
            text=TEXT.value,
            split=SPLIT.value,
            line_wise=LINES.value,
            max_tokens=TOKENS.value,
            arms=ARMS.value,
            loading=_loading(),
            rows=ROWS.value,
            chunk=CHUNK.value,
            **_slices(),
        )
        print(curves.table(scores))
        _print_slices(scores)
        print(f"curve by position: {write_curve(output, scores)}")
        return scores

    def _needles(path: Path, output: Path) -> Sequence[Any]:
        cells = find_needles(
            path,
            PATTERN.value or ("dense", "separator", "sink_window"),
            text=TEXT.value,
            lengths=whole_numbers("lengths", LENGTHS.value),
            depths=[n / 100 for n in whole_numbers("depths", DEPTHS.value, least=0)],
            tails=whole_numbers("tails", TAILS.value, least=0),
            arms=ARMS.value,
            window_size=WINDOW.value,
            trials=TRIALS.value,
            batch_tokens=FORWARD.value,
            **_loading(),
        )
        print(needle.table(cells))
        print(f"cells and heat map: {write_files(output, needle, cells)}")
        return cells

    def _recall(path: Path, output: Path) -> Sequence[Any]:
        cells = recall.score_run(path, PATTERN.value or (), arms=ARMS.value, step=STEP.value, batch_size=BATCH.value)
        print(recall.table(cells))
        return cells

    def _tasks(path: Path, output: Path) -> Sequence[Any]:
        return run_tasks(
            path,
            TASK.value,
            PATTERN.value or ("dense", "separator", "sink_window"),
            window_size=WINDOW.value,
            data=Path(DATA.value) if DATA.value else None,
            limit=LIMIT.value,
            num_fewshot=SHOTS.value,
            equal_kv=EQUAL.value,
            batch_size=BATCH.value,
            batch_tokens=FORWARD.value,
            apply_chat_template=CHAT.value,
            **_loading(),
        )

    def main() -> None:
        """Prints the table and writes the JSON."""
        path = Path(one_of_two("workdir", WORKDIR.value, "model", MODEL.value))
        job = jobs.job_of(TASK.value, compare=COMPARE.value, arms=bool(ARMS.value))
        jobs.JOBS.check(job)
        programs = {"perplexity": (_windows, "evaluation"), "streaming": (_streams, "streaming")}
        programs |= {"needle": (_needles, "needle"), "recall": (_recall, "recall")}
        program, name = programs.get(TASK.value[0], (_tasks, "tasks"))
        folder = path if (path / "checkpoints").is_dir() else Path()
        output = Path(OUTPUT.value or folder / f"{name}.json")
        jobs.check_output(output)
        scores = program(path, output)
        result = {"workdir": str(path), "text": TEXT.value, "scores": [dataclasses.asdict(s) for s in scores]}
        text = json.dumps(report.plain(provenance() | result), indent=2, allow_nan=False)
        files.write_text(output, text + "\n")
        print(f"written to {output}")

    run_main(main)
