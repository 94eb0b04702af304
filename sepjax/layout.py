"""SeparatorLayout: the definition of who attends to whom.

A token i sees token j of its own document when

    j <= i  and  ( is_separator[j]  or  position[j] < num_sinks  or  i - j <= n - 1 )

(arXiv 2412.12094, section 3; n counts the query itself). The keys that stay visible for ever, sinks and separators, are
the *global* keys. Pack them, in order, into one dense array, and every query sees two contiguous ranges:

    tokens        0 1 2 3 4 5 6 7 8 9 ...          G = global key
                  G . . G . G . . G .
    packed        0     1   2     3                token 9 with n = 3 sees
                  [far: 0 1 2      )[near: 7 8 9]  packed 0..2 and tokens 7..9; token 8 is packed 3, but near

    far range     [far_start_i, far_end_i)   packed indices: first global key of i's document, number of global keys at
                                             positions <= i - n
    near range    [near_start_i, i]          near_start_i = max(document start, i - n + 1)

No key is in both, so one online softmax runs over the two. Dense (n >= T), StreamingLLM's mask (no separators), FixLLM
(every delta-th token) and per-layer windows are layouts too: the same arrays with other numbers in them. So is a layer
that sees no further than its model's own sliding window, whatever is kept: its far_start_i is at least the number of
global keys at positions <= i - reach.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float, Int32

from sepjax.array_typing import Array
from sepjax.config import UserError

# Called outside jit, one program in place of dozens of single operations to compile; within jit nothing else.
_at_once = functools.partial(jax.jit, inline=True)


class LayoutError(UserError, ValueError):
    """Arrays that do not make a layout, or queries and keys that do not fit one."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SeparatorLayout:
    """Visible ranges of every query, computed once per batch in O(T) and shared by all heads and layers.

    Made by `build_layout`; that of one example alone has no axis B, and `jax.vmap` over examples gives it one.
    `far_start`, `far_end` and `near_start` never decrease along a row. A padding token i has the empty ranges
    far_start = far_end and near_start = i + 1: it sees nothing and nothing sees it.
    """

    global_index: Int32[Array, "*B S"]  # token position of each packed key, increasing; T where the row has no more
    num_global: Int32[Array, "*B"]  # global keys of the row; above S the packed array is incomplete (see `overflows`)
    global_count: Int32[Array, "*B T"]  # global keys at positions <= i
    document_start: Int32[Array, "*B T"]  # first token of i's document
    far_start: Int32[Array, "*B T"]
    far_end: Int32[Array, "*B T"]
    near_start: Int32[Array, "*B T"]

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True

    def __repr__(self) -> str:
        shape = f"T={self.length}" if self.far_start.ndim == 1 else f"{list(self.far_start.shape)}"
        return f"SeparatorLayout({shape}, room for {self.capacity} packed keys)"

    @property
    def length(self) -> int:
        """T, the tokens of a row."""
        return self.far_start.shape[-1]

    @property
    def capacity(self) -> int:
        """S, the packed keys that a row has room for."""
        return self.global_index.shape[-1]

    def with_window(self, window_size: int | Int32[Array, ""]) -> "SeparatorLayout":
        """The same documents, sinks and separators seen through another window n >= 1, which may be traced.

        Of a layout of `with_most_far` too, all global keys are seen again.
        """
        return _with_window(self, _checked_window(window_size, self.length))

    def with_most_far(self, count: int | Int32[Array, ""]) -> "SeparatorLayout":
        """Each query sees far away only so many of its document's global keys, the first ones; it may be traced.

        With the number of sinks, it sees sinks and window and nothing else that is kept.
        """
        return dataclasses.replace(self, far_end=jnp.minimum(self.far_end, self.far_start + count))

    def with_reach(self, reach: int | Int32[Array, ""]) -> "SeparatorLayout":
        """Each query sees no further back than so many keys, global ones included: i - j < reach; it may be traced.

        For a window n <= reach. It only shrinks what is seen; `with_most_far` comes before it, not behind.
        """
        return _with_reach(self, _checked_window(reach, self.length))

    def with_capacity(self, capacity: int) -> "SeparatorLayout":
        """The same layout with room for `capacity` packed keys."""
        return dataclasses.replace(self, global_index=_pack(self.global_count, capacity))

    def overflows(self) -> Bool[Array, ""]:
        """Whether some row has more global keys than the packed array has room for."""
        return jnp.any(self.num_global > self.capacity)

    def is_global(self) -> Bool[Array, "*B T"]:
        """Which tokens are global keys: sinks and separators that are not padding."""
        return jnp.diff(self.global_count, axis=-1, prepend=0) > 0

    @_at_once
    def as_mask(self) -> Bool[Array, "*B T T"]:
        """The mask [b, i, j], true where query i sees key j. For tests, pictures and small T: it is quadratic."""
        far, near = self.as_masks()
        return far | near

    def as_masks(self) -> tuple[Bool[Array, "*B T T"], Bool[Array, "*B T T"]]:
        """`as_mask` in two parts without a common key: seen far, as a packed key, and seen near, in the window."""
        j = jnp.arange(self.length, dtype=jnp.int32)
        rank = self.global_count[..., None, :] - 1  # packed index of key j, where it is global
        far = self.is_global()[..., None, :] & (self.far_start[..., None] <= rank) & (rank < self.far_end[..., None])
        near = (self.near_start[..., None] <= j) & (j <= j[:, None])
        return far, near

    def keys_per_query(self) -> Int32[Array, "*B T"]:
        """Number of keys that each query sees; 0 for padding."""
        i = jnp.arange(self.length, dtype=jnp.int32)
        return (self.far_end - self.far_start) + (i - self.near_start + 1)

    def num_pairs(self) -> Array:
        """Visible (query, key) pairs of each row, [B].

        int64 NumPy when called outside jit. Inside, int32 up to T = 65535 and float32 beyond, where counts pass 2^31.
        """
        keys = self.keys_per_query()
        if not isinstance(keys, Tracer):
            return np.asarray(np.asarray(keys).sum(axis=-1, dtype=np.int64))
        return jnp.sum(keys, axis=-1, dtype=jnp.int32 if self.length < 2**16 else jnp.float32)

    def attention_fraction(self) -> Float[Array, ""]:
        """Visible pairs over the causal pairs of the same documents, over all rows."""
        i = jnp.arange(self.length, dtype=jnp.int32)
        causal = jnp.where(self.near_start <= i, i - self.document_start + 1, 0)
        visible = jnp.sum(self.keys_per_query(), dtype=jnp.float32)
        return visible / jnp.maximum(jnp.sum(causal, dtype=jnp.float32), 1.0)

    def kv_kept(self) -> Float[Array, ""]:
        """The paper's r.KV: keys that each document's last query sees over the document's length, averaged."""
        i = jnp.arange(self.length, dtype=jnp.int32)
        is_token = self.near_start <= i
        next_start = jnp.roll(jnp.where(is_token, self.document_start, i), -1, axis=-1).at[..., -1].set(self.length)
        is_last = is_token & (next_start != self.document_start)
        kept = self.keys_per_query() / (i - self.document_start + 1)
        return jnp.sum(jnp.where(is_last, kept, 0.0)) / jnp.maximum(jnp.sum(is_last), 1)


