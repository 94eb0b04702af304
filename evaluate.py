"""Scores a run or a pretrained model on text, under several attention patterns side by side.

    python evaluate.py --workdir=runs/tiny                          the validation split of its corpus
    python evaluate.py --workdir=runs/tiny --text=book.txt          a file, or a folder of .txt files
    python evaluate.py --workdir=runs/tiny --split=train[:1%]       another split of the corpus, as TFDS writes it
    python evaluate.py --workdir=runs/tiny --patterns=separator,dense --window_size=64 --length=1024

Prints a table and writes <workdir>/evaluation.json (or --output). "KV kept" is counted, never a formula.

    python evaluate.py --task=streaming --model=smollm2-135m --text=books/ --budgets=4/64/256/800,4/64/224/324 \
        --output=streaming.json

streams whole documents through bounded caches of sinks/separators/window/cache slots (docs/streaming.md), and prints
perplexity, the slots that were held, bytes and tokens/s. "separator" is scored beside "sink_window" at equal slots
(w = c - a). The curve by position goes beside the output, as .csv and .png. --text may be an .npz of token ids, one
array a document.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

import sepjax
from sepjax.checkpoint import load_config
from sepjax.config import PATTERNS, AttentionConfig, Config, ConfigError, DataConfig, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation import curves, perplexity, streaming
from sepjax.evaluation.documents import Document, documents_of, read_documents
from sepjax.flags import one_of_two, run_main
from sepjax.model.transformer import Transformer
from sepjax.provenance import provenance


def evaluate(
    workdir: Path,
    patterns: Sequence[str] = PATTERNS,
    *,
    step: int | None = None,
    text: str = "",
    split: str = "",
    length: int = 0,
    window_size: int = 0,
    batch_size: int = 8,
    max_documents: int = 0,
    **settings: Any,
) -> list[perplexity.Score]:
    """Scores a run or a pretrained model under each of `patterns`; 0 and "" stand for its own settings.

    Further `settings` are those of `sepjax.load`.
    """
    model, tokenizer = sepjax.load(workdir, step=step, **settings)
    config = _config(workdir, model)
    attentions = [_attention(config, pattern, window_size) for pattern in patterns]
    data = dataclasses.replace(config.data, name=text) if text else config.data
    with tempfile.TemporaryDirectory() as scratch:  # a pretrained model has no folder for prepared data
        folder = data.data_dir or str(workdir / "data" if (workdir / "checkpoints").is_dir() else scratch)
        source = _source(data, folder, split or ("all" if text else data.eval_split))
        documents = list(source[: max_documents or len(source)])
    length = length or config.data.sequence_length
    return perplexity.score_patterns(model, tokenizer, documents, attentions, length=length, batch_size=batch_size)


def _config(path: Path, model: Transformer) -> Config:
    """The config of a run, or for a pretrained model one with its settings and windows of 2048 tokens."""
    if (path / "checkpoints").is_dir():
        return load_config(path)
    data = DataConfig(sequence_length=min(2048, model.config.max_positions))
    return Config(model=model.config, attention=model.attention, data=data)


def _source(data: DataConfig, folder: str, split: str) -> Sequence[str]:
    """The documents of a corpus. Imported late: token ids and text files are scored without TFDS."""
    from sepjax.data.sources import text_source

    return text_source(data, folder, split)


def _attention(config: Config, pattern: str, window_size: int) -> AttentionConfig:
    attention = dataclasses.replace(config.attention, pattern=pattern)
    if window_size:
        attention = dataclasses.replace(attention, window_size=window_size, layer_windows=())
    return validate_attention(attention, config.model.num_layers)


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
    rows: int = 32,
    chunk: int = 0,
    **settings: Any,
) -> list[streaming.StreamScore]:
    """Streams text through the bounded cache of each pattern and budget "a/s/w/c"; no budget: the model's own.

    Further `settings` are those of `sepjax.load`.
    """
    model, tokenizer = sepjax.load(path, step=step, **settings)
    attentions = [
        stream_attention(model.attention, pattern, budget, model.config.num_layers)
        for budget in budgets or [""]
        for pattern in patterns
    ]
    cut = {"line_wise": line_wise, "max_tokens": max_tokens}
    documents = read_documents(Path(text), tokenizer, **cut) if text else _corpus(path, split, tokenizer, **cut)
    return streaming.score_streams(model, tokenizer, documents, attentions, rows=rows, chunk=chunk)


def _corpus(path: Path, split: str, tokenizer: Tokenizer, **cut: Any) -> list[Document]:
    """The documents of a run's own corpus."""
    if not (path / "checkpoints").is_dir():
        raise ConfigError("a pretrained model has no corpus of its own: give --text")
    data = load_config(path).data
    source = _source(data, data.data_dir or str(path / "data"), split or data.eval_split)
    return documents_of(tokenizer, source, **cut)


