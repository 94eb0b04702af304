"""What bounded caches of a model keep where nobody says otherwise: an arm that lies with the model.

    FOLDER/kept.arm     of a workdir or a Hugging Face folder
    NAME.kept.arm       beside NAME.gguf
    configs/NAME.arm    of a model in a package: one that sepjax ships (`sepjax.hub.packaged`)

`sepjax layers` writes it and `sepjax.load` reads it, into `Transformer.kept`. It is taken whole or not at all: whoever
names a pattern, a size or an arm has that one, on top of the model's own settings. Masks of training, growing caches
and all that is evaluated do not see it.
"""

import os
from pathlib import Path

from sepjax.config import AttentionConfig, ConfigError
from sepjax.config.checkout import root
from sepjax.evaluation.arms import fixed_arms
from sepjax.hub.families import ATTENTION, KEY
from sepjax.hub.fields import Fields, read_bytes
from sepjax.hub.folder import is_folder
from sepjax.hub.packaged import PACKAGES
from sepjax.hub.remote import KEPT_ARM as NAME

_MOST = 1_000_000  # bytes


def place(source: Path) -> Path:
    """The file for the arm of the model that `sepjax.loading.locate` found at `source`."""
    return source / NAME if source.is_dir() else source.with_suffix(f".{NAME}")


def find(path: str | os.PathLike[str], source: Path) -> Path | None:
    """The file that says what is kept; None: there is none.

    Args:
      path: as the user named the model.
      source: where it is.
    """
    package = PACKAGES.get(os.fspath(path))
    if package is not None:
        return root() / "configs" / f"{package.arm}.arm" if package.arm else None
    return found if (found := place(source)).exists() else None


def read(file: Path, own: AttentionConfig, num_layers: int) -> AttentionConfig:
    """The settings that a file says, on top of a model's own.

    Raises ConfigError: it is damaged, has more arms than one, does not fit the model, or names other files.
    """
    try:
        text = read_bytes(file, _MOST).decode("utf-8")
        if "@" in text:
            raise ConfigError("it names another file, and a model may come from anywhere; write out what that has")
        arms = fixed_arms(text, own, num_layers, cached=True)
        if len(arms) != 1:
            raise ConfigError(f"it has {len(arms)} arms, expected one")
        if arms[0].attention.pattern == "dense":
            raise ConfigError('no bounded cache serves the pattern "dense"; expected another')
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{str(file)!r} sets what bounded caches of the model keep, but is invalid: {error}; fix or delete the file"
        ) from error
    return arms[0].attention


def has_own_mask(source: Path, own: AttentionConfig) -> bool:
    """Whether the settings of the model at `source` are its own, from its training, and keep less than everything.

    Those of a pretrained model are sepjax's, for models that know no such mask, also once it is converted to a workdir.
    """
    if source.is_file() or own.pattern == "dense":
        return False
    if is_folder(source):
        return Fields.read(source / "config.json").values.get(KEY) is not None
    return own != ATTENTION or (source / "config.json").is_file()  # a converted model has no config of a run
