"""GPT-NeoX: Pythia, Dolly, StableLM-alpha."""

import re
from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys
from sepjax.hub.tables import FLAT, GROUPED, LINEAR, LINEAR_OUT, SAME, Family, make_rows

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_QKV = "attention/query/{0} attention/key/{0} attention/value/{0}"
_TABLE = (
    *make_rows(
        "",
        ("gpt_neox.embed_in.weight", SAME, "embedding/embedding"),
        ("gpt_neox.final_layer_norm.weight", SAME, "final_norm/scale"),
        ("gpt_neox.final_layer_norm.bias", SAME, "final_norm/bias"),
        ("embed_out.weight", SAME, "head/embedding"),
    ),
    *make_rows(
        "gpt_neox.layers.{}.",
        ("input_layernorm.weight", SAME, "attention_norm/scale"),
        ("input_layernorm.bias", SAME, "attention_norm/bias"),
        ("post_attention_layernorm.weight", SAME, "mlp_norm/scale"),
        ("post_attention_layernorm.bias", SAME, "mlp_norm/bias"),
        ("attention.query_key_value.weight", GROUPED, _QKV.format("kernel")),
        ("attention.query_key_value.bias", GROUPED, _QKV.format("bias")),
        ("attention.dense.weight", LINEAR_OUT, "attention/out/kernel"),
        ("attention.dense.bias", FLAT, "attention/out/bias"),
        ("mlp.dense_h_to_4h.weight", LINEAR, "mlp/up/kernel"),
        ("mlp.dense_h_to_4h.bias", FLAT, "mlp/up/bias"),
        ("mlp.dense_4h_to_h.weight", LINEAR, "mlp/down/kernel"),
        ("mlp.dense_4h_to_h.bias", FLAT, "mlp/down/bias"),
    ),
)


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    heads, positions = fields.integer("num_attention_heads"), fields.integer("max_position_embeddings", 2048)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        num_layers=fields.integer("num_hidden_layers"),
        embed_dim=fields.integer("hidden_size"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim(),
        mlp_dim=fields.integer("intermediate_size"),
        norm="layernorm",
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        activation=fields.choice("hidden_act", "gelu", _ACTIVATIONS),
        gated_mlp=False,
        attention_bias=fields.flag("attention_bias", True),
        mlp_bias=True,
        parallel_residual=fields.flag("use_parallel_residual", True),
        max_positions=positions,
        rope=read_rope(fields, positions=positions, base="rotary_emb_base", fraction="rotary_pct", share=0.25),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no GPT-NeoX has this shape."""
    if config.norm != "layernorm" or config.gated_mlp or config.shared_norm or not config.mlp_bias:
        raise HubError("a GPT-NeoX has two layer norms a block and an ungated MLP with biases")
    if config.position_embedding != "rope" or config.num_heads != config.num_kv_heads:
        raise HubError("a GPT-NeoX has rotary positions and a key head a query head")
    if config.num_heads * config.head_dim != config.embed_dim or config.activation == "silu":
        raise HubError("a GPT-NeoX has heads that make up its width, and GELU")
    keys = rope_keys(config.rope)
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.parallel_residual,
        "max_position_embeddings": config.max_positions,
        "rotary_pct": config.rope.fraction,
        "rotary_emb_base": config.rope.base,
        "rope_scaling": keys["rope_scaling"],
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    read_config=read_config,
    write_config=write_config,
    table=lambda config: _TABLE,
    ignored=re.compile(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
)
