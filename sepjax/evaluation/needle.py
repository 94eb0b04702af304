"""A needle in a haystack: is a number, told once somewhere in a long text, still known at its end?

    haystack ... The secret number of the harbour is 48213. ... haystack. The secret number of the harbour is [48213]

At each length and depth several texts are made, each with its own place name and number. With `tails`, that many words
without a separator follow the number in its sentence: a kept separator stands next to the number, or far from it.
Found means that every token of the number is the model's best one: what greedy decoding would write. The mean
log-probability tells more of a weak model.
"""

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepjax.config import UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.arms import Arm
from sepjax.evaluation.scoring import score_continuations
from sepjax.model.transformer import Transformer
from sepjax.pictures.canvas import blank
from sepjax.progress import working

_PLACES = ("harbour", "library", "mill", "castle", "bakery", "theatre", "station", "garden", "tower", "market")
_NEEDLE = " The secret number of the {place} is {number}{tail}."
_TAIL = (
    " and everybody who ever came there on foot or by ship or with the night train from the old capital beyond the "
    "hills knew it by heart and would have told it to any stranger who asked for it at the gate on a market day in May"
)
_WORDS = _TAIL.split(" ")
_QUESTION = "\n\nQuestion: What is the secret number of the {place}?\nAnswer: The secret number of the {place} is"


class NeedleError(UserError, ValueError):
    """A grid that cannot be made from the text."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One length, depth and tail under one pattern."""

    arm: str
    pattern: str
    window_size: int  # 0: dense
    length: int  # tokens of the text, question included
    depth: float  # where the needle is: 0 at the beginning, 1 just before the question
    tail: int  # words of its sentence after the number
    found: float  # share of the texts
    error: float  # one standard error of it
    logprob: float  # of the number, in nats, averaged
    kv_kept: float  # keys that the last token sees over tokens
    trials: int


def needle_grid(
    model: Transformer,
    tokenizer: Tokenizer,
    haystack: str,
    arms: Sequence[Arm],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    tails: Sequence[int] = (0,),
    trials: int = 10,
    seed: int = 0,
    batch_tokens: int = 65_536,
    start: Sequence[int] | None = None,
) -> list[Cell]:
    """Scores every length, depth and tail under each arm, on the same texts.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      haystack: text, of at least the longest length.
      arms: the patterns.
      lengths: tokens of the texts.
      depths: 0 to 1.
      tails: words after the number in its sentence, 0 to 40 or so.
      trials: texts of each length and depth.
      seed: of places, numbers and pieces of the haystack.
      batch_tokens: tokens of a forward pass.
      start: what stands before a text; None: `tokenizer.prefix`.

    Raises:
      NeedleError: the haystack is too short, a length too short for needle and question or beyond the model's
        positions, a depth outside 0 to 1, too many words of a tail.
    """
    if not tails or not all(0 <= tail < len(_WORDS) for tail in tails):
        raise NeedleError(f"needs tails of 0 to {len(_WORDS) - 1} words, got {list(tails)}")
    if not lengths or not depths or any(not 0 <= depth <= 1 for depth in depths):
        raise NeedleError(f"needs lengths, and depths from 0 to 1: got {list(lengths)} and {list(depths)}")
    if (longest := max(lengths)) - 1 > (most := model.config.max_positions):  # it would lose its beginning
        raise NeedleError(f"a text of {longest} tokens is longer than the model's {most} positions; lower --lengths")
    with working("tokenising the haystack"):
        hay = tokenizer.encode(haystack)
    start = tokenizer.prefix if start is None else start
    rng = np.random.default_rng(seed)
    texts = [
        ((length, depth, tail), _text(tokenizer, start, hay, length, depth, tail, rng))
        for length in lengths
        for depth in depths
        for tail in tails
        for _ in range(trials)
    ]
    cells = []
    for arm in arms:
        scores = score_continuations(
            model, tokenizer, [pair for _, pair in texts], arm.attention, batch_tokens=batch_tokens
        )
        for key in dict.fromkeys(key for key, _ in texts):
            those = [s for s, (other, _) in zip(scores, texts, strict=True) if other == key]
            cells.append(_cell(arm, *key, those))
    return cells


