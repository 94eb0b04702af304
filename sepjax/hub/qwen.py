"""Qwen2 and Qwen2.5, with biases of queries, keys and values; Qwen3, with norms of each query and key head."""

import dataclasses
from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.decoder import (
    MATRICES,
    NORMS,
    QK_NORMS,
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

_FIRST_TO_SLIDE = 28  # layer, where no key says


def _read(fields: Fields, head_dim: int) -> ModelConfig:
    shape = read_shape(fields, positions=32_768, kv_heads=32, head_dim=head_dim)
    window = read_window(fields, 4096) if fields.flag("use_sliding_window", False) else 0
    first = fields.values.get("max_window_layers", _FIRST_TO_SLIDE)
    if window and (type(first) is not int or first < 0):
        fields.refuse("max_window_layers", "expected a whole number: the first layer with the window")
    return ModelConfig(
        **shape,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", "silu", SILU),
        rope=read_rope(fields, positions=shape["max_positions"]),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        **read_kinds(fields, window, lambda i: window > 0 and i >= first),
    )


def read_qwen2(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    return dataclasses.replace(_read(fields, 0), qkv_bias=True)


def read_qwen3(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    bias = fields.flag("attention_bias", False)
    return dataclasses.replace(_read(fields, 128), attention_bias=bias, qk_norm="head")


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Qwen2 has this shape."""
    expect("Qwen2", config, qkv_bias=True, qk_norm="none")
    if config.num_heads * config.head_dim != config.embed_dim:
        raise HubError("a Qwen2 has heads that make up its width")
    return _keys(config, "Qwen2")


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Qwen3 has this shape."""
    expect("Qwen3", config, qkv_bias=False, qk_norm="head")
    return _keys(config, "Qwen3") | {"attention_bias": config.attention_bias}


def _keys(config: ModelConfig, name: str) -> dict[str, Any]:
    expect(name, config, mlp_bias=False, parallel_residual=False)
    keys = shape_keys(config, name) | rope_keys(config.rope, name) | kind_keys(config)
    return keys | {"use_sliding_window": config.sliding_window > 0}


QWEN2 = decoder_family(
    "qwen2",
    "Qwen2ForCausalLM",
    read_config=read_qwen2,
    write_config=write_qwen2,
    table=decoder_rows(*NORMS, *MATRICES),
    features=frozenset({"qkv_bias", "sliding_window", "full_layers"}),
    layer_types=None,
)
QWEN3 = dataclasses.replace(
    QWEN2,
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    read_config=read_qwen3,
    write_config=write_qwen3,
    table=decoder_rows(*NORMS, *QK_NORMS, *MATRICES),
    features=frozenset({"qk_norm", "sliding_window", "full_layers"}),
)
