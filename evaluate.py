"""Scores a run on text, under several attention patterns side by side.

    python evaluate.py --workdir=runs/tiny                          the validation split of its corpus
    python evaluate.py --workdir=runs/tiny --text=book.txt          a file, or a folder of .txt files
    python evaluate.py --workdir=runs/tiny --split=train[:1%]       another split of the corpus, as TFDS writes it
    python evaluate.py --workdir=runs/tiny --patterns=separator,dense --window_size=64 --length=1024

Prints a table and writes <workdir>/evaluation.json (or --output). "KV kept" is counted, never a formula.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

import sepjax
from sepjax.checkpoint import load_config
from sepjax.config import PATTERNS, AttentionConfig, Config, validate_attention
from sepjax.data.sources import text_source
from sepjax.evaluation import perplexity
from sepjax.flags import run_main


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
) -> list[perplexity.Score]:
    """Scores the run in `workdir` under each of `patterns`; 0 and "" stand for the run's own settings."""
    config = load_config(workdir)
    attentions = [_attention(config, pattern, window_size) for pattern in patterns]
    data = dataclasses.replace(config.data, name=text) if text else config.data
    source = text_source(data, data.data_dir or str(workdir / "data"), split or ("all" if text else data.eval_split))
    documents = source[: max_documents or len(source)]
    model, tokenizer = sepjax.load(workdir, step=step)
    length = length or config.data.sequence_length
    return perplexity.score_patterns(model, tokenizer, documents, attentions, length=length, batch_size=batch_size)


def _attention(config: Config, pattern: str, window_size: int) -> AttentionConfig:
    attention = dataclasses.replace(config.attention, pattern=pattern)
    if window_size:
        attention = dataclasses.replace(attention, window_size=window_size, layer_windows=())
    return validate_attention(attention, config.model.num_layers)


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run that train.py wrote", required=True)
    STEP = flags.DEFINE_integer("step", None, "checkpoint to score; default: the newest")
    TEXT = flags.DEFINE_string("text", "", "a .txt file, a folder of them or a TFDS dataset; default: the run's corpus")
    SPLIT = flags.DEFINE_string("split", "", "of that data, as TFDS names it; default: all of --text, or validation")
    PATTERN = flags.DEFINE_list("patterns", list(PATTERNS), "attention patterns to compare")
    LENGTH = flags.DEFINE_integer("length", 0, "tokens of a window; default: as in training", lower_bound=0)
    WINDOW = flags.DEFINE_integer("window_size", 0, "n of every layer; default: as in training", lower_bound=0)
    BATCH = flags.DEFINE_integer("batch_size", 8, "windows of a forward pass", lower_bound=1)
    MAXIMUM = flags.DEFINE_integer("max_documents", 0, "score only the first so many; 0: all", lower_bound=0)
    OUTPUT = flags.DEFINE_string("output", "", "JSON file; default: <workdir>/evaluation.json")

    def main() -> None:
        """Prints the table and writes the JSON."""
        workdir = Path(WORKDIR.value)
        scores = evaluate(
            workdir,
            PATTERN.value,
            step=STEP.value,
            text=TEXT.value,
            split=SPLIT.value,
            length=LENGTH.value,
            window_size=WINDOW.value,
            batch_size=BATCH.value,
            max_documents=MAXIMUM.value,
        )
        print(perplexity.table(scores))
        output = Path(OUTPUT.value or workdir / "evaluation.json")
        result = {"workdir": str(workdir), "text": TEXT.value, "scores": [dataclasses.asdict(s) for s in scores]}
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {output}")

    run_main(main)
