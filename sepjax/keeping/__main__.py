"""Measures which tokens are worth keeping: `python -m sepjax.keeping table --model=... --text=... --density=0.12`."""

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags

import sepjax
from sepjax.console import say
from sepjax.evaluation.documents import read_texts
from sepjax.flags import run_main
from sepjax.keeping.measure import MEASURES
from sepjax.keeping.table import measure_table, store
from sepjax.loading import locate

if __name__ == "__main__":
    MODEL = flags.DEFINE_string(
        "model", None, "what sepjax.load reads: a workdir, a folder, a GGUF file", required=True
    )
    TEXT = flags.DEFINE_string("text", None, "a .txt file or a folder of them, like what will be read", required=True)
    DENSITY = flags.DEFINE_float("density", 0.12, "kept tokens a token")
    BY = flags.DEFINE_enum("by", "loss", MEASURES, "what an id's worth is measured by (sepjax/keeping/measure.py)")
    WINDOW = flags.DEFINE_integer("window_size", 256, "n: what is nearer is seen in any case", lower_bound=1)
    LENGTH = flags.DEFINE_integer("length", 1024, "tokens of a measured row", lower_bound=2)
    TOKENS = flags.DEFINE_integer("max_tokens", 65_536, "measured at most; all of --text is counted", lower_bound=1)
    OUTPUT = flags.DEFINE_string("output", "kept.json", "the table: ids, and how they were found")
    STORE = flags.DEFINE_bool("store", False, "also make it the separators of the model in its Hugging Face folder")

    def main() -> None:
        """Writes the table and says what is in it."""
        model, tokenizer = sepjax.load(MODEL.value)
        settings = {"density": DENSITY.value, "window_size": WINDOW.value, "length": LENGTH.value}
        texts = read_texts(Path(TEXT.value))
        table = measure_table(model, tokenizer, texts, by=BY.value, max_tokens=TOKENS.value, **settings)
        Path(OUTPUT.value).write_text(json.dumps(dataclasses.asdict(table)) + "\n", encoding="utf-8")
        frequent = " ".join(repr(text) for text, _ in table.most)
        print(f"{len(table.separator_ids):,} ids, {table.kept:.2%} of {table.tokens:,} tokens; most often: {frequent}")
        print(f"written to {OUTPUT.value}")
        if STORE.value:
            say(f"stored in {store(table, locate(MODEL.value), model.attention)}")

    if sys.argv[1:2] != ["table"]:
        print(
            "usage: python -m sepjax.keeping table --model=... --text=... [--by=loss] [--density=0.12]", file=sys.stderr
        )
        sys.exit(2)
    del sys.argv[1]
    run_main(main)
