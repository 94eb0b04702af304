"""The metadata of a GGUF file as our settings: each key is read, known to change nothing, or refused by name.

What keys mean is the rule of llama.cpp, whose format it is.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from sepjax.config import ConfigError, ModelConfig, RopeConfig, validate_model
from sepjax.hub.gguf_families import ARCHITECTURES, FACTORS
from sepjax.hub.gguf_header import GGUFError, Header
from sepjax.model.rope import rope_frequencies

_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.attn_factor", "rope.scaling.original_context_length",
}  # fmt: skip
# Of the token list the tensors decide; the others are notes.
_WITHOUT_EFFECT = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon"}
_NEUTRAL = {  # what a key must be, since other values would change the computation
    "attention.causal": True, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0, "attention.scale": 0,
    "attention.sliding_window": 0, "attn_logit_softcapping": 0, "embedding_scale": 0, "expert_count": 0,
    "expert_used_count": 0, "final_logit_softcapping": 0, "logit_scale": 0, "pooling_type": 0, "residual_scale": 0,
    "rope.scaling.alpha": 0, "rope.scaling.yarn_log_multiplier": 0, "use_parallel_residual": False,
}  # fmt: skip
_NEUTRAL_ELSEWHERE = {
    "general.type": "model", "split.no": 0, "split.count": 1, "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_sep_token": False,
}  # fmt: skip
_TOKENIZER = re.compile(  # keys that are read, or without effect on byte-level BPE
    r"model|pre|tokens|token_type|token_type_count|scores|merges|add_(bos|eos|sep)_token|add_space_prefix|"
    r"remove_extra_whitespaces|precompiled_charsmap|[a-z_]+_token_ids?"
)


def model_config(header: Header, dtype: str) -> ModelConfig:
    """Our shape of a file, with `dtype` for activations and matmuls.

    Raises:
      GGUFError: a field that is missing, of another type, not known or not supported; names it.
    """
    name = architecture(header)
    _check_keys(header, name)
    values = _Values(header, name)
    heads, width = values.integer("attention.head_count"), values.integer("embedding_length")
    head_dim = values.integer("attention.key_length", width // heads or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.integer(key, head_dim) != head_dim:
            raise values.fault(key, f"must be the size of a head, {head_dim}")
    config = ModelConfig(
        vocab_size=len(values.strings("tokenizer.ggml.tokens")),
        num_layers=values.integer("block_count"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=values.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=values.integer("feed_forward_length"),
        norm_epsilon=float(f"{values.number('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        max_positions=values.integer("context_length"),
        rope=_rope(values, head_dim),
        tie_embeddings="output.weight" not in header.tensors,
        dtype=dtype,
    )
    try:
        return validate_model(dataclasses.replace(config, **ARCHITECTURES[name].more(values, config)))
    except ConfigError as error:
        raise GGUFError(f"{str(header.path)!r}: {error}") from error


def architecture(header: Header) -> str:
    """The name of a file's architecture. Raises GGUFError for one that is not supported."""
    name = header.fields["general.architecture"].value if "general.architecture" in header.fields else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        of_experts = ", a mixture of experts" if f"{name}.expert_count" in header.fields else ""
        raise GGUFError(
            f"{str(header.path)!r} has the architecture {repr(name)[:80]}{of_experts}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return name


def _check_keys(header: Header, architecture: str) -> None:
    read = _READ | ARCHITECTURES[architecture].read
    for name, field in header.fields.items():
        space, _, key = name.partition(".")
        neutral = _NEUTRAL_ELSEWHERE.get(name, _NEUTRAL.get(key) if space == architecture else None)
        if space == architecture == "granite" and key == "rope.scaling.finetuned" and field.value is not True:
            raise GGUFError(f"{_shown(header, name)}: a Granite without rotation is not supported")
        if neutral is not None and key not in ARCHITECTURES[architecture].read:
            if field.value != neutral:
                raise GGUFError(f"{_shown(header, name)}: not supported; only {neutral!r} is")
        elif space == architecture and key not in read | _WITHOUT_EFFECT:
            raise GGUFError(f"{_shown(header, name)}: not a key that is known; the result might not be that model")
        elif space == "adapter" or (key.startswith("ggml.") and not _TOKENIZER.fullmatch(key.removeprefix("ggml."))):
            raise GGUFError(f"{_shown(header, name)}: not supported; the result would not be that model")


def _shown(header: Header, name: str) -> str:
    value = header.fields[name].value
    text = f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:80]
    return f"{str(header.path)!r}: {name}={text}"


