"""The axis legend and the array types used at public boundaries.

    B  batch: rows of packed tokens              N  query heads
    T  tokens of a row (queries, or all keys)    K  key/value heads; N is a multiple of K
    S  packed global keys: sinks and separators  H  head size
    C  slots of a key/value cache                D  model (embedding) size
    L  layers                                    F  feed-forward size
    V  vocabulary

"*B T" is a row of a batch or of one example alone: [B, T] or [T].

Jaxtyping annotations are checked in the tests only (`--jaxtyping-packages` in pyproject.toml); at run time they are
documentation and cost nothing.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt8, UInt16, UInt32

type Array = jax.Array | np.ndarray

Tokens = Int32[Array, "B T"]
Positions = Int32[Array, "B T"]
SegmentIds = Int32[Array, "B T"]
SeparatorFlags = Bool[Array, "B T"]
SeparatorTable = Bool[Array, "..."]  # of every token id, [V], or the flags of tokens themselves, [B, T]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]
Logits = Float[Array, "B T V"]


class InShapes:
    """A dataclass that prints as the types and shapes of its arrays, without their values; it says repr=False."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        return f"{type(self).__name__}({', '.join(f'{x.name}={_in_shapes(getattr(self, x.name))}' for x in fields)})"


def _in_shapes(x: Any) -> str:
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}" if x.shape else str(x.dtype)
    if dataclasses.is_dataclass(x) or isinstance(x, bool | int | float | str | None):
        return repr(x)
    arrays = [leaf for leaf in jax.tree.leaves(x) if hasattr(leaf, "size")]
    return f"<{len(arrays)} arrays of {sum(leaf.size for leaf in arrays):,} numbers>" if arrays else type(x).__name__


__all__ = [
    "Array",
    "Bool",
    "Float",
    "InShapes",
    "Int",
    "Int32",
    "Keys",
    "Logits",
    "Positions",
    "Queries",
    "SegmentIds",
    "SeparatorFlags",
    "SeparatorTable",
    "Tokens",
    "UInt8",
    "UInt16",
    "UInt32",
]
