"""Results that are written whole or not at all: a kill at any moment leaves the old one or the new one.

    file      .NAME.PID.partial   written and flushed beside its place, then renamed over it
    folder    .NAME.partial       the same, and what was there before waits meanwhile as .NAME.old

A rename puts a file over another, but no folder over a full one. So a folder goes in three steps, old aside, new in its
place, old deleted; `whole_folder` finds the old one where a kill fell between the first two.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from sepjax.config import UserError

CACHE = "SEPJAX_CACHE"  # the variable that names another folder for `cache_folder`

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class WriteError(UserError, OSError):
    """A result that cannot be written. `reason` is the operating system's word for it."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(f"cannot write {os.fspath(path)!r}: {reason}; make room or choose another place")
        self.reason = reason


class ForeignFolder(UserError):
    """A folder that holds something else than what would take its place."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place at the end; an error or a kill leaves `path` as it was.

    A device or a pipe (/dev/stdout) has no place to take, and is written itself.

    Raises:
      WriteError: the file cannot be written; names it.
    """
    path = Path(path)
    with _naming(path):
        if path.is_dir():
            raise WriteError(path, "it is a folder")
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            yield path
            return
        path = path.resolve()  # a link stays a link
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            yield partial
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file whole or not at all; raises as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises WriteError where `path` cannot be written: better before the work than after it. Leaves nothing there."""
    path = Path(path)
    with _naming(path):
        if path.is_dir():
            raise WriteError(path, "it is a folder")
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            return
        probe = path.resolve().with_name(f".{path.name}.{os.getpid()}.partial")
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def replacing_folder(folder: str | os.PathLike[str], what: str, is_one: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty folder to fill beside `folder`, which takes its place at the end; an error or a kill leaves the old one.

    Args:
      folder: the place; folders above it are made, and removed again where the writing fails.
      what: a folder may be replaced, in words ("a saved stream").
      is_one: whether a folder that is there, and not empty, is `what`.

    Raises:
      ForeignFolder: something else is there.
      WriteError: it cannot be written, or another process is writing it.
    """
    place = Path(folder).resolve()
    partial, old = _beside(place, "partial"), _beside(place, "old")
    with _naming(place):
        _check_place(place, what, is_one)
        with _filled(partial, place, lambda: _put(partial, place, old), lambda: _recover(place, old)):
            yield partial
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def adding_to(folder: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """An empty folder to fill within `folder`, whose files move into that at the end, the one named `last` after all
    others; an error or a kill before leaves what was there, and nothing that keeps the next one out.

    Raises WriteError where it cannot be written, or another process is writing it.
    """
    place = Path(folder).resolve()
    partial = place / ".partial"

    def put() -> None:
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            path.replace(place / path.name)
        _flush(place)

    with _naming(place):
        with _filled(partial, place, put):
            yield partial
        partial.rmdir()


@contextlib.contextmanager
def _filled(
    partial: Path, place: Path, put: Callable[[], None], recover: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """`partial`, empty and locked, is filled inside, then `put` moves what is in it to `place`; an error removes it."""
    made = _make(partial)
    with _held(partial, place):
        try:
            _empty(partial)
            yield
            _flush_all(partial)
            put()
        except BaseException:
            with contextlib.suppress(OSError):
                recover()
            shutil.rmtree(partial, ignore_errors=True)
            _unmake(made)
            raise


def check_folder(folder: str | os.PathLike[str], what: str, is_one: Callable[[Path], bool]) -> None:
    """Raises as `replacing_folder` would, before the work is done. Leaves nothing there."""
    place = Path(folder).resolve()
    with _naming(place):
        _check_place(place, what, is_one)
        partial = _beside(place, "partial")
        _unmake([*_make(partial), partial])


def whole_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder`, or what it was before where a kill came while it was being replaced."""
    place = Path(folder).resolve()
    old = _beside(place, "old")
    return old if old.exists() and not _is_full(place) else place


def _is_full(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _beside(place: Path, kind: str) -> Path:
    return place.parent / f".{place.name}.{kind}"  # of "/" too


def _check_place(place: Path, what: str, is_one: Callable[[Path], bool]) -> None:
    for there in (place, _beside(place, "old")):
        if not there.exists():
            continue
        if not there.is_dir():
            raise ForeignFolder(f"{str(there)!r} is a file; choose a folder that is new or empty, or {what}")
        names = sorted(path.name for path in there.iterdir())
        if names and not is_one(there):
            raise ForeignFolder(
                f"{str(there)!r} holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}, which is not {what}; "
                f"choose a folder that is new or empty, or {what}"
            )
    # Neither can be renamed away without pulling the ground from under somebody.
    kind = "a mount point" if os.path.ismount(place) else "the working folder" if place == Path.cwd() else ""
    if kind:
        raise ForeignFolder(f"{str(place)!r} is {kind}, which cannot be replaced as a whole; choose a folder in it")


def _put(partial: Path, place: Path, old: Path) -> None:
    _recover(place, old)
    if _is_full(place):
        place.rename(old)
    partial.rename(place)  # over an empty folder too
    _flush(place.parent)


def _recover(place: Path, old: Path) -> None:
    """Undoes half a replacement: of this process, or of one that was killed."""
    if old.exists():
        if _is_full(place):
            shutil.rmtree(old)
        else:
            old.rename(place)


def _make(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns those that were missing, the innermost last."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    made: list[Path] = []
    try:
        for path in missing:
            path.mkdir(exist_ok=True)
            made.append(path)
    except BaseException:
        _unmake(made)
        raise
    return made


def _unmake(made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # somebody else may have put something there
        for path in reversed(made):
            if path.exists():
                path.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _held(partial: Path, place: Path) -> Iterator[None]:
    """Locks the folder: what a killed process left in it may go, what another one is writing may not."""
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(handle, place)
        yield
    finally:
        os.close(handle)


def lock(handle: int, place: Path) -> None:
    """Locks an open file or folder, until it is closed, for what is to be at `place`.

    Raises WriteError where another process has locked it. A file system without locks has none.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise WriteError(place, "another process is writing it") from error


def _flush_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Waits until the disk has it: a machine that loses power must not leave a name without contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives the operating system's errors the name of the result; those of other files (a source) keep theirs."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        names = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]
        if names and not any(_concerns(name.absolute(), path.resolve()) for name in names):
            raise
        raise WriteError(path, error.strerror or str(error)) from error


def _concerns(name: Path, place: Path) -> bool:
    """Whether a file is the place, beside it, in it or above it."""
    if place.is_relative_to(name):
        return True
    first = name.relative_to(place.parent).parts[0] if name.is_relative_to(place.parent) else ""
    return first == place.name or first.startswith(f".{place.name}.")


def cache_folder() -> Path:
    """Where fetched models and compiled programs are kept: $SEPJAX_CACHE, or `sepjax` in $XDG_CACHE_HOME or ~/.cache.

    Raises RuntimeError for a user without a home.
    """
    named = os.environ.get(CACHE)
    return Path(named or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sepjax")).expanduser()
