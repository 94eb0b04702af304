"""Rows on disk, for the next process: `--state=FOLDER`.

    server.json         which model these are of
    lock                held by the server that uses the folder
    KEY/                a row, as streams are saved (`SavedRow.write`)
    KEY.json            the token ids that it has seen. Written last and removed first: without it the row is not there

A kill at any moment leaves a row whole or leaves it out.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sepjax.array_typing import Int32
from sepjax.config import AttentionConfig, UserError
from sepjax.files import whole_folder, write_text
from sepjax.generation.readers import BoundedReader
from sepjax.generation.saved import StreamStateError
from sepjax.generation.saved_row import SavedRow
from sepjax.serve.served import Served

log = logging.getLogger("sepjax.serve")
_SERVER, _LOCK, _VERSION = "server.json", "lock", 1
_LOST = "lost+found"  # a file system's own
_KEY, _ROW = re.compile(r"[0-9a-f]{32}\.json"), re.compile(r"[0-9a-f]{32}")
_HALF = re.compile(r"\.(?:server|[0-9a-f]{32})\.json\.\d+\.partial|\.[0-9a-f]{32}\.(?:partial|old)")  # `sepjax.files`


class StateError(UserError):
    """A folder that holds something else than this server's rows."""


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """What KEY.json says."""

    key: str
    ids: Int32[np.ndarray, "T"]
    last: int | None
    names: tuple[str, ...]
    row_bytes: int
    nbytes: int  # of all its files


class TakenFolder:
    """A folder that no other server uses from now on. It needs no model: what is wrong is told before that is loaded.

    Attributes:
      path: of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Takes the folder, which is new, empty, or of an earlier server.

        Raises:
          StateError: it holds something else; another server uses it.
          OSError: it cannot be written.
        """
        self.path = Path(path)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # what people said lies there
        self.words()
        self._handle: int | None = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise StateError(
                    f"cannot lock {str(self.path)!r}: {error.strerror}; choose a folder on a file system with locks"
                ) from error
            raise StateError(f"another server uses {str(self.path)!r}; give each a folder of its own") from error

    def close(self) -> None:
        """Lets others have it."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    def words(self) -> dict[str, Any] | None:
        """What the last server said of itself; None: nothing is there. Raises StateError where that is no server's."""
        names = {path.name for path in self.path.iterdir()} - {_LOCK, _LOST}
        names = {name for name in names if not _HALF.fullmatch(name)}
        if not names:
            return None
        try:
            words = json.loads((self.path / _SERVER).read_bytes())
            _ = words["fingerprint"], words["version"]
            return words
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{str(self.path)!r} holds {', '.join(sorted(names)[:3])}, which is not a server's state; choose a "
                "folder that is new or empty"
            ) from error


class StateFolder:
    """One server's. `entries` is called once, before all else."""

    def __init__(self, folder: str | os.PathLike[str] | TakenFolder, served: Served, budget: int):
        """Takes the folder, unless that has been done.

        Args:
          folder: new, empty, or of an earlier server of the same model.
          served: the model.
          budget: bytes of files; whoever writes keeps to it.

        Raises:
          StateError: as `TakenFolder`, or it holds rows of another model or pattern.
          sepjax.files.WriteError: it cannot be written.
        """
        self._taken = folder if isinstance(folder, TakenFolder) else TakenFolder(folder)
        self.budget = budget
        self._folder, self._config = self._taken.path, served.engine.prepared.config
        self._reader = BoundedReader(served.engine.prepared)
        try:
            self._check(served.fingerprint, served.engine.kept)
        except StateError:
            self.close()
            raise
        mine = {"version": _VERSION, "fingerprint": served.fingerprint, "model": served.name}
        mine["keeps"] = served.engine.kept.in_words()
        write_text(self._folder / _SERVER, json.dumps(mine, indent=2) + "\n")

    def close(self) -> None:
        """Lets others have it."""
        self._taken.close()

    def _check(self, fingerprint: str, kept: AttentionConfig) -> None:
        if (words := self._taken.words()) is None:
            return
        if words["version"] != _VERSION or words["fingerprint"] != fingerprint:
            keeps = words.get("keeps", "an unnamed one, such as --pattern=separator")
            raise StateError(
                f"the conversations in {str(self._folder)!r} are of {words.get('model')!r} with other weights, "
                f"another pattern ({keeps}; here: {kept.in_words()}), or of an older version of sepjax; serve the same "
                "model with the same settings, or name another folder"
            )

    def entries(self) -> list[OnDisk]:
        """All rows that are whole, the least recently used first; what a kill has left half done is removed.

        Files with names that this class does not give are left alone.
        """
        found = [(path.stat().st_mtime_ns, path) for path in self._folder.iterdir() if _KEY.fullmatch(path.name)]
        whole = [entry for _, path in sorted(found) if (entry := self._entry(path)) is not None]
        known = {entry.key for entry in whole}
        read_from = {
            whole_folder(self._folder / key).name for key in known
        }  # .KEY.old, where a kill fell between renames
        for path in self._folder.iterdir():
            ours = _KEY.fullmatch(path.name) or _HALF.fullmatch(path.name) or _ROW.fullmatch(path.name)
            key = path.name.removesuffix(".json")
            if not ours or key in known or path.name in read_from:
                continue
            log.warning("removed what was half written", extra={"name_on_disk": path.name})
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return whole

    def _entry(self, path: Path) -> OnDisk | None:
        try:
            words = json.loads(path.read_bytes())
            ids = np.array(words["ids"], np.int32)
            if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= self._config.vocab_size:
                return None
            last = None if words["last"] is None else int(words["last"])
            names, size = tuple(map(str, words["names"])), self._size(path.stem)
            return OnDisk(path.stem, ids, last, names, int(words["row_bytes"]), size)
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def _size(self, key: str) -> int:
        files = [self._folder / f"{key}.json", *whole_folder(self._folder / key).iterdir()]
        return sum(path.stat().st_size for path in files)

    def write(
        self, key: str, ids: Int32[np.ndarray, "T"], last: int | None, names: tuple[str, ...], row: SavedRow,
        row_bytes: int,
    ) -> int:  # fmt: skip
        """Writes a row; returns the bytes of its files. Raises WriteError."""
        row.write(self._folder / key, self._reader, self._config)
        words: dict[str, Any] = {"last": last, "names": list(names), "row_bytes": row_bytes, "ids": ids.tolist()}
        write_text(self._folder / f"{key}.json", json.dumps(words) + "\n")
        return self._size(key)

    def read(self, key: str) -> SavedRow | None:
        """The row, in the host's memory, which counts as used now; None: it is damaged or gone, and the log says why.

        Raises OSError where the files may be whole and cannot be read now (no file handles are left, say).
        """
        try:
            row = SavedRow.read(self._folder / key, self._reader, self._config).on_host()
        except (StreamStateError, FileNotFoundError) as error:
            log.warning("a saved conversation is damaged or gone", extra={"reason": str(error)})
            return None
        with contextlib.suppress(OSError):  # it is only used earlier than it seems
            os.utime(self._folder / f"{key}.json")
        return row

    def remove(self, key: str) -> None:
        """Removes its files."""
        (self._folder / f"{key}.json").unlink(missing_ok=True)
        for name in (key, f".{key}.old"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