def build_layout(
    is_separator: Bool[Array, "*B T"],
    *,
    window_size: int | Int32[Array, ""],
    num_sinks: int,
    segment_ids: Int32[Array, "*B T"] | None = None,
    capacity: int | None = None,
    document_mask: bool = True,
) -> SeparatorLayout:
    """Builds the layout of packed rows, or of one example alone. Pure; may be jitted and vmapped.

    Args:
      is_separator: bool[B, T] or bool[T], tokens that stay visible forever. Flags on padding are ignored.
      window_size: n >= 1, keys of the local window, the query itself included; n >= T is dense causal attention.
        It may be traced.
      num_sinks: a >= 0, first tokens of every document, which stay visible forever.
      segment_ids: int32 of is_separator's shape, 0 for padding; a document is a run of equal ids other than 0. None: a
        row is a document.
      capacity: S, room for packed keys; None: T, which cannot overflow. Outside jit and vmap, a row with more global
        keys raises; inside, `separator_attention` computes such batches exactly, with room for T.
      document_mask: False gives the official code's row-wise behaviour: all documents of a row are one, and only
        leading padding shifts the sinks; padding elsewhere counts as text.

    Raises:
      LayoutError: a ValueError, for shapes or dtypes that do not fit, T = 0, n < 1, a < 0, S < 0, or (outside jit and
        vmap) too small a capacity.
    """
    _check_arrays(is_separator, segment_ids)
    T = is_separator.shape[-1]
    window_size = _checked_window(window_size, T)
    if num_sinks < 0:
        raise LayoutError(f"num_sinks={num_sinks} must be 0 or more")
    if capacity is not None and capacity < 0:
        raise LayoutError(f"capacity={capacity} must be 0 or more; leave it out for one that cannot overflow")

    room = T if capacity is None else capacity
    layout = _build(is_separator, segment_ids, window_size, min(num_sinks, T), capacity=room, rows=not document_mask)
    if capacity is not None:
        _refuse_overflow(layout)
    return layout


def _check_arrays(is_separator: Array, segment_ids: Array | None) -> None:
    def said(x):
        return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"a {type(x).__name__}"

    shape = tuple(getattr(is_separator, "shape", ()))
    if said(is_separator)[:4] != "bool" or len(shape) not in (1, 2) or 0 in shape[-1:]:
        raise LayoutError(
            f"is_separator must be bool[B, T], or bool[T] of one example, with T >= 1, got {said(is_separator)}; "
            "flags of tokens are table[tokens] with the table of sepjax.separators.separator_table"
        )
    if segment_ids is not None and (getattr(segment_ids, "dtype", None) != np.int32 or segment_ids.shape != shape):
        raise LayoutError(
            f"segment_ids must be int32{list(shape)}, of is_separator's shape, got {said(segment_ids)}; they number "
            "the documents of a row, with 0 for padding: np.asarray(segment_ids, np.int32) makes them of other integers"
        )


