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
from jax.typing import DTypeLike
from jaxtyping import Float32, Int8

from sepjax.array_typing import Float
from sepjax.attention.target import target
from sepjax.model import digits_product

type Params = dict[str, Any]

MOST = 127  # the largest code: -128 is left out, so that a row and its negative have the same ones
# Where digits are faster than codes that are converted (docs/kernels_decode.md): on such GPUs, from so many rows and
# numbers of a matrix on, if this share of all SMs has something to do.
_HOPPER, _LEAST_ROWS, _LEAST_SIZE, _LEAST_BUSY = "9.0", 32, 2**23, 0.7
_MOST_INPUTS = 2**17  # sums of so many digits, of up to 128, and codes are below 2^31
_MOST_NUMBER = 127 * 256 + 127  # of two digits
_LEAST_TOP = 32 << 23  # 2^-95 as bits: below it, units would be denormal numbers


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

    def numbers(self, dtype: DTypeLike) -> Float[jax.Array, "*S O I"]:
        """The matrices themselves."""
        return (self.codes.astype(jnp.float32) * self.scales[..., None]).astype(dtype)


def quantise(x: jax.Array, inputs: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Codes of x and scales, float32 without the axes `inputs`, over which a scale is shared.

    No number is off by more than half a scale, a 254th of the largest that shares it.
    """
    wide = x.astype(jnp.float32)
    # Products: compilers make them of divisions of a matrix, too, which round otherwise.
    scales = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True) * jnp.float32(1 / MOST)
    codes = jnp.round(wide * (1 / jnp.where(scales > 0, scales, 1)))
    return jnp.clip(codes, -MOST, MOST).astype(jnp.int8), jnp.squeeze(scales, inputs)


def quantise_on_host(x: np.ndarray, inputs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`quantise` of NumPy's float32, bit for bit; x is used up, and needs no more memory than its codes."""
    scales = np.maximum(x.max(inputs, keepdims=True), -x.min(inputs, keepdims=True)) * np.float32(1 / MOST)
    x *= np.float32(1) / np.where(scales > 0, scales, np.float32(1))
    np.clip(np.rint(x, out=x), -MOST, MOST, out=x)
    with np.errstate(invalid="ignore"):  # NaN has no code; its scale is NaN, and so are the model's scores
        return x.astype(np.int8), np.squeeze(scales, inputs)


def inputs_of(path: str, in_layers: bool, tied: bool) -> tuple[int, ...] | None:
    """The axes of a parameter's inputs, if it is a matrix that has 8 bits; else None.

    Args:
      path: like "attention/query/kernel", as `sepjax.hub.families.flat` has it.
      in_layers: whether it is stacked, with an axis of layers in front.
      tied: whether the embedding is the head, too. One that is not is read by rows, and stays as it is.
    """
    *_, module, name = ("", *path.split("/"))
    if in_layers and name == "kernel":
        return (1, 2) if module == "out" else (1,)
    return (1,) if path == ("embedding/embedding" if tied else "head/embedding") else None


def in_8_bits(params: Params, *, tied: bool) -> Params:
    """Parameters with codes and scales for matrices, which they have in 16 bits or more.

    `params` is used up: one matrix after the other is deleted.
    """

    def convert(params: Params, path: tuple[str, ...]) -> Params:
        made = {}
        for name in [*params]:
            x, here = params.pop(name), (*path, name)
            if isinstance(x, dict):
                made[name] = convert(x, here)
                continue
            in_layers = here[0] == "layers"
            inputs = inputs_of("/".join(here[in_layers:]), in_layers, tied)
            if inputs is None:
                made[name] = x
                continue
            made[name], made["scales"] = _quantise(x, inputs)
            jax.block_until_ready(made["scales"])
            x.delete()
        return made

    return convert(params, ())


_quantise = jax.jit(quantise, static_argnums=1)


def numbers(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """float32[*inputs, *outputs] of codes as `Linear` has them, and of scales [*outputs]."""
    return codes.astype(jnp.float32) * scales


def product(x: jax.Array, codes: jax.Array, scales: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """x[..., I] @ (codes[I, *O] * scales[*O]), [..., flat O] in `dtype`, by default that of x.

    Summed in float32, whatever x is: sums of codes are 127 times as large, which float16 has no room for.
    """
    flat = codes.reshape(x.shape[-1], -1).astype(x.dtype)
    y = jnp.matmul(x, flat, preferred_element_type=jnp.float32) * scales.reshape(-1)
    return y.astype(dtype or x.dtype)


def product_by_outputs(x: jax.Array, matrix: QuantisedMatrix, dtype: DTypeLike | None = None) -> jax.Array:
    """`product` of x[..., I] and a matrix [O, I]: by digits where that is faster."""
    rows, inputs = x.size // x.shape[-1], x.shape[-1]
    # float16 has three bits more, which a row with a number far above the others would lose.
    may_pay = rows >= _LEAST_ROWS and matrix.size >= _LEAST_SIZE and inputs <= _MOST_INPUTS and x.dtype == jnp.bfloat16
    if may_pay and _has_kernel(matrix) and _tiling(rows, matrix).tasks >= _LEAST_BUSY * target().num_cores:
        return product_of_digits(x, matrix, dtype)
    return product(x, matrix.codes.T, matrix.scales, dtype)


def product_of_digits(x: jax.Array, matrix: QuantisedMatrix, dtype: DTypeLike | None = None) -> jax.Array:
    """`product` of x[..., I] and a matrix [O, I], multiplied as whole numbers of 8 bits.

    A row of x becomes whole numbers of two digits, x = (256 high + low) unit, in units of a power of two of which its
    largest number has 2^14 to 2^15. Numbers of bfloat16 are exact down to a 128th of the largest (of float16 a 16th),
    and what is smaller is off by half a unit at most. Sums of digits and codes are exact. A row that is not finite
    gives no finite numbers.
    """
    flat, dtype = x.reshape(-1, x.shape[-1]), dtype or x.dtype
    if _has_kernel(matrix):
        given = digits_of(jnp.pad(flat, ((0, -len(flat) % digits_product.ROWS), (0, 0))))
        tiling = _tiling(len(flat), matrix)
        y = digits_product.product(*given, matrix.codes, matrix.scales, dtype, tiling)[: len(flat)]
    else:
        high, low, unit = digits_of(flat)
        sums = jnp.einsum("bi,oi->bo", jnp.concatenate([high, low]), matrix.codes, preferred_element_type=jnp.int32)
        high, low = jnp.split(sums.astype(jnp.float32), 2)
        y = (256 * high + low) * (unit[:, None] * matrix.scales)
    return y.reshape(*x.shape[:-1], -1).astype(dtype)


def _has_kernel(matrix: QuantisedMatrix) -> bool:
    """On a Hopper GPU, of a matrix that is on one device whole."""
    alone = jax.sharding.get_abstract_mesh().size <= 1
    return alone and target().capability == _HOPPER and digits_product.serves(*matrix.shape[::-1])


def _tiling(rows: int, matrix: QuantisedMatrix) -> digits_product.Tiling:
    outputs, inputs = matrix.shape
    return digits_product.Tiling.of(rows, inputs, outputs, target().num_cores)


def digits_of(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int8[B, I] high and low digits of x[B, I], and float32[B] units: see `product_of_digits`."""
    wide = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.abs(wide), jnp.int32)  # in the order of the numbers, NaN above all
    top = jnp.maximum(jnp.max(bits, axis=-1, keepdims=True), _LEAST_TOP)
    unit = jax.lax.bitcast_convert_type(top & 0x7F800000, jnp.float32) * jnp.float32(2.0**-14)
    number = jnp.clip(jnp.round(wide * (1 / unit)), -_MOST_NUMBER, _MOST_NUMBER).astype(jnp.int32)
    high = (number + 128) >> 8
    return high.astype(jnp.int8), (number - 256 * high).astype(jnp.int8), unit[:, 0]
