"""The shape of a decoder: the section `model` of a config, and its checks."""

import dataclasses
import math

from sepjax.config.attention import EVERYTHING, AttentionConfig, under
from sepjax.config.checks import NO_SETTING, ConfigError
from sepjax.config.checks import at_least as _at_least
from sepjax.config.checks import one_of as _one_of
from sepjax.config.rope import SCALINGS, RopeConfig, same_rope

WEIGHT_DTYPES = ("model", "int8")


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """The shape of one decoder. Llama, Qwen, Gemma, OLMo, GPT-NeoX and the like are settings of it, not classes."""

    vocab_size: int = 8192  # V, rows of the embedding; at least the tokenizer's size
    num_layers: int = 4  # L, blocks of attention and MLP
    embed_dim: int = 256  # D, width of the residual stream
    num_heads: int = 4  # N, query heads
    num_kv_heads: int = 4  # K, KV heads; N / K query heads share each (1: multi-query attention)
    head_dim: int = 64  # H, width of a head
    mlp_dim: int = 1024  # F, hidden width of the MLP
    norm: str = "rmsnorm"  # "rmsnorm" | "layernorm"
    norm_epsilon: float = 1e-5  # added to the variance
    norm_offset: bool = False  # RMS norms multiply by 1 + their weights (Gemma)
    # of attention and MLP: "pre" (norms of their inputs) | "post" (of their outputs) | "both"
    norm_position: str = "pre"
    qk_norm: str = "none"  # RMS norms of queries and keys: "none" | "head" (per head) | "width" (over all heads)
    activation: str = "silu"  # "silu" | "gelu" | "gelu_tanh"
    gated_mlp: bool = True  # SwiGLU when activation is silu
    attention_bias: bool = False  # biases of queries, keys, values and output
    qkv_bias: bool = False  # biases of queries, keys and values only (Qwen2)
    mlp_bias: bool = False  # biases in the MLP
    parallel_residual: bool = False  # attention and MLP read the same input (GPT-NeoX, Falcon)
    shared_norm: bool = False  # with parallel_residual: one norm feeds both (Falcon-7B)
    position_embedding: str = "rope"  # "rope" | "learned" (GPT-2)
    max_positions: int = 2048  # rows of the learned table; with rope only documents the training context
    sliding_window: int = 0  # the model's own window, which applies beside any pattern; 0: none
    full_layers: tuple[int, ...] = ()  # with sliding_window: the layers without it
    no_rope_layers: tuple[int, ...] = ()  # layers without rotary embedding (SmolLM3)
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    sliding_rope: RopeConfig = dataclasses.field(default_factory=same_rope)  # layers with the window (base 0: as rope)
    embedding_scale: float = 1.0  # factor on the input of the first layer
    residual_scale: float = 1.0  # factor on the outputs of attention and MLP
    attention_scale: float = 0.0  # factor on attention scores; 0: head_dim ** -0.5
    logit_divisor: float = 1.0  # divides the logits
    final_softcap: float = 0.0  # logits s become cap * tanh(s / cap); 0: unchanged
    tie_embeddings: bool = True  # the output head is the embedding
    dtype: str = "float32"  # dtype of activations and matmul inputs; parameters, norms and softmax stay float32
    # True: one compiled block for all layers, so compile time does not grow with depth. False: one block per layer,
    # which saves copies between the two passes (160M shape on an H100: 16 % less time per step, compiled in 12 s
    # instead of 8; narrower models gain more: docs/kernels_training.md)
    scan_layers: bool = True
    remat: str = "none"  # "none" | "dots" (keep matmul outputs) | "full" (keep layer inputs only)
    # of matrices: "model" (`dtype`) | "int8" (sepjax.model.quantised). Of loaded models: no setting of a run
    weight_dtype: str = dataclasses.field(default="model", metadata=NO_SETTING)

    def in_words(self) -> str:
        """The size, for people."""
        heads = f"{self.num_heads} heads on {self.num_kv_heads} of keys"
        types = self.dtype if self.weight_dtype == "model" else f"{self.dtype}, weights {self.weight_dtype}"
        return f"{self.num_layers} layers, {self.embed_dim} wide, {heads}, {self.vocab_size} tokens, {types}"


