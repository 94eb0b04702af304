"""A gate's choice in a bounded cache: of every stretch the best may stay, and of all that may, the best s.

The gate scores a token when it is read; the scores of the ring's tokens are kept beside their keys. Who is among the
`keep` best of a stretch is known when the stretch is over, and needed when its first token leaves the window, which is
never earlier. So a pass over many tokens asks nothing of the gate but its scores, and a compaction does the rest:

    recent      . . 5 2 9 | 4 7 . . . w .      past window and window; | is the end of a stretch of 3 tokens, 1 stays
    past            5 2 9   4 7                9 may stay, and 7, if what follows in its stretch is no better
    kept zone   8 6 3                          of 8 6 3 9 7 the best s stay, each as good as half, a half life later

Within a stretch the scores decide alone, as in training. Between stretches it is log2(sigmoid(score)) + t / half_life,
t the token's time: what the gate said of it as a chance, faded by the time since (as looks fade, `watched.py`).
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.config import AttentionConfig, ModelConfig, sees_kept

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache

NEVER = 2**20  # tokens after which what is not to fade at all counts half; beyond what float32 tells apart


@dataclasses.dataclass(frozen=True)
class Gated:
    """A gate's numbers, hashable: a part of `StreamSizes`. Made by `create`."""

    layers: tuple[bool, ...]  # for each layer: whether it sees what the gate kept
    stretch: int
    keep: int
    half_life: int  # tokens

    @classmethod
    def create(cls, config: ModelConfig, attention: AttentionConfig) -> "Gated":
        """What an attention config with the pattern "gated" asks for."""
        return cls(
            layers=sees_kept(attention, config.num_layers),
            stretch=attention.gate_stretch,
            keep=attention.gate_keep,
            half_life=attention.watch_half_life or NEVER,
        )

    def scores(self, config: ModelConfig, batch_size: int, size: int) -> Float[jax.Array, "1 B 1 S"]:
        """Scores of `size` entries each, for an empty cache: one set for all layers and heads."""
        return jnp.zeros((1, batch_size, 1, size), jnp.float32)


def candidates(
    cache: "StreamingCache", p: Int32[jax.Array, "B N"], time: Float[jax.Array, "B N"]
) -> tuple[Float[jax.Array, "1 B 1 N"], Bool[jax.Array, "B N"]]:
    """Of past tokens, in slots p of the ring, what they count among kept ones, and which are the best of their stretch.

    Args:
      cache: whose ring still has the scores of the stretches that the first of them belongs to.
      p: their positions in the ring.
      time: of each, on the row's clock.
    """
    sizes, gate = cache.sizes, cache.sizes.gate
    assert gate is not None
    assert cache.scores is not None
    ring = cache.scores[0, :, 0, sizes.max_separators :]
    end = cache.next_recent[:, None]
    place = cache.place_in_text(p) % gate.stretch  # which is counted modulo a multiple of a stretch
    rivals = (p - place)[..., None] + jnp.arange(gate.stretch, dtype=jnp.int32)
    # Tokens that are no sinks, as many as a ring may hold: those before them have no score.
    came = jnp.where(cache.seen_high > 0, sizes.ring, cache.seen_low - cache.num_sinks)
    is_there = rivals >= (end - jnp.minimum(came, sizes.ring)[:, None])[..., None]
    rows = jnp.arange(len(p))[:, None]
    own, other = ring[rows, p % sizes.ring], ring[rows[..., None], rivals % sizes.ring]
    better = (other > own[..., None]) | ((other == own[..., None]) & (rivals < p[..., None]))
    is_best = jnp.sum(is_there & better, axis=-1) < gate.keep
    return (jax.nn.log_sigmoid(own) / jnp.log(2.0) + time / gate.half_life)[None, :, None], is_best


def unfinished(scores: Array | None, lengths: Array, stretch: int) -> jax.Array:
    """[B, P] of the scores[B, T] of prompts, for a growing cache: those of each row's unfinished stretch."""
    if scores is None:
        return jnp.full((len(lengths), stretch), -jnp.inf, jnp.float32)
    place = jnp.arange(stretch, dtype=jnp.int32)
    count = (lengths % stretch)[:, None]
    index = jnp.minimum(lengths[:, None] - count + place, scores.shape[1] - 1)
    return jnp.where(place < count, jnp.take_along_axis(jnp.asarray(scores), index, axis=1), -jnp.inf)
