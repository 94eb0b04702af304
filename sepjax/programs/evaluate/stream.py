"""streams whole documents through bounded caches: perplexity, slots, bytes and tokens/s

    sepjax evaluate stream --model=smollm2-135m --text=books/ --budgets=4/64/256/800,4/64/224/324

Budgets are sinks/separators/window/cache (docs/streaming.md). Without --patterns, "separator" is scored beside
"sink_window" at equal slots. The curve by position goes beside the output, as .csv and .png.
"""

import dataclasses
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.programs.evaluate import common

_JOB = "stream"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Sliced, common.Compared):
    """What is streamed, through which caches."""

    # a .txt file, a folder of them, or an .npz of token ids (one array per document); default: the corpus
    text: str = ""
    split: str = ""  # split of the run's corpus, in TFDS's syntax; default: validation
    budgets: tuple[str, ...] | None = None  # cache sizes as sinks/separators/window/cache; default: the model's own
    max_tokens: Annotated[int, AtLeast(0)] = 0  # maximum tokens to stream; 0: all
    rows: Annotated[int, AtLeast(1)] = 32  # maximum documents streamed at a time
    chunk: Annotated[int, AtLeast(0)] = 0  # tokens per pass; 0: as many as fit; 1: token by token
    line_wise: bool = False  # the official protocol: BOS in front of every line, its last token left out


def main(settings: Settings) -> None:
    """Prints the tables; writes the JSON and the curve."""
    settings, output = common.begin(settings, _JOB)
    from sepjax.evaluation import curves, jobs

    scores = jobs.stream(
        settings.path,
        settings.patterns or ("separator", "sink_window"),
        settings.budgets or (),
        text=settings.text,
        split=settings.split,
        line_wise=settings.line_wise,
        max_tokens=settings.max_tokens,
        arms=settings.arms,
        loading=settings.loading,
        rows=settings.rows,
        chunk=settings.chunk,
        **settings.slices,
    )
    print(curves.table(scores), curves.times(scores), sep="\n")
    common.print_slices(scores)
    common.write(settings, output, _JOB, scores)
    print(f"curve by position: {jobs.write_files(output, curves, scores)}")
    common.check_numbers(scores)
