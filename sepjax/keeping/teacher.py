"""What a dense model looks at from afar: for every token the far attention that it receives.

    worth of token j  =  sum over layers that see kept tokens, heads, later queries i >= j + n
                         of (weight of j in query i's softmax)^2

Squared, because sharp looks tell what is needed and mass does not. The weights of a layer are computed outright, one
head at a time: a single [B, T, T] is in memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from sepjax.array_typing import Bool, Float, Positions, SegmentIds, Tokens
from sepjax.config import AttentionConfig, layer_windows, sees_kept, with_own_window
from sepjax.model.attend import hidden_before_gate
from sepjax.model.layers import Attend
from sepjax.model.rope import layer_numbers, layer_ropes, of_layer, rope_tables, rotate
from sepjax.model.transformer import Transformer


class Observed(NamedTuple):
    """What a gate reads of rows, and what it is to tell from it."""

    hidden: Float[jax.Array, "B T D"]  # entering layer g
    worth: Float32[jax.Array, "B T"]  # 0 where no query is far enough away
    is_judged: Bool[jax.Array, "B T"]  # tokens whose worth says something, in whole stretches; sinks are none of them


def observe(
    model: Transformer, tokens: Tokens, positions: Positions, segment_ids: SegmentIds, attention: AttentionConfig
) -> Observed:
    """Runs rows through the gated model's lower layers, and through the dense model.

    The hidden states are the former's, which see sinks and window: what the gate will read when it is used. The weights
    are the latter's. A stretch is judged where `gate_stretch` queries at least are far from all of it.

    Args:
      model: the decoder.
      tokens: int32[B, T].
      positions: int32[B, T] within each document.
      segment_ids: int32[B, T], 0 for padding.
      attention: the gated pattern; far is what is beyond the narrowest window n of the layers that see its choice.
    """
    i = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    attention = with_own_window(attention, model.config)
    kept = sees_kept(attention, model.config.num_layers)
    windows = layer_windows(attention, model.config.num_layers, 0)
    window = min(n for n, sees in zip(windows, kept, strict=True) if sees)
    segments = jnp.asarray(segment_ids)
    sees = (segments[:, :, None] == segments[:, None]) & (i <= i[:, None])
    is_far = sees & (i[:, None] - i >= window)
    attend, g = _dense(model, positions, sees, is_far), attention.gate_layer
    inputs = layer_numbers([n or len(i) for n in attention.layer_reach]), layer_numbers(layer_ropes(model.config)[1])
    x, _ = model.run_layers(model.embed(tokens, positions), attend, inputs, 0, g)
    _, worth = model.run_layers(x, attend, inputs, g)
    worth = worth[jnp.asarray([i for i in range(g, len(kept)) if kept[i]]) - g]

    places = jnp.asarray(positions)
    to_last = attention.gate_stretch - 1 - places % attention.gate_stretch  # of the token's stretch
    judges = jnp.sum(is_far, axis=1, dtype=jnp.int32) - to_last  # of the last token of the stretch
    is_judged = (segments > 0) & (places >= attention.num_sinks) & (judges >= attention.gate_stretch)
    hidden = hidden_before_gate(model, tokens, positions, segment_ids, attention)
    return Observed(hidden, jnp.sum(worth, axis=0), is_judged)


def _dense(model: Transformer, positions: Positions, sees: jax.Array, is_far: jax.Array) -> Attend:
    """Attention by the mask `sees` that also returns the worth of every key, float32[B, T], by the pairs `is_far`."""
    tables = rope_tables(positions, layer_ropes(model.config)[0], model.config.head_dim)
    i = jnp.arange(sees.shape[1])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        reach, rope = layer
        seen = sees if reach is None else sees & (i[:, None] - i < reach)
        if tables is not None:
            table = of_layer(tables, rope)
            q, k = rotate(q, table), rotate(k, table)
        shared = q.shape[2] // k.shape[2]  # queries a key head

        def head(n: jax.Array) -> tuple[jax.Array, jax.Array]:
            query, key, value = (
                jax.lax.dynamic_index_in_dim(x, m, axis=2, keepdims=False)
                for x, m in ((q, n), (k, n // shared), (v, n // shared))
            )
            scores = jnp.einsum("bth,bsh->bts", query, key, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            worth = jnp.sum(jnp.where(is_far, weights, 0.0) ** 2, axis=1)
            return jnp.einsum("bts,bsh->bth", weights.astype(v.dtype), value), worth

        out, worth = jax.lax.map(head, jnp.arange(q.shape[2]))
        return jnp.moveaxis(out, 0, 2), jnp.sum(worth, axis=0)

    return attend