def stream_attention(attention: AttentionConfig, pattern: str, budget: str, num_layers: int) -> AttentionConfig:
    """A pattern at a budget. Without separators their slots go to the window: w = c - a, StreamingLLM."""
    attention = dataclasses.replace(attention, pattern=pattern)
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


def write_curve(output: Path, scores: Sequence[streaming.StreamScore]) -> str:
    """Writes the curve beside `output`; returns what to say about it."""
    curves.write_csv(output.with_suffix(".csv"), scores)
    try:
        curves.write_png(output.with_suffix(".png"), scores)
    except curves.PictureError as error:
        return f"{output.with_suffix('.csv')} (no picture: {error})"
    return f"{output.with_suffix('.csv')}, {output.with_suffix('.png')}"


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run of train.py")
    MODEL = flags.DEFINE_string(
        "model", None, "a pretrained model: smollm2-135m, a Hugging Face folder, a GGUF file, an id on the hub"
    )
    DOWNLOAD = flags.DEFINE_bool("download", False, "with --model=OWNER/NAME: fetch it from the Hugging Face hub")
    DTYPE = flags.DEFINE_string("dtype", None, "with --model: of the arithmetic; default: bfloat16, on a CPU float32")
    TASK = flags.DEFINE_enum("task", "perplexity", ["perplexity", "streaming"], "windows, or whole documents streamed")
    STEP = flags.DEFINE_integer("step", None, "checkpoint to score; default: the newest")
    TEXT = flags.DEFINE_string("text", "", "a .txt file, a folder of them or a TFDS dataset; default: the run's corpus")
    SPLIT = flags.DEFINE_string("split", "", "of that data, as TFDS names it; default: all of --text, or validation")
    PATTERN = flags.DEFINE_list(
        "patterns", None, "attention patterns to compare; default: all, or for streams separator,sink_window"
    )
    LENGTH = flags.DEFINE_integer("length", 0, "tokens of a window; default: as in training", lower_bound=0)
    WINDOW = flags.DEFINE_integer("window_size", 0, "n of every layer; default: as in training", lower_bound=0)
    BATCH = flags.DEFINE_integer("batch_size", 8, "windows of a forward pass", lower_bound=1)
    MAXIMUM = flags.DEFINE_integer("max_documents", 0, "score only the first so many; 0: all", lower_bound=0)
    BUDGETS = flags.DEFINE_list("budgets", [], "of streams: sinks/separators/window/cache, each; default: the model's")
    TOKENS = flags.DEFINE_integer("max_tokens", 0, "stream only the first so many; 0: all", lower_bound=0)
    ROWS = flags.DEFINE_integer("rows", 32, "documents streamed at a time, at most", lower_bound=1)
    CHUNK = flags.DEFINE_integer("chunk", 0, "tokens of a pass; 0: as many as fit; 1: token by token", lower_bound=0)
    LINES = flags.DEFINE_bool("line_wise", False, "the official protocol: a BOS a line, its last token left out")
    OUTPUT = flags.DEFINE_string("output", "", "JSON file; default: <workdir>/evaluation.json or streaming.json")

    def _loading() -> dict[str, Any]:
        return {"step": STEP.value, "dtype": DTYPE.value, "download": DOWNLOAD.value}

    def _windows(path: Path) -> list[perplexity.Score]:
        scores = evaluate(
            path,
            PATTERN.value or PATTERNS,
            text=TEXT.value,
            split=SPLIT.value,
            length=LENGTH.value,
            window_size=WINDOW.value,
            batch_size=BATCH.value,
            max_documents=MAXIMUM.value,
            **_loading(),
        )
        print(perplexity.table(scores))
        return scores

    def _streams(path: Path, output: Path) -> list[streaming.StreamScore]:
        scores = stream(
            path,
            PATTERN.value or ("separator", "sink_window"),
            BUDGETS.value,
            text=TEXT.value,
            split=SPLIT.value,
            line_wise=LINES.value,
            max_tokens=TOKENS.value,
            rows=ROWS.value,
            chunk=CHUNK.value,
            **_loading(),
        )
        print(curves.table(scores))
        print(f"curve by position: {write_curve(output, scores)}")
        return scores

    def main() -> None:
        """Prints the table and writes the JSON."""
        path, streams = (
            Path(one_of_two("workdir", WORKDIR.value, "model", MODEL.value)),
            TASK.value == "streaming",
        )
        folder = path if (path / "checkpoints").is_dir() else Path()
        output = Path(OUTPUT.value or folder / ("streaming.json" if streams else "evaluation.json"))
        scores = _streams(path, output) if streams else _windows(path)
        result = {"workdir": str(path), "text": TEXT.value, "scores": [dataclasses.asdict(s) for s in scores]}
        output.write_text(json.dumps(provenance() | result, indent=2) + "\n")
        print(f"written to {output}")

    run_main(main)
