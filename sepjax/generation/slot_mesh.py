"""Where the arrays of slots lie on a mesh: keys and values by heads over `tensor`, all others whole on every device.

Left to the compiler, each program would leave them in another way, and the next one be compiled for each of these.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def spread[T](tree: T) -> T:
    """Fresh arrays of rows, put there; without a mesh as they are."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree

    def put(path: Any, x: jax.Array) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, _spec(path, x, mesh.shape)))

    return jax.tree_util.tree_map_with_path(put, tree)


def kept_there[T](tree: T) -> T:
    """What a program gives, told to lie there; without a mesh as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def tell(path: Any, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, _spec(path, x, mesh.shape))

    return jax.tree_util.tree_map_with_path(tell, tree)


def _spec(path: Any, x: jax.Array, ways: Any) -> P:
    """Of a leaf of a cache's `k` or `v` ([B, K, ...], codes and their scales too), or of any other."""
    is_entry = any(getattr(key, "name", "") in ("k", "v") for key in path)
    return P(None, "tensor") if is_entry and x.ndim > 1 and x.shape[1] % ways["tensor"] == 0 else P()
