"""Rotary position embedding (arXiv 2104.09864), half-split form, with the scalings of published models."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from sepjax.array_typing import Array
from sepjax.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[jax.Array, float]:
    """Returns the angular frequencies float32[R/2] of the rotated dimensions, and the factor on cosine and sine.

    R = fraction * head_dim. The factor is 1 but for YaRN, which sharpens the attention of a stretched context, and
    where the config has an `attention_factor`.
    """
    rotated = round(rope.fraction * head_dim)
    frequencies = rope.base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    attention_factor = rope.attention_factor or 1.0
    if rope.scaling == "linear":
        return frequencies / rope.factor, attention_factor
    if rope.scaling == "llama3":
        return _llama3(frequencies, rope), attention_factor
    if rope.scaling == "yarn":
        return _yarn(frequencies, rope, rotated), rope.attention_factor or 0.1 * math.log(rope.factor) + 1.0
    return frequencies, attention_factor


def _llama3(frequencies: jax.Array, rope: RopeConfig) -> jax.Array:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended (Llama 3.1)."""
    turns = rope.original_context * frequencies / (2 * math.pi)  # full turns over the original context
    keep = (turns - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _yarn(frequencies: jax.Array, rope: RopeConfig, rotated: int) -> jax.Array:
    """A linear ramp over the dimensions between `beta_fast` and `beta_slow` turns (arXiv 2309.00071)."""

    def dimension(turns: float) -> float:
        return rotated * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    # Where both ends lie outside the dimensions the ramp runs backwards, as in the original code: no max() here.
    ramp = jnp.clip((jnp.arange(rotated // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    return (1 - ramp) * frequencies + ramp * frequencies / rope.factor


def rope_table(
    positions: Int32[Array, "*shape"], rope: RopeConfig, head_dim: int
) -> tuple[Float[jax.Array, "*shape R"], Float[jax.Array, "*shape R"]]:
    """Cosine and sine of every position's angles, float32[..., R/2]."""
    frequencies, factor = rope_frequencies(rope, head_dim)
    angles = jnp.asarray(positions, jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Float[Array, "*shape X H"], table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first R dimensions of every head of x[..., heads, H]; the rest passes through. Keeps the dtype.

    Differentiable in x.
    """
    cos, sin = (t[..., None, :] for t in table)
    return _turn(jnp.asarray(x), cos, sin)


@jax.custom_vjp
def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = cos.shape[-1]
    first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)


# The gradient of a rotation is the rotation back: one pass over it, where the transposed steps above would take three.
_turn.defvjp(
    lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)),
    lambda table, dx: (_turn(dx, table[0], -table[1]), None, None),
)
