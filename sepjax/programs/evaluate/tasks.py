"""runs tasks of EleutherAI's lm-eval under several patterns, from the hub or from local files

    sepjax evaluate tasks --task=gsm8k_cot,mmlu --model=smollm2-135m --patterns=dense,separator,sink_window

Without --patterns: dense, separator and sink_window (docs/pretrained.md).
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.config import ConfigError
from sepjax.programs.common import refuse_window
from sepjax.programs.evaluate import common

_JOB = "tasks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Job):
    """Which tasks, and how they are asked."""

    task: tuple[str, ...]  # names of lm-eval tasks
    patterns: tuple[str, ...] | None = None  # attention patterns to compare; default: see above
    window_size: Annotated[int, AtLeast(0)] = 0  # n, the local window of every layer; default: as in training
    task_data: str | None = None  # folder of local datasets for tasks; default: the hub's
    limit: Annotated[float, AtLeast(0)] = 0.0  # documents per task; below 1: a share of them; 0: all
    num_fewshot: int | None = None  # examples before each question; default: the task's own number
    equal_kv: bool = True  # give the other patterns as many keys as the separators kept
    batch_size: Annotated[int, AtLeast(1)] = 8  # answers generated at a time
    batch_tokens: Annotated[int, AtLeast(1)] = 65_536  # tokens per scoring pass
    apply_chat_template: bool = False  # put prompts into the model's chat template

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.task) or not self.task:
            raise ConfigError(f"--task={','.join(self.task)}: expected names of tasks with commas between them")
        if self.window_size and self.patterns and set(self.patterns) == {"dense"}:
            refuse_window("dense", ["window_size"])


def main(settings: Settings) -> None:
    """Prints a table as each task is done, and writes the JSON."""
    settings, output = common.begin(settings, _JOB)
    from sepjax.evaluation import jobs

    scores = jobs.run_tasks(
        settings.path,
        settings.task,
        settings.patterns or ("dense", "separator", "sink_window"),
        window_size=settings.window_size,
        data=Path(settings.task_data) if settings.task_data else None,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        equal_kv=settings.equal_kv,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        apply_chat_template=settings.apply_chat_template,
        **settings.loading,
    )
    common.write(settings, output, _JOB, scores)
