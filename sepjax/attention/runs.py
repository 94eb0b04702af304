"""Attention of a run of tokens a row over the slots of a cache and over one another: how prompts and streams are read.

    queries   [B, T, N, H]   the run's, turned to fit its own keys
    keys      [B, K, C, H]   in slots; those of the first may have to be turned to fit such queries, and [B, T, K, H]
    seen      of the slots what a mask says, of the run no later tokens than itself

Plain XLA is the definition and runs anywhere: scores of every query and key go through memory, some times. On a Hopper
GPU one kernel (`mosaic_gpu_run_kernels.py`) has them in registers, and passes by tiles of slots that no query sees.
"""

import dataclasses
import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.attention.decode import TILE, scores_of_run
from sepjax.attention.target import target

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
NOBODY, ALL = np.iinfo(np.int32).min, np.iinfo(np.int32).max  # numbers of keys that no query sees, and that all see
_TYPES = (jnp.bfloat16, jnp.float16)
_H100_SMS = 132  # where the device does not tell


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeenInRun:
    """Who sees what: for plain XLA, or, made by `seen_by_numbers`, for the kernel."""

    visible: Bool[jax.Array, "B T S"] | None  # of plain XLA: the C slots and the T tokens of the run
    numbers: Int32[jax.Array, "B S"] | None = None
    first: Int32[jax.Array, "B T"] | None = None
    order: Int32[jax.Array, "B X"] | None = None  # see `mosaic_gpu_run_kernels.RunBlocks`

    __no_type_check__ = True  # see `StreamingCache`

    @property
    def kernel(self) -> bool:
        """Whether the kernel runs."""
        return self.order is not None


def seen_by_numbers(
    numbers: Int32[Array, "B S"], first: Int32[Array, "B T"], places: Int32[Array, "B"] | None = None
) -> SeenInRun:
    """For the kernel, which serves what `sepjax.attention.decode.unsupported` has nothing against.

    A query sees the slots, and of the run the tokens up to itself, whose numbers are not below its own `first`: those
    with `NOBODY` are seen by none, those with `ALL` by all. `places`: in which row the slots of each are; None: in its
    own.
    """
    numbers, first = jnp.asarray(numbers), jnp.asarray(first)
    C = numbers.shape[1] - first.shape[1]
    tiles = numbers[:, :C].reshape(len(numbers), -1, TILE)
    lowest, highest = jnp.min(first, axis=1, keepdims=True), jnp.max(first, axis=1, keepdims=True)
    is_live, is_whole = jnp.max(tiles, axis=2) >= lowest, jnp.min(tiles, axis=2) >= highest
    kind = jnp.where(is_live, jnp.where(is_whole, 1, 0), 2)  # in this order; within it, as they lie
    order = jnp.argsort(kind, axis=1, stable=True)
    own_ends = jnp.min(numbers[:, C:], axis=1, keepdims=True) < highest
    counts = [jnp.sum(x, axis=1, keepdims=True) for x in (is_live, is_live & ~is_whole)]
    places = jnp.arange(len(numbers)) if places is None else jnp.asarray(places)
    order = jnp.concatenate([*counts, own_ends, places[:, None], order], axis=1).astype(jnp.int32)
    return SeenInRun(None, numbers, first, order)


def computes_in(dtype: DTypeLike) -> bool:
    """Whether the kernel serves queries of this type: of codes, whose own type does not tell it, not all."""
    return jnp.dtype(dtype) in _TYPES


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    k_slots: Float[Array, "R K C H"],
    v_slots: Float[Array, "R K C H"],
    seen: SeenInRun,
    turned: Float[Array, "B K A H"] | None = None,
) -> tuple[Float[jax.Array, "B T N H"], Float32[jax.Array, "B T N"]]:
    """The attention, computed in float32, and log-sum-exp float32; anything for queries that see nothing.

    Args:
      q: of the run; query heads go with their key heads in order.
      k: the run's keys, not in the cache yet; v: its values.
      k_slots: keys in slots; v_slots: values. R is B, but for the kernel, which finds a row's where it is told.
      seen: says whether the kernel runs.
      turned: keys of the first slots, in place of those in k_slots; for the kernel, of `whole_tiles` of them.
    """
    if seen.kernel:
        return _kernel(q, k, v, k_slots, v_slots, turned, seen)
    out, lse, _ = plainly(q, k, v, k_slots, v_slots, seen, turned)
    return out, lse


