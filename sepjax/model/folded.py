"""Norms whose weights are multiplied into the matrices that read them, for training steps.

    (x̂ * w + b) K + c  =  x̂ (w K) + (b K + c)            x̂: x normalised, w and b: the norm's weights

What is left of the norm has no parameters: a backward pass has no sums over tokens for them, for their gradients come
from those of the matrices, and XLA makes one or two kernels of the rest. Two norms of one input, as parallel blocks
have them, become one. Figures: docs/kernels_training.md.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.attention.target import target
from sepjax.config import Config, ModelConfig

type Params = dict[str, Any]


def pays(config: Config) -> bool:
    """Whether a training step is to fold its norms: on GPUs, in 16 bits, where there are matrices to fold into."""
    model = config.model
    has_biases = (model.attention_bias or model.qkv_bias) and model.mlp_bias
    return (
        target().platform == "gpu"
        and model.dtype != "float32"
        and model.norm_position != "post"
        and (model.norm == "rmsnorm" or has_biases)
        and not config.lora.rank
    )


def folded(layer: Params, config: ModelConfig) -> Params:
    """A block's float32 parameters with those of its norms multiplied in; `Block.folds` is to be set beside them."""
    attention, mlp = layer["attention"], layer["mlp"]
    first = layer["attention_norm"]
    second = first if config.shared_norm else layer["mlp_norm"]
    into = functools.partial(_into, offset=config.norm_offset and config.norm == "rmsnorm")
    return layer | {
        "attention": attention | {name: into(first, attention[name]) for name in ("query", "key", "value")},
        "mlp": mlp | {name: into(second, mlp[name]) for name in ("gate", "up") if name in mlp},
    }


def _into(norm: Mapping[str, jax.Array], matrix: Params, offset: bool) -> Params:
    kernel = matrix["kernel"]
    along = (-1,) + (1,) * (kernel.ndim - 1)
    by_input = {name: x.reshape(along) for name, x in norm.items()}
    folded = matrix | {"kernel": kernel * (by_input["scale"] + offset)}
    if "bias" in norm:
        # A sum, not a product of matrices: that would be rounded to fewer bits.
        folded["bias"] = matrix["bias"] + jnp.sum(by_input["bias"] * kernel, axis=0)
    return folded


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalised(x: jax.Array, epsilon: float, centred: bool) -> jax.Array:
    """x[..., D] over its root mean square, or standard deviation if `centred`; float32 inside, x's dtype outside."""
    return _normalised(x, epsilon, centred)[0]


def _normalised(x: jax.Array, epsilon: float, centred: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = x.astype(jnp.float32)
    mean_square = jnp.mean(y * y, axis=-1, keepdims=True)
    if centred:
        mean = jnp.mean(y, axis=-1, keepdims=True)
        y, mean_square = y - mean, jnp.maximum(mean_square - mean * mean, 0)
    inverse = jax.lax.rsqrt(mean_square + epsilon)
    out = (y * inverse).astype(x.dtype)
    return out, (out, inverse)


def _gradient(epsilon: float, centred: bool, kept: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array]:
    out, inverse = kept
    # Behind the barrier d_out is one array. Else every kernel of what follows would read all that it is the sum of.
    d = jax.lax.optimization_barrier(d_out).astype(jnp.float32)
    y = out.astype(jnp.float32)
    dx = d - y * jnp.mean(d * y, axis=-1, keepdims=True)
    if centred:
        dx -= jnp.mean(d, axis=-1, keepdims=True)
    return ((dx * inverse).astype(out.dtype),)


normalised.defvjp(_normalised, _gradient)
