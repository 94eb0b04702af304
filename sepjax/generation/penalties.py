"""Scores changed before a draw: the bias that a request gives tokens, and penalties for those that a text has already.

Which tokens a text has is one number a token: how often it was generated, and whether it was read.

    uses        15 bits: times it was generated in this turn, counted up to 32767 | 1 bit: it stands in what was read
    a new turn  what was generated before has become text that was read: the count turns into the bit

That is what a text read anew from its beginning would have, so a cache that is continued has the same penalties. The
order of changes is vLLM's and, of those that it has, Hugging Face's: the bias, the repetition penalty (over all of the
text), then OpenAI's frequency and presence penalties (over what was generated).
"""

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens, UInt16
from sepjax.generation.sampling import Sampling
from sepjax.sharding import whole

_READ = 2**15  # the bit; below it, the count
_MOST = _READ - 1


def no_uses(rows: int, vocab_size: int) -> UInt16[jax.Array, "B V"]:
    """Of texts that have no tokens yet."""
    return jnp.zeros((rows, vocab_size), jnp.uint16)


def after_reading(
    uses: UInt16[jax.Array, "B V"], tokens: Tokens, counts: Int32[Array, "B"]
) -> UInt16[jax.Array, "B V"]:
    """Uses once rows have read `counts` of their tokens[B, T]; what they had generated is read text from here on."""
    B, V = uses.shape
    read = jnp.where(uses > 0, jnp.uint16(_READ), jnp.uint16(0))
    at = jnp.where(jnp.arange(tokens.shape[1]) < jnp.asarray(counts)[:, None], jnp.asarray(tokens), V)
    return whole(read.at[jnp.arange(B)[:, None], at].set(jnp.uint16(_READ), mode="drop"))


def after_drawing(
    uses: UInt16[jax.Array, "B V"], drawn: Int32[jax.Array, "B"], active: Bool[jax.Array, "B"]
) -> UInt16[jax.Array, "B V"]:
    """Uses once every active row has drawn a token."""
    rows = jnp.arange(len(drawn))
    before = uses[rows, drawn]
    counted = active & ((before & _MOST) < _MOST)
    return uses.at[rows, drawn].set(before + counted.astype(jnp.uint16), unique_indices=True)


def after_drawing_all(uses: UInt16[jax.Array, "1 V"], drawn: Int32[jax.Array, "1 M"]) -> UInt16[jax.Array, "1 V"]:
    """`after_drawing` of the only row's tokens one after the other; -1: none."""
    at = jnp.where(drawn < 0, uses.shape[1], drawn)
    times = jnp.zeros(uses.shape[1], jnp.int32).at[at[0]].add(1, mode="drop")
    count = jnp.minimum((uses & _MOST).astype(jnp.int32) + times, _MOST)
    return (uses & jnp.uint16(_READ)) | count.astype(jnp.uint16)


def biased(logits: Float[jax.Array, "B V"], sampling: Sampling) -> Float[jax.Array, "B V"]:
    """The scores with every row's bias."""
    sampling = sampling.for_rows(len(logits))
    ids, (B, V) = jnp.asarray(sampling.bias_ids), logits.shape
    ids = jnp.where(ids < 0, V + jnp.arange(ids.shape[1]), ids)  # beyond the end: nowhere
    return logits.at[jnp.arange(B)[:, None], ids].add(sampling.bias, mode="drop", unique_indices=True)


def without(
    logits: Float[jax.Array, "B V"], tokens: Int32[Array, "*B E"], rows: Bool[jax.Array, "B"]
) -> Float[jax.Array, "B V"]:
    """The scores, in these rows some tokens' (-1: none) at -inf, which penalties leave where it is."""
    B, V = logits.shape
    ids = jnp.broadcast_to(tokens, (B, jnp.shape(tokens)[-1]))
    at = jnp.where(rows[:, None] & (ids >= 0), ids, V)  # beyond the end: nowhere
    return logits.at[jnp.arange(B)[:, None], at].set(-jnp.inf, mode="drop")


def penalised(
    logits: Float[jax.Array, "B V"], uses: UInt16[jax.Array, "B V"], sampling: Sampling
) -> Float[jax.Array, "B V"]:
    """The scores less every row's penalties; of a row that has none, the same bits.

    Element by element, so whoever reads the scores computes this on the way: a branch for rows that want it would write
    all scores once more.
    """
    sampling = sampling.for_rows(len(logits))
    repetition, frequency, presence = (
        jnp.asarray(x)[:, None]
        for x in (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    )
    smaller = jnp.where(logits > 0, logits / repetition, logits * repetition)
    count = (uses & _MOST).astype(jnp.float32)
    return jnp.where(uses > 0, smaller, logits) - frequency * count - presence * (count > 0)
