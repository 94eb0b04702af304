"""What a run with adapters never changes: its base, written once and read beside every checkpoint.

<workdir>/frozen/         sharded arrays in the types that the steps read (`TrainState.frozen`)
<workdir>/checkpoints/    adapters and their moments alone

So checkpoints stay small, and the workdir needs nothing outside of it (docs/decisions.md, 101).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from sepjax.config import Config, LoraConfig, UserError
from sepjax.model.lora import joined, merged
from sepjax.model.transformer import Params, abstract
from sepjax.run.checkpoint_files import agreed, check_shapes, damage, on_first, quiet, seal
from sepjax.sharding import parameter_shardings

FOLDER = "frozen"


class FrozenError(UserError, OSError):
    """A base that could not be read. Without it no checkpoint of the run is a model."""


def write_frozen(workdir: Path, params: Params, *, anew: bool) -> None:
    """Writes the base unless it is there, or `anew` in the place of what is; by all processes together.

    Raises what Orbax does where the files cannot be written.
    """
    folder = workdir.absolute() / FOLDER
    if not params or (folder.is_dir() and not anew):
        return
    with quiet(), ocp.StandardCheckpointer() as writer:  # complete or not there: renamed at the end
        writer.save(folder, params, force=True)
    on_first(lambda: seal(folder))


def read_frozen(workdir: Path, target: Any) -> Params:
    """The base, straight into the shards of `target`, a tree of shapes, dtypes and shardings; empty where that is.

    By all processes together: what one finds is an error of all.

    Raises:
      FrozenError: it is missing or damaged.
      ConfigError: it is of another shape.
    """
    folder = workdir.absolute() / FOLDER
    if not target:
        return {}
    share = (jax.process_index(), jax.process_count())
    reason = agreed(damage(folder, (), share=share) if folder.is_dir() else "it is not there")
    if reason is None:
        check_shapes(folder, target)
        base = {}
        try:
            with quiet(), ocp.StandardCheckpointer() as reader:
                base = reader.restore(folder, target)
        except Exception as error:  # Orbax and TensorStore raise all kinds for damaged files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if (reason := agreed(reason)) is None:
            return base
    raise FrozenError(
        f"cannot read {folder}, the model that this run's adapters belong to: {reason}; bring back a copy of the "
        "folder, or start a new --workdir"
    )


def learned_and_frozen(config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """What a run's checkpoints hold and what its base is, as shapes, dtypes and shardings; no adapters, no base."""
    if not config.lora.rank:
        return _placed(abstract(config.model, config.attention)[1], mesh), {}
    from sepjax.training.step import create_state  # whoever reads a plain model needs no optimizer

    state = jax.eval_shape(lambda: create_state(config))
    return _placed(state.params, mesh), _placed(state.frozen, mesh)


def merged_with(base: Params, params: Params, config: Config, mesh: Mesh) -> Params:
    """The parameters of a plain model, float32, in their shards: adapters added to the matrices of their base.

    `base` is used up: one matrix (of all layers) after the other is in memory twice, and not all of them.
    """
    if not config.lora.rank:
        return params
    places, whole = parameter_shardings(abstract(config.model, config.attention)[1], mesh), joined(base, params)
    base.clear()
    return _merged_each(whole, places, config.lora)


def _merged_each(params: Params, places: Any, lora: LoraConfig) -> Params:
    """`merged`, a module at a time; `params` is used up."""
    if all(isinstance(x, dict) for x in params.values()):
        return {name: _merged_each(params.pop(name), places[name], lora) for name in list(params)}
    found = jax.jit(functools.partial(merged, lora=lora), out_shardings=places)(params)
    params.clear()
    return jax.block_until_ready(found)


def _placed(shapes: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh),
    )
