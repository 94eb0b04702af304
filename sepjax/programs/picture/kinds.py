"""draws the share of long-range attention that separators, names, numbers and words receive

sepjax picture kinds --model=smollm2-135m --text=books/ --window_size=256 --output=kinds.svg
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.config import ConfigError
from sepjax.programs.common import Loading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Loading):
    """Which model, on which text."""

    text: str  # a .txt file or a folder of them
    window_size: Annotated[int, AtLeast(1)] = 256  # n, the local window; attention beyond it counts
    length: Annotated[int, AtLeast(2)] = 1024  # tokens per row
    max_tokens: Annotated[int, AtLeast(1)] = 16_384  # maximum tokens to measure
    output: str = "kinds.png"  # a .png, .svg or .pdf file

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length <= self.window_size:
            raise ConfigError(
                f"--length={self.length} is not more than --window_size={self.window_size}: nothing is far in such "
                "rows; raise it, or lower --window_size"
            )


def main(settings: Settings) -> None:
    """Writes the figure, and says the same as a table."""
    from sepjax.evaluation.documents import read_texts
    from sepjax.evaluation.perplexity import token_windows
    from sepjax.keeping.kinds import far_attention_by_kind
    from sepjax.keeping.table import rows_with_a_past
    from sepjax.loading import load
    from sepjax.pictures import draw_kinds
    from sepjax.pictures.figures import check_output

    check_output(Path(settings.output))
    texts = read_texts(Path(settings.text))
    model, tokenizer = load(settings.path, **settings.loading)
    windows = token_windows(tokenizer, texts, settings.length).ids
    rows = rows_with_a_past(windows, settings.window_size, settings.length, settings.max_tokens)
    kinds = far_attention_by_kind(
        model, tokenizer, rows, window_size=settings.window_size, num_sinks=model.attention.num_sinks
    )
    print(f"{'kind':<16}{'tokens':>9}{'far attention':>16}{'a token':>10}{'+-':>8}")
    for x in kinds:
        error = "" if x.error is None else f"{x.error:.2f}"
        print(f"{x.kind:<16}{x.tokens:>9.1%}{x.attention:>16.1%}{x.relative:>10.2f}{error:>8}")
    measured = sum(map(len, rows))
    what = (
        f"{settings.path.name}, {Path(settings.text).name}: attention from {settings.window_size} tokens later or more"
    )
    draw_kinds(
        Path(settings.output), kinds, f"{what}, {measured:,} tokens; bars: one standard error over {len(rows)} rows"
    )
    print(f"written to {settings.output}")
