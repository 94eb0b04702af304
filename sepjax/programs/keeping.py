"""measures which tokens are worth keeping, and writes a table of them

    sepjax keeping --model=smollm2-135m --text=books/ --by=loss --density=0.12 --output=kept.json

To train with the table, use --config.attention.separators=kept.json (docs/evaluation.md).
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from sepjax.command.settings import AtLeast, OneOf
from sepjax.command.settings import Settings as _Settings
from sepjax.keeping import MEASURES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """Which model, on which text."""

    model: str  # what sepjax.load reads: a workdir, a folder, a GGUF file
    text: str  # a .txt file or a folder of them, similar to the texts of later use
    density: float = 0.12  # share of tokens to keep
    by: Annotated[str, OneOf(MEASURES)] = "loss"  # how to measure the worth of a token id (sepjax/keeping/measure.py)
    window_size: Annotated[int, AtLeast(1)] = 256  # n, the local window; nearer tokens are visible anyway
    length: Annotated[int, AtLeast(2)] = 1024  # tokens per row
    max_tokens: Annotated[int, AtLeast(1)] = 65_536  # maximum tokens to run through the model; all of --text is counted
    output: str = "kept.json"  # JSON file to write: the ids, and how they were found
    store: bool = False  # also store the ids as the model's separators in its Hugging Face folder


def main(settings: Settings) -> None:
    """Writes the table and says what is in it."""
    from sepjax.console import say
    from sepjax.evaluation.documents import read_texts
    from sepjax.files import check_file, write_text
    from sepjax.keeping.table import measure_table, store
    from sepjax.loading import load, locate

    check_file(settings.output)
    texts = read_texts(Path(settings.text))
    model, tokenizer = load(settings.model)
    table = measure_table(
        model, tokenizer, texts, by=settings.by, max_tokens=settings.max_tokens,
        density=settings.density, window_size=settings.window_size, length=settings.length,
    )  # fmt: skip
    write_text(settings.output, json.dumps(dataclasses.asdict(table)) + "\n")
    frequent = " ".join(repr(text) for text, _ in table.most)
    print(f"{len(table.separator_ids):,} ids, {table.kept:.2%} of {table.tokens:,} tokens; most often: {frequent}")
    print(f"written to {settings.output}")
    if settings.store:
        say(f"stored in {store(table, locate(settings.model), model.attention)}")
