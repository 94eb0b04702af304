"""The embedded corpus: a few megabytes of real prose on any machine, with no download."""

import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from sepjax.data.corpora.docstrings import PACKAGES, documents, source_files
from sepjax.data.corpora.features import FEATURES
from sepjax.data.corpora.splits import HELD_OUT, digest, fingerprint


class Embedded(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Python's language reference and the prose among installed packages' docstrings.

    Splits: train, and about 2 % validation, by a hash of each text. The config's name is a fingerprint of Python's
    version and the packages' files: an upgraded package gives a new corpus.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, packages: Iterable[str] = PACKAGES, **kwargs: Any):
        """`packages` are import names, or "stdlib"; `kwargs` are TFDS's, such as data_dir."""
        self._packages = tuple(packages)
        super().__init__(config=_fingerprint(self._packages), **kwargs)

    @classmethod
    def get_builder_config(cls, name: str, version: Any = None) -> tfds.core.BuilderConfig:
        """Any fingerprint is a config."""
        return tfds.core.BuilderConfig(name=name)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(FEATURES))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        found = list(documents(self._packages))
        validation = {name for name, text in found if digest(text) % HELD_OUT == 0}
        return {
            "train": self._generate_examples(d for d in found if d[0] not in validation),
            "validation": self._generate_examples(d for d in found if d[0] in validation),
        }

    def _generate_examples(self, found: Iterable[tuple[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
        for name, text in found:
            yield name, {"name": name, "text": text}


@functools.cache  # within a process the installation does not change; every evaluation asks
def _fingerprint(packages: tuple[str, ...]) -> str:
    """Sizes, not times: hosts that share data_dir have the same packages, installed at different times."""
    files = [(name, file.stat().st_size) for name, file in source_files(packages)]
    return fingerprint([sys.version_info[:3], *files])
