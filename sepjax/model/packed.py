"""A pass over rows of different lengths that computes no padding: tokens of all rows lie behind one another.

rows      a a a . .      b . . . .      c c c c .        [B, T], of which each row has some
packed    a a a b c c c c . .                            [1, N]: embeddings, norms and products with matrices
apart     as they were                                   attention, which is of each row for itself
"""

from typing import Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Float, Int32, Positions, Tokens
from sepjax.model.layers import Attend, once


class Packed:
    """A model over packed rows, called as the model itself (`Transformer`, `Layerwise`); not with a gate."""

    def __init__(self, model: Any, counts: Int32[Array, "B"], length: int, most: int):
        """Of each row `counts` of the `length` tokens are wanted, up to `most` together.

        What comes of others means nothing; of tokens beyond `most`, too.
        """
        self._model, self.config = model, model.config
        counts = jnp.asarray(counts)
        ends, n = jnp.cumsum(counts), jnp.arange(most)
        begins = ends - counts
        row = jnp.minimum(jnp.sum(n[:, None] >= ends, axis=1), len(counts) - 1)
        place = row * length + jnp.clip(n - begins[row], 0, length - 1)
        back = jnp.minimum(begins[:, None] + jnp.arange(length), most - 1)
        self._place, self._back = once((place.astype(jnp.int32), back.astype(jnp.int32)))

    def _packed(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])[self._place][None]

    def _apart(self, x: jax.Array) -> jax.Array:
        return x[0][self._back]

    def __call__(
        self, tokens: Tokens, positions: Positions, attend: Attend, layer_inputs: Any
    ) -> tuple[Float[jax.Array, "B T D"], Any]:
        """See `Transformer.__call__`."""
        x, outputs = self.run_layers(self.embed(tokens, positions), attend, layer_inputs)
        return self.final_norm(x), outputs

    def embed(self, tokens: Tokens, positions: Positions) -> Float[jax.Array, "1 N D"]:
        """See `Transformer.embed`: packed."""
        return self._model.embed(self._packed(jnp.asarray(tokens)), self._packed(jnp.asarray(positions)))

    def run_layers(
        self, x: Float[Array, "1 N D"], attend: Attend, layer_inputs: Any, *layers: int
    ) -> tuple[Float[jax.Array, "1 N D"], Any]:
        """See `Transformer.run_layers`; `attend` is of rows as they are."""

        def attending(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            out, found = attend(self._apart(q), self._apart(k), self._apart(v), layer)
            return self._packed(out), found

        return self._model.run_layers(x, attending, layer_inputs, *layers)

    def final_norm(self, x: Float[Array, "1 N D"]) -> Float[jax.Array, "B T D"]:
        """See `Transformer`: of rows as they are."""
        return self._apart(self._model.final_norm(x))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[jax.Array, "*B V"]:
        """See `Transformer.logits`."""
        return self._model.logits(hidden)
