"""Where rows of bounded caches lie on a mesh: keys and values by heads over `tensor`, all others whole on every device.

Left to the compiler, each program would leave them in another way, and the next one be compiled for each of these.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def spread[T](tree: T) -> T:
    """Fresh arrays of rows, put there; without a mesh as they are."""
    return _with_shardings(jax.device_put, tree)


def spread_shapes[T](tree: T) -> T:
    """Shapes of arrays that `spread` puts there, for a program that is compiled before there are any."""
    return _with_shardings(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _with_shardings[T](f: Any, tree: T) -> T:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    return jax.tree_util.tree_map_with_path(lambda path, x: f(x, NamedSharding(mesh, _spec(path, x, mesh.shape))), tree)


def kept_there[T](tree: T) -> T:
    """What a program gives, told to lie there; without a mesh as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def tell(path: Any, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, _spec(path, x, mesh.shape))

    return jax.tree_util.tree_map_with_path(tell, tree)


def _spec(path: Any, x: Any, ways: Any) -> P:
    """Of a leaf of a cache's `k` or `v` ([B, K, ...] of each layer or [L, B, K, ...]; codes, scales), or of another."""
    at = next((i for i, key in enumerate(path) if getattr(key, "name", "") in ("k", "v")), None)
    if at is None or x.ndim < 2:
        return P()
    heads = 1 if isinstance(next(iter(path[at + 1 :]), None), jax.tree_util.SequenceKey) else 2
    return P(*(None,) * heads, "tensor") if x.shape[heads] % ways["tensor"] == 0 else P()
