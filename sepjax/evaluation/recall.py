"""How much of the generated recall task a pattern answers: by how long ago a fact stood, and where in its segment.

    --Kq---.  ...  ?K[q]       ago: tokens from the fact's value to the question's; place: tokens from it to the end

Only the first question for a key counts: the next may be answered from it. An answer is recalled where it has more than
half of the probability, which makes it the model's best one. Chance is 1 in 26, ln 26 = 3.26 nats.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepjax.config import UserError, under, validate_attention
from sepjax.data.corpora.recall.recall import END, KEYS, QUESTION, VALUES
from sepjax.data.sources import text_source
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.arms import Arm, fixed_arms, plain_arms
from sepjax.evaluation.perplexity import TextWindows, score_windows, token_windows
from sepjax.generation import lost
from sepjax.loading import load as load_model
from sepjax.model.transformer import Transformer
from sepjax.run.checkpoint import load_config

CHANCE = 1 / len(VALUES)


class RecallError(UserError, ValueError):
    """Texts without questions."""


@dataclasses.dataclass(frozen=True)
class Recalled:
    """The answers of one kind under one pattern."""

    arm: str
    kind: str  # "all", "ago 64-90", "place 3"
    kv_kept: float  # of whole rows, counted
    recalled: float  # share of the answers
    error: float  # one standard error of it
    loss: float  # nats an answer
    answers: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """Where the answers are among all scored tokens, and where their facts were."""

    at: np.ndarray  # int[Q] of the scored tokens, row after row
    ago: np.ndarray  # int[Q]
    place: np.ndarray  # int[Q] tokens between the value and the end of its segment

    @classmethod
    def find(cls, tokenizer: Tokenizer, windows: TextWindows) -> "Answers":
        """Raises `RecallError` where there are none."""
        found, start = [], 0
        for ids in windows.ids:
            text = "".join(x or " " for x in map(tokenizer.token_texts().__getitem__, ids.tolist()))
            for i in range(2, len(text)):
                question = text[i - 2 : i]
                if question[0] == QUESTION and question[1] in KEYS and text.find(question) == i - 2:  # the first time
                    fact = text.find(text[i - 1 : i + 1], 0, i - 1)
                    if fact >= 0:
                        found.append((start + i - 1, i - 1 - fact, text.index(END, fact) - fact - 2))
            start += len(ids) - 1
        if not found:
            raise RecallError('no questions in the texts: sepjax evaluate recall is for data.name="recall"')
        return cls(*(np.array(x) for x in zip(*found, strict=True)))

    def kinds(self) -> list[tuple[str, np.ndarray]]:
        """Groups of answers: all, half octaves of `ago`, places."""
        octave = np.floor(2 * np.log2(self.ago)).astype(int)
        edges = {x: (math.ceil(2 ** (x / 2)), math.ceil(2 ** ((x + 1) / 2)) - 1) for x in np.unique(octave).tolist()}
        ages = [(f"ago {low}-{high}", octave == x) for x, (low, high) in edges.items()]
        places = [(f"place {x}", self.place == x) for x in np.unique(self.place).tolist()]
        return [("all", np.ones(len(self.at), bool)), *ages, *places]


def score_recall(
    model: Transformer,
    tokenizer: Tokenizer,
    windows: TextWindows,
    arms: Sequence[Arm],
    *,
    length: int,
    batch_size: int = 8,
) -> list[Recalled]:
    """Scores the answers of rows of the recall task under each arm.

    Raises:
      RecallError: there are no answers.
      NotNumbers: the model's scores are NaN or infinite.
    """
    found: list[Recalled] = []
    answers = Answers.find(tokenizer, windows)
    for arm in arms:
        attention = validate_attention(arm.attention, model.config.num_layers)
        scores = score_windows(model, tokenizer, windows, attention, length=length, batch_size=batch_size)
        nll = scores.nll[answers.at].astype(np.float64)
        lost.check_scores(nll, f"recall with {arm.name}")
        for kind, mask in answers.kinds():
            share, count = float(np.mean(nll[mask] < math.log(2))), int(mask.sum())
            error = math.sqrt(share * (1 - share) / max(count - 1, 1))
            found.append(Recalled(arm.name, kind, scores.kv_kept, share, error, float(nll[mask].mean()), count))
    return found


def score_run(
    workdir: Path, patterns: Sequence[str] = (), *, arms: str = "", batch_size: int = 8, **loading: Any
) -> list[Recalled]:
    """Scores a run with data.name="recall" on its evaluation split, under its own pattern unless told otherwise.

    `loading` is for `sepjax.load`.
    """
    model, tokenizer = load_model(workdir, **loading)
    config = load_config(workdir)
    length, folder = config.data.sequence_length, config.data.data_dir or str(workdir / "data")
    texts = text_source(config.data, folder, config.data.eval_split)[:]
    windows = token_windows(tokenizer, texts, length, start=tokenizer.document_start)  # as in training
    own = model.attention
    compared = plain_arms([under(own, x) for x in patterns or [own.pattern]])
    if arms:
        compared = fixed_arms(arms, own, model.config.num_layers)
    return score_recall(model, tokenizer, windows, compared, length=length, batch_size=batch_size)


def table(cells: Sequence[Recalled]) -> str:
    """A row for each arm and kind of answers."""
    wide = max(16, *(len(x.arm) + 2 for x in cells))
    lines = [f"{'arm':<{wide}}{'answers':<14}{'KV kept':>9}{'recalled':>10}{'+-':>7}{'nats':>8}{'number':>9}"]
    lines += [
        f"{x.arm:<{wide}}{x.kind:<14}{x.kv_kept:>9.1%}{x.recalled:>10.1%}{x.error:>7.1%}{x.loss:>8.3f}{x.answers:>9,}"
        for x in cells
    ]
    return "\n".join([*lines, f"chance: {CHANCE:.1%}, {-math.log(CHANCE):.3f} nats"])
