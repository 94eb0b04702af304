"""What the builders share: features, fingerprints, and a split for validation that never moves a document."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import tensorflow_datasets as tfds

HELD_OUT = 50  # one document in so many is validation
FEATURES = {"text": tfds.features.Text(), "name": tfds.features.Text()}


def digest(text: str) -> int:
    """64 bits that depend on nothing but `text`, whatever the process or machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")


def fingerprint(facts: Iterable[object]) -> str:
    """A short name for what a corpus is made of; TFDS keeps data of another fingerprint in another folder."""
    return f"{digest(repr(list(facts))):016x}"


def held_out(keys: Sequence[str]) -> set[str]:
    """The keys of the validation documents: about one in `HELD_OUT`, and both sides get one if there are two keys."""
    return set(filter(side_of(keys) or _is_held_out, keys))


def side_of(keys: Iterable[str]) -> Callable[[str], bool] | None:
    """Tells whether a key of `keys` is held out; None where no two of them differ.

    Keys may be many and come from a disk: they are not kept, and no more are asked for once both sides have one.
    """
    first = last = None  # by their hashes
    found: set[bool] = set()
    for key in keys:
        found.add(_is_held_out(key))
        if len(found) == 2:
            return _is_held_out
        first = key if first is None else min(first, key, key=digest)
        last = key if last is None else max(last, key, key=digest)
    if first == last:
        return None
    return (lambda key: key != last) if True in found else (lambda key: key == first)


def _is_held_out(key: str) -> bool:
    return digest(key) % HELD_OUT == 0
