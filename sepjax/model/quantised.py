"""Matrices as whole numbers of 8 bits with scales: half the bytes of 16 bits, for inference alone.

`ModelConfig.weight_dtype="int8"` keeps row o of a matrix [O, I], the weights of one output, as codes from -127 to 127
and one scale, its largest number / 127: w[o, i] = codes[o, i] * scales[o]. A scale is of an output, so it leaves the
sum, and no number of the matrix is made for a product:

    y[o] = scales[o] * sum_i codes[o, i] x[i]

Codes are exact in bfloat16 (8 bits of precision), so products of 16 bits are rounded where those of 16-bit weights are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int8

from sepjax.array_typing import Array, Float

MOST = 127  # the largest code: -128 is left out, so that a row and its negative have the same ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedMatrix:
    """Matrices [O, I] by their outputs, each row `codes * scale`."""

    codes: Int8[jax.Array, "*S O I"]
    scales: Float32[jax.Array, "*S O"]

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.codes.shape

    @property
    def size(self) -> int:
        """How many numbers."""
        return self.codes.size
