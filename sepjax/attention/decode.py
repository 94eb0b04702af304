"""Attention of one new token a row over the slots of a cache: what every decoding step does in every layer.

    queries   [B, K, Z, G, H]   G query heads of a key head, turned to fit the keys of each of Z zones of slots
    cache     [B, K, C, H]      keys and values in slots, of which each row sees some; the token sees itself, too
    zones     slots [0, ends[0]), [ends[0], ends[1]), ... [ends[-1], C)

Plain XLA is the definition and runs anywhere. On a Hopper GPU one kernel (`mosaic_gpu_decode_kernels.py`) reads each
key and value once, of those tiles of slots alone in which the row sees something.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float32

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.attention.packing import unserved
from sepjax.attention.target import target

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_PLAIN = ("xla", "reference", "tpu")  # implementations of `separator_attention` by whose names decoding is plain XLA
_H100_SMS = 132  # where the device does not tell
TILE = 64  # slots that the kernel reads at a time: the rows of one product
_STAGES = {64: 4, 128: 3, 256: 2}  # by head size, tiles of keys and of values in shared memory
_BLOCKS = 2  # of the kernel that an SM takes at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Which slots each row sees. Made by `seen_slots`, once for all layers that see the same."""

    visible: Bool[jax.Array, "B C"]
    bias: Float32[jax.Array, "B C"] | None  # of the kernel: 0 where a slot is visible, else -inf
    live: Int32[jax.Array, "B X"] | None  # how many tiles have a visible slot, and their numbers

    __no_type_check__ = True  # see `StreamingCache`


def unsupported(
    dtype: DTypeLike, head_dim: int, slots: int, implementation: str | None = None, *, wants_weights: bool = False
) -> str | None:
    """Why the kernel cannot serve a decoding step on the device that is traced for, or None when it can.

    Args:
      dtype: of the cache.
      head_dim: H.
      slots: C.
      implementation: what the config names for `separator_attention`. A decoding step has two forms: the plain ones'
        names ("xla", "reference", "tpu") mean the plain one here, others and None the kernel where it can serve.
      wants_weights: whether the weights are asked for, which the kernel never has.
    """
    if implementation in _PLAIN:
        return f"attention.implementation={implementation!r} asks for plain XLA"
    device = target()
    if device.capability != "9.0":
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), the device is {device}"
    if jax.sharding.get_abstract_mesh().size > 1:
        return "it runs on one device, the mesh has several"
    if wants_weights:
        return "it has no weights to give, and watched tokens are kept by them"
    if not slots or slots % TILE:
        return f"it reads {TILE} slots at a time, the cache has {slots}"
    return unserved(jnp.dtype(dtype), head_dim, (jnp.bfloat16, jnp.float16))


def seen_slots(visible: Bool[Array, "B C"], *, kernel: bool) -> Seen:
    """What `attend` is told of who sees what; `kernel`: for the kernel (`unsupported`), otherwise for plain XLA."""
    visible = jnp.asarray(visible)
    if not kernel:
        return Seen(visible, None, None)
    is_live = jnp.any(visible.reshape(len(visible), -1, TILE), axis=-1)
    order = jnp.argsort(~is_live, axis=-1, stable=True).astype(jnp.int32)
    count = jnp.sum(is_live, axis=-1, keepdims=True, dtype=jnp.int32)
    return Seen(visible, jnp.where(visible, 0.0, -jnp.inf), jnp.concatenate([count, order], axis=1))


def attend(
    queries: Float[Array, "B K Z G H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    k_cache: Float[Array, "B K C H"],
    v_cache: Float[Array, "B K C H"],
    seen: Seen,
    ends: tuple[int, ...] = (),
    scales: tuple[Float[Array, "B K C"], Float[Array, "B K C"]] | None = None,
) -> Float[jax.Array, "B K G H"]:
    """The attention, in v's dtype, computed in float32.

    Args:
      queries: those of each zone, the last zone's fit `k`.
      k: the token's own key; v: its value. They are not in the cache yet.
      k_cache: keys in slots; v_cache: values.
      seen: of `seen_slots`, which says whether the kernel runs.
      ends: where the zones but the last end.
      scales: by which keys and values in slots are to be multiplied, for plain XLA alone; None: they are as they are.
    """
    if seen.bias is None or seen.live is None:
        return with_weights(queries, k, v, k_cache, v_cache, seen, ends, scales)[0]
    assert scales is None  # `unsupported` for whole numbers
    return _kernel(queries, k, v, k_cache, v_cache, seen.bias, seen.live, ends=ends)


def with_weights(
    queries: Float[Array, "B K Z G H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    k_cache: Float[Array, "B K C H"],
    v_cache: Float[Array, "B K C H"],
    seen: Seen,
    ends: tuple[int, ...] = (),
    scales: tuple[Float[Array, "B K C"], Float[Array, "B K C"]] | None = None,
) -> tuple[Float[jax.Array, "B K G H"], Float32[jax.Array, "B K G C"]]:
    """`attend` in plain XLA, and the weights of the slots. All zones are rows of one product, which cost nothing."""
    of_keys, of_values = (None, None) if scales is None else (x.astype(jnp.float32)[:, :, None] for x in scales)
    scores = _einsum("BKZGH,BKCH->BKZGC", queries, k_cache)
    scores = scores if of_keys is None else scores * of_keys[:, :, None]
    bounds = [0, *ends, k_cache.shape[2]]
    parts = [scores[:, :, z, :, bounds[z] : bounds[z + 1]] for z in range(len(ends) + 1)]
    scores = jnp.where(seen.visible[:, None, None], jnp.concatenate(parts, axis=-1), -jnp.inf)
    own = _einsum("BKGH,BKH->BKG", queries[:, :, -1], k)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1) * k.shape[-1] ** -0.5, axis=-1)
    shares = weights[..., :-1] if of_values is None else weights[..., :-1] * of_values
    out = _einsum("BKGC,BKCH->BKGH", shares.astype(v.dtype), v_cache)
    out += weights[..., -1:] * v[:, :, None]
    return out.astype(v.dtype), weights[..., :-1]


def _splits(blocks: int, tiles: int) -> int:
    """How many blocks share the slots of a row's key head, so that all SMs have some."""
    wanted = -(-_BLOCKS * (target().num_cores or _H100_SMS) // blocks)
    return max(1, min(wanted, tiles // 2))


@functools.partial(jax.jit, static_argnames="ends")  # one program for all layers: its lowering takes seconds
def _kernel(
    queries: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, bias: Any, live: Any, *, ends: tuple[int, ...]
) -> jax.Array:
    module = importlib.import_module("sepjax.attention.mosaic_gpu_decode_kernels")
    (B, K, _, G, H), C = queries.shape, k_cache.shape[2]
    splits = _splits(B * K, live.shape[1] - 1)
    shape = module.Shape(B, K, G, H, C, ends, jnp.dtype(v.dtype), H**-0.5, TILE, _STAGES[H], splits)
    return module.run(shape, queries, k, v, k_cache, v_cache, bias, live)
