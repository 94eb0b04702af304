"""The axis legend and the array types used at public boundaries.

    B  batch: rows of packed tokens              N  query heads
    T  tokens of a row (queries, or all keys)    K  key/value heads; N is a multiple of K
    S  packed global keys: sinks and separators  H  head size
    C  slots of a key/value cache                D  model (embedding) size
    L  layers                                    F  feed-forward size
    V  vocabulary

Jaxtyping annotations are checked in the tests only (`--jaxtyping-packages` in pyproject.toml); at run time they are
documentation and cost nothing.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt8, UInt16, UInt32

type Array = jax.Array | np.ndarray

Tokens = Int32[Array, "B T"]
Positions = Int32[Array, "B T"]
SegmentIds = Int32[Array, "B T"]
SeparatorFlags = Bool[Array, "B T"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]
Logits = Float[Array, "B T V"]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Int32",
    "Keys",
    "Logits",
    "Positions",
    "Queries",
    "SegmentIds",
    "SeparatorFlags",
    "Tokens",
    "UInt8",
    "UInt16",
    "UInt32",
]