class _Values:
    """The fields of an architecture, their types checked. Lists of one value a layer must be all the same."""

    def __init__(self, header: Header, architecture: str):
        self.header, self.architecture = header, architecture

    def full(self, name: str) -> str:
        """A field's name in the file."""
        return f"{self.architecture}.{name}"

    def fault(self, name: str, why: str) -> GGUFError:
        """An error about a field."""
        return GGUFError(f"{_shown(self.header, self.full(name))}: {why}")

    def there(self, name: str) -> bool:
        """Whether the file has it."""
        return self.full(name) in self.header.fields

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of 1 or more."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.fault(name, "expected a whole number of 1 or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.fault(name, "expected a number above 0")
        return float(value)

    def optional(self, name: str, neutral: float) -> float:
        """A number above 0, which is stored as float32; 0 or none stands for `neutral`."""
        if self._value(name, 0) == 0:
            return neutral
        return float(f"{self.number(name):.6g}")

    def strings(self, name: str) -> list[str]:
        """A list of texts, by its whole name."""
        value = self.header.fields[name].value if name in self.header.fields else None
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise GGUFError(f"{str(self.header.path)!r} lacks the list {name!r}; it is damaged or of another kind")
        return value

    def _value(self, name: str, default: Any) -> Any:
        if not self.there(name):
            if default is None:
                raise GGUFError(
                    f"{str(self.header.path)!r} lacks the field {self.full(name)!r}; it is damaged or of another kind"
                )
            return default
        value = self.header.fields[self.full(name)].value
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.fault(name, "layers of different shapes are not supported")
            return value[0]
        return value


def _rope(values: _Values, head_dim: int) -> RopeConfig:
    """The rotary embedding. A factor without a type is linear, as it is to llama.cpp."""
    kind = (
        values.header.fields[values.full("rope.scaling.type")].value if values.there("rope.scaling.type") else "linear"
    )
    if kind not in ("none", "linear", "yarn"):
        raise values.fault("rope.scaling.type", "supported are none, linear and yarn")
    given = [name for name in ("rope.scaling.factor", "rope.scale_linear") if values.there(name)]
    factor = next((_factor(values, name) for name in given), 1.0)
    if len(given) == 2 and _factor(values, given[1]) != factor:
        raise values.fault(given[0], f"contradicts {values.full(given[1])}")
    if kind == "none" and factor != 1:
        raise values.fault(given[0], f"contradicts {values.full('rope.scaling.type')}='none'")
    rope = RopeConfig(base=values.number("rope.freq_base", 10_000.0), factor=factor)
    if kind == "yarn":
        rope.scaling = "yarn"
        rope.original_context = values.integer("rope.scaling.original_context_length", values.integer("context_length"))
    elif factor != 1:
        rope.scaling = "linear"
    temperature = values.number("rope.scaling.attn_factor", 1.0)
    if temperature != 1:  # on top of the scaling's own
        rope.attention_factor = temperature * (0.1 * math.log(factor) + 1 if kind == "yarn" else 1)
    return _with_divisors(values, rope, head_dim) if FACTORS in values.header.tensors else rope


def _factor(values: _Values, name: str) -> float:
    """How many times longer; 0, which llama.cpp takes for "not said", is 1."""
    value = values.header.fields[values.full(name)].value
    return 1.0 if value == 0 and type(value) in (int, float) else values.number(name)


def _with_divisors(values: _Values, rope: RopeConfig, head_dim: int) -> RopeConfig:
    """The scaling whose divisors of the frequencies these are: files say the divisors, not where they come from."""
    header = values.header
    tensor, refused = header.tensors[FACTORS], None
    factors = (
        np.frombuffer(header.data, np.float32, math.prod(tensor.shape), tensor.start) if tensor.kind == 0 else None
    )
    if rope.scaling != "none":
        refused = f"beside the scaling {rope.scaling!r}"
    elif factors is None or factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        refused = f"with other numbers than the {head_dim // 2} divisors above 0 that a head of {head_dim} has"
    elif (factors == 1).all():
        return rope
    else:
        scaled = dataclasses.replace(rope, scaling="llama3", factor=float(f"{factors.max():.4g}"))
        plain, found = (rope_frequencies(r, head_dim)[0] for r in (rope, scaled))
        if scaled.factor >= 1 and np.allclose(plain / found, factors, rtol=1e-4):
            return scaled
        refused = f"in another way than Llama 3.1 (low 1, high 4, original context {rope.original_context})"
    raise GGUFError(
        f"{str(header.path)!r}: tensor {FACTORS!r} scales the rotary embedding {refused}, which is not supported"
    )
