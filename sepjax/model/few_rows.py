"""Products of matrices and a single row: a step of one text, in which every matrix is read once and hardly used.

On a GPU such a step is bound by how many kernels it is and by how they read. XLA makes two kernels of a small product
of one row, of which the first writes a matrix of products to memory, and two more of the norm before it. Written as
sums over the rows of a matrix [O, I], where a thread reads along memory, it is one kernel with what comes before and
after it: a norm's statistics are one more sum of the same kernel, and its division comes after the sums.

    y[o] = sum_i w[o, i] g[i] x[i] / rms(x)        sums of w g x and of x x, side by side
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sepjax.array_typing import Array, Float
from sepjax.model.layers import RMSNorm
from sepjax.model.quantised import QuantisedMatrix, product_by_outputs

# Rows of x that sums are made for, and of matrices of so many numbers; more are rows of one product of matrices.
MOST_ROWS, MOST_OF_ROWS = 4, 2**23
# Numbers of a matrix whose kernel sums the squares for a norm, too. For larger ones that takes longer than a kernel of
# their own, which runs beside the one that multiplies by the norm's weights: docs/kernels_decode.md.
MOST_WITH_NORM = 2**24


def products(
    x: Float[Array, "*B I"],
    matrix: Float[Array, "O I"] | QuantisedMatrix,
    norm: Any = None,
    parts: int = 1,
    dtype: DTypeLike | None = None,
) -> list[Float[jax.Array, "*B _"]]:
    """norm(x) @ matrix.T in so many parts of as many outputs, summed in float32.

    Of few rows and an RMS norm its division comes after the sums. `dtype`: of the results; None: the matrix's, of a
    quantised one that of x.
    """
    x, matrix = jnp.asarray(x), matrix if isinstance(matrix, QuantisedMatrix) else jnp.asarray(matrix)
    kind = x.dtype if isinstance(matrix, QuantisedMatrix) else matrix.dtype
    dtype = dtype or kind
    few = are_few(x, matrix)
    fused = norm if isinstance(norm, RMSNorm) and few else None
    if fused is None:
        x = (x if norm is None else norm(x)).astype(kind)
    if not few and isinstance(matrix, QuantisedMatrix):
        return jnp.split(product_by_outputs(jnp.asarray(x), matrix, dtype), parts, axis=-1)
    if not few:
        return jnp.split(jnp.einsum("...i,oi->...o", x, matrix, preferred_element_type=dtype), parts, axis=-1)
    numbers = matrix.codes if isinstance(matrix, QuantisedMatrix) else matrix
    matrices, flat = jnp.split(numbers, parts), jnp.asarray(x).reshape(-1, x.shape[-1])
    rows = [_sums(row, matrices, fused, kind) for row in flat]
    if isinstance(matrix, QuantisedMatrix):
        rows = [[y * s for y, s in zip(sums, jnp.split(matrix.scales, parts), strict=True)] for sums in rows]
    return [jnp.stack(sums).reshape(*x.shape[:-1], -1).astype(dtype) for sums in zip(*rows, strict=True)]


def are_few(x: Float[Array, "*B I"], matrix: Float[Array, "O I"] | QuantisedMatrix) -> bool:
    """Whether the rows of x are so few that sums are made."""
    rows = x.size // x.shape[-1]
    return rows == 1 or (rows <= MOST_ROWS and matrix.size <= MOST_OF_ROWS)


def _sums(x: jax.Array, matrices: Sequence[jax.Array], norm: RMSNorm | None, kind: Any) -> list[jax.Array]:
    """float32[O] for each matrix; `kind`: the type of products of more rows."""
    wide = x.astype(jnp.float32)
    features = wide if norm is None else wide * jnp.asarray(norm.factor(), jnp.float32)
    squares, is_small = wide * wide, sum(matrix.size for matrix in matrices) <= MOST_WITH_NORM
    if norm is not None and not is_small:  # made once, and rounded where 16 bits reach as far, as every output reads it
        kept = features.astype(jnp.bfloat16) if kind == jnp.bfloat16 else features
        features = jax.lax.optimization_barrier(kept).astype(jnp.float32)
    terms = [matrix.astype(jnp.float32) * features for matrix in matrices]
    if norm is None:
        return list(_sum_along_rows(terms))
    if is_small:  # each output sums the squares for itself: that costs less than to wait for another kernel
        *sums, squares = _sum_along_rows([*terms, jnp.broadcast_to(squares, terms[0].shape)])
    else:
        sums, squares = _sum_along_rows(terms), jnp.sum(squares)
    return [y * jax.lax.rsqrt(squares / x.size + norm.epsilon) for y in sums]


def _sum_along_rows(terms: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """As one operation: of several XLA would make several kernels, and of squares a sum that it makes once."""

    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return jax.lax.reduce(tuple(terms), (jnp.float32(0),) * len(terms), add, (1,))
