"""Compiled programs kept from one command to the next, in a folder of the user's: compiling takes most of a start.

    ~/.cache/sepjax/compiled-<this machine's kind>     or under $XDG_CACHE_HOME, or $SEPJAX_CACHE

JAX's own persistent cache does it (its keys are the program, the compiler's version and settings, and the devices), and
its settings have the last word: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=0 turns
it off. What a killed program has left half written is compiled again, and replaced.
"""

import contextlib
import errno
import hashlib
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

from sepjax import console
from sepjax.files import cache_folder

_LEAST_SECONDS = 0.3  # of compiling, for a program to be kept
_MOST_BYTES = 2**31  # then those that were used longest ago go


def keep() -> None:
    """Keeps what this process compiles, unless JAX is told otherwise. No folder to write in: a line says so."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    try:
        folder = cache_folder() / f"compiled-{_kind_of_machine()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except (OSError, RuntimeError) as error:  # the latter: a user without a home
        why = f"{str(error.filename)!r}: {error.strerror}" if isinstance(error, OSError) else str(error)
        _say_none_kept(f"{why}; name a folder in SEPJAX_CACHE")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in (
        ("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS),
        ("jax_compilation_cache_max_size", _MOST_BYTES),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    replace_damaged(folder)


def _say_none_kept(why: str) -> None:
    console.say(f"warning: compiled programs are not kept, so the next start compiles them again: {why}")


def replace_damaged(folder: Path) -> None:
    """Makes room for programs whose files JAX cannot read, in place of its warning: it would leave them for ever.

    Of those that it cannot write one line tells, where it warns of each.
    """
    show, told = warnings.showwarning, []

    def remove(message: Warning | str, *about: Any, **more: Any) -> None:
        if lost := re.match(r"Error writing persistent compilation cache entry .*?: (.*)", str(message)):
            if not told:
                told.append(lost[1])
                _say_none_kept(f"{re.sub(r'^OSError: .Errno [0-9]+. ', '', lost[1])}; make room in {str(folder)!r}")
            return
        found = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
        if not found:
            show(message, *about, **more)
            return
        if re.search(r"Timeout|Permission|lock", str(message)):
            return  # another process has it; this one compiles
        for file in folder.glob(f"{found[1]}-*-cache"):  # which of them is not said
            with contextlib.suppress(OSError):
                file.unlink()

    warnings.showwarning = remove


def _kind_of_machine() -> str:
    """Machines that share a home may have processors that run each other's programs only in part."""
    said = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said += [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]
