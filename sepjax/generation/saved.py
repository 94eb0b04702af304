"""Streams on disk: a folder that is written whole or not at all.

stream.json          what the host knows, and the checksum of the other file
state.safetensors    what the device holds: the leaves of a `DecodeState` under their numbers
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig, ConfigError, UserError, from_json_section
from sepjax.files import check_folder, replacing_folder, whole_folder
from sepjax.generation.row import RepetitionGuard
from sepjax.hub.errors import HubError
from sepjax.hub.safetensors_file import Planned, SafetensorsFile, write_safetensors

_WORDS, _STATE = "stream.json", "state.safetensors"
_WHAT = "a saved stream"
_KINDS = {  # a list: of any length, of its one kind
    "model": dict, "sizes": dict, "room": [int], "pending": [int], "has_drawn": bool, "seen": int,
    "finish_reason": str | None, "checksum": int,
    "text": {"held": str, "passed": int, "stopped": bool, "decoder": {"bytes": [int], "drops_space": bool}},
    "guard": {"recent": [int], "matched": [int]},
}  # fmt: skip


class StreamStateError(UserError, ValueError):
    """A saved stream that does not belong to this model or these settings, or is damaged."""


def check_place(folder: str | os.PathLike[str]) -> None:
    """Raises what `write` would for a folder: before hours of text, not after them. Leaves nothing there."""
    check_folder(folder, _WHAT, _is_stream)


def write(folder: str | os.PathLike[str], words: Mapping[str, Any], leaves: Sequence[jax.Array | np.ndarray]) -> None:
    """Puts a stream in place of an older one. A kill at any moment leaves the old or the new.

    Raises:
      sepjax.files.ForeignFolder: the folder holds something else than a saved stream.
      sepjax.files.WriteError: the files cannot be written.
      StreamStateError: the arrays are spread over several processes.
    """
    if not all(isinstance(leaf, np.ndarray) or leaf.is_fully_addressable for leaf in leaves):
        raise StreamStateError("a stream whose cache is spread over several processes cannot be saved; use one process")
    with replacing_folder(folder, _WHAT, _is_stream) as partial:
        planned = {str(i): Planned(np.dtype(x.dtype), x.shape, _reader(x)) for i, x in enumerate(leaves)}
        write_safetensors(partial / _STATE, planned)
        text = json.dumps({**words, "checksum": _checksum(partial / _STATE)}, indent=2) + "\n"
        (partial / _WORDS).write_text(text, encoding="utf-8")


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], Path]:
    """What the host knew, and the folder that holds the arrays: the older stream's where a kill fell between renames.

    Raises:
      FileNotFoundError: nothing was saved there.
      StreamStateError: stream.json is damaged.
    """
    place = whole_folder(folder)
    path = place / _WORDS
    try:
        words = {"room": []} | json.loads(path.read_bytes())  # streams of older versions were all over bounded caches
        words["text"] = {"passed": 0} | words["text"]  # and knew no `min_new_tokens`
        damaged = _misfit(words, _KINDS, "") or _out_of_range(words)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(place)!r} has no saved stream: there is no {_WORDS} in it") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise StreamStateError(f"{str(path)!r} is not what a stream saves ({error!r}); use another copy") from error
    if damaged:
        raise StreamStateError(f"{str(path)!r} has {damaged}; use another copy")
    return words, place


def attention_of(folder: str | os.PathLike[str], own: AttentionConfig, kept: AttentionConfig | None) -> AttentionConfig:
    """The pattern and sizes that a stream was saved with, for whoever goes on with it and asks for none.

    Args:
      folder: of the stream.
      own: the model's settings.
      kept: what its bounded caches keep (`Transformer.kept`). Older versions did not save settings; what they saved is
        of one of the two, or is refused later by what differs.

    Raises as `read`.
    """
    words, place = read(folder)
    found = words.get("attention")
    if found is None:
        return kept if kept is not None and kept.pattern == words["sizes"].get("pattern") else own
    try:
        attention = from_json_section(AttentionConfig, found, "attention.")
        return dataclasses.replace(attention, implementation=own.implementation)  # this device's
    except ConfigError as error:
        raise StreamStateError(f"{str(place / _WORDS)!r}: {error}; use another copy") from error


def _out_of_range(words: Mapping[str, Any]) -> str | None:
    """The same for lists of the right kind that mean nothing."""
    fits = {
        "room": len(words["room"]) in (0, 2),
        "text": all(i < 256 for i in words["text"]["decoder"]["bytes"]),
        "guard": len(words["guard"]["matched"]) == RepetitionGuard.LONGEST,
    }
    return next((f"{name}={str(words[name])[:80]!r}" for name, is_good in fits.items() if not is_good), None)


def _misfit(value: Any, kind: Any, name: str) -> str | None:
    """The name and value of the first that is not of its kind, or a number below 0; None: all are."""
    if isinstance(kind, dict) and isinstance(value, dict):
        found = (_misfit(value[key], inner, f"{name}.{key}".lstrip(".")) for key, inner in kind.items())
        return next(filter(None, found), None)
    if isinstance(kind, list) and isinstance(value, list):
        fits = all(type(item) is int and 0 <= item < 2**31 for item in value)
    elif kind is int:
        fits = type(value) is int and value >= 0
    else:
        fits = not isinstance(kind, (dict, list)) and isinstance(value, kind)
    return None if fits else f"{name}={str(value)[:80]!r}"


def read_leaves(place: Path, words: Mapping[str, Any], like: list[jax.Array]) -> list[jax.Array]:
    """The arrays, placed as those of `like` are. Raises StreamStateError where they are others or damaged."""
    path = place / _STATE
    try:
        file = SafetensorsFile(path)
    except (HubError, FileNotFoundError) as error:
        raise StreamStateError(f"{str(path)!r} is missing or damaged; use another copy") from error
    expected = {str(i): (np.dtype(x.dtype), tuple(x.shape)) for i, x in enumerate(like)}
    found = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    if found != expected:
        raise StreamStateError(f"{str(path)!r} holds arrays of another stream or version; use another copy")
    if _checksum(path) != words["checksum"]:
        raise StreamStateError(f"the contents of {str(path)!r} have changed since it was saved; use another copy")
    arrays = [np.array(file.view(str(i))) for i in range(len(like))]
    # What lies where it happens to be shall do so again: put there, it would have programs of its own.
    return [jax.device_put(a, x.sharding) if x.committed else jnp.asarray(a) for a, x in zip(arrays, like, strict=True)]


def _reader(leaf: jax.Array | np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(leaf)


def _is_stream(folder: Path) -> bool:
    """Also one of an older version, whose arrays were in a folder "state"; never a folder with anything else in it."""
    if not {path.name for path in folder.iterdir()} <= {_WORDS, _STATE, "state"}:
        return False
    try:
        words = json.loads((folder / _WORDS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(words, dict) and words.keys() >= _KINDS.keys() - {"checksum", "room"}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
