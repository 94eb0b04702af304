"""Examples alone, and `jax.vmap` over them: their rows become rows of one batch, which is what kernels are made for.

Left to itself, vmap would give every loop of a kernel one more axis, run both branches of each `cond`, and stop at
Mosaic GPU's kernels, for which JAX has no rule. These rules stand inside `custom_vjp`, around its forward and its
backward function, since JAX takes no gradient through them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Bool

from sepjax.array_typing import Array


def over_examples(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, whose arguments and results are arrays with rows as first axis; under vmap it runs once on all rows.

    `f` treats rows alike: what it says of one does not depend on the others. Arguments that all examples share are
    repeated. It may be closed over what is no array.
    """
    folded = custom_vmap(f)

    def rule(axis_size: int, is_batched: list[Any], *arrays: Any) -> tuple[Any, Any]:
        def fold(x, batched):
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        rows = jax.tree.map(fold, arrays, tuple(is_batched))
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), folded(*rows))
        return out, jax.tree.map(lambda _: True, out)

    folded.def_vmap(rule)
    return folded


@custom_vmap
def in_any_example(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """`flag`; under vmap whether it is true in any example, so that a `cond` on it runs one branch for all of them."""
    return flag


@in_any_example.def_vmap
def _in_any_example(axis_size: int, is_batched: list[bool], flags: Array) -> tuple[Array, bool]:
    return in_any_example(jnp.any(flags, axis=0) if is_batched[0] else flags), False


def alone(example: Any) -> Any:
    """The arrays of one example as a batch of one row."""
    return jax.tree.map(lambda x: x[None], example)


def first(batch: Any) -> Any:
    """The arrays of the first row: `alone`, undone."""
    return jax.tree.map(lambda x: x[0], batch)
