"""A gate in a Hugging Face folder: a file of its own, float32, which transformers passes over."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sepjax.config import AttentionConfig, ModelConfig
from sepjax.hub.errors import HubError
from sepjax.hub.safetensors_file import Planned, SafetensorsFile, write_safetensors
from sepjax.model.transformer import Params, abstract
from sepjax.sharding import parameter_shardings

GATE = "sepllm_gate.safetensors"


def write_gate(folder: Path, params: Params) -> None:
    """Writes the gate among a model's parameters, if it has one."""

    def plan(x: jax.Array) -> Planned:
        return Planned(np.dtype(np.float32), x.shape, lambda: np.asarray(x, np.float32))

    if "gate" in params:
        write_safetensors(folder / GATE, {name: plan(x) for name, x in _named(params["gate"])})


def read_gate(folder: Path, config: ModelConfig, attention: AttentionConfig, mesh: Mesh | None = None) -> Params:
    """{"gate": ...} of a folder whose pattern needs one, else {}.

    Raises:
      HubError: the file is missing, damaged, of another shape, or there though the pattern has no use for it.
    """
    path = folder / GATE
    if path.exists() != (attention.pattern == "gated"):
        what = "lacks" if attention.pattern == "gated" else "has"
        raise HubError(
            f"{str(folder)!r} {what} {GATE}, but its config.json says sepllm.pattern={attention.pattern!r}; they do "
            "not belong together"
        )
    if attention.pattern != "gated":
        return {}
    shapes = {"gate": abstract(config, attention)[1]["gate"]}
    expected = {name: x.shape for name, x in _named(shapes["gate"])}
    file = SafetensorsFile(path)
    found = {name: tuple(entry.shape) for name, entry in file.entries.items()}
    if found != expected:
        raise HubError(f"{str(path)!r} has tensors {found}, expected {expected} by config.json")
    places: Any = parameter_shardings(shapes, mesh) if mesh else jax.tree.map(lambda _: jax.devices()[0], shapes)

    def read(keys: Any, place: Any) -> jax.Array:
        name = ".".join(key.key for key in keys[1:])
        return jax.device_put(np.asarray(file.view(name), np.float32), place)

    return jax.tree_util.tree_map_with_path(lambda keys, _, place: read(keys, place), shapes, places)


def _named(gate: Params) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(gate)
    return [(".".join(getattr(key, "key", "") for key in keys), x) for keys, x in leaves]
