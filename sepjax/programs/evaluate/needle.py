"""hides a number in long texts and asks for it: the share found, by length and depth

    sepjax evaluate needle --model=smollm2-135m --text=books/ --lengths=512,1024 --depths=0,50,100

Without --patterns: dense, separator and sink_window. A heat map goes beside the output, as .csv and .png.
"""

import dataclasses
from typing import Annotated

from sepjax.command.settings import AtLeast, AtMost
from sepjax.programs.evaluate import common

_JOB = "needle"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Compared):
    """Which texts, and where in them."""

    text: str = ""  # a .txt file or a folder of them, in which to hide needles
    window_size: Annotated[int, AtLeast(0)] = 0  # n, the local window of every layer; default: as in training
    lengths: Annotated[tuple[int, ...], AtLeast(1)] = (512, 1024, 2048)  # tokens of the texts
    # percent of the text before the needle
    depths: Annotated[tuple[int, ...], AtLeast(0), AtMost(100)] = (0, 25, 50, 75, 100)
    tails: Annotated[tuple[int, ...], AtLeast(0)] = (0,)  # words after the number in the needle's sentence
    trials: Annotated[int, AtLeast(1)] = 10  # texts per length and depth
    batch_tokens: Annotated[int, AtLeast(1)] = 65_536  # tokens per pass


def main(settings: Settings) -> None:
    """Prints the table; writes the JSON and the heat map."""
    settings, output = common.begin(settings, _JOB)
    from sepjax.evaluation import jobs, needle

    cells = jobs.find_needles(
        settings.path,
        settings.patterns or ("dense", "separator", "sink_window"),
        text=settings.text,
        lengths=settings.lengths,
        depths=[percent / 100 for percent in settings.depths],
        tails=settings.tails,
        arms=settings.arms,
        window_size=settings.window_size,
        trials=settings.trials,
        batch_tokens=settings.batch_tokens,
        **settings.loading,
    )
    print(needle.table(cells))
    common.write(settings, output, _JOB, cells)
    print(f"cells and heat map: {jobs.write_files(output, needle, cells)}")
