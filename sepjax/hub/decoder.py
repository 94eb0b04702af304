"""What the families that descend from Llama share: their rows, and how their config.json is read and written."""

import re
from collections.abc import Callable
from typing import Any

from sepjax.config import ModelConfig
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields
from sepjax.hub.tables import FLAT, LINEAR, LINEAR_OUT, SAME, Family, Kind, Row, make_rows

SILU = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"
NORMS = (  # as in Llama; families with norms in other places have tables of their own
    ("input_layernorm.weight", SAME, "attention_norm/scale"),
    ("post_attention_layernorm.weight", SAME, "mlp_norm/scale"),
)
NORMS_BEHIND = (
    ("post_attention_layernorm.weight", SAME, "attention_out_norm/scale"),
    ("post_feedforward_layernorm.weight", SAME, "mlp_out_norm/scale"),
)
QK_NORMS = (
    ("self_attn.q_norm.weight", SAME, "attention/query_norm/scale"),
    ("self_attn.k_norm.weight", SAME, "attention/key_norm/scale"),
)
OUT = (
    ("self_attn.o_proj.weight", LINEAR_OUT, "attention/out/kernel"),
    ("self_attn.o_proj.bias", FLAT, "attention/out/bias"),
    ("mlp.down_proj.weight", LINEAR, "mlp/down/kernel"),
    ("mlp.down_proj.bias", FLAT, "mlp/down/bias"),
)
MATRICES = (
    ("self_attn.q_proj.weight", LINEAR, "attention/query/kernel"),
    ("self_attn.k_proj.weight", LINEAR, "attention/key/kernel"),
    ("self_attn.v_proj.weight", LINEAR, "attention/value/kernel"),
    ("self_attn.q_proj.bias", FLAT, "attention/query/bias"),
    ("self_attn.k_proj.bias", FLAT, "attention/key/bias"),
    ("self_attn.v_proj.bias", FLAT, "attention/value/bias"),
    ("mlp.gate_proj.weight", LINEAR, "mlp/gate/kernel"),
    ("mlp.up_proj.weight", LINEAR, "mlp/up/kernel"),
    ("mlp.gate_proj.bias", FLAT, "mlp/gate/bias"),
    ("mlp.up_proj.bias", FLAT, "mlp/up/bias"),
    *OUT,
)


def decoder_rows(*layer: tuple[str, Kind, str]) -> Callable[[ModelConfig], tuple[Row, ...]]:
    """A family's table: embedding, final norm and head, and `layer` of every layer. What a config lacks is left out."""
    whole = (
        ("model.embed_tokens.weight", SAME, "embedding/embedding"),
        ("model.norm.weight", SAME, "final_norm/scale"),
        ("model.norm.bias", SAME, "final_norm/bias"),
        ("lm_head.weight", SAME, "head/embedding"),
    )
    table = (*make_rows("", *whole), *make_rows("model.layers.{}.", *layer))
    return lambda config: table


def decoder_family(name: str, architecture: str, **fields: Any) -> Family:
    """A family of these: `name` is what its config.json calls it, `fields` are the rest of `Family`."""
    common = {"model_types": (name,), "prefix": "model.", "ignored": re.compile(r".*\.rotary_emb\.inv_freq")}
    return Family(name=name, architecture=architecture, **(common | fields))


def read_shape(fields: Fields, *, positions: int, kv_heads: int | None = None, head_dim: int = 0) -> dict[str, Any]:
    """Arguments of `ModelConfig` that all these families say alike.

    Args:
      fields: the whole config.json.
      positions: its default of max_position_embeddings.
      kv_heads: its default of num_key_value_heads; None: as many as heads.
      head_dim: its default of head_dim; 0: heads make up the width.
    """
    heads = fields.integer("num_attention_heads")
    has_head_dim = fields.values.get("head_dim") is not None
    return {
        "vocab_size": fields.integer("vocab_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "embed_dim": fields.integer("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": _kv_heads(fields, kv_heads or heads),
        "head_dim": fields.integer("head_dim", head_dim) if has_head_dim or head_dim else fields.head_dim(),
        "mlp_dim": fields.integer("intermediate_size"),
        "max_positions": fields.integer("max_position_embeddings", positions),
    }


def _kv_heads(fields: Fields, default: int) -> int:
    """As many as query heads where the key is null; a missing one is another matter."""
    if "num_key_value_heads" in fields.values and fields.values["num_key_value_heads"] is None:
        return fields.integer("num_attention_heads")
    return fields.integer("num_key_value_heads", default)


def read_window(fields: Fields, default: int | None) -> int:
    """`sliding_window`, which may be null; 0: there is none."""
    if fields.values.get("sliding_window") is None and ("sliding_window" in fields.values or default is None):
        return 0
    return fields.integer("sliding_window", default)


def read_kinds(fields: Fields, window: int, slides: Callable[[int], bool]) -> dict[str, Any]:
    """`sliding_window` and `full_layers` of a ModelConfig.

    Args:
      fields: the whole config.json; its `layer_types` count, if there are any.
      window: of the layers that slide; 0: none can.
      slides: whether layer i does, where no key says.
    """
    layers = range(fields.integer("num_hidden_layers"))
    kinds = fields.values.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if slides(i) else FULL for i in layers]
    if not isinstance(kinds, list) or not all(kind in (FULL, SLIDING) for kind in kinds):
        fields.refuse("layer_types", f"layers of other kinds than {FULL} and {SLIDING} are not supported")
    if len(kinds) != len(layers):
        fields.refuse("layer_types", f"{len(kinds)} kinds for num_hidden_layers={len(layers)}")
    full = tuple(i for i in layers if kinds[i] == FULL)
    if len(full) == len(layers):
        return {}
    if not window:
        fields.refuse("layer_types", f"has {SLIDING}, but the config has no sliding window in use")
    return {"sliding_window": window, "full_layers": full}


def kind_keys(config: ModelConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a config.json.

    A window that no layer has reaches over everything: transformers makes its mask for some families all the same.
    """
    slides = [config.sliding_window > 0 and i not in config.full_layers for i in range(config.num_layers)]
    kinds = [SLIDING if x else FULL for x in slides]
    return {"sliding_window": config.sliding_window or config.max_positions, "layer_types": kinds}


def shape_keys(config: ModelConfig, name: str, *, norm: str = "rmsnorm") -> dict[str, Any]:
    """The keys of a config.json that say what `read_shape` reads, and more that all have.

    Raises:
      HubError: none of these families has this shape; `name` is the family, in words.
    """
    if config.norm != norm or not config.gated_mlp or config.position_embedding != "rope":
        kind = {"rmsnorm": "RMS", "layernorm": "layer"}[norm]
        raise HubError(f"{a_model(name)} has {kind} norms, a gated MLP and rotary positions")
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        ("rms_norm_eps" if norm == "rmsnorm" else "layer_norm_eps"): config.norm_epsilon,
        "hidden_act": activation_name(config),
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    }


def activation_name(config: ModelConfig) -> str:
    """What transformers calls the activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)


def expect(name: str, config: ModelConfig, **settings: Any) -> None:
    """Raises HubError, in words on a family, where a config has other values than all of that family have."""
    for key, value in settings.items():
        if getattr(config, key) != value:
            raise HubError(f"{a_model(name)} has {key}={value!r}, this model {getattr(config, key)!r}")


def a_model(name: str) -> str:
    """A family's name behind its article."""
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
