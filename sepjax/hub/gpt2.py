"""GPT-2. Its learned positions end at its context: no stream goes further (`StreamSizes.create` says so)."""

import re
from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.tables import CONV, CONV_OUT, FLAT, SAME, SIDE_BY_SIDE, Family, make_rows

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_QKV = "attention/query/{0} attention/key/{0} attention/value/{0}"
_TABLE = (
    *make_rows(
        "",
        ("transformer.wte.weight", SAME, "embedding/embedding"),
        ("transformer.wpe.weight", SAME, "position_embedding/embedding"),
        ("transformer.ln_f.weight", SAME, "final_norm/scale"),
        ("transformer.ln_f.bias", SAME, "final_norm/bias"),
        ("lm_head.weight", SAME, "head/embedding"),
    ),
    *make_rows(
        "transformer.h.{}.",
        ("ln_1.weight", SAME, "attention_norm/scale"),
        ("ln_1.bias", SAME, "attention_norm/bias"),
        ("ln_2.weight", SAME, "mlp_norm/scale"),
        ("ln_2.bias", SAME, "mlp_norm/bias"),
        ("attn.c_attn.weight", SIDE_BY_SIDE, _QKV.format("kernel")),
        ("attn.c_attn.bias", SIDE_BY_SIDE, _QKV.format("bias")),
        ("attn.c_proj.weight", CONV_OUT, "attention/out/kernel"),
        ("attn.c_proj.bias", FLAT, "attention/out/bias"),
        ("mlp.c_fc.weight", CONV, "mlp/up/kernel"),
        ("mlp.c_fc.bias", FLAT, "mlp/up/bias"),
        ("mlp.c_proj.weight", CONV, "mlp/down/kernel"),
        ("mlp.c_proj.bias", FLAT, "mlp/down/bias"),
    ),
)


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    fields = fields.alias(
        hidden_size="n_embd", num_attention_heads="n_head", num_hidden_layers="n_layer",
        max_position_embeddings="n_positions",
    ).with_defaults(n_head=12, n_embd=768)  # fmt: skip
    heads, width = fields.integer("n_head"), fields.integer("n_embd")
    fields.must_be("scale_attn_weights", True, "unscaled attention is not supported")
    fields.must_be("scale_attn_by_inverse_layer_idx", False, "a scale of each layer's own is not supported")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 50257),
        num_layers=fields.integer("n_layer", 12),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim("n_head", "n_embd"),
        mlp_dim=fields.integer("n_inner", 4 * width),
        norm="layernorm",
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", "gelu_new", _ACTIVATIONS),
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        position_embedding="learned",
        max_positions=fields.integer("n_positions", 1024),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no GPT-2 has this shape."""
    if config.norm != "layernorm" or config.gated_mlp or config.parallel_residual:
        raise HubError("a GPT-2 has layer norms, an ungated MLP and no parallel residual")
    if config.position_embedding != "learned" or config.num_heads != config.num_kv_heads:
        raise HubError("a GPT-2 has learned positions and a key head a query head")
    if not (config.attention_bias and config.mlp_bias) or config.activation == "silu":
        raise HubError("a GPT-2 has biases everywhere, and GELU")
    if config.num_heads * config.head_dim != config.embed_dim:
        raise HubError("a GPT-2 has heads that make up its width")
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    read_config=read_config,
    write_config=write_config,
    table=lambda config: _TABLE,
    ignored=re.compile(r".*\.attn\.(bias|masked_bias)"),
)
