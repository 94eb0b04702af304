"""The gate: separators found in context. A small network scores tokens; the best of each stretch stay visible.

    layers 0 ... g-1     see sinks and window
    gate                 reads what enters layer g, one score a token
    layers g ... L-1     see sinks, window and the `gate_keep` best of every `gate_stretch` tokens of their document

    document    0 1 2 3 | 4 5 6 7 8 | 9 ...        a = 4 sinks, which take no part; stretches of 9 tokens, 2 kept
    score         sinks | 3 1 7 2 5 | 4 ...
    kept                |     x   x |              known once token 8 is there

A stretch is no longer than the windows of the layers above, so it is over before its first token leaves a window: no
flag that a query depends on depends on a later token. All layers above share one layout, of a known size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float32

from sepjax.array_typing import Array, Bool, Float, Int32, Tokens
from sepjax.config import AttentionConfig, ConfigError, ModelConfig
from sepjax.layout import SeparatorLayout
from sepjax.model.layers import Attend, Linear, make_norm

_WIDTH = 256  # of the hidden layer: a hundredth of what a small model's layer computes


class Gate(nnx.Module):
    """Norm, D -> 256, GELU, 256 -> 1. Its second half computes in float32: what it says is compared, token by token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm = make_norm(config, rngs)
        init = nnx.initializers.normal(0.02)
        dtype = jnp.dtype(config.dtype)
        self.up = Linear(config.embed_dim, _WIDTH, dtype=dtype, kernel_init=init, rngs=rngs)
        self.down = Linear(_WIDTH, 1, dtype=jnp.float32, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float32[jax.Array, "B T"]:
        """Scores of tokens from the hidden states that enter layer g."""
        hidden = jax.nn.gelu(self.up(self.norm(x)).astype(jnp.float32), approximate=False)
        return self.down(hidden)[..., 0]


def needs_gate(model: Any, attention: AttentionConfig) -> Gate:
    """The gate of a model under a gated pattern. Raises ConfigError where it has none."""
    gate = getattr(model, "gate", None)
    if gate is None:
        raise ConfigError(
            f"attention.pattern={attention.pattern!r} needs a model with a gate, and this one has none; train one "
            "(configs/post_gated.py, sepjax distill), or choose another pattern"
        )
    return gate


def run_with_gate(
    model: Any,
    tokens: Tokens,
    positions: Int32[Array, "B T"],
    attend: Attend,
    layer_inputs: Any,
    attention: AttentionConfig,
) -> tuple[Float[jax.Array, "B T D"], Any, Float32[jax.Array, "B T"]]:
    """A model's layers with the gate between them, as `Transformer.__call__` runs them without: hidden states, what
    the layers gave, and the gate's scores.

    Raises ConfigError where the model has no gate.
    """
    gate, g = needs_gate(model, attention), attention.gate_layer
    x, below = model.run_layers(model.embed(tokens, positions), attend, layer_inputs, 0, g)
    scores = gate(x)
    x, above = model.run_layers(x, attend, layer_inputs, g)
    if g:  # of no layers nothing came
        above = jax.tree.map(lambda *parts: jnp.concatenate(parts), below, above)
    return model.final_norm(x), above, scores


def keep_best(scores: Float32[Array, "B T"], layout: SeparatorLayout, attention: AttentionConfig) -> Bool[Array, "B T"]:
    """Which tokens are the best `gate_keep` of their stretch, sinks aside.

    Stretches go by position in the document, so a document is the same alone and packed. Of equal scores the earlier
    token is better. Sinks and padding take no part; a stretch that the document's end cuts off keeps as many.

    Args:
      scores: of every token; what is added to them for the choice (noise) included.
      layout: of the same rows; its documents, tokens and padding count.
      attention: the pattern.
    """
    i = jnp.arange(layout.length, dtype=jnp.int32)
    place = i - layout.document_start
    takes_part = (layout.near_start <= i) & (place >= attention.num_sinks)
    return _rank(scores, i - place % attention.gate_stretch, takes_part, attention.gate_stretch) < attention.gate_keep


def _rank(scores: Array, stretch: Array, takes_part: Array, length: int) -> Int32[Array, "B T"]:
    """How many tokens of its stretch are better than each; a large number for one that takes no part.

    `stretch` numbers stretches by their first token. All of a token's stretch is in its own block of `length` tokens,
    the one before or the one behind it.
    """
    B, T = scores.shape

    def blocks(x: Array, beyond: Any) -> jax.Array:
        x = jnp.pad(jnp.asarray(x), ((0, 0), (0, -T % length)), constant_values=beyond)
        return x.reshape(B, -1, length)

    def around(x: jax.Array, beyond: Any) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=beyond)
        return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)[:, :, None]

    score, start, part = blocks(scores, 0.0), blocks(stretch, -1), blocks(takes_part, False)
    own = score[..., None]
    others, rivals = around(score, 0.0), (around(start, -1) == start[..., None]) & around(part, False)
    place = jnp.arange(length, dtype=jnp.int32)
    is_earlier = jnp.arange(3 * length, dtype=jnp.int32) < (place + length)[:, None]
    better = rivals & ((others > own) | ((others == own) & is_earlier))
    rank = jnp.where(part, jnp.sum(better, axis=-1, dtype=jnp.int32), jnp.iinfo(jnp.int32).max)
    return rank.reshape(B, -1)[:, :T]


def straight_through(scores: Float32[Array, "B T"]) -> Float32[jax.Array, "B T"]:
    """Factors that are 1 and whose gradient reaches the scores: sigmoid(score) over itself, held fixed.

    Times the values of far keys, they tell the gate what far use of each kept token was worth; decoding, which needs no
    gradient, needs no factors.
    """
    # As a quotient of sigmoids the gradient would pass through 1 / sigmoid(score), which overflows for low scores.
    chance = jax.nn.log_sigmoid(scores)
    return jnp.exp(chance - jax.lax.stop_gradient(chance))


def exploring(key: jax.Array, shape: tuple[int, ...], scale: Any) -> Float32[jax.Array, "B T"]:
    """Gumbel noise of a scale: with 1 a stretch's tokens are drawn as often as the exponentials of their scores say."""
    return jnp.asarray(scale) * jax.random.gumbel(key, shape, jnp.float32)
