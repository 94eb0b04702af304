"""Rotary position embedding (arXiv 2104.09864), half-split form, with the scalings of published models."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from sepjax.array_typing import Array
from sepjax.attention.target import target
from sepjax.config import ModelConfig, RopeConfig

type Table = tuple[jax.Array, jax.Array]  # cosine and sine


def layer_ropes(config: ModelConfig) -> tuple[tuple[RopeConfig | None, ...], tuple[int, ...]]:
    """The distinct rotations of a model's layers (None: none), and of every layer the number of its own.

    Where all layers have the same one, the second is empty; where positions are learned, both are.
    """
    if config.position_embedding != "rope":
        return (), ()
    sliding = config.sliding_rope if config.sliding_window and config.sliding_rope.base else config.rope
    layers = [
        None if i in config.no_rope_layers else config.rope if i in config.full_layers else sliding
        for i in range(config.num_layers)
    ]
    distinct = [rope for i, rope in enumerate(layers) if rope not in layers[:i]]
    if len(distinct) == 1:
        return tuple(distinct), ()
    return tuple(distinct), tuple(distinct.index(rope) for rope in layers)


def layer_numbers(kinds: Sequence[int] | None) -> Int32[jax.Array, "L"] | None:
    """A number of each layer, such as the second result of `layer_ropes`, as its attention gets it; None: none."""
    return jnp.array(kinds, jnp.int32) if kinds else None


def rope_tables(positions: Int32[Array, "*shape"], ropes: Sequence[RopeConfig | None], head_dim: int) -> Table | None:
    """`rope_table` of the rotations of `layer_ropes`; several are stacked, for `of_layer`. None: there are none.

    What is not rotated has angles of 0, which change no bit: a layer's number stays data.
    """
    if not ropes:
        return None
    if len(ropes) == 1 and ropes[0] is not None:
        return rope_table(positions, ropes[0], head_dim)
    turning = next(rope for rope in ropes if rope is not None)
    zeros = jnp.zeros_like(jnp.asarray(positions))
    tables = [
        rope_table(zeros, RopeConfig(fraction=turning.fraction), head_dim)
        if rope is None
        else rope_table(positions, rope, head_dim)
        for rope in ropes
    ]
    return jnp.stack([cos for cos, _ in tables]), jnp.stack([sin for _, sin in tables])


def of_layer(table: Table, number: Int32[Array, ""] | None) -> Table:
    """A layer's own of `rope_tables`; `number` is None where all layers are alike."""
    return table if number is None else (table[0][number], table[1][number])


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


def _turn_back(table: Table, dx: jax.Array) -> tuple[jax.Array, None, None]:
    # The gradient of a rotation is the rotation back: one pass over it, where the transposed steps above would take
    # three. A GPU writes it by itself: fused into the array that has queries' and keys' gradients side by side, it took
    # nearly three times the time of its memory traffic (docs/kernels_training.md).
    turned = _turn(dx, table[0], -table[1])
    return jax.lax.optimization_barrier(turned) if target().platform == "gpu" else turned, None, None


_turn.defvjp(lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)), _turn_back)
