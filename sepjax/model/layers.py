"""The parts of a decoder block. Parameters are float32; `ModelConfig.dtype` is the type of activations and matmuls.

What the backward pass keeps is chosen for accelerators, where memory traffic costs more than arithmetic: the inputs of
matrices, and of norms and activations their inputs alone (docs/decisions.md, 18).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sepjax.attention.target import target
from sepjax.config import ModelConfig
from sepjax.model import quantised
from sepjax.model.folded import normalised
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


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm` in an order that XLA makes one kernel of on GPUs: x is read once.

    Normalised first and then scaled, it is what XLA knows from softmax. Were the statistics scaled before, they would
    be a kernel of their own, and x would be read again.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis in float32."""
        y = x.astype(self.dtype).astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.factor()).astype(self.dtype)

    def factor(self) -> jax.Array | float:
        """What normalised features are multiplied by: the weights, in the type of the result."""
        return 1.0 if self.scale is None else self.scale[...].astype(self.dtype)


class OffsetNorm(RMSNorm):
    """An RMS norm that multiplies by 1 + its weights, which are stored as they are and begin at 0 (Gemma)."""

    def __init__(self, num_features: int, **settings: Any):
        super().__init__(num_features, scale_init=nnx.initializers.zeros, **settings)

    def factor(self) -> jax.Array | float:
        """As above, in float32."""
        return 1.0 if self.scale is None else 1 + self.scale[...].astype(jnp.float32)


def make_norm(config: ModelConfig, rngs: nnx.Rngs, size: int | None = None) -> nnx.RMSNorm | nnx.LayerNorm:
    """The config's norm over so many features, by default those of the embedding; statistics in float32."""
    kind = nnx.LayerNorm if config.norm == "layernorm" else OffsetNorm if config.norm_offset else RMSNorm
    return kind(size or config.embed_dim, epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), rngs=rngs)


class Linear(nnx.LinearGeneral):
    """`nnx.LinearGeneral` over the last axes, as one product of flat features. It has the same parameters.

    Attributes:
      is_frozen: whether no gradient of the kernel is asked for (`sepjax.model.lora` sets these four).
      lora_a, lora_b: a low-rank adapter, [*inputs, R] and [R, *outputs]; None: there is none.
      lora_scale: what it adds is multiplied by.
      scales: of the outputs, [*outputs], where the kernel is codes (`sepjax.model.quantised`); None: it is numbers.
    """

    is_frozen = False
    lora_a: nnx.Param[jax.Array] | None = None
    lora_b: nnx.Param[jax.Array] | None = None
    lora_scale = 1.0
    scales: nnx.Param[jax.Array] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[..., *inputs] to [..., *outputs]."""
        return self.add_bias(self.product(x))

    def product(self, x: jax.Array) -> jax.Array:
        """The mapping without its bias."""
        lead = x.shape[: x.ndim - len(self.in_features)]
        if self.scales is not None:
            flat = x.astype(self.dtype).reshape(*lead, -1)
            return quantised.product(flat, self.kernel[...], self.scales[...]).reshape(*lead, *self.out_features)
        x, kernel = x.astype(self.dtype).reshape(*lead, -1), self.flat_kernel()
        # A kernel without a gradient needs none of `_matmul`'s care for it, and x is not kept for its sake.
        y = x @ kernel if self.is_frozen else _matmul(x, kernel)
        return (y if self.lora_a is None else y + self.adapter(x)).reshape(*lead, *self.out_features)

    def adapter(self, x: jax.Array) -> jax.Array:
        """What the adapter adds to the product of flat features x[..., I]."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        a, b = self.lora_a[...].astype(self.dtype), self.lora_b[...].astype(self.dtype)
        return (x @ a.reshape(-1, a.shape[-1]) * self.lora_scale) @ b.reshape(b.shape[0], -1)

    def flat_kernel(self) -> jax.Array:
        """The kernel of flat features, [I, O], in the dtype of the product."""
        return self.numbers().reshape(math.prod(self.in_features), -1)

    def numbers(self) -> jax.Array:
        """The kernel [*inputs, *outputs], in the dtype of the product."""
        kernel = self.kernel[...]
        return (kernel if self.scales is None else quantised.numbers(kernel, self.scales[...])).astype(self.dtype)

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


