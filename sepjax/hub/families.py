"""The families, and which of them a config.json or one of our shapes belongs to."""

import dataclasses
from typing import Any

from sepjax.config import (
    AttentionConfig,
    ConfigError,
    ModelConfig,
    from_json_section,
    nearest,
    validate_attention,
    validate_model,
)
from sepjax.hub import (
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo,
    phi,
    qwen,
    smollm3,
    stablelm,
)
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.tables import Family, Row
from sepjax.model.transformer import Params, abstract

FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    mistral.MINISTRAL,
    qwen.QWEN2,
    qwen.QWEN3,
    smollm3.FAMILY,
    olmo.OLMO2,
    olmo.OLMO3,
    gemma.FAMILY,
    granite.FAMILY,
    phi.FAMILY,
    stablelm.FAMILY,
    gpt_neox.FAMILY,
    gpt2.FAMILY,
    falcon.FAMILY,
)
_FEATURES = {name for family in FAMILIES for name in family.features}
KEY = "sepllm"  # of a config.json, where our settings are

# Keys that any architecture of transformers may have -> the value that changes nothing, and why others are refused.
_NOT_SUPPORTED = {
    "quantization_config": ({}, "quantised checkpoints are not supported: take one in bfloat16, or a GGUF file"),
    "compression_config": ({}, "compressed checkpoints are not supported: take one in bfloat16, or a GGUF file"),
    "per_layer_config": ({}, "settings of each layer's own are not supported"),
    "attention_chunk_size": (0, "attention within chunks is not supported"),
    "is_causal": (True, "attention in both directions is not supported"),
    "transformers_weights": ("model.safetensors", "weights of another name are not read; rename the file"),
}

# Keys of architectures that are of another kind than any here, and what they are.
_OTHER_KINDS = (
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), "a mixture of experts"),
    (("is_encoder_decoder",), "an encoder with a decoder"),
    (("vision_config", "audio_config", "text_config"), "a multimodal model"),
    (("ssm_cfg", "state_size", "mamba_d_state", "linear_num_key_heads"), "a model with recurrent layers"),
)

# What a pretrained model is used with unless told otherwise: the paper's training-free window and streaming cache.
ATTENTION = AttentionConfig(num_sinks=4, window_size=256, max_separators=64, cache_size=800)


def family_of(fields: Fields) -> Family:
    """The family of a config.json. Raises HubError for an architecture that is not supported."""
    kinds = {kind: family for family in FAMILIES for kind in family.model_types}
    kind = fields.values.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        why = next((f"{why}; " for names, why in _OTHER_KINDS if any(fields.values.get(name) for name in names)), "")
        hint = nearest(kind, kinds) if isinstance(kind, str) and not why else ""
        fields.refuse("model_type", f"{why}supported architectures are {', '.join(kinds)}{hint}")
    if kind == "mistral" and "layer_types" in fields.values:
        return mistral.MINISTRAL  # transformers reads it as that
    return kinds[str(kind)]


def read_model_config(fields: Fields, family: Family, dtype: str) -> ModelConfig:
    """Our shape of a config.json, with `dtype` for activations and matmuls.

    Raises:
      HubError: a key that changes what the model computes in a way that is not supported, or a shape that cannot be.
    """
    for name, (neutral, why) in _NOT_SUPPORTED.items():
        if fields.values.get(name) not in (None, neutral):
            fields.refuse(name, why)
    kinds, allowed = fields.values.get("layer_types") or [], family.layer_types
    if allowed and not (isinstance(kinds, list) and all(kind in allowed for kind in kinds)):
        fields.refuse("layer_types", f"layers of other kinds than {', '.join(allowed)} are not supported here")
    try:
        config = family.read_config(fields)
        if "sliding_window" not in family.features:
            _refuse_window(fields, config.max_positions)
        return validate_model(dataclasses.replace(config, dtype=dtype))
    except ConfigError as error:
        raise HubError(f"{str(fields.path)!r}: {error}") from error


def _refuse_window(fields: Fields, positions: int) -> None:
    """Of a family without one. transformers attends to everything there, but for its cache, which drops keys."""
    if fields.values.get("sliding_window") is not None and fields.integer("sliding_window") < positions:
        kind = fields.values["model_type"]
        why = f"the architecture {kind} has none; it would be a Mistral's, or the key is to be null"
        fields.refuse("sliding_window", why)


def read_attention(fields: Fields, num_layers: int) -> AttentionConfig:
    """Our settings under "sepllm", or the ones for models that were not trained with separators."""
    values = fields.values.get(KEY)
    try:
        attention = ATTENTION if values is None else from_json_section(AttentionConfig, values, f"{KEY}.")
        return validate_attention(attention, num_layers)
    except ConfigError as error:
        raise HubError(f"{str(fields.path)!r}: {error}") from error


def family_for(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that a shape of ours can be written as, and its keys of config.json.

    Raises:
      HubError: none; says why for each.
    """
    reasons = []
    plain = ModelConfig()
    special = [name for name in sorted(_FEATURES) if getattr(config, name) != getattr(plain, name)]
    for family in FAMILIES:
        try:
            if missing := [name for name in special if name not in family.features]:
                raise HubError(f"it has no {', '.join(missing)}")
            return family, family.write_config(config)
        except HubError as error:
            reasons.append(f"{family.name}: {error}")
    raise HubError("no architecture of transformers has this model's shape; " + "; ".join(reasons))


def rows_of(family: Family, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[Row]:
    """The rows for what a model has; `shapes` are of `flat_shapes`. Together they make up every parameter."""
    rows = [row for row in family.table(config) if all(name in shapes for name in row.ours)]
    covered = {name for row in rows for name in row.ours}
    if covered != set(shapes):
        raise HubError(f"the family {family.name} has no name for {', '.join(sorted(set(shapes) - covered))}")
    return rows


def flat_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter, a layer's once: "attention/query/kernel" [D, N, H], "embedding/embedding"."""
    return shapes_of(abstract(config)[1])


def shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    """`flat_shapes` of parameters that are there, or stand-ins for them."""
    return {name: leaf.shape[in_layers:] for name, in_layers, leaf in flat(params)}


def flat(params: Params) -> list[tuple[str, bool, Any]]:
    """(path, whether layers are stacked in it, leaf) of every parameter, the path without "layers/"."""
    found = []

    def walk(tree: Params, path: tuple[str, ...]) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, (*path, name))
            else:
                in_layers = path[:1] == ("layers",)
                found.append(("/".join((*path, name)[in_layers:]), in_layers, value))

    walk(params, ())
    return found
