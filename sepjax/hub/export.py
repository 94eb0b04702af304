"""Models written as Hugging Face folders: what transformers opens, as a dense model, and we read back bit for bit."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sepjax
from sepjax.config import ConfigError, ModelConfig
from sepjax.data.special_tokens import GENERATION
from sepjax.data.tokenizer import FILES, Tokenizer
from sepjax.files import adding_to, write_text
from sepjax.hub.errors import HubError
from sepjax.hub.families import KEY, family_for, family_of, flat, flat_shapes, rows_of
from sepjax.hub.fields import Fields
from sepjax.hub.folder import INDEX, SINGLE, TOKENIZER_FILES
from sepjax.hub.gate_file import write_gate
from sepjax.hub.safetensors_file import Planned, write_safetensors
from sepjax.hub.tables import Family, Row
from sepjax.model.transformer import Params, Transformer, split

_SHARD = 5_000_000_000  # bytes of a file, at most, unless one tensor is larger
_DTYPE_KEYS = ("torch_dtype", "dtype")  # of config.json, older and newer


def save_folder(
    model: Transformer,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    dtype: str | None = None,
    like: Path | None = None,
    shard_bytes: int = _SHARD,
) -> None:
    """Writes a model as safetensors with config.json (our settings under "sepllm") and its tokenizer.

    A gate goes into a file of its own, `sepllm_gate.safetensors`, in float32.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      folder: where to; made if missing. It must hold no model yet, and holds none if this fails.
      dtype: of the tensors; None: what `like` says, else the parameters' own.
      like: a Hugging Face folder that the model came from: its other keys and tokenizer files are kept.
      shard_bytes: of a file, at most; more than one get an index.

    Raises:
      HubError: no architecture of transformers has this shape, or `like` is of another; there is a model already.
      sepjax.files.WriteError: it cannot be written.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        raise HubError(f"{str(folder)!r} holds a model already; choose another folder")
    if model.config.weight_dtype != "model":
        raise HubError(
            f"a model of weight_dtype={model.config.weight_dtype!r} has rounded weights, which no file of safetensors "
            'here can hold; load it with weight_dtype="model" to write it'
        )
    family, keys = _config(model, tokenizer, like)
    dtype = dtype or next((keys[name] for name in _DTYPE_KEYS if keys.get(name)), None)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={dtype!r} must be float32, bfloat16 or float16")
    params = split(model)[1]
    tensors = _plan(family, model.config, params, dtype)
    found = next(iter(tensors.values())).dtype.name
    keys |= {name: found for name in _DTYPE_KEYS if name in keys} or {_DTYPE_KEYS[0]: found}
    keys[KEY] = dataclasses.asdict(model.attention)
    with adding_to(folder, "config.json") as partial:  # last: without it the folder is no model
        _write_tokenizer(tokenizer, partial, like)
        _write_tensors(partial, tensors, shard_bytes)
        write_gate(partial, params)
        write_text(partial / "config.json", json.dumps(keys, indent=2) + "\n")


def _config(model: Transformer, tokenizer: Tokenizer, like: Path | None) -> tuple[Family, dict[str, Any]]:
    """The family, and the keys of config.json: those of the model's origin if that is known."""
    if like is None or not (like / "config.json").is_file():
        family, keys = family_for(model.config)
        about = {"architectures": [family.architecture], "model_type": family.model_types[0]}
        return family, about | keys | _ids(tokenizer) | {"sepjax_version": sepjax.__version__}
    fields = Fields.read(like / "config.json")
    family = family_of(fields)
    tied = model.config.tie_embeddings  # the origin's config may have been wrong about that
    origin = dataclasses.replace(family.read_config(fields), dtype=model.config.dtype, tie_embeddings=tied)
    changed = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in ("scan_layers", "remat")
        and getattr(origin, field.name) != getattr(model.config, field.name)
    ]
    if changed:
        raise HubError(f"{str(like)!r} is of another shape than the model: {', '.join(changed)} differ")
    keys = dict(fields.values)
    return family, keys if family.read_config(fields).tie_embeddings == tied else keys | {"tie_word_embeddings": tied}


def _plan(family: Family, config: ModelConfig, params: Params, dtype: str | None) -> dict[str, Planned]:
    """Every tensor of the family by name, read from the device when it is written."""
    shapes = flat_shapes(config)
    leaves = {name: leaf for name, _, leaf in flat(params)}

    def plan(row: Row, layer: int) -> Planned:
        ours = [leaves[name] for name in row.ours]
        shape = row.kind.theirs([shapes[name] for name in row.ours])

        def read() -> np.ndarray:
            return row.kind.join([_to_host(x, layer if row.in_layers else None) for x in ours])

        return Planned(np.dtype(jnp.dtype(dtype)) if dtype else np.dtype(ours[0].dtype), shape, read)

    return {
        row.theirs.format(layer): plan(row, layer)
        for row in rows_of(family, config, shapes)
        for layer in (range(config.num_layers) if row.in_layers else (0,))
    }


def _to_host(x: jax.Array, layer: int | None) -> np.ndarray:
    if not x.is_fully_addressable:
        raise HubError("parameters are spread over several processes; export from one that reads them all")
    return np.asarray(x if layer is None else x[layer])


def _write_tensors(folder: Path, tensors: Mapping[str, Planned], shard_bytes: int) -> None:
    shards: list[dict[str, Planned]] = [{}]
    for name, planned in tensors.items():
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + planned.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = planned
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    total = {"total_size": sum(x.nbytes for x in tensors.values())}
    total["total_parameters"] = sum(math.prod(x.shape) for x in tensors.values())
    write_text(folder / INDEX, json.dumps({"metadata": total, "weight_map": places}, indent=2) + "\n")


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, like: Path | None) -> None:
    """The origin's files byte for byte, or ours and what transformers takes from no tokenizer's file."""
    if like is None or not any((like / name).is_file() for name in FILES):
        tokenizer.spelled_out().save(folder)
        _write_generation_config(tokenizer, folder)
    there = [name for name in TOKENIZER_FILES if like is not None and (like / name).is_file()]
    for name in there:
        assert like is not None
        shutil.copyfile(like / name, folder / name)


def _write_generation_config(tokenizer: Tokenizer, folder: Path) -> None:
    """Adds the ids of BOS and EOS to generation_config.json: without it no answer ends in transformers."""
    file = folder / GENERATION
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_text(file, json.dumps(_ids(tokenizer) | said, indent=2) + "\n")


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json and generation_config.json call the tokens that begin a text and end an answer; null: none."""
    ends = list(tokenizer.end_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
