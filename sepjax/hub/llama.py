"""Llama 1, 2, 3 and 3.1, and what has their shape: SmolLM2, TinyLlama."""

from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.decoder import MATRICES, NORMS, SILU, decoder_family, decoder_rows, expect, read_shape, shape_keys
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    shape = read_shape(fields, positions=2048)
    return ModelConfig(
        **shape,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", "silu", SILU),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        rope=read_rope(fields, positions=shape["max_positions"]),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Llama has this shape."""
    expect("Llama", config, parallel_residual=False)
    keys = shape_keys(config, "Llama") | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return keys | rope_keys(config.rope, "Llama")


FAMILY = decoder_family(
    "llama",
    "LlamaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    table=decoder_rows(*NORMS, *MATRICES),
)
