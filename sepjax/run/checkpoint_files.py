"""Whether the files of a checkpoint are whole: sizes and checksums, written once it is complete, read before its use.

<workdir>/checkpoints/<step>/sepjax_files.json      {"files": {"params/d/1f3a...": [size, crc32], ...}}
<workdir>/torn_checkpoints/<step>[.2, .3, ...]      what was found damaged, set aside

Orbax renames a checkpoint into its place when all is written, so a kill leaves none half done. Crashes of a machine,
copies that break off and bad disks do, and Orbax itself reads a flipped bit without a word.
"""

import contextlib
import functools
import json
import logging
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sepjax.config import ConfigError

MANIFEST = "sepjax_files.json"
_CHUNK = 1 << 24
_SEAL_EVERY = 0.5  # seconds between looks for a checkpoint that has become complete
_MOST = 64 << 30  # bytes of a checkpoint above which only sizes are kept: one host would read for too long


def seal(folder: Path) -> None:
    """Writes the manifest of a complete checkpoint. Raises OSError where that cannot be done."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    total = sum(path.stat().st_size for path in paths)
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path) if total <= _MOST else None]
        for path in paths
    }
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps({"files": files}))
    partial.replace(folder / MANIFEST)


class Seals:
    """Writes the manifest of every checkpoint soon after it has become complete; on process 0, in the background."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._expected: set[int] = set()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="seals", daemon=True)

    def expect(self, step: int) -> None:
        """`step` is being written."""
        if jax.process_index() != 0:
            return
        with self._lock:
            self._expected.add(step)
        if not self._thread.is_alive():
            self._thread.start()

    def seal(self) -> None:
        """Seals what is complete by now."""
        with self._lock, contextlib.suppress(OSError):  # no manifest is better than no run
            for step in self._expected.intersection(steps_on_disk(self._folder)):
                self._expected.discard(step)
                seal(self._folder / str(step))

    def _watch(self) -> None:
        while not self._end.wait(_SEAL_EVERY):
            if self._expected:
                self.seal()

    def close(self) -> None:
        """Seals for the last time."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self.seal()


def damage(folder: Path, items: Sequence[str], *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint's files; None: nothing that can be seen without Orbax.

    Args:
      folder: of one step.
      items: what must be in it ("params", ...).
      share: (index, count): checksums of every count-th file from the index-th on, so that processes share the work.
    """
    missing = [name for name in items if not (folder / name).is_dir()]
    if missing:
        return f"it lacks {', '.join(missing)}"
    # Orbax writes none of these, and a link to a device may be read for ever.
    odd = [path for path in folder.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
    if odd:
        return f"{min(odd).relative_to(folder)} is a link or a device"
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None  # killed before it was sealed, or of another version
    try:
        files = {name: (int(size), checksum) for name, (size, checksum) in json.loads(content)["files"].items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):  # no JSON, or other than ours
        return f"{MANIFEST} is damaged"
    for number, (name, (size, checksum)) in enumerate(sorted(files.items())):
        path = folder / name
        if ".." in Path(name).parts or not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} of {size} bytes"
        if checksum is not None and number % share[1] == share[0] and _checksum(path) != checksum:
            return f"the contents of {name} have changed"
    return None


def set_aside(folder: Path) -> Path:
    """Moves a damaged checkpoint out of the way, so that its step can be written again; returns where it is now."""
    target = folder.parent.parent / "torn_checkpoints"
    target.mkdir(exist_ok=True)
    place = target / folder.name
    for number in range(2, 1000):
        if not place.exists():
            break
        place = target / f"{folder.name}.{number}"
    return Path(shutil.move(folder, place))


def remove_unfinished(folder: Path, step: int) -> None:
    """Deletes what a failed write of a step has left: on a full disk its room is needed."""
    for path in folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def steps_on_disk(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in order."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def agreed(reason: str | None, elsewhere: str = "another process found its files damaged") -> str | None:
    """The same answer on every process: a failure of one counts for all. Every process has to ask.

    Args:
      reason: what has failed here; None: nothing.
      elsewhere: the answer where only others have failed.
    """
    if jax.process_count() == 1:
        return reason
    found = multihost_utils.process_allgather(np.array(reason is not None))
    return reason or (elsewhere if found.any() else None)


def on_first(act: Callable[[], None]) -> None:
    """Has process 0 do something. Raises OSError on every process where that fails: none waits for one that ended."""
    error = None
    if jax.process_index() == 0:
        try:
            act()
        except OSError as failed:
            error = failed
    reason = agreed(None if error is None else str(error), "process 0 could not write its files")
    if reason is not None:
        raise error or OSError(reason)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what Orbax logs from the console; and, from the first use on, what it leaves of a failed write."""

    def is_not_orbax(record: logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname

    _silence_leftovers()
    log = logging.getLogger("absl")
    log.addFilter(is_not_orbax)
    try:
        yield
    finally:
        log.removeFilter(is_not_orbax)


@functools.cache
def _silence_leftovers() -> None:
    """A write that fails leaves futures and coroutines, a traceback for each array whenever one is collected.

    What they say is in the error that is raised. They speak as late as when Python ends, so this is never undone.
    """
    ignored = sys.unraisablehook

    def unraisable(what: Any) -> None:
        # TensorStore's threads call an event loop that the first error has closed: no frame of Python's is around that.
        code = getattr(what.object, "cr_code", None) or (what.exc_traceback and what.exc_traceback.tb_frame.f_code)
        if code is None or not ("/orbax/" in code.co_filename or code.co_name == "call_soon_threadsafe"):
            ignored(what)

    def is_no_leftover(record: logging.LogRecord) -> bool:
        words = f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"
        return "orbax" not in words

    sys.unraisablehook = unraisable
    logging.getLogger("asyncio").addFilter(is_no_leftover)


def check_shapes(folder: Path, params: Any) -> None:
    """Raises ConfigError, naming the parameters, where those of a checkpoint are not those of the model."""
    with quiet():  # it misses a file that only whole checkpoints have
        saved: Any = ocp.StandardCheckpointer().metadata(folder).item_metadata
    there, here = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (saved.tree, params))
    )
    differ = [
        f"\n  {name}: {there.get(name, 'nothing')} saved, {here.get(name, 'nothing')} now"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differ:
        more = f"\n  and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ConfigError(
            f"the parameters in {folder} are not those of this config and code; go back to the config and version that "
            f"wrote them:{''.join(differ[:5])}{more}"
        )


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
