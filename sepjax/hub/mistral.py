"""Mistral, every layer of which has a sliding window or none has, and Ministral, whose layers may differ."""

import dataclasses
from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.decoder import (
    MATRICES,
    NORMS,
    SILU,
    decoder_family,
    decoder_rows,
    expect,
    kind_keys,
    read_kinds,
    read_shape,
    read_window,
    shape_keys,
)
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys


def _read(fields: Fields) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias"):
        fields.must_be(name, False, "a Mistral has no biases")
    shape = read_shape(fields, positions=131_072, kv_heads=8)
    return ModelConfig(
        **shape,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", "silu", SILU),
        rope=read_rope(fields, positions=shape["max_positions"]),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _window(fields: Fields) -> int:
    """The window, 4096 unless the key says otherwise; 0: it has none."""
    window = read_window(fields, 4096)
    if window:
        fields.must_be("use_sliding_window", True, f"contradicts sliding_window={window}, which a Mistral always uses")
    return window


def read_mistral(fields: Fields) -> ModelConfig:
    """Our shape of a config.json that does not say the kinds of layers: one that does is a Ministral's."""
    return dataclasses.replace(_read(fields), sliding_window=_window(fields))


def read_ministral(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    window = _window(fields)
    return dataclasses.replace(_read(fields), **read_kinds(fields, window, lambda i: window > 0))


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Mistral has this shape."""
    if config.full_layers:
        raise HubError("the layers of a Mistral are all alike")
    return _keys(config) | {"sliding_window": config.sliding_window or None}


def write_ministral(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Ministral has this shape."""
    return _keys(config) | kind_keys(config)


def _keys(config: ModelConfig) -> dict[str, Any]:
    expect("Mistral", config, attention_bias=False, mlp_bias=False, parallel_residual=False)
    return shape_keys(config, "Mistral") | rope_keys(config.rope, "Mistral")


FAMILY = decoder_family(
    "mistral",
    "MistralForCausalLM",
    read_config=read_mistral,
    write_config=write_mistral,
    table=decoder_rows(*NORMS, *MATRICES),
    features=frozenset({"sliding_window"}),
)
MINISTRAL = dataclasses.replace(
    FAMILY,
    name="ministral",
    model_types=("ministral",),
    architecture="MinistralForCausalLM",
    read_config=read_ministral,
    write_config=write_ministral,
    features=frozenset({"sliding_window", "full_layers"}),
    layer_types=None,
)
