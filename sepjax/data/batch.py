"""Batch: what the data pipeline hands to the training step."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Int32

from sepjax.array_typing import Array, InShapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Batch(InShapes):
    """Packed rows of documents. NumPy on the host, jax.Array once placed on a mesh; all arrays share one shape."""

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True

    tokens: Int32[Array, "B T"]  # token ids; 0 where padding
    targets: Int32[Array, "B T"]  # the next token of the same document
    loss_mask: Bool[Array, "B T"]  # which targets are scored
    positions: Int32[Array, "B T"]  # 0, 1, 2, ... within each document (piece)
    segment_ids: Int32[Array, "B T"]  # 1, 2, ... for the documents of a row, 0 for padding
    is_separator: Bool[Array, "B T"]  # tokens that stay visible for ever, sinks aside


def padded(batch: Batch, rows: int) -> Batch:
    """A batch on the host with rows of padding behind its own, `rows` in all."""
    return jax.tree.map(lambda x: np.pad(x, ((0, rows - len(x)), (0, 0))), batch)
