"""StableLM 2 and 3B: a Llama with layer norms, a part of each head rotated; serial or parallel."""

from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.decoder import MATRICES, NORMS, SILU, decoder_family, decoder_rows, expect, read_shape, shape_keys
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys
from sepjax.hub.tables import SAME

_PART = "partial_rotary_factor"
_BIASES = (
    ("input_layernorm.bias", SAME, "attention_norm/bias"),
    ("post_attention_layernorm.bias", SAME, "mlp_norm/bias"),
)


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    fields.must_be("qk_layernorm", False, "layer norms of each head's own are not supported")
    shape = read_shape(fields, positions=4096, kv_heads=32)
    shape["head_dim"] = fields.head_dim()
    parallel = fields.flag("use_parallel_residual", False)
    return ModelConfig(
        **shape,
        norm="layernorm",
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        activation=fields.choice("hidden_act", "silu", SILU),
        qkv_bias=fields.flag("use_qkv_bias", False),
        parallel_residual=parallel,
        shared_norm=parallel,
        rope=read_rope(fields, positions=shape["max_positions"], fraction=_PART, share=0.25),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no StableLM has this shape."""
    expect("StableLM", config, attention_bias=False, mlp_bias=False, shared_norm=config.parallel_residual)
    if config.num_heads * config.head_dim != config.embed_dim:
        raise HubError("a StableLM has heads that make up its width")
    return shape_keys(config, "StableLM", norm="layernorm") | rope_keys(config.rope) | {
        "use_qkv_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel_residual,
        _PART: config.rope.fraction,
    }  # fmt: skip


FAMILY = decoder_family(
    "stablelm",
    "StableLmForCausalLM",
    read_config=read_config,
    write_config=write_config,
    table=decoder_rows(*NORMS, *_BIASES, *MATRICES),
    features=frozenset({"qkv_bias"}),
)