def validate_model(model: ModelConfig) -> ModelConfig:
    """Checks the shape of a model, wherever it comes from; raises as `validate` does."""
    for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
        _at_least(f"model.{name}", getattr(model, name), 1)
    _one_of("model.norm", model.norm, ("rmsnorm", "layernorm"))
    _one_of("model.norm_position", model.norm_position, ("pre", "post", "both"))
    _one_of("model.qk_norm", model.qk_norm, ("none", "head", "width"))
    _one_of("model.activation", model.activation, ("silu", "gelu", "gelu_tanh"))
    _one_of("model.position_embedding", model.position_embedding, ("rope", "learned"))
    _one_of("model.dtype", model.dtype, ("float32", "bfloat16", "float16"))
    _one_of("model.weight_dtype", model.weight_dtype, WEIGHT_DTYPES)
    _one_of("model.remat", model.remat, ("none", "dots", "full"))
    _one_of("model.rope.scaling", model.rope.scaling, SCALINGS)
    _at_least("model.max_positions", model.max_positions, 1)
    _at_least("model.sliding_window", model.sliding_window, 0)
    if not 0 < model.norm_epsilon < 1:
        raise ConfigError(f"model.norm_epsilon={model.norm_epsilon} must be above 0 and below 1")
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}; "
            "every key head serves the same number of query heads"
        )
    fault = model.rope.fault(model.head_dim) if model.position_embedding == "rope" else None
    if fault:
        raise ConfigError(f"model.rope.{fault}")
    if model.shared_norm and not model.parallel_residual:
        raise ConfigError("model.shared_norm=True needs model.parallel_residual=True: a serial block has two norms")
    _validate_parts(model)
    _validate_layers(model)
    return model


def _validate_parts(model: ModelConfig) -> None:
    if model.norm != "rmsnorm" and (model.norm_offset or model.qk_norm != "none"):
        name = "norm_offset=True" if model.norm_offset else f"qk_norm={model.qk_norm!r}"
        raise ConfigError(f'model.{name} needs model.norm="rmsnorm", got {model.norm!r}')
    if model.parallel_residual and model.norm_position != "pre":
        raise ConfigError(
            f'model.parallel_residual=True needs model.norm_position="pre", got {model.norm_position!r}: attention and '
            "MLP read the same input"
        )
    if model.attention_bias and model.qkv_bias:
        raise ConfigError("model.qkv_bias=True means no bias of the output, and attention_bias=True has one; keep one")
    for name in ("embedding_scale", "residual_scale", "logit_divisor"):
        if not 0 < getattr(model, name) < math.inf:
            raise ConfigError(f"model.{name}={getattr(model, name)} must be above 0; 1 changes nothing")
    for name in ("attention_scale", "final_softcap"):
        if not 0 <= getattr(model, name) < math.inf:
            raise ConfigError(f"model.{name}={getattr(model, name)} must be 0 or more")


def _validate_layers(model: ModelConfig) -> None:
    for name in ("full_layers", "no_rope_layers"):
        layers = getattr(model, name)
        if list(layers) != sorted(set(layers)) or not all(0 <= i < model.num_layers for i in layers):
            raise ConfigError(f"model.{name}={layers} must be layers, 0 to {model.num_layers - 1}, in order, each once")
    uses_rope = model.position_embedding == "rope"
    if len(model.no_rope_layers) == model.num_layers:
        raise ConfigError(f"model.no_rope_layers has all {model.num_layers} layers; one at least must know positions")
    if not model.sliding_window and (model.full_layers or model.sliding_rope.base):
        name = "full_layers" if model.full_layers else "sliding_rope"
        raise ConfigError(f"model.{name} needs model.sliding_window, which is 0: no layer has a window of its own")
    if len(model.full_layers) == model.num_layers:
        raise ConfigError(f"model.full_layers has all {model.num_layers} layers; set model.sliding_window=0 instead")
    if not uses_rope and (model.no_rope_layers or model.sliding_rope.base):
        raise ConfigError('model.no_rope_layers and sliding_rope need model.position_embedding="rope"')
    if model.sliding_rope.base:
        _one_of("model.sliding_rope.scaling", model.sliding_rope.scaling, SCALINGS)
        if fault := model.sliding_rope.fault(model.head_dim):
            raise ConfigError(f"model.sliding_rope.{fault}")
        if model.sliding_rope.fraction != model.rope.fraction:
            raise ConfigError(
                f"model.sliding_rope.fraction={model.sliding_rope.fraction} must be model.rope.fraction="
                f"{model.rope.fraction}: all layers rotate as many dimensions"
            )


def with_own_window(attention: AttentionConfig, model: ModelConfig) -> AttentionConfig:
    """The pattern as a model with a sliding window of its own computes it: what both let a query see.

    A pattern takes keys away and never adds any. So layers with the window see through the smaller of the two, and a
    kept token as long as it is in their own; "dense" is the model's window and nothing else (docs/decisions.md, 84).
    """
    if not model.sliding_window:
        return attention
    given = attention.layer_reach or (0,) * model.num_layers
    own = [0 if i in model.full_layers else model.sliding_window for i in range(model.num_layers)]
    reach = tuple(min(x or EVERYTHING, y or EVERYTHING) % EVERYTHING for x, y in zip(given, own, strict=True))
    attention = dataclasses.replace(attention, layer_reach=reach)
    if attention.pattern != "dense":
        return attention
    window = EVERYTHING if model.full_layers else model.sliding_window
    changes = {"num_sinks": 0, "window_size": window, "layer_windows": ()}
    if attention.cache_size < window:  # a bound that was meant for another pattern, or has no room
        changes |= {"cache_size": 0}
    return under(attention, "sink_window", **changes)
