"""Next-token cross-entropy over packed rows, without ever holding the logits of a whole batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.attention.target import target
from sepjax.sharding import RULES, ways

# Logits held at a time on a device: 1 GiB in float32, 2 on a GPU. Each chunk costs a pass over the gradient of the
# head, read and written.
_CHUNK_ELEMENTS = 2**28
_GPU_CHUNKS = 2

# Exponentials over the target's may sum up to this, as they do where its probability is 2^-80: no product of theirs
# is near overflow then.
_LARGEST_TOTAL = 2.0**80


def cross_entropy_sums(
    hidden: Float[jax.Array, "B T D"],
    head: Float[jax.Array, "V D"],
    targets: Int32[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """Sums, not means, so that micro-batches and devices with different token counts add up exactly.

    Args:
      hidden: final hidden states; their dtype is that of the matmuls, accumulation and softmax are float32.
      head: the output embedding, a row for each token.
      targets: the next token of every position.
      loss_mask: which positions count.
      z_loss: weight of log(Z)^2 (arXiv 2204.02311), which keeps the softmax's normaliser near 1.
      softcap: what logits are capped at (`ModelConfig.final_softcap`); 0: they are not.

    Returns:
      float32 (objective, negative log-likelihood in nats), both summed over `loss_mask`. Differentiate the first; the
      second is a report, with no gradient.
    """
    chunks = _number_of_chunks(hidden.shape[0], hidden.shape[1], head.shape[0])
    objective, nll = _chunked(hidden, head, targets, loss_mask, z_loss, softcap, chunks)
    return objective, jax.lax.stop_gradient(nll)


def _number_of_chunks(B: int, T: int, V: int) -> int:
    """The fewest chunks of a row, dividing T, whose logits fit `_CHUNK_ELEMENTS` on each device."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for name in ("batch", "length") for axis in RULES[name])
    elements = _CHUNK_ELEMENTS * (_GPU_CHUNKS if target().platform == "gpu" else 1)
    least = max(1, -(-B * T * V // (ways * elements)))
    return next(chunks for chunks in range(min(least, T), T + 1) if T % chunks == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked(hidden, head, targets, loss_mask, z_loss, softcap, chunks):
    head = head.astype(hidden.dtype)

    def body(sums, chunk):
        _, log_z, target_logit = _softmax(_capped(_logits(chunk[0], head), softcap), chunk[1])
        return _add(sums, log_z, target_logit, chunk[2], z_loss), None

    return jax.lax.scan(body, _zeros(), _split(chunks, hidden, targets, loss_mask))[0]


def _forward(hidden, head, targets, loss_mask, z_loss, softcap, chunks):
    """Takes the gradients along with the loss, while a chunk's logits are at hand: nothing is computed twice."""
    head_dtype, head = head.dtype, head.astype(hidden.dtype)
    gradients = functools.partial(_gradients, softcap=softcap)
    if _reads_once(hidden.dtype) and not softcap:
        gradients = _gradients_in_one_read

    def body(carry, chunk):
        sums, head_gradient = carry
        h, target, mask = chunk
        log_z, target_logit, gradient, factor = gradients(h, head, target, mask, z_loss)
        h_gradient = jnp.einsum("btv,vd->btd", gradient, head, preferred_element_type=h.dtype)
        if factor is not None:
            h, h_gradient = ((x * factor).astype(x.dtype) for x in (h, h_gradient))
        head_gradient += jnp.einsum("btv,btd->vd", gradient, h, preferred_element_type=jnp.float32)
        return (_add(sums, log_z, target_logit, mask, z_loss), head_gradient), h_gradient

    start = (_zeros(), jnp.zeros(head.shape, jnp.float32))
    (sums, head_gradient), h_gradient = jax.lax.scan(body, start, _split(chunks, hidden, targets, loss_mask))
    return sums, (_join(h_gradient), head_gradient.astype(head_dtype))


def _gradients(h, head, target, mask, z_loss, softcap=0.0):
    """Loss and gradient of a chunk's logits [B, t, V], as (log-normaliser, target's logit, gradient, factor on it).

    The factor, float32 [B, t, 1], is a token's: whoever multiplies by the gradient brings it in. None: it is 1.
    """
    logits = _capped(_logits(h, head), softcap)
    p, log_z, target_logit = _softmax(logits, target)
    scale = jnp.where(mask, 1 + 2 * z_loss * log_z, 0.0)[..., None]
    gradient = p * scale - jax.nn.one_hot(target, p.shape[-1]) * mask[..., None]
    if softcap:
        gradient *= 1 - (logits / softcap) ** 2
    return log_z, target_logit, gradient.astype(h.dtype), None


def _gradients_in_one_read(h, head, target, mask, z_loss):
    """`_gradients` with one read of the logits in place of two.

    Exponentials over the target's logit need no largest one: a single pass writes them in h's dtype and sums them up.
    Dividing by the sum is left to the factor. Only the target's own entry needs the sum: it is written afterwards, in
    its place, so that nothing is subtracted from what has been rounded.
    """
    logits = _logits(h, head)
    target_logit = _entry(logits, target)

    def over(reference):
        exponentials = jnp.exp(logits - reference[..., None])
        return reference, jnp.sum(exponentials, axis=-1), exponentials.astype(h.dtype)

    # No time through the loop, but where some target is nearly impossible: then once, over the largest logits.
    reference, total, exponentials, _ = jax.lax.while_loop(
        lambda state: state[3] & ~jnp.all(state[1] < _LARGEST_TOTAL),
        lambda state: (*over(jnp.max(logits, axis=-1)), jnp.bool_(False)),
        (*over(target_logit), jnp.bool_(True)),
    )
    log_z = reference + jnp.log(total)
    scale = 1 + 2 * z_loss * log_z
    scale = jnp.where(jnp.abs(scale) < 1e-3, 1e-3, scale)  # divided by
    own = jnp.exp(target_logit - reference) - total / scale
    factor = jnp.where(mask, scale / total, 0.0)[..., None]
    return log_z, target_logit, _with_entry(exponentials, target, own), factor


def _reads_once(dtype: jnp.dtype) -> bool:
    """Whether `_gradients_in_one_read` is worth it, and its exponentials have the range that they need."""
    return target().platform == "gpu" and ways("vocab") == 1 and dtype != jnp.float16


def _backward(z_loss, softcap, chunks, gradients, cotangents):
    objective, _ = cotangents
    hidden_gradient, head_gradient = (g * objective.astype(g.dtype) for g in gradients)
    return hidden_gradient, head_gradient, None, None


_chunked.defvjp(_forward, _backward)


def _logits(h: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("btd,vd->btv", h, head, preferred_element_type=jnp.float32)


def _capped(logits: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _entry(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, t, index[b, t]]."""
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def _with_entry(x: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    """x with x[b, t, index[b, t]] = value[b, t]."""
    return jax.vmap(jax.vmap(lambda x, i, y: x.at[i].set(y)))(x, index, value.astype(x.dtype))


def _softmax(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Probabilities [B, t, V], log-normaliser [B, t] and the target's logit [B, t]."""
    top, total = jax.lax.platform_dependent(logits, cuda=_top_and_total_at_once, default=_top_and_total)
    return jnp.exp(logits - top[..., None]) / total[..., None], top + jnp.log(total), _entry(logits, target)


def _top_and_total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit of each token and the sum of exp(logit - largest), in two passes."""
    top = jnp.max(logits, axis=-1)
    return top, jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)


def _top_and_total_at_once(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same in one pass: a GPU waits for memory here, and has exponentials to spare."""

    def add(x: tuple[jax.Array, jax.Array], y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        top = jnp.maximum(x[0], y[0])
        return top, x[1] * jnp.exp(x[0] - top) + y[1] * jnp.exp(y[0] - top)

    # The lowest finite number, not -inf: its exp(lowest - top) is 0, never NaN.
    nothing = np.float32(jnp.finfo(jnp.float32).min), np.float32(0)
    return jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, add, (logits.ndim - 1,))


def _zeros() -> tuple[jax.Array, jax.Array]:
    return jnp.zeros(()), jnp.zeros(())


def _add(
    sums: tuple[jax.Array, jax.Array], log_z: jax.Array, target_logit: jax.Array, mask: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    nll = jnp.where(mask, log_z - target_logit, 0.0)
    objective = nll + jnp.where(mask, z_loss * log_z**2, 0.0)
    return sums[0] + objective.sum(), sums[1] + nll.sum()


def _split(chunks: int, *arrays: Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] to [chunks, B, T / chunks, ...]; chunk c has the tokens t with t % chunks == c.

    Strided, so that a T sharded over devices stays sharded within every chunk.
    """
    return tuple(jnp.moveaxis(jnp.asarray(a).reshape(a.shape[0], -1, chunks, *a.shape[2:]), 2, 0) for a in arrays)


def _join(chunked: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    a = jnp.moveaxis(chunked, 0, 2)
    return a.reshape(a.shape[0], -1, *a.shape[3:])
