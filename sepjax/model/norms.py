"""RMS norms whose input goes on beside them, and what comes back on both ways.

    x ----+--------> x          dx = the norm's part of it + what comes back on the other way
          +-> norm -> y

Plain XLA makes two kernels of that: one for the rows' sums, another for the result and sums over rows; x and y's
gradient are read twice. On a Hopper GPU one kernel reads each once (`sepjax.attention.mosaic_gpu_norm_kernels`).
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float32

from sepjax.array_typing import Array, Float
from sepjax.attention.target import target
from sepjax.sharding import on_one_device

_H100_SMS = 132  # where the device does not tell
_ROWS, _FEATURES, _MOST = 64, 192, 576  # of a tile; multiples; shared memory holds no more


def unsupported(x: Any, dtype: Any) -> str | None:
    """Why the kernel cannot serve norms of x that compute in `dtype`, or None when it can."""
    device = target()
    if device.capability != "9.0":
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), the device is {device}"
    if not on_one_device():
        return "a mesh of several devices splits rows, and the kernel knows nothing of that"
    if x.dtype != dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes bfloat16 and float16, got {x.dtype} and a norm in {jnp.dtype(dtype)}"
    *rows, features = x.shape
    if features % _FEATURES or features > _MOST or functools.reduce(int.__mul__, rows, 1) % _ROWS:
        return f"it takes rows in {_ROWS}s and {_FEATURES}, {2 * _FEATURES} or {_MOST} features, got {x.shape}"
    return None


def serves(norm: Any, x: jax.Array) -> bool:
    """Whether `beside` takes such a norm of x here."""
    return hasattr(norm, "factor") and norm.scale is not None and unsupported(x, norm.dtype) is None


def beside(norm: Any, x: Float[Array, "*B D"]) -> tuple[Float[jax.Array, "*B D"], Float[jax.Array, "*B D"]]:
    """norm(x) and x, of `sepjax.model.layers.RMSNorm` or one of its kind; only where it `serves`.

    For the backward pass x is kept, nothing else.
    """
    graph, scale = nnx.split(norm)
    return _beside(graph, norm.epsilon, scale, norm.factor().astype(jnp.float32), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _beside(graph: Any, epsilon: float, scale: Any, factor: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return nnx.merge(graph, scale)(x), x


def _forward(graph: Any, epsilon: float, scale: Any, factor: jax.Array, x: jax.Array) -> tuple[Any, Any]:
    return _beside(graph, epsilon, scale, factor, x), (scale, factor, x)


def _backward(graph: Any, epsilon: float, kept: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    scale, factor, x = kept
    dx, dfactor = _gradients(x, *gradients, factor, epsilon=epsilon)
    return jax.tree.map(jnp.zeros_like, scale), dfactor, dx  # the weights' gradient goes by the factor


_beside.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames="epsilon")  # one for all layers: its lowering takes seconds
def _gradients(
    x: Float[Array, "*B D"], g: Float[Array, "*B D"], more: Float[Array, "*B D"], factor: Float32[Array, "D"],
    *, epsilon: float,
) -> tuple[Float[jax.Array, "*B D"], Float32[jax.Array, "D"]]:  # fmt: skip
    kernels = importlib.import_module("sepjax.attention.mosaic_gpu_norm_kernels")
    flat = [y.reshape(-1, y.shape[-1]) for y in (x, g, more)]
    sms = target().num_cores or _H100_SMS
    dx, parts = kernels.gradients(*flat[0].shape, x.dtype, epsilon, sms)(*flat, factor)
    return dx.reshape(x.shape), jnp.sum(parts, axis=0)