def products_of(linears: Sequence[Linear], x: jax.Array, axis: str) -> list[jax.Array]:
    """`product(x)` of linear maps of one input; `axis` is the one that splits their features over a mesh.

    Together they have two backward products in place of two each: the gradient of x is one sum over all features,
    which is rounded once and written once, and x is read once for the kernels'.
    """
    # Side by side, the features of a device would not be; and what is no number has no gradient.
    if ways(axis) > 1 or linears[0].is_frozen or linears[0].scales is not None:
        return [f.product(x) for f in linears]
    flat = _matmuls(x.astype(linears[0].dtype), tuple(f.flat_kernel() for f in linears))
    return [y.reshape(*x.shape[:-1], *f.out_features) for f, y in zip(linears, flat, strict=True)]


def _linear(
    config: ModelConfig,
    inputs: int | tuple[int, ...],
    outputs: int | tuple[int, ...],
    bias: bool,
    std: float,
    rngs: nnx.Rngs,
) -> Linear:
    axis = tuple(range(-len(inputs), 0)) if isinstance(inputs, tuple) else -1
    linear = Linear(
        inputs,
        outputs,
        axis=axis,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )
    if config.weight_dtype == "int8":
        codes, scales = quantised.quantise(linear.kernel.get_value(), tuple(range(len(linear.in_features))))
        linear.kernel.set_value(codes)
        linear.scales = nnx.Param(scales)
    return linear


