"""scores texts in windows, all patterns at equal cost

    sepjax evaluate compare --model=smollm2-135m --text=books/ [--compare_at=pairs]

Every pattern keeps as many keys as the separators do, or with --compare_at=pairs sees as many (query, key) pairs.
"""

import dataclasses
from typing import Annotated

from sepjax.command.settings import OneOf
from sepjax.programs.evaluate import common

_JOB = "compare"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Texts, common.Sliced, common.Job):
    """What is scored, and what is made equal."""

    compare_at: Annotated[str, OneOf(("kv", "pairs"))] = "kv"  # cost to make equal: keys kept, or (query, key) pairs


def main(settings: Settings) -> None:
    """Prints the tables and writes the JSON."""
    settings, output = common.begin(settings, _JOB)
    from sepjax.evaluation import jobs, report

    given = settings.texts | settings.slices | settings.loading
    scores = jobs.evaluate(settings.path, equal=settings.compare_at, **given)
    print(report.table(scores))
    common.print_slices(scores)
    common.write(settings, output, _JOB, scores)
    common.check_numbers(scores)
