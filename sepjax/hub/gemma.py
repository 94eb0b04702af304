"""Gemma 3, its text models: norms on both sides and of queries and keys, five of six layers with a window."""

import math
from typing import Any

from sepjax.config import ModelConfig
from sepjax.config.rope import same_rope
from sepjax.hub.decoder import (
    MATRICES,
    QK_NORMS,
    SILU,
    activation_name,
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
from sepjax.hub.rope_kinds import read_ropes, ropes_keys
from sepjax.hub.tables import SAME

_NORMS = (
    ("input_layernorm.weight", SAME, "attention_norm/scale"),
    ("post_attention_layernorm.weight", SAME, "attention_out_norm/scale"),
    ("pre_feedforward_layernorm.weight", SAME, "mlp_norm/scale"),
    ("post_feedforward_layernorm.weight", SAME, "mlp_out_norm/scale"),
)
_LOCAL = "rope_local_base_freq"
_BASES = {"base": 1e6, "sliding_base": 1e4, "local": _LOCAL}


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    if fields.values.get("attn_logit_softcapping") is not None:
        fields.refuse("attn_logit_softcapping", "a soft cap of attention scores is not supported")
    if fields.values.get("use_bidirectional_attention"):
        fields.refuse("use_bidirectional_attention", "attention in both directions is not supported")
    shape = read_shape(fields, positions=131_072, kv_heads=4, head_dim=256)
    every = fields.integer("sliding_window_pattern", 6)
    kinds = read_kinds(fields, read_window(fields, 4096), lambda i: (i + 1) % every != 0)
    scalar = fields.integer("query_pre_attn_scalar", 256)
    capped = fields.values.get("final_logit_softcapping") is not None
    full, sliding = read_ropes(fields, positions=shape["max_positions"], **_BASES)
    return ModelConfig(
        **shape,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        norm_offset=True,
        norm_position="both",
        qk_norm="head",
        activation=fields.choice("hidden_activation", "gelu_pytorch_tanh", SILU),
        attention_bias=fields.flag("attention_bias", False),
        **kinds,
        rope=full,
        sliding_rope=sliding if kinds else same_rope(),
        embedding_scale=math.sqrt(shape["embed_dim"]),
        attention_scale=0.0 if scalar == shape["head_dim"] else scalar**-0.5,
        final_softcap=fields.number("final_logit_softcapping") if capped else 0.0,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Gemma 3 has this shape."""
    expect("Gemma 3", config, norm_offset=True, norm_position="both", qk_norm="head", mlp_bias=False)
    expect("Gemma 3", config, embedding_scale=math.sqrt(config.embed_dim))
    scalar = round(config.attention_scale**-2) if config.attention_scale else config.head_dim
    if config.attention_scale and scalar**-0.5 != config.attention_scale:
        raise HubError(f"a Gemma 3 has the root of a whole number for its attention_scale={config.attention_scale}")
    keys = shape_keys(config, "Gemma 3") | kind_keys(config) | ropes_keys(config, "Gemma 3", local=_LOCAL)
    del keys["hidden_act"]
    return keys | {
        "hidden_activation": activation_name(config),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": config.final_softcap or None,
    }


FAMILY = decoder_family(
    "gemma3",
    "Gemma3ForCausalLM",
    model_types=("gemma3_text",),
    read_config=read_config,
    write_config=write_config,
    table=decoder_rows(*_NORMS, *QK_NORMS, *MATRICES),
    features=frozenset({
        "norm_offset", "norm_position", "qk_norm", "sliding_window", "full_layers", "sliding_rope", "embedding_scale",
        "attention_scale", "final_softcap",
    }),
    layer_types=None,
)  # fmt: skip
