"""The architectures of GGUF files that are read: the names of their tensors, and what their metadata say besides.

What keys mean is llama.cpp's rule, whose format it is.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Never, Protocol, runtime_checkable

from sepjax.config import ModelConfig, RopeConfig
from sepjax.hub.gguf_header import GGUFError
from sepjax.hub.tables import FLAT, LINEAR, LINEAR_OUT, SAME, Family, make_rows

FACTORS = "rope_freqs.weight"
_WHOLE = make_rows(
    "",
    ("token_embd.weight", SAME, "embedding/embedding"),
    ("output_norm.weight", SAME, "final_norm/scale"),
    ("output.weight", SAME, "head/embedding"),
)
_LAYER = (
    ("attn_q.weight", LINEAR, "attention/query/kernel"),
    ("attn_k.weight", LINEAR, "attention/key/kernel"),
    ("attn_v.weight", LINEAR, "attention/value/kernel"),
    ("attn_q.bias", FLAT, "attention/query/bias"),
    ("attn_k.bias", FLAT, "attention/key/bias"),
    ("attn_v.bias", FLAT, "attention/value/bias"),
    ("attn_output.weight", LINEAR_OUT, "attention/out/kernel"),
    ("attn_norm.weight", SAME, "attention_norm/scale"),
    ("attn_q_norm.weight", SAME, "attention/query_norm/scale"),
    ("attn_k_norm.weight", SAME, "attention/key_norm/scale"),
    ("post_attention_norm.weight", SAME, "attention_out_norm/scale"),
    ("ffn_norm.weight", SAME, "mlp_norm/scale"),
    ("post_ffw_norm.weight", SAME, "mlp_out_norm/scale"),
    ("ffn_gate.weight", LINEAR, "mlp/gate/kernel"),
    ("ffn_up.weight", LINEAR, "mlp/up/kernel"),
    ("ffn_down.weight", LINEAR, "mlp/down/kernel"),
)
_TABLE = (*_WHOLE, *make_rows("blk.{}.", *_LAYER))  # rows for what a config does not have are left out


@runtime_checkable
class Values(Protocol):
    """The metadata of an architecture, by names without it."""

    def there(self, name: str) -> bool:
        """Whether the file has it."""
        ...

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of 1 or more."""
        ...

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        ...

    def optional(self, name: str, neutral: float) -> float:
        """The same, or `neutral` where it is not there or 0."""
        ...

    def fault(self, name: str, why: str) -> GGUFError:
        """An error about a field."""
        ...


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
      read: keys that mean something to it and must be neutral for others.
      more: fields of a ModelConfig that it has besides those of a Llama, from the metadata and what was read so far.
      interleaved: whether the rows of Q and K are stored for pairs (2i, 2i + 1); else for (i, i + H/2), as ours.
      adds_one: whether the weights of norms are stored with 1 added to them.
    """

    more: Callable[[Values, ModelConfig], dict[str, Any]]
    read: frozenset[str] = frozenset()
    interleaved: bool = False
    adds_one: bool = False


def _granite(values: Values, config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_scale": values.optional("embedding_scale", 1.0),
        "residual_scale": values.optional("residual_scale", 1.0),
        "attention_scale": values.optional("attention.scale", 0.0),
        "logit_divisor": values.optional("logit_scale", 1.0),
    }


_GEMMA_27B = 62  # layers of the one Gemma 3 whose scores are scaled by its width


def _gemma3(values: Values, config: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "norm_offset": True,
        "norm_position": "both",
        "qk_norm": "head",
        "activation": "gelu_tanh",
        "embedding_scale": math.sqrt(config.embed_dim),
        "final_softcap": values.optional("final_logit_softcapping", 0.0),
    }
    if config.num_layers == _GEMMA_27B:
        found["attention_scale"] = (config.embed_dim / config.num_heads) ** -0.5
    if values.there("attention.sliding_window"):
        every = values.integer("attention.sliding_window_pattern", 6)
        found["sliding_window"] = values.integer("attention.sliding_window")
        found["full_layers"] = tuple(i for i in range(config.num_layers) if (i + 1) % every == 0)
        found["sliding_rope"] = RopeConfig(base=values.number("rope.freq_base_swa", 10_000.0))
    return found


ARCHITECTURES = {
    "llama": Architecture(lambda values, config: {}, interleaved=True),
    "qwen2": Architecture(lambda values, config: {"qkv_bias": True}),
    "qwen3": Architecture(lambda values, config: {"qk_norm": "head"}),
    "olmo2": Architecture(lambda values, config: {"norm_position": "post", "qk_norm": "width"}),
    "granite": Architecture(
        _granite,
        frozenset({"embedding_scale", "residual_scale", "attention.scale", "logit_scale"}),
        interleaved=True,
    ),
    "gemma3": Architecture(
        _gemma3,
        frozenset({
            "attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping",
            "rope.freq_base_swa",
        }),
        adds_one=True,
    ),
}  # fmt: skip


def _only_read(*_: Any) -> Never:
    raise NotImplementedError("GGUF files are read, not written")


def family(name: str) -> Family:
    """The table of an architecture's tensors."""
    return Family(
        name=name,
        model_types=(),
        architecture="",
        prefix="",
        read_config=_only_read,
        write_config=_only_read,
        table=lambda config: _TABLE,
        ignored=re.compile(re.escape(FACTORS)),
    )
