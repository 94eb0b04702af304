"""Dense causal attention by `jax.nn.dot_product_attention`: the honest baseline, on the fastest path of the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from sepjax.array_typing import Array
from sepjax.attention.examples import alone, first


def dense_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K H"],
    segment_ids: Int32[Array, "*B T"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "*B T N H"]:
    """Every query sees all earlier tokens of its document, and itself.

    Without `segment_ids` no mask is built, and bfloat16 or float16 on an NVIDIA GPU run in cuDNN's flash attention, in
    memory linear in T. With them a bool[B, 1, T, T] mask is built: cuDNN reads it as a bias for every head and skips
    no tile, other devices hold the scores [B, N, T, T] as well. Where documents need not be kept apart, leave it out.

    Args:
      q: [B, T, N, H], float32, bfloat16 or float16; all without B is one example alone, for `jax.vmap` too.
      k: [B, T, K, H] of q's dtype; N is a multiple of K.
      v: like k.
      segment_ids: int32[B, T], 0 for padding; a document is a run of equal ids other than 0. None: a row is a document.
      scale: of the scores; None: H ** -0.5.

    Returns:
      [B, T, N, H] in q's dtype, 0 for padding.

    Raises:
      ValueError, NotImplementedError or RuntimeError: from JAX, for shapes that disagree or that cuDNN does not take.
    """
    implementation = "cudnn" if jax.default_backend() == "gpu" and q.dtype != jnp.float32 else None
    if segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=implementation)
    if q.ndim == 3:
        return first(dense_attention(*alone((q, k, v, segment_ids)), scale=scale))
    segment_ids = jnp.asarray(segment_ids)
    document = jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=0) != 0, axis=1)
    mask = (document[:, :, None] == document[:, None, :])[:, None]  # padding sees padding, so no row of it is empty
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True, implementation=implementation)
    return jnp.where(segment_ids[:, :, None, None] != 0, out, 0)
