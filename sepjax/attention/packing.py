"""What every packed implementation does around its kernel: room for all global keys, and their gradients' way back."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sepjax.layout import SeparatorLayout


def with_room[R](layout: SeparatorLayout, run: Callable[[SeparatorLayout], R]) -> R:
    """`run` on a layout whose packed array holds every global key: the one given, or one with room for all T."""
    if layout.capacity >= layout.length:
        return run(layout)
    return lax.cond(layout.overflows(), lambda: run(layout.with_capacity(layout.length)), lambda: run(layout))


def unpack(packed: jax.Array, layout: SeparatorLayout, axis: int) -> jax.Array:
    """[..., S, ...] of packed keys -> [..., T, ...] of tokens, 0 where a token is no global key; B is the first axis.

    Every global key reads its packed slot: a gather, so nothing depends on the order of additions.
    """
    other = [d for d in range(packed.ndim) if d not in (0, axis)]
    rank = jnp.expand_dims(jnp.maximum(layout.global_count - 1, 0), other)
    is_global = jnp.expand_dims(layout.is_global(), other)
    return jnp.where(is_global, jnp.take_along_axis(packed, rank, axis=axis), jnp.zeros((), packed.dtype))


def vary_alike[Tree](tree: Tree) -> Tree:
    """Inside `jax.shard_map`, marks every array as varying over the mesh axes that any of them varies over."""
    varying = [jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)]
    axes = frozenset().union(*varying)

    def cast(x):
        missing = tuple(axes - jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