def _text(
    tokenizer: Tokenizer,
    start: Sequence[int],
    hay: Sequence[int],
    length: int,
    depth: float,
    tail: int,
    rng: np.random.Generator,
) -> tuple[list[int], list[int]]:
    """A context of `length` tokens with the number's, and the number."""
    place, number = str(rng.choice(_PLACES)), str(rng.integers(10_000, 100_000))
    needle = tokenizer.encode(_NEEDLE.format(place=place, number=number, tail=" ".join(_WORDS[: tail + 1])))
    question = tokenizer.encode(_QUESTION.format(place=place))
    answer = tokenizer.encode(_QUESTION.format(place=place) + f" {number}")[len(question) :]
    room = length - len(start) - len(needle) - len(question) - len(answer)
    if room < 1:
        raise NeedleError(
            f"a text of {length} tokens has no room for a haystack: needle and question take {length - room}; give "
            "larger --lengths"
        )
    if len(hay) < room:
        raise NeedleError(
            f"a text of {length} tokens needs {room} of haystack, which has {len(hay)}; give a longer --text or "
            "smaller --lengths"
        )
    at = int(rng.integers(0, len(hay) - room + 1))
    piece, before = list(hay[at : at + room]), round(depth * room)
    return [*start, *piece[:before], *needle, *piece[before:], *question], answer


def _cell(arm: Arm, length: int, depth: float, tail: int, scores: Sequence[Any]) -> Cell:
    attention, found = arm.attention, np.array([s.is_greedy for s in scores], float)
    return Cell(
        arm=arm.name,
        pattern=attention.pattern,
        window_size=0 if attention.pattern == "dense" else attention.window_size,
        length=length,
        depth=depth,
        tail=tail,
        found=float(found.mean()),
        error=float(np.sqrt(found.mean() * (1 - found.mean()) / max(len(found) - 1, 1))),
        logprob=float(np.mean([s.logprob for s in scores])),
        kv_kept=float(np.mean([s.held / s.seen for s in scores])),
        trials=len(found),
    )


def table(cells: Sequence[Cell]) -> str:
    """A row for each arm, length and tail: the share found at each depth."""
    depths, wide = sorted({cell.depth for cell in cells}), max(16, *(len(cell.arm) + 2 for cell in cells))
    lines = [
        f"{'arm':<{wide}}{'n':>6}{'length':>8}{'tail':>6}{'KV kept':>9}   found at depth "
        + "".join(f"{d:>7.0%}" for d in depths)
    ]
    for key in dict.fromkeys((c.arm, c.window_size, c.length, c.tail) for c in cells):
        row = [c for c in cells if (c.arm, c.window_size, c.length, c.tail) == key]
        kept = np.mean([c.kv_kept for c in row])
        found = "".join(f"{c.found:>7.0%}" for c in sorted(row, key=lambda c: c.depth))
        lines.append(f"{key[0]:<{wide}}{key[1] or '':>6}{key[2]:>8}{key[3]:>6}{kept:>9.1%}   {'':<15}{found}")
    return "\n".join(lines)


def write_csv(path: Path, cells: Iterable[Cell]) -> None:
    """A row for each cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Cell)])
        writer.writerows([getattr(cell, field.name) for field in dataclasses.fields(Cell)] for cell in cells)


def write_png(path: Path, cells: Sequence[Cell]) -> None:
    """A heat map for each arm and tail: length across, depth down, the share found as colour.

    Raises:
      PictureError: matplotlib is not installed.
    """
    patterns = list(dict.fromkeys((c.arm, c.tail) for c in cells))
    lengths, depths = (sorted({getattr(c, name) for c in cells}) for name in ("length", "depth"))
    figure = blank(1.5 + 3.2 * len(patterns), 3.6, "the map")
    axes = figure.subplots(1, len(patterns), squeeze=False, sharey=True)[0]
    image = None
    for axis, (arm, tail) in zip(axes, patterns, strict=True):
        there = {(c.depth, c.length): c for c in cells if (c.arm, c.tail) == (arm, tail)}
        window = next(iter(there.values())).window_size
        values = [[there[d, n].found for n in lengths] for d in depths]
        kept = np.mean([c.kv_kept for c in there.values()])
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        name = f"{arm}{f' n={window}' if window and 'n=' not in arm else ''}{f', tail {tail}' if tail else ''}"
        axis.set(title=f"{name}, {kept:.0%} kept", xlabel="tokens")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axes[0].set_ylabel("depth of the needle")
    if image is not None:
        figure.colorbar(image, ax=axes, label="found")
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
