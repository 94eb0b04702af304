"""The parts of a decoder block. Parameters are float32; `ModelConfig.dtype` is the type of activations and matmuls.

What the backward pass keeps is chosen for accelerators, where memory traffic costs more than arithmetic: the inputs of
matrices, and of norms and activations their inputs alone (docs/decisions.md, 18).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sepjax.config import ModelConfig
from sepjax.sharding import constrain, ways

# attend(q[B,T,N,H], k[B,T,K,H], v[B,T,K,H], layer_input) -> (out[B,T,N,H], layer_output). Queries and keys arrive
# without their rotary embedding: who attends knows which positions they have.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

_INIT_STD = 0.02


def once[T](x: T) -> T:
    """Arrays that all layers share, such as rotation tables and masks, computed once.

    Where layers are not scanned, XLA computes such things anew inside each layer's kernels, as if a cosine were free:
    it made the rotation of one token's queries by far the slowest small kernel of a decoding step.
    """
    return jax.lax.optimization_barrier(x)


def _gelu(x: jax.Array) -> jax.Array:
    """Exact GELU. 16 bits go through float32: its erf costs less than a 16-bit erfc, and the result is rounded once."""
    if x.dtype == jnp.float32:
        return jax.nn.gelu(x, approximate=False)
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu": _gelu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def make_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """RMSNorm or LayerNorm over the embedding; statistics in float32."""
    kind = nnx.RMSNorm if config.norm == "rmsnorm" else nnx.LayerNorm
    return kind(config.embed_dim, epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), rngs=rngs)


class Linear(nnx.LinearGeneral):
    """`nnx.LinearGeneral` over the last axes, as one product of flat features. It has the same parameters."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[..., *inputs] to [..., *outputs]."""
        return self.add_bias(self.product(x))

    def product(self, x: jax.Array) -> jax.Array:
        """The mapping without its bias."""
        lead = x.shape[: x.ndim - len(self.in_features)]
        return _matmul(x.astype(self.dtype).reshape(*lead, -1), self.flat_kernel()).reshape(*lead, *self.out_features)

    def flat_kernel(self) -> jax.Array:
        """The kernel of flat features, [I, O], in the dtype of the product."""
        return self.kernel[...].astype(self.dtype).reshape(math.prod(self.in_features), -1)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """`product(x)` with the bias, if there is one."""
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x[..., I] @ kernel[I, O], whose two backward products stay by themselves."""
    return x @ kernel


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Behind the barrier no operand is shared with another product. XLA would merge products that share one, and copy
    # their other operands side by side for it: 0.9 GB a layer at 32k tokens of the 160M shape.
    x, kernel = residuals
    x, dy = jax.lax.optimization_barrier((x, dy))
    tokens = tuple(range(x.ndim - 1))
    return (
        jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ()))),
        jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ()))),
    )


_matmul.defvjp(lambda x, kernel: (_matmul(x, kernel), (x, kernel)), _matmul_backward)


@jax.custom_vjp
def _matmuls(x: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x[..., I] @ kernel[I, O] for each, whose gradients are written side by side: two backward products in all."""
    return tuple(x @ kernel for kernel in kernels)


def _matmuls_backward(residuals: tuple, dys: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x, kernels = residuals
    dx, dkernel = _matmul_backward((x, jnp.concatenate(kernels, axis=-1)), jnp.concatenate(dys, axis=-1))
    ends = np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1]
    return dx, tuple(jnp.split(dkernel, ends, axis=-1))


_matmuls.defvjp(lambda x, kernels: (_matmuls(x, kernels), (x, kernels)), _matmuls_backward)


