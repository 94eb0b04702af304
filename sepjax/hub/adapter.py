"""Low-rank adapters as PEFT's folders have them: adapter_config.json and adapter_model.safetensors, in and out.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    [R, inputs]
                                                    .lora_B.weight    [outputs, R]        W + scale * B A, W of torch

The scale is lora_alpha / r, with use_rslora lora_alpha / sqrt(r). What would change the result and is not read is
refused by name.
"""

import functools
import json
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sepjax.config import Config, ModelConfig
from sepjax.files import write_text
from sepjax.hub.errors import HubError
from sepjax.hub.families import family_for, family_of, flat, flat_shapes, rows_of
from sepjax.hub.fields import Fields
from sepjax.hub.folder import is_folder
from sepjax.hub.remote import HUB_ID, fetch
from sepjax.hub.safetensors_file import Planned, SafetensorsFile, write_safetensors
from sepjax.hub.tables import CONV, CONV_OUT, LINEAR, LINEAR_OUT, SIDE_BY_SIDE, Family, Row
from sepjax.model.transformer import Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# Keys of adapter_config.json that say where it came from or how it was trained, or that the tensors say too.
_NOTES = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Keys with the values that leave a plain adapter; others that are set are refused.
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
_INPUTS_FIRST = (CONV, CONV_OUT, SIDE_BY_SIDE)  # kinds whose tensors are [inputs, outputs]
_KINDS = (LINEAR, LINEAR_OUT, CONV, CONV_OUT)


def origin_family(config: ModelConfig, origin: Path | None) -> Family:
    """The family of a model: its origin's, a folder with config.json, if that is known, else one of its shape."""
    if origin is not None and (origin / "config.json").is_file():
        return family_of(Fields.read(origin / "config.json"))
    return family_for(config)[0]


def write_adapter(folder: Path, config: Config, learned: Params, family: Family) -> None:
    """Writes what a run with `lora.rank` has learned, in float32.

    Args:
      folder: an empty one.
      config: the run's.
      learned: its adapters (`sepjax.run.checkpoint.load_adapter`).
      family: the names of the base's tensors.

    Raises:
      HubError: the family has several of our matrices in one tensor, or there is a gate, which has no place in it.
    """
    if "gate" in learned:
        raise HubError("an adapter has no place for a gate, which the run has learned too; write the whole model")
    leaves = {name: leaf for name, _, leaf in flat(learned)}
    rows = [row for row in _rows(family, config.model) if any(_stem(name) + "/lora_a" in leaves for name in row.ours)]
    tensors: dict[str, Planned] = {}
    for row in rows:
        if row.kind not in _KINDS:
            raise HubError(
                f"the family {family.name} has {' and '.join(_stem(name) for name in row.ours)} in one matrix, "
                f"{_module(row.theirs)!r}, for which adapters of each are none; write the merged model"
            )
        a, b = (leaves[f"{_stem(row.ours[0])}/{part}"] for part in ("lora_a", "lora_b"))
        for layer in range(config.model.num_layers):
            name = _PREFIX + _module(row.theirs).format(layer)
            flat_a, flat_b = a[layer].reshape(-1, config.lora.rank).T, b[layer].reshape(config.lora.rank, -1).T
            tensors |= {f"{name}.lora_A.weight": _planned(flat_a), f"{name}.lora_B.weight": _planned(flat_b)}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / TENSORS, tensors)
    write_text(folder / CONFIG, json.dumps(_keys(config, rows, family), indent=2) + "\n")  # last, as of a model


def _planned(x: jax.Array) -> Planned:
    return Planned(np.dtype(np.float32), x.shape, lambda: np.asarray(x, np.float32))


def _keys(config: Config, rows: list[Row], family: Family) -> dict[str, Any]:
    others = [_module(row.theirs) for row in _rows(family, config.model) if row not in rows]

    def short(row: Row) -> str:
        """The end of a module's name that no other module has."""
        parts = _module(row.theirs).split(".")
        names = (".".join(parts[-n:]) for n in range(1, len(parts)))
        return next(x for x in names if not any(f".{other}".endswith(f".{x}") for other in others))

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": peft_base(config.training.init_from),
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": sorted({short(row) for row in rows}),
        "fan_in_fan_out": any(row.kind in _INPUTS_FIRST for row in rows),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def peft_base(source: str) -> str | None:
    """The name by which PEFT opens a `training.init_from`: a Hugging Face folder's or the hub's; None: it cannot.

    An id of the hub counts where the hub's local cache has it: a workdir that has gone may look like one.
    """
    if (path := Path(source)).exists():
        return source if is_folder(path) else None
    if not HUB_ID.fullmatch(source):
        return None
    try:
        fetch(source, download=False)
    except HubError:
        return None
    return source


