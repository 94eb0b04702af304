"""The loss of every single token, without the logits of all of them at once."""

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Float, Int32
from sepjax.config import ModelConfig
from sepjax.model.transformer import scaled_logits

_LOGITS = 2**28  # held at a time: 1 GiB in float32


def token_nll(
    hidden: Float[jax.Array, "B T D"], head: Float[jax.Array, "V D"], targets: Int32[Array, "B T"], config: ModelConfig
) -> Float[jax.Array, "B T"]:
    """-log p of each target in nats, float32; the logits of all tokens never exist at once.

    `head` is `Transformer.output_embedding()`; `config` is the model's, whose logits may be divided or capped.
    """
    tokens, V = targets.size, head.shape[0]
    least = max(1, -(-tokens * V // _LOGITS))
    chunks = next(n for n in range(min(least, tokens), tokens + 1) if tokens % n == 0)
    head = head.astype(hidden.dtype)

    def part(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, target = inputs
        logits = jnp.einsum("td,vd->tv", h, head, preferred_element_type=jnp.float32)
        logits = scaled_logits(logits, config)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]

    parts = hidden.reshape(chunks, -1, hidden.shape[-1]), jnp.asarray(targets).reshape(chunks, -1)
    return jax.lax.map(part, parts).reshape(targets.shape)
