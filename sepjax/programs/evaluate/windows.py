"""scores texts in windows under several patterns: perplexity, KV kept, loss by slice

    sepjax evaluate windows --workdir=runs/tiny                      the validation split of its corpus
    sepjax evaluate windows --workdir=runs/tiny --text=book.txt      a file, or a folder of .txt files
    sepjax evaluate windows --workdir=runs/tiny --split=train[:1%]   another split of the corpus, in TFDS's syntax
    sepjax evaluate windows --model=smollm2-135m --text=books/ --arms="dense; sink_window n=657; separator n=256"

Without --patterns and --arms: all patterns that the model can run.
"""

import dataclasses

from sepjax.programs.evaluate import common

_JOB = "windows"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Texts, common.Sliced, common.Compared):
    """What is scored, under which patterns."""


def main(settings: Settings) -> None:
    """Prints the tables and writes the JSON."""
    settings, output = common.begin(settings, _JOB)
    from sepjax.evaluation import jobs, report

    given = settings.texts | settings.slices | settings.loading
    scores = jobs.evaluate(settings.path, settings.patterns or (), arms=settings.arms, **given)
    print(report.table(scores))
    common.print_slices(scores)
    common.write(settings, output, _JOB, scores)
    common.check_numbers(scores)