@functools.partial(_at_once, static_argnames=("capacity", "rows"))
def _build(
    is_separator: Bool[Array, "*B T"],
    segment_ids: Int32[Array, "*B T"] | None,
    window_size: int | Int32[Array, ""],
    num_sinks: int | Int32[Array, ""],
    *,
    capacity: int,
    rows: bool,
) -> SeparatorLayout:
    """`build_layout` of checked arguments; `rows`: all documents of a row are one."""
    if is_separator.ndim == 1:
        one = jax.tree.map(lambda x: x[None], (is_separator, segment_ids))
        return jax.tree.map(lambda x: x[0], _build(*one, window_size, num_sinks, capacity=capacity, rows=rows))
    B, T = is_separator.shape
    i = jnp.arange(T, dtype=jnp.int32)
    is_token, starts = _documents(segment_ids, B, T, rows)
    document_start = jax.lax.cummax(jnp.where(starts, i, 0), axis=1)
    is_global = is_token & (jnp.asarray(is_separator) | (i - document_start < num_sinks))
    global_count = jnp.cumsum(is_global, axis=1, dtype=jnp.int32)
    layout = SeparatorLayout(
        global_index=_pack(global_count, capacity),
        num_global=global_count[:, -1],
        global_count=global_count,
        document_start=document_start,
        far_start=jnp.where(is_token, _count_up_to(global_count, document_start - 1), global_count),
        far_end=global_count,
        near_start=jnp.where(is_token, document_start, i + 1),
    )
    return _with_window(layout, window_size)


@_at_once
def _with_window(layout: SeparatorLayout, window_size: int | Int32[Array, ""]) -> SeparatorLayout:
    i = jnp.arange(layout.length, dtype=jnp.int32)
    is_token = layout.near_start <= i
    near_start = jnp.maximum(layout.document_start, i - window_size + 1)
    far_end = jnp.maximum(layout.far_start, _count_up_to(layout.global_count, i - window_size))
    return dataclasses.replace(
        layout,
        far_end=jnp.where(is_token, far_end, layout.far_start),
        near_start=jnp.where(is_token, near_start, i + 1),
    )


@_at_once
def _with_reach(layout: SeparatorLayout, reach: int | Int32[Array, ""]) -> SeparatorLayout:
    """The far range without keys at positions <= i - reach."""
    out_of_reach = _count_up_to(layout.global_count, jnp.arange(layout.length, dtype=jnp.int32) - reach)
    far_start = jnp.maximum(layout.far_start, jnp.minimum(out_of_reach, layout.far_end))
    return dataclasses.replace(layout, far_start=far_start)


def _checked_window(window_size: int | Int32[Array, ""], length: int) -> int | Int32[Array, ""]:
    """n >= 1. A plain number is cut to T, which says the same and fits int32 whatever was meant by "no window"."""
    if isinstance(window_size, Tracer):
        return window_size
    if int(window_size) < 1:
        raise LayoutError(f"window_size={window_size} must be 1 or more: the query itself is part of its window")
    return min(int(window_size), length)


def _documents(segment_ids: Int32[Array, "B T"] | None, B: int, T: int, rows: bool) -> tuple[jax.Array, jax.Array]:
    """Which positions hold tokens, and which of them start a document."""
    if segment_ids is None:
        is_token = jnp.ones((B, T), bool)
        return is_token, is_token & (jnp.arange(T) == 0)
    segment_ids = jnp.asarray(segment_ids)
    if rows:
        segment_ids = jax.lax.cummax((segment_ids != 0).astype(jnp.int32), axis=1)
    previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :T]
    is_token = segment_ids != 0
    return is_token, is_token & (segment_ids != previous)


def _count_up_to(global_count: Array, position: jax.Array) -> jax.Array:
    """global_count at `position`, [T] or [B, T]; 0 before the row starts."""
    position = jnp.broadcast_to(position, global_count.shape)
    count = jnp.take_along_axis(global_count, jnp.maximum(position, 0), axis=-1)
    return jnp.where(position < 0, 0, count)


def _pack(global_count: Array, capacity: int) -> jax.Array:
    """Positions of the first `capacity` global keys of each row, then T."""
    if global_count.ndim == 1:
        return _pack(global_count[None], capacity)[0]
    B, T = global_count.shape
    is_global = jnp.diff(global_count, axis=1, prepend=0) > 0
    slot = jnp.where(is_global, global_count - 1, capacity)  # beyond the end: dropped
    index = jnp.full((B, capacity), T, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return index.at[jnp.arange(B)[:, None], slot].set(positions, mode="drop")


def _refuse_overflow(layout: SeparatorLayout) -> None:
    if isinstance(layout.num_global, Tracer):
        return
    most = int(jnp.max(layout.num_global, initial=0))
    if most > layout.capacity:
        raise LayoutError(
            f"a row has {most} sinks and separators but capacity={layout.capacity}; raise capacity to {most} or more, "
            "or leave it out for one that cannot overflow"
        )
