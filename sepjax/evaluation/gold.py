"""How likely a model finds the right answers of lm-eval's tasks: a number that moves long before accuracy does.

The right answer of a document is the continuation that the task scores by: the right one of several choices, the text
of a task that scores one, and, where answers are generated, the reference as it would stand behind the prompt.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

NATS = "gold_nats_per_token,none"


@dataclasses.dataclass(frozen=True)
class Gold:
    """The right answer of one document. `logprob` is None where the task has not asked for it."""

    context: str
    continuation: str
    logprob: float | None


def gold_answers(tasks: Mapping[str, Any], samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Gold]:
    """The right answers of what was asked, one a document that has one.

    Args:
      tasks: lm-eval's task objects by name.
      samples: what lm-eval has logged of each of them (`log_samples=True`), by name.
    """
    found = []
    for name, rows in samples.items():
        once = {row["doc_id"]: row for row in rows}  # a filter each has its own
        found += [gold for row in once.values() if (gold := _gold(tasks[name], row)) is not None]
    return found


def _gold(task: Any, row: Mapping[str, Any]) -> Gold | None:
    kind, asked = task.OUTPUT_TYPE, row["arguments"]
    if kind == "loglikelihood":
        context, continuation = asked[0]
        return Gold(context, continuation, row["resps"][0][0][0])
    if kind == "multiple_choice":
        right = _index(task, row)
        if right is None:
            return None
        context, continuation = asked[right]
        return Gold(context, continuation, row["resps"][right][0][0])
    target = row["target"][0] if isinstance(row["target"], list) and row["target"] else row["target"]
    if kind == "generate_until" and isinstance(target, str | int | float) and str(target):
        return Gold(asked[0][0], f"{task.config.target_delimiter}{target}", None)
    return None  # whole texts have no answer


def _index(task: Any, row: Mapping[str, Any]) -> int | None:
    """Which of the choices is right: the first, if several are; None: the document does not say."""
    choices = task.doc_to_choice(row["doc"])
    right = task.doc_to_text(row["doc"]) if task.multiple_input else row["target"]
    right = right[0] if isinstance(right, list) and right else right
    if isinstance(right, str):
        right = choices.index(right) if right in choices else None
    return right if isinstance(right, int) and 0 <= right < len(choices) else None


def nats_per_token(nats: Sequence[float], tokens: Sequence[int]) -> tuple[float, float | None]:
    """Loss of all answers over all their tokens, and its standard error over documents (None for one).

    Args:
      nats: of each answer, as a whole.
      tokens: of each answer, 1 or more.
    """
    losses, lengths = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
    mean, n = float(losses.sum() / lengths.sum()), len(losses)
    if n < 2:
        return mean, None
    residues = losses - mean * lengths
    return mean, math.sqrt(n / (n - 1) * float((residues**2).sum())) / float(lengths.sum())
