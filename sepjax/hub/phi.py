"""Phi-3, Phi-3.5 and Phi-4: Q, K and V are one matrix in their files, gate and up another."""

from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.decoder import (
    NORMS,
    OUT,
    SILU,
    decoder_family,
    decoder_rows,
    expect,
    read_shape,
    read_window,
    shape_keys,
)
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys
from sepjax.hub.tables import STACKED

_QKV = "attention/query/kernel attention/key/kernel attention/value/kernel"
_PART = "partial_rotary_factor"


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    shape = read_shape(fields, positions=4096)
    rope = read_rope(fields, positions=shape["max_positions"], fraction=_PART)
    if rope.scaling != "none":
        name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
        fields.refuse(name, f"a Phi-3 has no rotation of the type {rope.scaling!r}")
    return ModelConfig(
        **shape,
        norm_epsilon=fields.number("rms_norm_eps", 1e-5),
        activation=fields.choice("hidden_act", "silu", SILU),
        sliding_window=read_window(fields, None),
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no Phi-3 has this shape."""
    expect("Phi-3", config, attention_bias=False, mlp_bias=False, parallel_residual=False, full_layers=())
    if config.rope.scaling != "none" or config.num_heads * config.head_dim != config.embed_dim:
        raise HubError("a Phi-3 has no scaled rotation, and heads that make up its width")
    more = {_PART: config.rope.fraction, "sliding_window": config.sliding_window or None, "pad_token_id": None}
    return shape_keys(config, "Phi-3") | rope_keys(config.rope) | more


FAMILY = decoder_family(
    "phi3",
    "Phi3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    table=decoder_rows(
        *NORMS,
        ("self_attn.qkv_proj.weight", STACKED, _QKV),
        ("mlp.gate_up_proj.weight", STACKED, "mlp/gate/kernel mlp/up/kernel"),
        *OUT,
    ),
    features=frozenset({"sliding_window"}),
)
