"""lm-eval's tasks under several patterns side by side, at equal KV, with the keys that were kept counted.

Of every request the adapter notes what was held and seen; `kv_kept` of a task is their ratio, averaged. A pattern that
kept everything, because every prompt fits its window, is refused: its score would be the dense one under another name.
"""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepjax.config import AttentionConfig, UserError, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.equal import window_of_equal_kept
from sepjax.evaluation.gold import NATS, Gold, gold_answers, nats_per_token
from sepjax.hub.chat_template import ChatTemplate
from sepjax.model.transformer import Transformer

_TABLE_DIGITS = 4


class TaskError(UserError, ValueError):
    """A task that lm-eval does not know, or lm-eval itself missing."""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One task under one pattern. `metrics` is empty where `refused` says why."""

    task: str
    pattern: str
    num_sinks: int
    window_size: int  # 0: dense
    interval: int
    metrics: dict[str, float]  # "acc,none", "exact_match,strict-match", ..., and of the right answers NATS
    errors: dict[str, float | None]  # standard errors of the same names
    requests: int
    documents: int
    kv_kept: float  # held over seen at the last token, averaged over requests
    tokens: int  # that the model computed, prompts and answers; an input that requests share counts once
    generated: int
    seconds: float  # that it took: encoding, compilation and the device, without lm-eval's prompts and statistics
    refused: str  # why there is no score; empty: there is one

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and answers together, compilation included."""
        return self.tokens / self.seconds if self.seconds else 0.0