class Attention(nnx.Module):
    """Projections around an attention that the caller brings."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.query = _linear(config, D, (N, H), bias, _INIT_STD, rngs)
        self.key = _linear(config, D, (K, H), bias, _INIT_STD, rngs)
        self.value = _linear(config, D, (K, H), bias, _INIT_STD, rngs)
        self.out = _linear(config, (N, H), D, config.attention_bias, _residual_std(config), rngs)
        sizes = {"none": (), "head": (H, H), "width": (N * H, K * H)}[config.qk_norm]
        self.query_norm, self.key_norm = [make_norm(config, rngs, size) for size in sizes] or (None, None)
        # Whoever attends multiplies scores by H ** -0.5; what another scale differs by is brought in beforehand.
        self.query_scale = config.attention_scale * H**0.5 or 1.0
        self.scanned = config.scan_layers

    def __call__(self, x: jax.Array, attend: Attend, layer_input: Any) -> tuple[jax.Array, Any]:
        """Maps x[B, T, D] to the attention's output [B, T, D] and what `attend` returned for this layer."""
        q, k, v = (constrain(y, "batch", "length", "heads", None) for y in self._projections(x))
        out, layer_output = attend(*self.prepared(q, k), v, layer_input)
        return self._output(out), layer_output

    def prepared(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys [B, T, heads, H] after their norms, the queries scaled for an attention of H ** -0.5."""
        if self.query_norm is not None and self.key_norm is not None:
            q, k = _normed_heads(self.query_norm, q, self.scanned), _normed_heads(self.key_norm, k, self.scanned)
        return (q if self.query_scale == 1 else q * self.query_scale), k

    def _projections(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values [B, T, heads, H]."""
        linears = self.query, self.key, self.value
        products = products_of(linears, x, "heads")
        biased = linears if self._output_bias() is None else linears[:2]
        return [f.add_bias(y) if f in biased else y for f, y in zip(linears, products, strict=True)]

    def _output(self, attended: jax.Array) -> jax.Array:
        bias = self._output_bias()
        return self.out(attended) if bias is None else (y := self.out.product(attended)) + bias.astype(y.dtype)

    def _output_bias(self) -> jax.Array | None:
        if self.value.bias is None or self.out.bias is None:
            return None
        value = self.value.bias[...]
        bias = output_bias(value, self.out.numbers(), self.out.bias[...])
        if self.out.lora_a is None:
            return bias
        flat = jnp.repeat(value, self.out.in_features[0] // value.shape[0], axis=0).reshape(-1)
        return bias + self.out.adapter(flat.astype(self.out.dtype))  # which reads values with their bias


def _normed_heads(norm: nnx.RMSNorm | nnx.LayerNorm, x: jax.Array, scanned: bool) -> jax.Array:
    """x[B, T, heads, H] normalised over H, or over all heads where the norm has as many features."""
    if norm.num_features == x.shape[-1]:
        return _keep_inputs(norm, scanned)(x)
    return _keep_inputs(norm, scanned)(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


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
        # Products without biases: the sums would be arrays of their own, kept for the backward pass.
        linears = [self.up] if self.gate is None else [self.gate, self.up]
        together = len(linears) > 1 and target().platform == "gpu"  # measured nowhere else
        products = products_of(linears, x, "mlp") if together else [f.product(x) for f in linears]
        hidden = _keep_inputs(self._activate, self.scanned)(*products)
        return self.down(constrain(hidden, "batch", "length", "mlp"))

    def _activate(self, *products: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            return activation(self.up.add_bias(products[0]))
        return activation(self.gate.add_bias(products[0])) * self.up.add_bias(products[1])


class Block(nnx.Module):
    """One decoder layer.

    serial      x -> norm -> attention -> + -> norm -> MLP -> +          (Llama, GPT-2)
    post        x -> attention -> norm -> + -> MLP -> norm -> +          (OLMo 2; with both, Gemma 3)
    parallel    x -> norm -> attention -> + <- MLP <- norm <- x          (GPT-NeoX; Falcon-7B shares the norm)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        before, after = config.norm_position != "post", config.norm_position != "pre"
        self.attention_norm = make_norm(config, rngs) if before else None
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = make_norm(config, rngs) if before and not config.shared_norm else None
        self.mlp = MLP(config, rngs=rngs)
        self.attention_out_norm = make_norm(config, rngs) if after else None
        self.mlp_out_norm = make_norm(config, rngs) if after else None
        self.parallel, self.shares_norm = config.parallel_residual, config.shared_norm
        self.residual_scale = config.residual_scale
        self.scanned = config.scan_layers
        self.folds = False  # whether the matrices have the weights of the norms before them (`sepjax.model.folded`)

    def __call__(self, x: jax.Array, attend: Attend, layer_input: Any) -> tuple[jax.Array, Any]:
        """Maps the residual stream x[B, T, D] to [B, T, D] and what `attend` returned for this layer."""
        x, layer_output = self.run(x, lambda normed: self.attention(normed, attend, layer_input), self.mlp)
        return constrain(x, "batch", "length", "hidden"), layer_output

    def run(
        self,
        x: jax.Array,
        attention: Callable[[Any], tuple[jax.Array, Any]],
        mlp: Callable[[Any], jax.Array],
        before: Callable[[Any, jax.Array], Any] | None = None,
    ) -> tuple[jax.Array, Any]:
        """The layer's norms and sums around an attention and an MLP, which may be laid out in another way.

        before: what these get, made of the norm before them (or None) and its input; None: the normalised input.
        """
        before = before or (self._plain if self.folds else self._normed)
        normed = before(self.attention_norm, x)
        attended, layer_output = attention(normed)
        attended = self._added(self.attention_out_norm, attended)
        if not self.parallel:
            x = x + attended
        if self.parallel and self.folds:
            # Behind the barrier: XLA would merge a product with one of the attention's, and take them apart by copies.
            mlp_input = jax.lax.optimization_barrier(normed)
        else:
            mlp_input = normed if self.shares_norm else before(self.mlp_norm, x)
        out = self._added(self.mlp_out_norm, mlp(mlp_input))
        # Adding to `attended`, which nobody else needs, a matmul can do in place; x must live on.
        return x + (attended + out if self.parallel else out), layer_output

    def _added(self, norm: nnx.RMSNorm | nnx.LayerNorm | None, out: jax.Array) -> jax.Array:
        out = self._normed(norm, out)
        return out if self.residual_scale == 1 else out * self.residual_scale

    def _normed(self, norm: nnx.RMSNorm | nnx.LayerNorm | None, x: jax.Array) -> jax.Array:
        return x if norm is None else _keep_inputs(norm, self.scanned)(x)

    def _plain(self, norm: nnx.RMSNorm | nnx.LayerNorm | None, x: jax.Array) -> jax.Array:
        """Without the weights."""
        return x if norm is None else normalised(x, norm.epsilon, isinstance(norm, nnx.LayerNorm))


def _keep_inputs(f: Callable[..., jax.Array], scanned: bool) -> Callable[..., jax.Array]:
    """`f`, an elementwise function or a norm, computed again in the backward pass from its inputs.

    Without a scan between the passes, XLA would see the same computation twice and keep the first one's results after
    all, unless told that it must not. Of a norm those would be statistics, few enough; but kept, they are a kernel of
    their own, and the backward pass, which reads x for another sum, has them for nothing.
    """
    return jax.checkpoint(f, prevent_cse=not scanned)


def _residual_std(config: ModelConfig) -> float:
    """Projections into the residual stream start smaller, so that its variance does not grow with depth (GPT-2)."""
    return _INIT_STD / (2 * config.num_layers) ** 0.5
