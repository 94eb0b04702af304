"""What corpora share: fingerprints, and a split for validation that never moves a document."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

HELD_OUT = 50  # one document in so many is validation


def digest(text: str) -> int:
    """64 bits that depend on nothing but `text`, whatever the process or machine."""
    return digest_of_bytes(text.encode(errors="replace"))


def digest_of_bytes(text: bytes) -> int:
    """`digest` of a text that is encoded already."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def fingerprint(facts: Iterable[object]) -> str:
    """A short name for what a corpus is made of; TFDS keeps data of another fingerprint in another folder."""
    return f"{digest(repr(list(facts))):016x}"


def held_out(keys: Sequence[str]) -> set[str]:
    """The keys of the validation documents: about one in `HELD_OUT`, and both sides get one if there are two keys."""
    return set(filter(side_of(keys) or is_held_out, keys))


def side_of(keys: Iterable[str]) -> Callable[[str], bool] | None:
    """Tells whether a key of `keys` is held out; None where no two of them differ.

    Keys may be many and come from a disk: they are not kept, and no more are asked for once both sides have one.
    """
    first = last = None  # by their hashes
    found: set[bool] = set()
    for key in keys:
        found.add(is_held_out(key))
        if len(found) == 2:
            return is_held_out
        first = key if first is None else min(first, key, key=digest)
        last = key if last is None else max(last, key, key=digest)
    if first == last:
        return None
    return (lambda key: key != last) if True in found else (lambda key: key == first)


def is_held_out(key: str) -> bool:
    """The side of a key wherever both sides have one."""
    return digest(key) % HELD_OUT == 0
