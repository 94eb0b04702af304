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

    text: str = ""  # a .txt file, a folder of them, an .npz of token ids (an array a document); default: the corpus
    split: str = ""  # of the run's own corpus, as TFDS names it; default: validation
    budgets: tuple[str, ...] | None = None  # sinks/separators/window/cache, each; default: the model's own
    max_tokens: Annotated[int, AtLeast(0)] = 0  # stream only the first so many; 0: all
    rows: Annotated[int, AtLeast(1)] = 32  # documents streamed at a time, at most
    chunk: Annotated[int, AtLeast(0)] = 0  # tokens of a pass; 0: as many as fit; 1: token by token
    line_wise: bool = False  # the official protocol: a BOS a line, its last token left out


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
    print(f"curve by position: {jobs.write_files(output, curves, scores)}")
    common.write(settings, output, _JOB, scores)
