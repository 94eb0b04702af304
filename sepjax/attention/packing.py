"""What packed implementations do around their kernels: say whom they serve, pack keys, bring gradients back."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sepjax.array_typing import Array, Queries
from sepjax.attention.examples import in_any_example
from sepjax.layout import SeparatorLayout

_HEAD_SIZES = (64, 128, 256)  # of the kernels for accelerators


def unserved(
    dtype: DTypeLike, head_dim: int, dtypes: tuple[DTypeLike, DTypeLike], *, fills: bool = False
) -> str | None:
    """Why kernels for two dtypes cannot serve heads of this one and size, whatever the device; None when they can.

    `fills`: whether what surrounds them fills up heads (`with_filled_heads`), as those of a cache are not.
    """
    if dtype not in dtypes:
        return f"it computes in {' or '.join(jnp.dtype(x).name for x in dtypes)}, got {jnp.dtype(dtype).name}"
    sizes = ", ".join(map(str, _HEAD_SIZES))
    if fills and _filled_size(head_dim) is None:
        return f"it serves head sizes {sizes}, and others from {_HEAD_SIZES[0] // 2 + 1} on filled up, got {head_dim}"
    if not fills and head_dim not in _HEAD_SIZES:
        return f"it serves head sizes {sizes}, got {head_dim}"
    return None


def _filled_size(head_dim: int) -> int | None:
    """The next size that kernels have; None where there is none, or half of it and more would be zeros."""
    size = next((size for size in _HEAD_SIZES if head_dim <= size), 0)
    return size if head_dim > size // 2 and size else None


def with_filled_heads[Tree](arrays: Tree, run: Callable[[Tree], tuple[Queries, Array]]) -> tuple[Queries, Array]:
    """`run` on queries, keys and values whose heads zeros fill up to a size that kernels have: (out, lse) of true size.

    Zeros add nothing to a score, whose scale is the true size's, and columns of zeros to what comes out. Gradients are
    cut as results are, by the derivative of filling up.
    """
    head_dim = jax.tree.leaves(arrays)[0].shape[-1]
    size = _filled_size(head_dim)
    if size in (head_dim, None):
        return run(arrays)
    zeros = (0, size - head_dim)
    out, lse = run(jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [zeros]), arrays))
    return out[..., :head_dim], lse


def with_positive_scale(q: Queries, scale: float) -> tuple[Queries, float]:
    """Queries and a scale above 0 that give the same scores: kernels look for the largest before they scale it."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)


def packed_index(layout: SeparatorLayout) -> jax.Array:
    """int32[B, S]: the token of each packed key, and some token for slots that hold none, which nobody sees."""
    return jnp.minimum(layout.global_index, layout.length - 1)


def pack(x: Array, layout: SeparatorLayout) -> jax.Array:
    """[B, T, K, H] of tokens -> [B, S, K, H] of packed keys."""
    return jnp.take_along_axis(jnp.asarray(x), packed_index(layout)[:, :, None, None], axis=1)


def scaled(far_v: jax.Array, far_scale: Array | None, layout: SeparatorLayout) -> jax.Array:
    """Packed values [B, S, K, H], each times its token's entry of far_scale[B, T]; None: as they are."""
    if far_scale is None:
        return far_v
    scale = jnp.take_along_axis(jnp.asarray(far_scale), packed_index(layout), axis=1)
    return (far_v * scale[:, :, None, None]).astype(far_v.dtype)


def value_gradients(
    near: jax.Array, far: jax.Array, v: Array, far_scale: Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of the values and of far_scale, from those of near values and of `scaled` packed ones.

    near and far: [B, T, K, H] of tokens, far 0 where a token is no global key (`unpack`); v: the values. The sum is
    taken in float32 and rounded once, to v's dtype.
    """
    if far_scale is None:
        return (near.astype(jnp.float32) + far.astype(jnp.float32)).astype(v.dtype), None
    far, scale = far.astype(jnp.float32), jnp.asarray(far_scale)[:, :, None, None]
    d_scale = jnp.sum(far * v.astype(jnp.float32), axis=(2, 3))
    return (near.astype(jnp.float32) + far * scale).astype(v.dtype), d_scale.astype(scale.dtype)


def with_room[R](layout: SeparatorLayout, run: Callable[[SeparatorLayout], R]) -> R:
    """`run` on a layout whose packed array holds every global key: the one given, or one with room for all T."""
    if layout.capacity >= layout.length:
        return run(layout)
    overflows = in_any_example(layout.overflows())
    return lax.cond(overflows, lambda: run(layout.with_capacity(layout.length)), lambda: run(layout))


def unpack(packed: jax.Array, layout: SeparatorLayout, axis: int) -> jax.Array:
    """[..., S, ...] of packed keys -> [..., T, ...] of tokens, 0 where a token is no global key; B is the first axis.

    Every global key reads its packed slot: a gather, so nothing depends on the order of additions.
    """
    other = [d for d in range(packed.ndim) if d not in (0, axis)]
    rank = jnp.expand_dims(jnp.maximum(layout.global_count - 1, 0), other)
    is_global = jnp.expand_dims(layout.is_global(), other)
    return jnp.where(is_global, jnp.take_along_axis(packed, rank, axis=axis), jnp.zeros((), packed.dtype))


def vary_alike[Tree](tree: Tree) -> Tree:
    """Inside `jax.shard_map`, marks every array as varying over the mesh axes that any of them varies over."""
    varying = [jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)]
    axes = frozenset().union(*varying)

    def cast(x):
        missing = tuple(axes - jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
