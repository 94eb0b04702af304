"""Rows of a bounded cache as caches of their own, and back: which axis of an array numbers them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Int32
from sepjax.config import ModelConfig
from sepjax.generation.cache import stored
from sepjax.generation.cache.stored import Vectors
from sepjax.sharding import constrain

BY_SET = ("scores", "kept_at")  # fields whose first axis is the sets that are kept, the second the batch


def empty(config: ModelConfig, shape: tuple[int, ...], cache_dtype: str) -> Vectors:
    """`stored.empty` of this shape [(L,) B, K, C, H], where it lies on a mesh."""
    return stored.in_each_array(lambda x: _placed(x, len(shape) - 4), stored.empty(config, shape, cache_dtype))


def one(cache: Any, i: Int32[Array, ""]) -> Any:
    """Row i."""
    return _on_rows(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, i, 1, axis), cache)


def with_one(cache: Any, i: Int32[Array, ""], row: Any) -> Any:
    """The cache with row i as `row`, a cache of one row, has it."""

    def put(x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, i, axis)

    return _on_rows(put, cache, row)


def some(cache: Any, rows: Int32[Array, "M"]) -> Any:
    """These rows; numbers of no row give any one's."""
    return _on_rows(lambda x, axis: jnp.take(x, rows, axis, mode="clip"), cache)


def with_some(cache: Any, rows: Int32[Array, "M"], few: Any) -> Any:
    """The cache with these rows as `few` has them; numbers of no row are none."""

    def put(x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        at = (slice(None), rows) if axis else rows
        return x.at[at].set(new, mode="drop", unique_indices=True)

    return _on_rows(put, cache, few)


def first_of(wanted: Bool[Array, "B"], most: int) -> Int32[jax.Array, "M"]:
    """Numbers of the first rows that are wanted, up to `most`; where there are fewer, numbers of no row."""
    B = len(wanted)
    rows = jnp.nonzero(wanted, size=min(B, most), fill_value=B)[0].astype(jnp.int32)
    return jnp.where(rows < B, rows, B + jnp.arange(len(rows), dtype=jnp.int32))


def chosen(wanted: Bool[Array, "B"], cache: Any, other: Any) -> Any:
    """The rows of `cache` that are wanted, and those of another one in place of the rest; also of several sizes."""

    def pick(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
        return jnp.where(wanted.reshape(*(1 for _ in range(axis)), -1, *(1 for _ in x.shape[axis + 1 :])), x, y)

    return _on_rows(pick, cache, other)


@dataclasses.dataclass
class InPlace:
    """What kernels have written into a cache's layers themselves, while a pass is traced.

    Layers that are traced one after the other, in the same trace, find here what those before them have left.
    """

    entries: dict[int, tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=dict)  # keys, values of layers

    def mended(self, which: int, layers: Any) -> Any:
        """Keys (0) or values (1) of all layers, of these layers as kernels have left them."""
        if not self.entries:
            return layers
        return tuple(self.entries[i][which] if i in self.entries else x for i, x in enumerate(layers))


def next_slots(cache: Any, num_tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each of the next tokens [B, T]: whether it is a sink; its slot of the ring; its slot."""
    i = jnp.arange(num_tokens, dtype=jnp.int32)
    sink, slot = cache.num_sinks[:, None] + i, (cache.next_recent[:, None] + i) % cache.sizes.ring
    is_sink = sink < cache.sizes.num_sinks
    return is_sink, slot, jnp.where(is_sink, sink, cache.sizes.num_sinks + cache.sizes.max_separators + slot)


def written(
    x: jax.Array,
    new: jax.Array,
    lead: tuple[slice, ...],
    rows: Int32[Array, "B 1"],
    slots: Int32[Array, "B T"],
    mode: str,
) -> jax.Array:
    """Keys, values or their scales [(L,) rows, K, C, (H)] with those of tokens [(L,) B, T, K, (H)] in these slots.

    `lead`: what stands before the rows in an index; `mode`: as `jax.numpy.ndarray.at` has it.
    """
    n = len(lead)
    by_head = jnp.swapaxes(new, n + 1, n + 2)
    if slots.size == 1:  # XLA would compare the slot with the end, in a kernel of its own for every layer
        x = jax.lax.dynamic_update_slice_in_dim(x, by_head, slots[0, 0], axis=n + 2)
    elif slots.shape[1] > 1:
        # Heads are indices, too, or XLA may turn the whole cache round, to have them behind the slots.
        at = rows[:, None], jnp.arange(x.shape[n + 1])[:, None], slots[:, None]
        x = x.at[*lead, *at].set(by_head, mode=mode, unique_indices=True)
    else:
        by_row = jnp.moveaxis(new, (n, n + 1), (0, 1))
        x = x.at[*lead, rows, :, slots].set(by_row, mode=mode, unique_indices=True)
    return _placed(x, n)


def _placed(x: jax.Array, layer_axes: int) -> jax.Array:
    """Keys, values or their scales [(L,) rows, K, C, (H)] where they lie on a mesh: heads split, where they divide.

    Left to the compiler, each program would leave them in another way, and the next one be compiled for each of these.
    """
    return constrain(x, *(None,) * (layer_axes + 1), "heads", *(None,) * (x.ndim - layer_axes - 2))


def _on_rows(f: Callable[..., jax.Array], cache: Any, *others: Any) -> Any:
    """`f` of every array (and of the others' same array) and the number of its axis B."""

    def on(path: tuple, x: jax.Array, *same: jax.Array) -> jax.Array:
        names = [getattr(step, "name", None) for step in path]
        at = next((i for i, name in enumerate(names) if name in ("k", "v")), None)
        # Keys and values lie stacked over layers, or as a tuple of them: then a place in it follows their name.
        is_stack = at is not None and not isinstance(next(iter(path[at + 1 :]), None), jax.tree_util.SequenceKey)
        stacked = is_stack or any(name in BY_SET for name in names)
        return f(x, *same, int(stacked))

    return jax.tree_util.tree_map_with_path(on, cache, *others)
