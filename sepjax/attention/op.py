"""separator_attention: checks the arguments and chooses the implementation."""

import importlib
from types import ModuleType
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from sepjax.array_typing import Array, Queries
from sepjax.attention.examples import alone, first
from sepjax.attention.target import target
from sepjax.layout import LayoutError, SeparatorLayout

_DTYPES = ("float32", "bfloat16", "float16")

# Best first, with the platform that each is for. `attend(q, k, v, layout, far_scale, *, scale)` returns (out, lse),
# `attend_ranges` the same over any two arrays of keys (`ranges.Ranges`); `unsupported(q)` says why neither can serve.
_IMPLEMENTATIONS = {"mosaic_gpu": "gpu", "tpu": "tpu", "xla": "any", "reference": "any"}


@overload
def separator_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K H"],
    layout: SeparatorLayout,
    *,
    far_scale: Float32[Array, "*B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: Literal[False] = False,
) -> Float[Array, "*B T N H"]: ...


@overload
def separator_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K H"],
    layout: SeparatorLayout,
    *,
    far_scale: Float32[Array, "*B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: Literal[True],
) -> tuple[Float[Array, "*B T N H"], Float32[Array, "*B T N"]]: ...


def separator_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K H"],
    layout: SeparatorLayout,
    *,
    far_scale: Float32[Array, "*B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "*B T N H"] | tuple[Float[Array, "*B T N H"], Float32[Array, "*B T N"]]:
    """Attention where every query sees its window, and the sinks and separators before it.

    The answer is exact whatever the layout's capacity: a row with more global keys than that (possible under jit only)
    is computed with room for all of its tokens. Differentiable once in q, k, v and far_scale, through both outputs.

    One example alone comes without the axis B: q[T, N, H] and the layout of its own is_separator[T]. `jax.vmap` over
    examples (and over batches) makes one call of their rows together, forward and backward, with every implementation.

    Args:
      q: [B, T, N, H], float32, bfloat16 or float16.
      k: [B, T, K, H] of q's dtype; N is a multiple of K, and query heads kN/K ... (k + 1)N/K - 1 share key head k.
      v: like k.
      layout: the mask, from `build_layout`, for the same B (or none) and T.
      far_scale: float32[B, T], a factor on the value of each token for those queries that see it far, as a packed key,
        and not for those that have it in their window; None: 1. Where all are 1, its gradient says what far use of each
        token is worth.
      scale: of the scores; None: H ** -0.5.
      implementation: "mosaic_gpu" (Hopper GPUs), "tpu", "xla" (memory linear in T, any device), "reference" (the
        definition, quadratic), or None: the first of these that serves the call on the device that is traced for (the
        mesh's under `jax.set_mesh`, else the default one). A named implementation never falls back to another.
      return_lse: also return the log of the sum of the exponentiated scores.

    Returns:
      [B, T, N, H] in q's dtype, 0 for a query that sees nothing (padding); with `return_lse` also float32[B, T, N],
      -inf for such a query.

    Raises:
      LayoutError: a ValueError, for shapes or dtypes that disagree.
      ValueError: for an unknown implementation.
      NotImplementedError: for an implementation that cannot serve this call.
    """
    _check(q, k, v, layout, far_scale)
    arrays = q, k, v, layout, far_scale
    is_alone = q.ndim == 3
    q, k, v, layout, far_scale = alone(arrays) if is_alone else arrays
    results = choose(implementation, q).attend(
        q, k, v, layout, far_scale, scale=q.shape[-1] ** -0.5 if scale is None else float(scale)
    )
    out, lse = first(results) if is_alone else results
    return (out, lse) if return_lse else out


def choose(implementation: str | None, q: Queries) -> ModuleType:
    """The module that serves a call with queries like `q`; errors as in `separator_attention`."""
    if implementation is None:
        here = (target().platform, "any")
        modules = (_module(name) for name, platform in _IMPLEMENTATIONS.items() if platform in here)
        return next(module for module in modules if module.unsupported(q) is None)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; expected None or one of {', '.join(_IMPLEMENTATIONS)}"
        )
    module = _module(implementation)
    reason = module.unsupported(q)
    if reason is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot serve this call: {reason}. A named implementation never falls "
            "back to another; use None (the best that fits) or 'xla' (runs anywhere)"
        )
    return module


def _module(implementation: str) -> ModuleType:
    """Imported when it is wanted: the languages of kernels take half a second, which most programs need not wait."""
    return importlib.import_module(f"sepjax.attention.{implementation}")


def _check(q: Array, k: Array, v: Array, layout: SeparatorLayout, far_scale: Array | None) -> None:
    strangers = [f"{name} is a {type(x).__name__}" for name, x in (("q", q), ("k", k), ("v", v)) if not _is_array(x)]
    if strangers:
        raise LayoutError(f"q, k and v must be arrays of JAX or NumPy, but {', '.join(strangers)}; use jnp.asarray")
    if not isinstance(layout, SeparatorLayout):
        raise LayoutError(f"layout must be what build_layout returns, got a {type(layout).__name__}")
    if q.ndim not in (3, 4) or k.ndim != q.ndim or k.shape != v.shape:
        raise LayoutError(
            f"expected q[B, T, N, H] and k, v[B, T, K, H], or all without B, got q{list(q.shape)}, k{list(k.shape)}, "
            f"v{list(v.shape)}; k and v have one shape, heads before the head size"
        )
    if (*q.shape[:-2], q.shape[-1]) != (*k.shape[:-2], k.shape[-1]):
        raise LayoutError(
            f"q{list(q.shape)} and k{list(k.shape)} must agree in B, T and H; queries and keys are the same tokens "
            "(for queries after cached keys see sepjax.generation.cache.growing)"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise LayoutError(
            f"q has N={q.shape[-2]} heads, k has K={k.shape[-2]}; N must be a multiple of K: every key head serves the "
            "same number of query heads"
        )
    if not (q.dtype == k.dtype == v.dtype and jnp.dtype(q.dtype).name in _DTYPES):
        raise LayoutError(
            f"q, k and v must share one dtype of {', '.join(_DTYPES)}, got {q.dtype}, {k.dtype}, {v.dtype}; cast them"
        )
    rows = q.shape[:-2]
    if layout.far_start.shape != rows:
        raise LayoutError(
            f"the layout is for [B, T] = {list(layout.far_start.shape)} but q is {list(q.shape)}; build it from the "
            "tokens of this batch, or of this example"
        )
    if far_scale is not None and (far_scale.shape != rows or far_scale.dtype != jnp.float32):
        raise LayoutError(
            f"far_scale must be float32[B, T] = {list(rows)}, got {far_scale.dtype}{list(far_scale.shape)}; it "
            "has a factor a token, the same for all heads"
        )


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array | np.ndarray)
