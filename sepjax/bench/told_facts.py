"""Writes texts in which facts are told once and asked for later, among the sentences of texts that are there.

    python -m sepjax.bench.told_facts --text=BOOKS --output=TOLD [--every=6000]

What `docs/keeping.md` post-trained on to see whether a gate learns to keep what is told once. None of its sentences is
one of the needle's (`sepjax evaluate needle`). The same texts give the same facts, whatever else is in the folder.
"""

import dataclasses
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast
from sepjax.command.settings import Settings as _Settings
from sepjax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is written, where."""

    text: str  # folder of .txt files
    output: str  # folder to write
    every: Annotated[int, AtLeast(100)] = 6_000  # characters of text for each fact


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    "Abel Agnes Basil Clara Conrad Dora Edgar Edith Felix Flora Gilbert Hester Ivor Jasper Judith Lionel Mabel "
    "Martha Nigel Olive Percy Rhoda Silas Tobias Ursula Victor Winifred"
)
_LAST = _words(
    "Ashdown Barlow Carver Dunmore Ellery Fenwick Garland Hobbs Ingram Kershaw Lockhart Mercer Norwood Oakley "
    "Pemberton Quayle Ransome Selby Thorne Upton Vickers Wetherby Yardley"
)
_THING = _words(
    "clock trunk ledger violin carriage telescope lantern portrait saddle compass cabinet rifle necklace kettle "
    "sledge barrel mirror anchor"
)
_ADJ = _words("old brass broken painted silver Dutch heavy small carved green wooden rusty borrowed")
_TOWN = _words(
    "Aldmoor Brexby Carnford Dunwell Estmere Farnley Greyholm Harwick Ilverton Kelsby Lanwick Marlow Netherby "
    "Orford Penhurst Rothwell Stanwick Tarnby Ulverton Wexcombe"
)
_WORD = _words(
    "amber thistle falcon orchid granite saffron juniper walnut copper heron cobalt marble willow raven cedar "
    "ivory pepper maple"
)
_DELAY = 2_500, 12_000  # characters between a fact and its question: more than a window, less than a row


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is told, and how it is asked for."""

    told: str
    asked: str


def fact(draw: random.Random) -> Fact:
    """One of six kinds."""
    who, town = f"{draw.choice(_FIRST)} {draw.choice(_LAST)}", draw.choice(_TOWN)
    thing, number = f"{draw.choice(_ADJ)} {draw.choice(_THING)}", draw.randrange(10, 10 ** draw.randint(2, 6))
    other, words = draw.choice([x for x in _TOWN if x != town]), f"{draw.choice(_WORD)} {draw.choice(_WORD)}"
    kinds: list[tuple[str, list[str]]] = [
        (f"The {thing} of {who} was bought for {number} crowns.", [
            f"What was paid for the {thing} of {who}? It was bought for {number} crowns.",
            f"The {thing} of {who}, it will be remembered, was bought for {number} crowns.",
        ]),
        (f"The telephone of {who} in {town} is {number}.", [
            f"Which telephone has {who} in {town}? The telephone of {who} in {town} is {number}.",
            f"Whoever wishes to reach {who} in {town} should ring {number}.",
        ]),
        (year := f"{who} was born in {town} in the year {1500 + number % 500}.", [
            f"When and where was {who} born? {year}",
        ]),
        (watchword := f"The watchword of {who} is {words}.", [f"What is the watchword of {who}? {watchword}"]),
        (road := f"The road from {town} to {other} is {number} furlongs long.", [
            f"How long is the road from {town} to {other}? {road}",
        ]),
        (carried := f"Of the company at {town}, {who} carried the {thing}.", [
            f"Who carried the {thing} at {town}? {carried}", f"At {town} the {thing} was carried by {who}.",
        ]),
    ]  # fmt: skip
    told, questions = draw.choice(kinds)
    return Fact(told, draw.choice(questions))


def with_facts(text: str, draw: random.Random, every: int, new: Callable[[random.Random], Fact] = fact) -> str:
    """`text` with a fact about every so many characters, and its question 2,500 to 12,000 characters later."""
    out: list[str] = []
    at, due, questions = 0, draw.uniform(0, 2 * every), []
    for paragraph in text.split("\n\n"):
        at += len(paragraph)
        told = new(draw) if at >= due else None
        if told and len(paragraph) > 200 and ". " in paragraph and draw.random() < 0.7:
            cut = draw.choice([i + 2 for i in range(len(paragraph)) if paragraph.startswith(". ", i)])
            out.append(f"{paragraph[:cut]}{told.told} {paragraph[cut:]}")
        else:
            out += [paragraph, told.told] if told else [paragraph]
        while questions and questions[0][0] <= at:
            out.append(questions.pop(0)[1])
        if not told:
            continue
        questions = sorted([*questions, (at + draw.uniform(*_DELAY), told.asked)])
        due = at + draw.uniform(0.3, 1.7) * every
    return "\n\n".join(out)


def write(text: Path, output: Path, every: int) -> Iterator[Path]:
    """Writes every `.txt` file of a folder anew into another; gives what was written.

    Raises ConfigError where there is none, or the two folders are one.
    """
    files = sorted(text.glob("*.txt"))
    if not files:
        raise ConfigError(f"--text={text} has no .txt files")
    if output.resolve() == text.resolve():
        raise ConfigError(f"--output={output} is --text; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    for file in files:
        draw = random.Random(zlib.crc32(file.name.encode()))
        to = output / file.name
        to.write_text(with_facts(file.read_text(encoding="utf-8"), draw, every), encoding="utf-8")
        yield to


def main(settings: Settings) -> None:
    """Writes the folder and says how many."""
    written = list(write(Path(settings.text), Path(settings.output), settings.every))
    print(f"{settings.output}: {len(written)} texts with a fact about every {settings.every:,} characters")


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
