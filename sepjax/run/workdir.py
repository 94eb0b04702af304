"""What makes a folder the workdir of one run: one config for its whole life, one process at a time."""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from sepjax.config import Config, ConfigError, UserError, from_json, to_json
from sepjax.console import say
from sepjax.files import write_text
from sepjax.run.checkpoint_files import steps_on_disk

_FILE = ".run.lock"
# Settings that a resumed run may change: they touch neither the parameters' path nor the order of the data.
_FREE = ("training.steps", "training.log_every", "training.eval_every", "training.eval_batches")
_FREE += (
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "data.data_dir",
    "data.num_workers",
)
_FREE += ("training.max_skipped_steps", "training.spike_factor", "data.max_bad_documents")
_FREE += ("mesh.", "attention.implementation", "attention.capacity", "attention.cache_size", "attention.max_separators")
_FREE += ("attention.stream_positions", "attention.keep_all_separators", "attention.cache_dtype")
# Settings that it may change with --new_data: the order of the data is another one then. Never the tokenizer.
_DATA = ("data.name", "data.text_key", "data.train_split", "data.eval_split", "data.sequence_length", "data.batch_size")
_DATA += ("optimizer.accumulation_steps", "data.train_on", "data.too_long")


class WorkdirInUse(UserError):
    """Another process trains in this workdir."""


@contextlib.contextmanager
def hold_workdir(workdir: Path) -> Iterator[None]:
    """Holds the workdir for the block. The operating system frees it when the process dies, however it dies.

    The lock file says who holds it; one that a dead process left is recognised and taken over. Only process 0 of a run
    of several holds it. File systems without locks get a warning.

    Raises:
      WorkdirInUse: another process holds it; says which.
    """
    if jax.process_index() != 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / _FILE
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirInUse(
                f"{workdir} is in use: {_describe(_read(path))} trains there; wait for it, stop it, or choose another "
                "--workdir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            say(f"warning: {workdir} has no file locks; see that only one run uses it")
        if left := _read(path):
            say(f"{workdir}: {_describe(left)} is gone without having ended; this one takes over")
        _write(path, {"pid": os.getpid(), "host": socket.gethostname(), "since": _now(), "argv": sys.argv})
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk must not hide why the run ends
                os.truncate(path, 0)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write(path: Path, holder: dict[str, Any]) -> None:
    # In place: a renamed file would be another one than that which is locked.
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(holder), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def has_begun(workdir: Path) -> bool:
    """Whether a run has saved anything here. One that has not leaves the workdir free for any other."""
    return bool(steps_on_disk(workdir.absolute() / "checkpoints"))


def claim_workdir(workdir: Path, config: Config, *, new_data: bool = False) -> None:
    """Writes `config.json` into a workdir without checkpoints, or checks that an old one belongs to this config.

    Raises:
      ConfigError: when the workdir holds a run of another config (names the fields that differ), or a converted model.
      WriteError: the file cannot be written.
    """
    path = workdir / "config.json"
    if has_begun(workdir):
        if path.exists():
            check_same_run(from_json(path.read_bytes()), config, workdir, new_data)
        elif (workdir / "checkpoints" / "0").is_dir():  # no run of ours saves before its first step
            raise ConfigError(
                f"{workdir} holds a converted model, parameters without a run; to train it, begin a run in another "
                f"folder: --workdir=... --config.training.init_from={workdir}"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not has_begun(workdir):
            _clear_failed_start(workdir, path, config)
        write_text(path, to_json(config))
    if jax.process_count() > 1:  # nobody may take up a tokenizer that is about to go
        multihost_utils.sync_global_devices("sepjax_claimed")


def _clear_failed_start(workdir: Path, path: Path, config: Config) -> None:
    """Removes what a start of another config made from its data or its model before it failed."""
    try:
        changed = [name for name, _, _ in differing_fields(from_json(path.read_bytes()), config)]
    except ConfigError:  # damaged, or of another version
        changed = ["data."]
    if any(name.startswith(("data.", "training.init_from")) for name in changed):
        say(f"{workdir}: an earlier start of another config saved nothing; its tokenizer is made anew")
        for name in ("tokenizer", "hub", "frozen"):
            shutil.rmtree(workdir / name, ignore_errors=True)


def check_same_run(saved: Config, now: Config, place: Path, new_data: bool) -> bool:
    """Whether the data are others than those of a saved config, as `new_data` allows.

    Raises:
      ConfigError: something differs that must not; names the fields.
    """
    differences = differing_fields(saved, now)
    wrong = [d for d in differences if not (new_data and d[0] in _DATA)]
    if wrong:
        fields = "; ".join(f"{name}: {old!r} in the workdir, {new!r} now" for name, old, new in wrong)
        hint = ""
        if all(name in _DATA for name, _, _ in wrong):
            hint = ". Or add --new_data: parameters and optimizer go on, and the data start from their beginning"
        raise ConfigError(
            f"{place} holds a run of another config; choose another --workdir, or go back to {fields}{hint}"
        )
    return bool(differences)


def differing_fields(saved: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(dotted name, saved value, new value) of the settings that a resumed run must not change."""
    old, new = (_flat(dataclasses.asdict(config)) for config in (saved, now))
    return [(name, old[name], new[name]) for name in new if old[name] != new[name] and not name.startswith(_FREE)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
