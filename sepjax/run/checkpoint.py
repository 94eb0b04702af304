"""Checkpoints of a run: parameters, optimizer, data iterator and config, written by Orbax in the background.

<workdir>/checkpoints/<step>/params      sharded arrays, readable alone (generation, evaluation); what learns
                            /optimizer   optax moments
                            /data        the data iterator, one file a process
                            /config      the Config as JSON
                            /health      skipped steps and the mean loss, JSON
                            /sepjax_files.json    sizes and checksums (`sepjax.run.checkpoint_files`)
<workdir>/frozen                         with `lora.rank` the base (`sepjax.run.frozen`)
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sepjax.config import Config, UserError, first_line, from_json, to_json
from sepjax.console import say
from sepjax.model.transformer import Params
from sepjax.progress import working
from sepjax.run.checkpoint_files import (
    Seals,
    agreed,
    check_shapes,
    damage,
    on_first,
    quiet,
    remove_unfinished,
    set_aside,
    steps_on_disk,
)
from sepjax.run.frozen import learned_and_frozen, merged_with, read_frozen, write_frozen
from sepjax.run.moving import Moving, has_moved_anywhere
from sepjax.run.workdir import check_same_run
from sepjax.sharding import make_mesh

if TYPE_CHECKING:
    import grain

    from sepjax.training.step import TrainState

_ITEMS = ("params", "optimizer", "data", "config")


class CheckpointError(UserError, OSError):
    """A checkpoint that could not be written, or none that can be read."""


class Checkpointer:
    """Saves and restores one run; a context manager that waits for the last write when it closes.

    A write that fails is told on stderr and the next one tries again: older checkpoints stay as they are, and the run
    goes on. If the last one fails, closing raises `CheckpointError`.
    """

    def __init__(self, workdir: Path, keep: int, remake: Callable[[], None] | None = None, *, warns: bool = True):
        """`remake` puts back what else belongs into a workdir that has vanished; `warns`: of writes that failed."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(directory(workdir), options=options)
        self._folder, self._remake, self._warns = directory(workdir), remake, warns
        self._writing: int | None = None  # step whose write may still go on
        self._failed: CheckpointError | None = None  # of the newest write
        self._seals = Seals(self._folder)
        # Orbax logs each failure with several tracebacks; the messages here have what a user needs of them.
        self._quiet = quiet()
        self._quiet.__enter__()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint. Interrupted ones do not count."""
        return self._manager.latest_step()

    def describe(self) -> str:
        """Which checkpoint is the newest complete one, in words."""
        self.wait()
        return _newest(self._folder)

    def save(self, state: "TrainState", data: "grain.DatasetIterator", config: Config) -> None:
        """Starts writing a checkpoint of `state.step`; returns once the arrays are copied off the devices."""
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps() and self._folder.is_dir():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            data=_grain().CheckpointSave(data),
            config=ocp.args.JsonSave(json.loads(to_json(config))),
            health=ocp.args.JsonSave({name: x.item() for name, x in vars(jax.device_get(state.health)).items()}),
        )
        try:
            self._ensure_workdir()
            _probe(self._folder)
            with _naming(self._folder):  # what an earlier start left without a checkpoint may be of another model
                write_frozen(self._folder.parent, state.frozen, anew=not self._manager.all_steps())
            self.write(step, items)
        except (CheckpointError, OSError) as error:
            self._note(step, error)

    def write(self, step: int, items: ocp.args.Composite) -> None:
        """Starts writing items that are named as in this file's heading. Raises CheckpointError."""
        with _naming(self._folder):
            self._manager.save(step, args=items, force=True)
        self._writing = step
        self._seals.expect(step)

    def wait(self) -> None:
        """Waits for the write that goes on, if any. If it has failed, says so."""
        step, self._writing = self._writing, None
        if step is None:
            return
        try:
            with _naming(self._folder):
                self._manager.wait_until_finished()
        except CheckpointError as error:
            self._note(step, error)
        else:
            self._failed = None
            self._seals.seal()

    def check(self) -> None:
        """Waits, and raises CheckpointError if the newest write has failed."""
        self.wait()
        if self._failed is not None:
            raise self._failed

    def restore(self, target: "TrainState", data: Moving, config: Config, *, new_data: bool = False) -> "TrainState":
        """Reads the newest checkpoint that is whole straight into its shards, and sets `data` to where it was.

        Damaged ones are named on stderr, and set aside once an older one could be read. Other devices and processes may
        have written it.

        Args:
          target: the state's shapes, dtypes and shardings (`sepjax.training.step.abstract_state`).
          data: the training batches.
          config: of the run as it goes on.
          new_data: whether a checkpoint of other data may be used; `data` then stays where it is.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ConfigError: the newest one does not fit `config` or the code; names what differs.
          CheckpointError: none can be read.
        """
        torn: list[tuple[int, str]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            reason = agreed(damage(self._folder / str(step), _ITEMS, share=(jax.process_index(), jax.process_count())))
            if reason is None:
                try:
                    with working(f"loading step {step} of {self._folder}"):
                        state = self._read(step, target, data, config, new_data)
                except UserError:
                    raise
                except Exception as error:  # Orbax, TensorStore and Grain raise all kinds for damaged files
                    reason = _reason(error)
                else:
                    self._set_aside([step for step, _ in torn])
                    return state
            torn.append((step, reason))
            _say(f"warning: the checkpoint of step {step} cannot be used: {reason}")
        if not torn:
            raise FileNotFoundError(f"no complete checkpoint in {self._folder}")
        raise CheckpointError(
            f"none of the {len(torn)} checkpoints in {self._folder} can be read; the newest, of step {torn[0][0]}: "
            f"{torn[0][1].rstrip('.')}. Bring back a copy, or move the folder away to start over"
        )

    def _read(self, step: int, target: "TrainState", data: Moving, config: Config, new_data: bool) -> "TrainState":
        folder = self._folder / str(step)
        is_new = check_same_run(from_json((folder / "config" / "metadata").read_bytes()), config, folder, new_data)
        check_shapes(folder / "params", target.params)
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(target.params),
            "optimizer": ocp.args.StandardRestore(target.optimizer),
        }
        moved = not is_new and has_moved_anywhere(data, folder / "data")
        if not is_new and not moved:
            items["data"] = _grain().CheckpointRestore(data)
        if (folder / "health").is_dir():
            items["health"] = ocp.args.JsonRestore()
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        if moved:
            data.read_moved(folder / "data")
        numbers = {"step": step, "skipped": 0, "loss_mean": 0.0} | dict(read.get("health") or {})
        replicated: Any = target.step
        scalars = {
            name: jax.device_put(np.float32(x) if isinstance(x, float) else np.int32(x), replicated.sharding)
            for name, x in numbers.items()
        }
        health = dataclasses.replace(target.health, skipped=scalars["skipped"], loss_mean=scalars["loss_mean"])
        return dataclasses.replace(
            target,
            step=scalars["step"],
            params=read["params"],
            optimizer=read["optimizer"],
            health=health,
            frozen=read_frozen(self._folder.parent, target.frozen),
        )

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps:
            if jax.process_index() == 0:
                _say(f"the damaged checkpoint of step {step} is now {set_aside(self._folder / str(step))}")
        if steps:
            sync("sepjax_torn_checkpoints")
            self._manager.reload()

    def _ensure_workdir(self) -> None:
        if self._folder.is_dir():
            return
        _say(f"warning: {self._folder} has vanished, with every checkpoint in it; it is made anew")
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True)
            if self._remake:
                self._remake()
        sync("sepjax_remade_workdir")
        self._manager.reload()

    def _note(self, step: int, error: Exception) -> None:
        if not isinstance(error, CheckpointError):
            error = CheckpointError(f"cannot write a checkpoint in {self._folder}: {error}; {_newest(self._folder)}")
        self._failed = error
        if jax.process_index() == 0:
            remove_unfinished(self._folder, step)
        if self._warns:
            _say(f"warning: step {step} is not saved: {error}")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
            with contextlib.suppress(OSError, ValueError):
                self._manager.close()
        finally:
            self._seals.close()
            self._quiet.__exit__(None, None, None)
        if error is None and self._failed is not None:
            raise self._failed


