"""Checkpoints of a run: parameters, optimizer, data iterator and config, written by Orbax in the background.

<workdir>/checkpoints/<step>/params      sharded arrays, readable alone (generation, evaluation)
                            /optimizer   optax moments
                            /data        the data iterator, one file a process
                            /config      the Config as JSON
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from sepjax.config import Config, ConfigError, UserError, from_json, to_json
from sepjax.model.transformer import Params, abstract
from sepjax.sharding import make_mesh, parameter_shardings

if TYPE_CHECKING:
    import grain

    from sepjax.training.step import TrainState

# Settings that a resumed run may change: they touch neither the parameters' path nor the order of the data.
_FREE = ("training.steps", "training.log_every", "training.eval_every", "training.eval_batches")
_FREE += ("training.checkpoint_every", "training.keep_checkpoints", "data.data_dir", "data.num_workers")
_FREE += ("mesh.", "attention.implementation", "attention.capacity", "attention.cache_size", "attention.max_separators")
_FREE += ("attention.stream_positions", "attention.keep_all_separators")


class CheckpointError(UserError, OSError):
    """A checkpoint that could not be written."""


class Checkpointer:
    """Saves and restores one run; a context manager that waits for the last write when it closes.

    A write that fails raises `CheckpointError`, then or at the next save; older checkpoints stay as they are.
    """

    def __init__(self, workdir: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(directory(workdir), options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint. Interrupted ones do not count."""
        return self._manager.latest_step()

    def save(self, state: "TrainState", data: "grain.DatasetIterator", config: Config) -> None:
        """Starts writing a checkpoint of `state.step`; returns once the arrays are copied off the devices."""
        step = int(state.step)
        if step == self.latest_step:
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            data=_grain().CheckpointSave(data),
            config=ocp.args.JsonSave(json.loads(to_json(config))),
        )
        self.write(step, items)

    def write(self, step: int, items: ocp.args.Composite) -> None:
        """Starts writing items that are named as in this file's heading."""
        with self._writing():
            self._manager.save(step, args=items, force=True)

    def restore(self, target: "TrainState", data: "grain.DatasetIterator") -> "TrainState":
        """Reads the newest checkpoint straight into its shards, and sets `data` to where it was.

        `target` has the state's shapes, dtypes and shardings (`sepjax.training.step.abstract_state`).
        """
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(f"no complete checkpoint in {self._manager.directory}")
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(target.params),
            optimizer=ocp.args.StandardRestore(target.optimizer),
            data=_grain().CheckpointRestore(data),
        )
        read = self._manager.restore(step, args=items)
        counter: Any = target.step
        count = jax.device_put(np.int32(step), counter.sharding)
        return dataclasses.replace(target, step=count, params=read["params"], optimizer=read["optimizer"])

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._writing():
                self._manager.close()
        else:  # the run has a reason to stop already; another one must not hide it
            with contextlib.suppress(OSError, ValueError):
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what a failed write leaves. Orbax writes in the background; TensorStore's errors are ValueErrors."""
        try:
            yield
        except (OSError, ValueError) as error:
            complete = steps_on_disk(Path(self._manager.directory))
            raise CheckpointError(
                f"cannot write a checkpoint in {self._manager.directory}: {str(error).splitlines()[0][:300]}; "
                + (f"the newest complete one is of step {complete[-1]}, " if complete else "there is none yet, ")
                + "and the same command goes on from there once files can be written"
            ) from error


def _grain() -> Any:
    """Grain's Orbax handler, imported late: reading a model needs no data pipeline."""
    import grain.checkpoint

    return grain.checkpoint


def directory(workdir: Path) -> Path:
    """Where a run's checkpoints are. Absolute, as Orbax asks."""
    return workdir.absolute() / "checkpoints"


def load_params(workdir: Path | str, step: int | None = None, mesh: Mesh | None = None) -> tuple[Config, Params, int]:
    """Reads the config and the parameters of a run, and nothing else.

    Args:
      workdir: of a run that has saved at least once.
      step: which checkpoint; None: the newest.
      mesh: where the parameters go; None: the first device.

    Returns:
      (config, parameters as `sepjax.model.transformer.merge` takes them, step).

    Raises:
      FileNotFoundError: no such run, no complete checkpoint, or not that step.
    """
    folder = _step_folder(Path(workdir), step)
    config = from_json((folder / "config" / "metadata").read_text())
    mesh = mesh or make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, context=1), jax.devices()[:1])
    shapes = abstract(config.model, config.attention)[1]
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh),
    )
    with ocp.StandardCheckpointer() as reader:
        return config, reader.restore(folder / "params", target), int(folder.name)


def save_params(workdir: Path, config: Config, params: Params) -> None:
    """Writes parameters that no run of ours made as step 0 of a workdir: what `load_params` reads.

    Raises:
      CheckpointError: the files cannot be written.
    """
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params), config=ocp.args.JsonSave(json.loads(to_json(config)))
    )
    with Checkpointer(workdir, keep=1) as checkpointer:
        checkpointer.write(0, items)


def load_config(workdir: Path | str) -> Config:
    """The config of the newest checkpoint of a run; raises as `load_params` does."""
    return from_json((_step_folder(Path(workdir), None) / "config" / "metadata").read_text())


def steps_on_disk(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in order."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def _step_folder(workdir: Path, step: int | None) -> Path:
    folder = directory(workdir)
    steps = steps_on_disk(folder)
    if not steps:
        raise FileNotFoundError(f"no complete checkpoint in {folder}; is {workdir} the folder that train.py wrote?")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, steps))}")
    return folder / str(steps[-1] if step is None else step)


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes `config.json` into a new workdir, or checks that an old one belongs to this config.

    Raises:
      ConfigError: when the workdir holds a run of another config; names the fields that differ.
    """
    path = workdir / "config.json"
    if path.exists():
        differences = differing_fields(from_json(path.read_text()), config)
        if differences:
            lines = "".join(f"\n  {name}: {old!r} in the workdir, {new!r} now" for name, old, new in differences)
            raise ConfigError(
                f"{workdir} holds a run of another config; choose another --workdir, or go back to:{lines}"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_json(config))
        temporary.replace(path)


def differing_fields(saved: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(dotted name, saved value, new value) of the settings that a resumed run must not change."""
    old, new = (_flat(dataclasses.asdict(config)) for config in (saved, now))
    return [(name, old[name], new[name]) for name in new if old[name] != new[name] and not name.startswith(_FREE)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
