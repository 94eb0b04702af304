"""Parameters as generation and scoring want them: converted once, not in every step."""

import functools

import jax
import jax.numpy as jnp

from sepjax.config import ModelConfig
from sepjax.model.transformer import Params


def working_copy(params: Params, config: ModelConfig) -> Params:
    """The matrices in the type of the matmuls; vectors (norms and biases) and a gate stay float32, as they are used.

    The results are those of the parameters themselves, bit for bit: layers convert a matrix before they use it.
    Parameters that have their type already are returned as they are.
    """
    dtype = jnp.dtype(config.dtype)
    return params if all(x.dtype == dtype for x in jax.tree.leaves(params)) else _convert(params, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _convert(params: Params, dtype: jnp.dtype) -> Params:
    def convert(path: tuple, x: jax.Array) -> jax.Array:
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        is_vector = x.ndim - stacked < 2 or getattr(path[-1], "key", None) == "bias"
        is_gate = getattr(path[0], "key", None) == "gate"  # small, and half of it computes in float32
        return x if is_vector or is_gate else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, params)
