"""Choosing the next token from its scores.

The order is Hugging Face's: divide by the temperature, then keep the `top_k` best, of these the fewest that reach the
probability `top_p`, of these the ones at least `min_p` times as probable as the best, and draw. Equal scores are kept
or dropped together. The best token always stays.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.config import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw, all rows alike or each its own way: traced, so another value is not another program. By `create`."""

    temperature: Float[jax.Array, "*B"]  # 0: greedy, the best token; then nothing else matters
    top_k: Int32[jax.Array, "*B"]  # 0: all
    top_p: Float[jax.Array, "*B"]  # 1: all
    min_p: Float[jax.Array, "*B"]  # 0: all

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True

    @classmethod
    def create(cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> "Sampling":
        """Checks the settings and makes them arrays.

        Raises:
          ConfigError: temperature or top_k below 0, top_p outside (0, 1], min_p outside [0, 1].
        """
        for name, value, fits, expected in (
            ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more, and finite"),
            ("top_k", top_k, 0 <= top_k < 2**31, "0 (all tokens) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (all tokens)"),
            ("min_p", min_p, 0 <= min_p <= 1, "between 0 (all tokens) and 1"),
        ):
            if not fits:
                raise ConfigError(f"{name}={value} must be {expected}")
        return cls(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))

    @classmethod
    def of_rows(cls, rows: "Sequence[Sampling]", num_rows: int) -> "Sampling":
        """Each row its own way. Raises ConfigError where there are not as many as rows."""
        if len(rows) != num_rows:
            raise ConfigError(f"sampling must be one, or one a prompt: got {len(rows)} for {num_rows} prompts")
        return jax.tree.map(lambda *x: jnp.stack(x), *rows)


def sample(
    logits: Float[Array, "B V"], keys: jax.Array, sampling: Sampling, active: Bool[Array, "B"] | None = None
) -> Int32[jax.Array, "B"]:
    """Draws one token for each row.

    Args:
      logits: scores of the next token.
      keys: typed PRNG keys, one a row; a row's token depends on its own key and scores only.
      sampling: how to draw, all rows alike or each its own way.
      active: rows whose tokens mean something; what the others wish costs nothing. None: all.
    """
    sampling = _for_rows(sampling, len(logits))
    if active is not None:
        greedy_row = Sampling(jnp.float32(0), jnp.int32(0), jnp.float32(1), jnp.float32(0))
        sampling = jax.tree.map(lambda x, y: jnp.where(active, x, y), sampling, greedy_row)
    # Temperatures below the least normal number would be flushed to zero and divide by it.
    is_hot = sampling.temperature >= jnp.finfo(jnp.float32).tiny

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        hot = dataclasses.replace(sampling, temperature=jnp.where(is_hot, sampling.temperature, 1.0))
        drawn = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, hot)).astype(jnp.int32)
        return jnp.where(is_hot, drawn, greedy())

    return jax.lax.cond(jnp.any(is_hot), draw, greedy)


def _for_rows(sampling: Sampling, rows: int) -> Sampling:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows,)), sampling)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[jax.Array, "B V"]:
    """Scores divided by the temperature (above 0), the best token's shifted to 0, those left out at -inf."""
    sampling = jax.tree.map(lambda x: x[:, None], _for_rows(sampling, len(logits)))
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    needs_sort = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
    everything = jnp.full_like(logits[:, :1], -jnp.inf)
    least = jax.lax.cond(needs_sort, lambda: _least_of_top(logits, sampling), lambda: everything)
    return jnp.where((logits >= least) & (logits >= jnp.log(sampling.min_p)), logits, -jnp.inf)


def _least_of_top(logits: Array, sampling: Sampling) -> jax.Array:
    """The lowest score, [B, 1], that top_k and top_p leave."""
    V = logits.shape[1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    in_top_k = ordered >= jnp.take_along_axis(ordered, k - 1, axis=1)
    probability = jax.nn.softmax(jnp.where(in_top_k, ordered, -jnp.inf), axis=-1)
    better = jnp.cumsum(probability, axis=-1) - probability  # of all tokens before this one; rounding may reach 1
    in_top_p = (better < sampling.top_p) | (sampling.top_p >= 1)
    return jnp.min(jnp.where(in_top_k & in_top_p, ordered, jnp.inf), axis=-1, keepdims=True)
