"""Falcon: the 7B layout (one key head, attention and MLP read one norm) and the 40B one (groups, a norm for each)."""

import re
from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys
from sepjax.hub.tables import FLAT, GROUPED, LINEAR, LINEAR_OUT, SAME, Family, Row, make_rows

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_QKV = "attention/query/{0} attention/key/{0} attention/value/{0}"
_WHOLE = make_rows(
    "",
    ("transformer.word_embeddings.weight", SAME, "embedding/embedding"),
    ("transformer.ln_f.weight", SAME, "final_norm/scale"),
    ("transformer.ln_f.bias", SAME, "final_norm/bias"),
    ("lm_head.weight", SAME, "head/embedding"),
)
_BLOCK = (
    ("self_attention.query_key_value.weight", GROUPED, _QKV.format("kernel")),
    ("self_attention.query_key_value.bias", GROUPED, _QKV.format("bias")),
    ("self_attention.dense.weight", LINEAR_OUT, "attention/out/kernel"),
    ("self_attention.dense.bias", FLAT, "attention/out/bias"),
    ("mlp.dense_h_to_4h.weight", LINEAR, "mlp/up/kernel"),
    ("mlp.dense_h_to_4h.bias", FLAT, "mlp/up/bias"),
    ("mlp.dense_4h_to_h.weight", LINEAR, "mlp/down/kernel"),
    ("mlp.dense_4h_to_h.bias", FLAT, "mlp/down/bias"),
)


def table(config: ModelConfig) -> tuple[Row, ...]:
    """The rows; norms have other names in each layout."""
    names = ("input_layernorm", "post_attention_layernorm")
    if config.parallel_residual and not config.shared_norm:
        names = ("ln_attn", "ln_mlp")
    norms = [
        (f"{theirs}.{kind}", SAME, f"{ours}/{part}")
        for theirs, ours in zip(names, ("attention_norm", "mlp_norm"), strict=True)
        for kind, part in (("weight", "scale"), ("bias", "bias"))
    ]
    return (*_WHOLE, *make_rows("transformer.h.{}.", *norms, *_BLOCK))


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    fields = fields.alias(n_embed="hidden_size").with_defaults(num_attention_heads=71, hidden_size=4544)
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    positions = fields.integer("max_position_embeddings", 2048)
    fields.must_be("alibi", False, "ALiBi positions are not supported")
    grouped, parallel = fields.flag("new_decoder_architecture", False), fields.flag("parallel_attn", True)
    bias = fields.flag("bias", False)
    norms, kv_heads = _norms(fields, grouped, parallel), _kv_heads(fields, grouped, heads)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 65024),
        num_layers=fields.integer("num_hidden_layers", 32),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.head_dim(),
        mlp_dim=fields.integer("ffn_hidden_size", 4 * width),
        norm="layernorm",
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation", "gelu", _ACTIVATIONS),
        gated_mlp=False,
        attention_bias=bias,
        mlp_bias=bias,
        parallel_residual=parallel or grouped,
        shared_norm=(parallel or grouped) and norms == 1,
        max_positions=positions,
        rope=read_rope(fields, positions=positions),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _norms(fields: Fields, grouped: bool, parallel: bool) -> int:
    """Norms before a parallel attention and MLP."""
    if grouped and not parallel:
        fields.refuse("parallel_attn", "contradicts new_decoder_architecture=True")
    norms = fields.integer("num_ln_in_parallel_attn", 2 if grouped else 1)
    if norms > (2 if grouped or not parallel else 1):
        fields.refuse("num_ln_in_parallel_attn", "expected 1, or 2 with new_decoder_architecture=True")
    return norms


def _kv_heads(fields: Fields, grouped: bool, heads: int) -> int:
    if grouped:
        return fields.integer("num_kv_heads", heads)
    if fields.flag("multi_query", True):
        return 1
    if fields.integer("num_kv_heads", heads) != heads:
        fields.refuse("num_kv_heads", f"without multi_query and new_decoder_architecture it is the {heads} heads")
    return heads


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Falcon has this shape."""
    if config.norm != "layernorm" or config.gated_mlp or config.activation == "silu":
        raise HubError("a Falcon has layer norms and an ungated MLP with GELU")
    if config.position_embedding != "rope" or config.rope.fraction != 1:
        raise HubError("a Falcon rotates whole heads")
    if config.attention_bias != config.mlp_bias or config.num_heads * config.head_dim != config.embed_dim:
        raise HubError("a Falcon has biases everywhere or nowhere, and heads that make up its width")
    grouped = config.parallel_residual and (not config.shared_norm or config.num_kv_heads not in (1, config.num_heads))
    if not grouped and config.num_kv_heads not in (1, config.num_heads):
        raise HubError("a Falcon with groups of heads has a parallel residual")
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "multi_query": config.num_kv_heads == 1,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if grouped else None,
        "parallel_attn": config.parallel_residual,
        "ffn_hidden_size": config.mlp_dim,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "bias": config.attention_bias,
        "alibi": False,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    } | rope_keys(config.rope)


FAMILY = Family(
    name="falcon",
    model_types=("falcon",),
    architecture="FalconForCausalLM",
    prefix="transformer.",
    read_config=read_config,
    write_config=write_config,
    table=table,
    ignored=re.compile(r".*\.rotary_emb\.inv_freq"),
)
