"""Llama 1, 2, 3 and 3.1, and what has their shape: SmolLM2, TinyLlama, Mistral."""

import re
from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys
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
    """Our shape of a config.json. What a missing key means is not the same for a Llama and a Mistral."""
    is_mistral = fields.values.get("model_type") == "mistral"
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    positions = fields.integer("max_position_embeddings", 131_072 if is_mistral else 2048)
    has_head_dim = fields.values.get("head_dim") is not None
    if is_mistral:
        for name in ("attention_bias", "mlp_bias"):
            fields.must_be(name, False, "a Mistral has no biases")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        num_layers=fields.integer("num_hidden_layers"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, 8 if is_mistral else heads),
        head_dim=fields.integer("head_dim") if has_head_dim else fields.head_dim(),
        mlp_dim=fields.integer("intermediate_size"),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", "silu", _ACTIVATIONS),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        sliding_window=_sliding_window(fields) if is_mistral else _no_window(fields, positions),
        max_positions=positions,
        rope=read_rope(fields, positions=positions),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _kv_heads(fields: Fields, default: int) -> int:
    """As many as query heads where the key is null; a missing one is another matter."""
    if "num_key_value_heads" in fields.values and fields.values["num_key_value_heads"] is None:
        return fields.integer("num_attention_heads")
    return fields.integer("num_key_value_heads", default)


def _no_window(fields: Fields, positions: int) -> int:
    """A Llama has no window of its own. transformers attends to everything, but for its cache, which drops keys."""
    if fields.values.get("sliding_window") is not None and fields.integer("sliding_window") < positions:
        fields.refuse("sliding_window", "a Llama has none; it would be a Mistral's, or the key is to be null")
    return 0


def _sliding_window(fields: Fields) -> int:
    """A Mistral's own window, 4096 unless the key says otherwise; 0: it has none."""
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return 0
    window = fields.integer("sliding_window", 4096)
    fields.must_be("use_sliding_window", True, f"contradicts sliding_window={window}, which a Mistral always uses")
    return window


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Llama has this shape."""
    if config.norm != "rmsnorm" or not config.gated_mlp or config.parallel_residual:
        raise HubError("a Llama has RMS norms, a gated MLP and no parallel residual")
    if config.position_embedding != "rope" or config.rope.fraction != 1:
        raise HubError("a Llama rotates whole heads")
    keys = {
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
    }
    return keys | rope_keys(config.rope) | _mistral_keys(config)


def _mistral_keys(config: ModelConfig) -> dict[str, Any]:
    if not config.sliding_window:
        return {}
    if config.attention_bias or config.mlp_bias:
        raise HubError("only a Mistral has a sliding window, and no biases")
    about = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return about | {"sliding_window": config.sliding_window}


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
