"""The definition of separator_attention: the whole mask, the whole softmax, in float32. Quadratic in memory."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float32

from sepjax.array_typing import Array, Keys, Queries
from sepjax.layout import SeparatorLayout


def unsupported(q: Queries) -> str | None:
    """Nothing is: the definition serves every call."""
    return None


def attend(
    q: Queries, k: Keys, v: Keys, layout: SeparatorLayout, *, scale: float, dtype: DTypeLike = jnp.float32
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`separator_attention` and its log-sum-exp; the arguments are checked there.

    `dtype` is that of every operation. Tests measure with it how much error a lower precision makes on its own.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    queries, keys, values = (jnp.asarray(x).astype(dtype) for x in (q, k, v))
    queries = queries.reshape(B, T, K, N // K, H)  # the N / K query heads beside the key head that they share
    mask = layout.as_mask()[:, None, None]  # [B, 1, 1, T, T]

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
