"""Mixtures of corpora, "books/*0.7,code.jsonl*0.3": what each of them is, and which of them a row is of."""

import dataclasses
import math
import re
from pathlib import Path

from sepjax.data.errors import DataError

_PART = re.compile(r"(.+?)\*([^,*]*)(?:,|$)")  # a name may have commas and stars, a weight has none
_GOLDEN = round(2**64 * (math.sqrt(5) - 1) / 2) | 1  # whose multiples, modulo 2^64, fill every interval evenly


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture, with its share of the rows, in (0, 1)."""

    name: str
    share: float


def parts_of(name: str) -> tuple[Part, ...]:
    """The parts of a mixture, whose shares sum to 1; none where `data.name` is not one: it exists, or has no star.

    Raises:
      DataError: a part has no weight above 0, or is there twice, or is alone.
    """
    if "*" not in name or Path(name).expanduser().exists():
        return ()
    found = _PART.findall(name)
    if ",".join(f"{source}*{weight}" for source, weight in found) != name:
        raise DataError(f"data.name={name!r}: every source of a mixture needs its weight, as in 'books/*0.7,code/*0.3'")
    weights = [_weight(source, weight) for source, weight in found]
    places = [str(Path(source).expanduser().resolve()) for source, _ in found]
    if twice := [source for (source, _), place in zip(found, places, strict=True) if places.count(place) > 1]:
        raise DataError(f"data.name={name!r} has {twice[0]!r} twice; give it one weight")
    if len(found) < 2:
        raise DataError(f"data.name={name!r} is a mixture of one source; leave its weight out")
    if any(source == "recall" for source, _ in found):
        raise DataError(f"data.name={name!r}: 'recall' has a vocabulary of its own and cannot be mixed; leave it out")
    return tuple(Part(source, w / sum(weights)) for (source, _), w in zip(found, weights, strict=True))


def part_of_row(row: int, parts: tuple[Part, ...]) -> int:
    """Which part the row of this number is of: any stretch of rows has the parts in their shares, to a few rows."""
    at = (row * _GOLDEN) % 2**64 / 2**64
    for number, part in enumerate(parts[:-1]):
        at -= part.share
        if at < 0:
            return number
    return len(parts) - 1


def _weight(source: str, weight: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise DataError(f"data.name: the weight of {source!r} is {weight!r}, expected a number above 0")
    return value