def _linear(
    config: ModelConfig,
    inputs: int | tuple[int, ...],
    outputs: int | tuple[int, ...],
    bias: bool,
    std: float,
    rngs: nnx.Rngs,
) -> Linear:
    axis = tuple(range(-len(inputs), 0)) if isinstance(inputs, tuple) else -1
    return Linear(
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
        q, k, v = (constrain(y, "batch", "length", "heads", None) for y in self._projections(x))
        out, layer_output = attend(q, k, v, layer_input)
        return self._output(out), layer_output

    def _projections(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values [B, T, heads, H]."""
        linears = self.query, self.key, self.value
        if ways("heads") > 1:  # side by side, the heads of a device would not be
            products = [f.product(x) for f in linears]
        else:
            flat = _matmuls(x.astype(self.query.dtype), tuple(f.flat_kernel() for f in linears))
            products = [y.reshape(*x.shape[:-1], *f.out_features) for f, y in zip(linears, flat, strict=True)]
        biased = linears if self._output_bias() is None else linears[:2]
        return [f.add_bias(y) if f in biased else y for f, y in zip(linears, products, strict=True)]

    def _output(self, attended: jax.Array) -> jax.Array:
        bias = self._output_bias()
        return self.out(attended) if bias is None else (y := self.out.product(attended)) + bias.astype(y.dtype)

    def _output_bias(self) -> jax.Array | None:
        if self.value.bias is None or self.out.bias is None:
            return None
        return output_bias(self.value.bias[...], self.out.kernel[...].astype(self.out.dtype), self.out.bias[...])


def output_bias(value: jax.Array, out_kernel: jax.Array, out: jax.Array) -> jax.Array:
    """The biases of values, [K, H], and of the output projection, [D], as one of the latter, [D].

    The weights of a softmax sum to 1: what is added to every value is added to the result. Added to all values, and its
    gradient summed over them, it would be three passes over the values of every layer.
    """
    per_head = jnp.repeat(value, out_kernel.shape[0] // value.shape[0], axis=0)
    return out + jnp.einsum("NH,NHD->D", per_head, out_kernel.astype(value.dtype))


class MLP(nnx.Module):
    """Two matrices around an activation, or three with a gate (SwiGLU)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        self.up = _linear(config, D, F, bias, _INIT_STD, rngs)
        self.gate = _linear(config, D, F, bias, _INIT_STD, rngs) if config.gated_mlp else None
        self.down = _linear(config, F, D, bias, _residual_std(config), rngs)
        self.activation = config.activation
        self.scanned = config.scan_layers

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[B, T, D] to [B, T, D]."""
        # From products without biases: the sums would be arrays of their own, kept for the backward pass.
        projections = (self.up,) if self.gate is None else (self.gate, self.up)
        hidden = _keep_inputs(self._activate, self.scanned)(*(f.product(x) for f in projections))
        return self.down(constrain(hidden, "batch", "length", "mlp"))

    def _activate(self, *products: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            return activation(self.up.add_bias(products[0]))
        return activation(self.gate.add_bias(products[0])) * self.up.add_bias(products[1])


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
        normed = _keep_inputs(self.attention_norm)(x)
        attended, layer_output = self.attention(normed, attend, layer_input)
        if not self.parallel:
            x = x + attended
        out = self.mlp(normed if self.mlp_norm is None else _keep_inputs(self.mlp_norm)(x))
        # Adding to `attended`, which nobody else needs, a matmul can do in place; x must live on.
        x = x + (attended + out if self.parallel else out)
        return constrain(x, "batch", "length", "hidden"), layer_output


def _keep_inputs(f: Callable[..., jax.Array], scanned: bool = True) -> Callable[..., jax.Array]:
    """`f`, an elementwise function or a norm, computed again in the backward pass from its inputs.

    Without a scan between the passes, XLA would see the same computation twice and keep the first one's results after
    all, unless told that it must not. Where those are few (norms: their statistics) that is welcome.
    """
    return jax.checkpoint(f, prevent_cse=not scanned)


def _residual_std(config: ModelConfig) -> float:
    """Projections into the residual stream start smaller, so that its variance does not grow with depth (GPT-2)."""
    return _INIT_STD / (2 * config.num_layers) ** 0.5
