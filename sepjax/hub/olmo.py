"""OLMo 2 and 3: norms behind attention and MLP, and over all query heads and all key heads; OLMo 3 with windows."""

import dataclasses
from typing import Any

from sepjax.config import ModelConfig
from sepjax.config.rope import same_rope
from sepjax.hub.decoder import (
    MATRICES,
    NORMS_BEHIND,
    QK_NORMS,
    SILU,
    decoder_family,
    decoder_rows,
    expect,
    kind_keys,
    read_kinds,
    read_shape,
    read_window,
    shape_keys,
)
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_rope, rope_keys
from sepjax.hub.rope_kinds import read_ropes, ropes_keys

_BASE = 500_000.0  # of OLMo 3's rotation, where no key says


def _read(fields: Fields) -> ModelConfig:
    return ModelConfig(
        **read_shape(fields, positions=2048),
        norm_epsilon=fields.number("rms_norm_eps", 1e-5),
        norm_position="post",
        qk_norm="width",
        activation=fields.choice("hidden_act", "silu", SILU),
        attention_bias=fields.flag("attention_bias", False),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def read_olmo2(fields: Fields) -> ModelConfig:
    """Our shape of a config.json."""
    config = _read(fields)
    return dataclasses.replace(config, rope=read_rope(fields, positions=config.max_positions))


def read_olmo3(fields: Fields) -> ModelConfig:
    """Our shape of a config.json. Three of four layers slide unless its kinds say otherwise."""
    kinds = read_kinds(fields, read_window(fields, 4096), lambda i: (i + 1) % 4 != 0)
    config = dataclasses.replace(_read(fields), **kinds)
    if "rope_theta" in fields.values and "sliding_attention" not in fields.section("rope_parameters").values:
        why = "without rope_parameters.sliding_attention versions of transformers take it for other layers; say both"
        fields.must_be("rope_theta", _BASE, why)
    full, sliding = read_ropes(fields, positions=config.max_positions, base=_BASE, sliding_base=_BASE)
    return dataclasses.replace(config, rope=full, sliding_rope=sliding if config.sliding_window else same_rope())


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no OLMo 2 has this shape."""
    return _keys(config, "OLMo 2") | rope_keys(config.rope, "OLMo 2")


def write_olmo3(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no OLMo 3 has this shape."""
    return _keys(config, "OLMo 3") | kind_keys(config) | ropes_keys(config, "OLMo 3")


def _keys(config: ModelConfig, name: str) -> dict[str, Any]:
    expect(name, config, norm_position="post", qk_norm="width", mlp_bias=False, parallel_residual=False)
    return shape_keys(config, name) | {"attention_bias": config.attention_bias}


OLMO2 = decoder_family(
    "olmo2",
    "Olmo2ForCausalLM",
    read_config=read_olmo2,
    write_config=write_olmo2,
    table=decoder_rows(*NORMS_BEHIND, *QK_NORMS, *MATRICES),
    features=frozenset({"norm_position", "qk_norm"}),
)
OLMO3 = dataclasses.replace(
    OLMO2,
    name="olmo3",
    model_types=("olmo3",),
    architecture="Olmo3ForCausalLM",
    read_config=read_olmo3,
    write_config=write_olmo3,
    features=OLMO2.features | {"sliding_window", "full_layers", "sliding_rope"},
    layer_types=None,
)
