"""Llama 1, 2, 3 and 3.1, and what has their shape: SmolLM2, TinyLlama, Mistral."""

import re
from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields, rope_keys
from sepjax.hub.tables import FLAT, LINEAR, LINEAR_OUT, SAME, Family, make_rows

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_TABLE = (
    *make_rows(
        "",
        ("model.embed_tokens.weight", SAME, "embedding/embedding"),
        ("model.norm.weight", SAME, "final_norm/scale"),
        ("lm_head.weight", SAME, "head/embedding"),
    ),
    *make_rows(
        "model.layers.{}.",
        ("input_layernorm.weight", SAME, "attention_norm/scale"),
        ("self_attn.q_proj.weight", LINEAR, "attention/query/kernel"),
        ("self_attn.k_proj.weight", LINEAR, "attention/key/kernel"),
        ("self_attn.v_proj.weight", LINEAR, "attention/value/kernel"),
        ("self_attn.o_proj.weight", LINEAR_OUT, "attention/out/kernel"),
        ("self_attn.q_proj.bias", FLAT, "attention/query/bias"),
        ("self_attn.k_proj.bias", FLAT, "attention/key/bias"),
        ("self_attn.v_proj.bias", FLAT, "attention/value/bias"),
        ("self_attn.o_proj.bias", FLAT, "attention/out/bias"),
        ("post_attention_layernorm.weight", SAME, "mlp_norm/scale"),
        ("mlp.gate_proj.weight", LINEAR, "mlp/gate/kernel"),
        ("mlp.up_proj.weight", LINEAR, "mlp/up/kernel"),
        ("mlp.down_proj.weight", LINEAR, "mlp/down/kernel"),
        ("mlp.gate_proj.bias", FLAT, "mlp/gate/bias"),
        ("mlp.up_proj.bias", FLAT, "mlp/up/bias"),
        ("mlp.down_proj.bias", FLAT, "mlp/down/bias"),
    ),
)


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json. A sliding window (Mistral) ends `max_positions`: our patterns take its place."""
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    positions = fields.integer("max_position_embeddings", 2048)
    if fields.values.get("sliding_window") is not None and fields.flag("use_sliding_window", True):
        positions = min(positions, fields.integer("sliding_window"))
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        num_layers=fields.integer("num_hidden_layers"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", width // heads),
        mlp_dim=fields.integer("intermediate_size"),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", "silu", _ACTIVATIONS),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        max_positions=positions,
        rope=fields.rope(),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Llama has this shape."""
    if config.norm != "rmsnorm" or not config.gated_mlp or config.parallel_residual:
        raise HubError("a Llama has RMS norms, a gated MLP and no parallel residual")
    if config.position_embedding != "rope" or config.rope.fraction != 1:
        raise HubError("a Llama rotates whole heads")
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    } | rope_keys(config.rope)


FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral"),
    architecture="LlamaForCausalLM",
    prefix="model.",
    read_config=read_config,
    write_config=write_config,
    table=lambda config: _TABLE,
    ignored=re.compile(r".*\.rotary_emb\.inv_freq"),
)
