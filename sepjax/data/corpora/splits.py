"""What the builders share: features, fingerprints, and a split for validation that never moves a document."""

import hashlib
from collections.abc import Iterable, Sequence

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
    ranked = sorted(keys, key=digest)
    chosen = {key for key in ranked if digest(key) % HELD_OUT == 0}
    if len(ranked) > 1:
        chosen = (chosen or {ranked[0]}) - ({ranked[-1]} if len(chosen) == len(ranked) else set())
    return chosen
