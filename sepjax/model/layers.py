"""The parts of a decoder block. Parameters are float32; `ModelConfig.dtype` is the type of activations and matmuls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sepjax.config import ModelConfig
from sepjax.sharding import constrain

# attend(q[B,T,N,H], k[B,T,K,H], v[B,T,K,H], layer_input) -> (out[B,T,N,H], layer_output). Queries and keys arrive
# without their rotary embedding: who attends knows which positions they have.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
_INIT_STD = 0.02


def make_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """RMSNorm or LayerNorm over the embedding; statistics in float32."""
    kind = nnx.RMSNorm if config.norm == "rmsnorm" else nnx.LayerNorm
    return kind(config.embed_dim, epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _linear(
    config: ModelConfig,
    inputs: int | tuple[int, ...],
    outputs: int | tuple[int, ...],
    bias: bool,
    std: float,
    rngs: nnx.Rngs,
) -> nnx.LinearGeneral:
    axis = tuple(range(-len(inputs), 0)) if isinstance(inputs, tuple) else -1
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=axis,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Projections around an attention that the caller brings."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.attention_bias
        self.query = _linear(config, D, (N, H), bias, _INIT_STD, rngs)
        self.key = _linear(config, D, (K, H), bias, _INIT_STD, rngs)
        self.value = _linear(config, D, (K, H), bias, _INIT_STD, rngs)
        self.out = _linear(config, (N, H), D, bias, _residual_std(config), rngs)

    def __call__(self, x: jax.Array, attend: Attend, layer_input: Any) -> tuple[jax.Array, Any]:
        """Maps x[B, T, D] to the attention's output [B, T, D] and what `attend` returned for this layer."""
        q, k, v = (constrain(f(x), "batch", "length", "heads", None) for f in (self.query, self.key, self.value))
        out, layer_output = attend(q, k, v, layer_input)
        return self.out(out), layer_output


class MLP(nnx.Module):
    """Two matrices around an activation, or three with a gate (SwiGLU)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        self.up = _linear(config, D, F, bias, _INIT_STD, rngs)
        self.gate = _linear(config, D, F, bias, _INIT_STD, rngs) if config.gated_mlp else None
        self.down = _linear(config, F, D, bias, _residual_std(config), rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[B, T, D] to [B, T, D]."""
        activation = _ACTIVATIONS[self.activation]
        hidden = self.up(x)
        hidden = activation(hidden) if self.gate is None else activation(self.gate(x)) * hidden
        return self.down(constrain(hidden, "batch", "length", "mlp"))


class Block(nnx.Module):
    """One decoder layer.

    serial      x -> norm -> attention -> + -> norm -> MLP -> +          (Llama, GPT-2)
    parallel    x -> norm -> attention -> + <- MLP <- norm <- x          (GPT-NeoX; Falcon-7B shares the norm)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = make_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = None if config.shared_norm else make_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.parallel = config.parallel_residual

    def __call__(self, x: jax.Array, attend: Attend, layer_input: Any) -> tuple[jax.Array, Any]:
        """Maps the residual stream x[B, T, D] to [B, T, D] and what `attend` returned for this layer."""
        normed = self.attention_norm(x)
        attended, layer_output = self.attention(normed, attend, layer_input)
        if not self.parallel:
            x = x + attended
        mlp_input = normed if self.mlp_norm is None else self.mlp_norm(x)
        x = x + self.mlp(mlp_input)
        if self.parallel:
            x = x + attended
        return constrain(x, "batch", "length", "hidden"), layer_output


def _residual_std(config: ModelConfig) -> float:
    """Projections into the residual stream start smaller, so that its variance does not grow with depth (GPT-2)."""
    return _INIT_STD / (2 * config.num_layers) ** 0.5