def run_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    patterns: Sequence[AttentionConfig],
    *,
    data: Path | None = None,
    limit: int | float = 0,
    num_fewshot: int | None = None,
    equal_kv: bool = True,
    batch_size: int = 64,
    batch_tokens: int = 65_536,
    chat_template: ChatTemplate | None = None,
    apply_chat_template: bool = False,
    consume: bool = False,
) -> Iterable[TaskScore]:
    """Yields a score for each task and pattern, as they are done.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      tasks: names of lm-eval's tasks or groups.
      patterns: in order. With `equal_kv`, "sink_window" and "fixed_interval" after "separator" get the window that
        keeps as many keys as the separators did in that task.
      data: folder of local datasets (`sepjax.evaluation.lm_eval_data`); None: lm-eval downloads them.
      limit: documents of each (sub)task; below 1: their share; 0: all.
      num_fewshot: examples before each question; None: the task's own number.
      equal_kv: see `patterns`.
      batch_size: answers generated at a time.
      batch_tokens: tokens of a forward pass that scores.
      chat_template: the model's.
      apply_chat_template: whether prompts are put into it.
      consume: whether the model is given up, as `Generator` has it, once a task asks for answers.

    Raises:
      TaskError: lm-eval is not installed, or does not know a task; a limit that is no number of documents.
      sepjax.evaluation.lm_eval_data.TaskDataError: a local dataset is missing or damaged.
    """
    if not (0 <= limit < 1 or limit == limit // 1 >= 1):  # so that NaN fails too
        raise TaskError(f"limit={limit} must be a whole number of documents, or their share below 1; 0: all")
    require_lm_eval()
    from sepjax.evaluation.lm_eval_model import SepjaxLM

    for task in tasks:
        reference: TaskScore | None = None
        uses: list[Any] = []
        encoded: dict[str, np.ndarray] = {}
        for attention in patterns:
            if equal_kv and reference is not None and attention.pattern in ("sink_window", "fixed_interval"):
                attention = window_of_equal_kept(attention, [u.seen for u in uses], reference.kv_kept)
                attention = validate_attention(attention, model.config.num_layers)
            lm = SepjaxLM(
                model, tokenizer, attention,
                batch_size=batch_size, batch_tokens=batch_tokens, chat_template=chat_template,
                encoded=encoded, consume=consume,
            )  # fmt: skip
            score = _score(task, attention, lm, *_evaluate(lm, task, data, limit, num_fewshot, apply_chat_template))
            if attention.pattern == "separator" and not score.refused:
                reference, uses = score, list(lm.uses.values())
            yield score


def require_lm_eval() -> None:
    """Raises TaskError where it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise TaskError('tasks are run by lm-eval, which is missing: pip install "sepjax[eval]"') from error


def _evaluate(
    lm: Any, task: str, data: Path | None, limit: int | float, num_fewshot: int | None, apply_chat_template: bool
) -> tuple[dict[str, Any], list[Gold]]:
    """lm-eval's results, and the right answers."""
    from lm_eval.evaluator import simple_evaluate

    manager: Any = _Noting(_manager(task))

    from sepjax.evaluation.lm_eval_data import local_datasets

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork for its bootstrap, which JAX cannot stand
    with metrics_package(), local_datasets(data):
        results: Any = simple_evaluate(
            lm,
            tasks=[task],
            num_fewshot=num_fewshot,
            limit=(limit if limit < 1 else int(limit)) or None,
            task_manager=manager,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            log_samples=True,
            bootstrap_iters=1000,
        )
        return results, gold_answers(manager.loaded, results["samples"])


class _Noting:
    """A manager of tasks that notes the ones it has made: they alone know which choice is right."""

    def __init__(self, manager: Any):
        self._manager, self.loaded = manager, {}

    def load(self, tasks: Any) -> Any:
        with _no_look_at_empty_choices():
            made = self._manager.load(tasks)
        self.loaded = made["tasks"]
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


@contextlib.contextmanager
def _no_look_at_empty_choices() -> Iterator[None]:
    """Inside, lm-eval's tasks can be made: each looks at the first character of its first document's choices, if only
    to note it in a log, and would end with an IndexError where a choice has none.
    """
    from lm_eval.api.task import ConfigurableTask

    own = ConfigurableTask.doc_to_choice

    def doc_to_choice(self: Any, *args: Any, **settings: Any) -> Any:
        choices = own(self, *args, **settings)
        return [choice or " " for choice in choices] if isinstance(choices, list) else choices

    ConfigurableTask.doc_to_choice = doc_to_choice
    try:
        yield
    finally:
        ConfigurableTask.doc_to_choice = own


@contextlib.contextmanager
def metrics_package() -> Iterator[None]:
    """Inside, `import evaluate` is the package of that name, with whose metrics some of lm-eval's tasks score.

    While `python evaluate.py` runs, or `python -m sepjax` in a checkout, it would be our file.
    """
    before, path = sys.modules.get("evaluate"), sys.path[:]
    if hasattr(before, "__path__"):  # it is a package already
        yield
        return
    sys.modules.pop("evaluate", None)
    sys.path[:] = [folder for folder in path if not Path(folder, "evaluate.py").is_file()]
    try:
        yield
    finally:
        sys.path[:] = [*path, *(folder for folder in sys.path if folder not in path)]
        if before is not None:
            sys.modules["evaluate"] = before


@functools.cache
def _manager(task: str) -> Any:
    """lm-eval's index of the folders whose names the task's begins with: of all of them it takes many seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    parts = task.split("_")
    homes = [root / "_".join(parts[: i + 1]) for i in range(len(parts))]
    near = lm_eval.tasks.TaskManager(include_path=[h for h in homes if h.is_dir()], include_defaults=False)
    if task in near.all_tasks:
        return near
    every = lm_eval.tasks.TaskManager()
    if task not in every.all_tasks:
        raise TaskError(f"lm-eval has no task {task!r}; `lm-eval ls tasks` lists them")
    return every


def _score(task: str, attention: AttentionConfig, lm: Any, results: dict[str, Any], gold: list[Gold]) -> TaskScore:
    uses = list(lm.uses.values())
    kept = float(np.mean([use.held / use.seen for use in uses])) if uses else 1.0
    refused = ""
    if not uses:
        refused = "every request was empty"
    elif attention.pattern != "dense" and all(use.held >= use.seen for use in uses):
        refused = (
            f"nothing was compressed: the longest of {len(uses)} requests has {max(use.seen for use in uses)} tokens, "
            f"all of which n={attention.window_size} keeps; choose a smaller --window_size"
        )
    numbers = results.get("groups", {}).get(task) or results["results"][task]
    named = {key: value for key, value in numbers.items() if "," in key and isinstance(value, (int, float))}
    if gold and not refused:
        nats, error = nats_per_token(*lm.gold(gold))
        named |= {NATS: nats} if error is None else {NATS: nats, NATS.replace(",", "_stderr,"): error}
    samples = results.get("n-samples", {})
    return TaskScore(
        task=task,
        pattern=attention.pattern,
        num_sinks=0 if attention.pattern == "dense" else attention.num_sinks,
        window_size=0 if attention.pattern == "dense" else attention.window_size,
        interval=attention.interval,
        metrics={} if refused else {k: float(v) for k, v in named.items() if "_stderr," not in k},
        errors={} if refused else {k.replace("_stderr", ""): float(v) for k, v in named.items() if "_stderr," in k},
        requests=len(uses),
        documents=sum(x.get("effective", 0) for x in samples.values()),
        kv_kept=kept,
        tokens=lm.computed,
        generated=sum(use.generated for use in uses),
        seconds=lm.seconds,
        refused=refused,
    )


def table(scores: Iterable[TaskScore]) -> str:
    """The scores as a text table, a line a metric."""
    lines = [
        f"{'task':<18}{'pattern':<16}{'a':>3}{'n':>6}{'KV kept':>9}  {'metric':<30}{'value':>10}{'stderr':>10}"
        f"{'documents':>11}{'tokens/s':>10}"
    ]
    for s in scores:
        head = f"{s.task:<18}{s.pattern:<16}{s.num_sinks:>3}{s.window_size or '':>6}{s.kv_kept:>9.1%}  "
        if s.refused:
            lines.append(f"{head}not reported: {s.refused}")
        for name, value in s.metrics.items():
            error = s.errors.get(name)
            stderr = "" if error is None else f"{error:.{_TABLE_DIGITS}f}"
            lines.append(
                f"{head}{name.removesuffix(',none'):<30}{value:>10.{_TABLE_DIGITS}f}{stderr:>10}{s.documents:>11,}"
                f"{s.tokens_per_second:>10,.0f}"
            )
    return "\n".join(lines)