def add_adapter(params: Params, folder: Path, config: ModelConfig, family: Family) -> Params:
    """The parameters of a model with a PEFT adapter added, in the types and places that they had.

    Args:
      params: of a plain model, from `sepjax.model.transformer.split`. They are used up: changed where they are.
      folder: the adapter.
      config: the model's.
      family: the names of the model's tensors.

    Raises:
      HubError: an adapter of another kind or for another model; names the key or tensor.
    """
    keys = _checked(folder)
    file = SafetensorsFile(folder / TENSORS)
    shapes = flat_shapes(config)
    rows = {_module(row.theirs).format(i): (row, i) for row in _rows(family, config) for i in range(config.num_layers)}
    pairs: dict[str, dict[str, str]] = {}
    for name in file.entries:
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in rows:
            raise HubError(
                f"{str(file.path)!r}: tensor {name!r} belongs to no matrix in a layer of this {family.name}; the "
                "adapter is of another model, or of a kind that is not read"
            )
        pairs.setdefault(match["module"], {})[match["part"]] = name
    if not pairs:
        raise HubError(f"{str(file.path)!r} has no tensors, so there is nothing to add; write the adapter anew")
    for module, names in pairs.items():  # one matrix of one layer at a time: a model may fill its device
        row, layer = rows[module]
        whole = _product(file, module, names, row.kind.theirs([shapes[name] for name in row.ours]), row, keys)
        for ours, part in zip(row.ours, row.kind.split(whole, [shapes[name] for name in row.ours]), strict=True):
            *path, last = ours.split("/")
            place = functools.reduce(operator.getitem, path, params["layers"])
            place[last] = _added(place[last], layer, part)
    return params


def _product(
    file: SafetensorsFile, module: str, names: Mapping[str, str], shape: tuple[int, ...], row: Row, keys: Fields
) -> np.ndarray:
    """scale * B A in the shape of a family's tensor."""
    if set(names) != {"A", "B"}:
        raise HubError(f"{str(file.path)!r} has only one of lora_A and lora_B for {module!r}")
    a, b = (np.asarray(file.view(names[part]), np.float32) for part in "AB")
    outputs, inputs = reversed(shape) if row.kind in _INPUTS_FIRST else shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape[0] != outputs or a.shape[0] != b.shape[1]:
        raise HubError(
            f"{str(file.path)!r}: lora_A and lora_B of {module!r} have shapes {list(a.shape)} and {list(b.shape)}, "
            f"expected [r, {inputs}] and [{outputs}, r]"
        )
    rank = a.shape[0]
    scale = keys.number("lora_alpha", 8.0) / (rank**0.5 if keys.flag("use_rslora", False) else rank)
    whole = scale * (b @ a)
    return whole.T if row.kind in _INPUTS_FIRST else whole


def _added(x: jax.Array, layer: int, delta: np.ndarray) -> jax.Array:
    """A stack of matrices [L, ...] with `delta` added to one of them, in its place in memory: `x` is used up."""
    one = x.sharding
    if isinstance(one, NamedSharding):
        one = NamedSharding(one.mesh, PartitionSpec(*one.spec[1:]))
    return _adder(x.sharding)(x, layer, jax.device_put(delta, one))


@functools.cache
def _adder(sharding: jax.sharding.Sharding) -> Any:
    def add(x: jax.Array, layer: jax.Array, delta: jax.Array) -> jax.Array:
        return x.at[layer].set((x[layer].astype(jnp.float32) + delta).astype(x.dtype))

    return jax.jit(add, donate_argnums=0, out_shardings=sharding)


def _checked(folder: Path) -> Fields:
    keys = Fields.read(folder / CONFIG)
    if not (folder / TENSORS).is_file():
        raise HubError(f"{str(folder)!r} lacks {TENSORS}; other files are not read, since they may run code")
    if keys.values.get("peft_type") != "LORA":
        keys.refuse("peft_type", "adapters of the type LORA are read")
    for name, value in keys.values.items():
        if name in _PLAIN:
            if value not in _PLAIN[name]:
                keys.refuse(name, f"expected one of {', '.join(map(repr, _PLAIN[name]))}")
        elif name not in _NOTES and value:
            _refuse_unknown(keys, name)
    if keys.values.get("alpha_pattern"):
        _refuse_unknown(keys, "alpha_pattern")
    return keys


def _refuse_unknown(keys: Fields, name: str) -> None:
    keys.refuse(name, "it is not read; merge the adapter with PEFT (merge_and_unload) and read that")


def _rows(family: Family, config: ModelConfig) -> list[Row]:
    """The rows of layers' matrices."""
    rows = rows_of(family, config, flat_shapes(config))
    return [row for row in rows if row.in_layers and row.ours[0].endswith("/kernel")]


def _module(theirs: str) -> str:
    return theirs.removesuffix(".weight")


def _stem(ours: str) -> str:
    """The path of a matrix without "/kernel"."""
    return ours.rpartition("/")[0]
