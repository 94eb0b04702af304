"""SmolLM3: a Llama, every fourth layer of which does not rotate queries and keys."""

from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.decoder import (
    MATRICES,
    NORMS,
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


def read_config(fields: Fields) -> ModelConfig:
    """Our shape of a config.json. Where no key says who has the window, it is the layers without rotation."""
    shape = read_shape(fields, positions=32_768, kv_heads=4)
    plain = _no_rope_layers(fields, shape["num_layers"])
    window = read_window(fields, None) if fields.flag("use_sliding_window", False) else 0
    return ModelConfig(
        **shape,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", "silu", SILU),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        no_rope_layers=plain,
        **read_kinds(fields, window, lambda i: window > 0 and i in plain),
        rope=read_rope(fields, positions=shape["max_positions"], default=2e6),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _no_rope_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """`no_rope_layers` says 0 for a layer that does not rotate, 1 for one that does."""
    rotates = fields.values.get("no_rope_layers")
    if rotates is None:
        every = fields.integer("no_rope_layer_interval", 4)
        rotates = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(rotates, list) or len(rotates) != layers or not all(x in (0, 1) for x in rotates):
        fields.refuse("no_rope_layers", f"expected a list of {layers}, 0 for a layer that does not rotate, else 1")
    return tuple(i for i in range(layers) if not rotates[i])


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; HubError if no SmolLM3 has this shape."""
    expect("SmolLM3", config, parallel_residual=False)
    keys = shape_keys(config, "SmolLM3") | rope_keys(config.rope, "SmolLM3") | kind_keys(config)
    return keys | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(i not in config.no_rope_layers) for i in range(config.num_layers)],
        "use_sliding_window": config.sliding_window > 0,
        "pad_token_id": None,  # the default would be beyond most vocabularies
    }


FAMILY = decoder_family(
    "smollm3",
    "SmolLM3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    table=decoder_rows(*NORMS, *MATRICES),
    features=frozenset({"no_rope_layers", "sliding_window", "full_layers"}),
    layer_types=None,
)
