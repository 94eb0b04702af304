"""The definition of separator_attention: the whole mask, the whole softmax, in float32. Quadratic in memory."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float32

from sepjax.array_typing import Array, Keys, Queries
from sepjax.attention.ranges import Ranges
from sepjax.layout import SeparatorLayout


def unsupported(q: Queries) -> str | None:
    """Nothing is: the definition serves every call."""
    return None


def attend(
    q: Queries,
    k: Keys,
    v: Keys,
    layout: SeparatorLayout,
    far_scale: Float32[Array, "B T"] | None = None,
    *,
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`separator_attention` and its log-sum-exp; the arguments are checked there.

    `dtype` is that of every operation. Tests measure with it how much error a lower precision makes on its own.
    """
    if far_scale is None:
        return _attend(q, k, v, layout.as_mask(), scale, dtype)
    # Every key twice: as it is for those who see it near, with its value scaled for those who see it far.
    far, near = layout.as_masks()
    far_v = jnp.asarray(v).astype(dtype) * jnp.asarray(far_scale).astype(dtype)[:, :, None, None]
    k, v = jnp.concatenate([k, k], axis=1), jnp.concatenate([jnp.asarray(v).astype(dtype), far_v], axis=1)
    return _attend(q, k, v, jnp.concatenate([near, far], axis=2), scale, dtype)


def attend_ranges(
    q: Queries,
    near: tuple[Array, Array],
    far: tuple[Array, Array],
    seen: Ranges,
    *,
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`attend` over near and far (k, v), each [B, keys, K, H], of which the queries see `seen`."""

    def mask(start, end, keys):
        j = jnp.arange(keys, dtype=jnp.int32)
        return (start[..., None] <= j) & (j < end[..., None])

    seen_near = mask(seen.near_start, seen.near_end, near[0].shape[1])
    seen_far = mask(seen.far_start, seen.far_end, far[0].shape[1])
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(near, far, strict=True))
    return _attend(q, k, v, jnp.concatenate([seen_near, seen_far], axis=2), scale, dtype)


def _attend(q, k, v, mask, scale, dtype):
    B, T, N, H = q.shape
    K = k.shape[2]
    queries, keys, values = (jnp.asarray(x).astype(dtype) for x in (q, k, v))
    queries = queries.reshape(B, T, K, N // K, H)  # the N / K query heads beside the key head that they share
    mask = mask[:, None, None]  # [B, 1, 1, T, keys]

    scores = jnp.einsum("btkgh,bskh->bkgts", queries, keys, precision="highest") * scale
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    sees_some = total > 0
    total = jnp.where(sees_some, total, 1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights / total, values, precision="highest")
    lse = jnp.where(sees_some, top + jnp.log(total), -jnp.inf)[..., 0]  # [B, K, G, T]
    return out.reshape(B, T, N, H).astype(q.dtype), lse.reshape(B, N, T).swapaxes(1, 2).astype(jnp.float32)