def _probe(folder: Path) -> None:
    """Raises OSError where nothing can be made in the folder: Orbax would wait for a thread that has died of it."""

    def make() -> None:
        probe = folder / f".probe.{os.getpid()}"
        probe.mkdir()
        probe.rmdir()

    on_first(make)


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Says what a failed write leaves. Orbax writes in the background; TensorStore's errors are ValueErrors."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write a checkpoint in {folder}: {_reason(error)}; {_newest(folder)}, "
            "and the same command goes on from there once files can be written"
        ) from error


def _newest(folder: Path) -> str:
    complete = steps_on_disk(folder)
    return (
        f"the newest complete checkpoint is of step {complete[-1]}"
        if complete
        else "there is no complete checkpoint yet"
    )


def _reason(error: Exception) -> str:
    if found := re.search(r": ([^:\[\]]+) \[os_error_code=", str(error)):  # TensorStore's, behind names of its files
        return found[1]
    return first_line(error)


def _say(message: str) -> None:
    if jax.process_index() == 0:
        say(message)


def sync(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _grain() -> Any:
    """Grain's Orbax handler, imported late: reading a model needs no data pipeline."""
    import grain.checkpoint

    return grain.checkpoint


def directory(workdir: Path) -> Path:
    """Where a run's checkpoints are. Absolute, as Orbax asks."""
    return workdir.absolute() / "checkpoints"


def load_params(workdir: Path | str, step: int | None = None, mesh: Mesh | None = None) -> tuple[Config, Params, int]:
    """Reads the config and the parameters of a run, and nothing else. Adapters come merged into their base.

    Args:
      workdir: of a run that has saved at least once.
      step: which checkpoint; None: the newest.
      mesh: where the parameters go; None: the first device.

    Returns:
      (config, parameters as `sepjax.model.transformer.merge` takes them, step).

    Raises:
      FileNotFoundError: no such run, no complete checkpoint, or not that step.
      CheckpointError: its files are damaged. Without `step` damaged checkpoints are passed over with a warning.
      ConfigError: the parameters are not those of the saved config, or another version saved it.
    """
    config, learned, base, step, mesh = _read(workdir, step, mesh, with_base=True)
    return config, merged_with(base, learned, config, mesh), step


def load_adapter(workdir: Path | str, step: int | None = None) -> tuple[Config, Params, int]:
    """`load_params` of what a run with `lora.rank` has learned alone: adapters, and a gate if there is one.

    Nothing of the base is read.
    """
    config, learned, _, step, _ = _read(workdir, step, None, with_base=False)
    return config, learned, step


def _read(
    workdir: Path | str, step: int | None, mesh: Mesh | None, *, with_base: bool
) -> tuple[Config, Params, Params, int, Mesh]:
    """The config, what has learned, the frozen base (else empty), the step, and where they are."""
    folder = step_folder(Path(workdir), step)
    config = from_json((folder / "config" / "metadata").read_bytes())
    mesh = mesh or make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, context=1), jax.devices()[:1])
    target, frozen = learned_and_frozen(config, mesh)
    try:
        check_shapes(folder / "params", target)
        with working(f"loading step {folder.name} of {workdir}"), ocp.StandardCheckpointer() as reader:
            base = read_frozen(Path(workdir), frozen if with_base else {})
            return config, reader.restore(folder / "params", target), base, int(folder.name), mesh
    except UserError:
        raise
    except Exception as error:  # see Checkpointer.restore
        raise CheckpointError(
            f"cannot read {folder / 'params'}: {_reason(error)}; use an older checkpoint (--step) or a copy"
        ) from error