def plainly(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    k_slots: Float[Array, "B K C H"],
    v_slots: Float[Array, "B K C H"],
    seen: SeenInRun,
    turned: Float[Array, "B K A H"] | None = None,
) -> tuple[Float[jax.Array, "B T N H"], Float32[jax.Array, "B T N"], Float32[jax.Array, "B K G T S"]]:
    """`attend` in plain XLA, and the weights."""
    assert seen.visible is not None
    v = jnp.asarray(v)
    values = jnp.concatenate([v_slots, jnp.swapaxes(v, 1, 2)], axis=2)
    scores = _scores(q, k, k_slots, seen.visible, turned)
    weights = jax.nn.softmax(scores, axis=-1)
    out = _in_rows(_einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), values)).astype(v.dtype)
    return out, _in_rows(jax.nn.logsumexp(scores, axis=-1)), weights


def _scores(q: Any, k: Any, k_slots: Any, visible: Any, turned: Any) -> jax.Array:
    first = 0 if turned is None else turned.shape[2]
    parts = [] if turned is None else [jnp.asarray(turned)]
    keys = jnp.concatenate([*parts, k_slots[:, :, first:], jnp.swapaxes(k, 1, 2)], axis=2)
    return jnp.where(visible[:, None, None], scores_of_run(q, keys), -jnp.inf)


def weights_of(
    lse: Float32[Array, "B T N"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    k_slots: Float[Array, "B K C H"],
    seen: SeenInRun,
    turned: Float[Array, "B K A H"] | None = None,
) -> Float32[jax.Array, "B K G T S"]:
    """The weights of what `attend` gave with this log-sum-exp, in plain XLA, to which `seen` is told."""
    scores = _scores(q, k, k_slots, seen.visible, turned)
    return jnp.exp(scores - _by_key_head(lse, scores.shape[1]))


def _by_key_head(x: Float32[Array, "B T N"], num_kv_heads: int) -> Float32[jax.Array, "B K G T 1"]:
    return jnp.moveaxis(x.reshape(*x.shape[:2], num_kv_heads, -1), 1, 3)[..., None]


def joined(
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K A H"],
    v: Float[Array, "B K A H"],
    visible: Bool[Array, "B #T A"],
) -> Float[jax.Array, "B T N H"]:
    """One softmax over what `attend` gave and a few keys more, towards which queries have turned otherwise."""
    scores = jnp.where(visible[:, None, None], scores_of_run(q, k), -jnp.inf)
    more = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    of_those = _by_key_head(lse, scores.shape[1])
    whole = jnp.logaddexp(of_those, more)
    few = _einsum("BKGTS,BKSH->BKGTH", jnp.exp(scores - whole).astype(v.dtype), v)
    return (jnp.asarray(out) * _in_rows(jnp.exp(of_those - whole)) + _in_rows(few)).astype(v.dtype)


def whole_tiles(slots: int) -> int:
    """How many first slots `attend` takes turned, if so many are."""
    return -(-slots // TILE) * TILE


def _in_rows(x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] as [B, T, N, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@jax.jit  # one for all layers: its lowering takes seconds
def _kernel(q: Any, k: Any, v: Any, k_slots: Any, v_slots: Any, turned: Any, seen: SeenInRun) -> Any:
    kernels = importlib.import_module("sepjax.attention.mosaic_gpu_kernels")
    blocks = importlib.import_module("sepjax.attention.mosaic_gpu_run_kernels").RunBlocks
    tiles_of = importlib.import_module("sepjax.attention.mosaic_gpu").forward_tiles
    (B, T, N, H), K, C = q.shape, k.shape[2], k_slots.shape[2]
    q, k, v = (_filled(x, -T % kernels.ALIGNMENT, 0) for x in (q, k, v))
    sms = target().num_cores or _H100_SMS
    shape = kernels.Shape(B, q.shape[1], N, K, H, C, q.shape[1], q.dtype, H**-0.5, sms)
    assert seen.numbers is not None and seen.first is not None  # noqa: PT018
    more = shape.padded - T
    numbers, first = _filled(seen.numbers, more, NOBODY), _filled(seen.first, more, ALL)
    of_queries = jnp.stack([first, jnp.broadcast_to(jnp.arange(1, shape.padded + 1), first.shape)], axis=1)
    beside = () if turned is None else (turned,)
    out, lse = kernels.forward(shape, tiles_of(shape), blocks)(
        q, k, v, k_slots, v_slots, *beside, numbers, of_queries, seen.order
    )
    return out[:, :T], jnp.swapaxes(lse[:, :, :T], 1, 2) * math.log(2)


def _filled(x: jax.Array, more: int, fill: int) -> jax.Array:
    """With so many more entries of the second axis."""
    return jnp.pad(x, [(0, more) if axis == 1 else (0, 0) for axis in range(x.ndim)], constant_values=fill)
