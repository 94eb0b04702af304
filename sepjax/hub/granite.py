"""Granite 3: a Llama with scales of embeddings, residuals, attention scores and logits."""

from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.decoder import MATRICES, NORMS, SILU, decoder_family, decoder_rows, expect, read_shape, shape_keys
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    shape = read_shape(fields, positions=2048)
    scale = fields.number("attention_multiplier", 1.0)
    return ModelConfig(
        **shape,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", "silu", SILU),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        rope=read_rope(fields, positions=shape["max_positions"]),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        attention_scale=0.0 if scale == shape["head_dim"] ** -0.5 else scale,
        logit_divisor=fields.number("logits_scaling", 1.0),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Granite has this shape."""
    expect("Granite", config, parallel_residual=False)
    return shape_keys(config, "Granite") | rope_keys(config.rope, "Granite") | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "logits_scaling": config.logit_divisor,
    }  # fmt: skip


FAMILY = decoder_family(
    "granite",
    "GraniteForCausalLM",
    read_config=read_config,
    write_config=write_config,
    table=decoder_rows(*NORMS, *MATRICES),
    features=frozenset({"embedding_scale", "residual_scale", "attention_scale", "logit_divisor"}),
)