def save_params(workdir: Path, config: Config, params: Params) -> None:
    """Writes parameters that no run of ours made as step 0 of a workdir: what `load_params` reads.

    Raises:
      CheckpointError: the files cannot be written.
    """
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params), config=ocp.args.JsonSave(json.loads(to_json(config)))
    )
    with working(f"writing {workdir}"), Checkpointer(workdir, keep=1, warns=False) as checkpointer:  # closing raises
        checkpointer.write(0, items)


def load_config(workdir: Path | str) -> Config:
    """The config of the newest checkpoint of a run; raises as `load_params` does."""
    return from_json((step_folder(Path(workdir), None) / "config" / "metadata").read_bytes())


def step_folder(workdir: Path, step: int | None) -> Path:
    """The newest checkpoint whose files are whole, or that of `step`."""
    folder = directory(workdir)
    steps = steps_on_disk(folder)
    if not steps:
        raise FileNotFoundError(f"no complete checkpoint in {folder}; is {workdir} the folder that train.py wrote?")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, steps))}")
    for candidate in reversed(steps) if step is None else [step]:
        reason = damage(folder / str(candidate), ("params", "config"))
        if reason is None:
            return folder / str(candidate)
        _say(f"warning: the checkpoint of step {candidate} cannot be used: {reason}")
    raise CheckpointError(f"no checkpoint in {folder} can be used{f' of step {step}' if step is not None else ''}")
