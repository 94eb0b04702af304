"""The kernel as an operation of JAX."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.interpreters import mlir
from jaxlib.mlir import ir

from sepjax.model.one_row.kernel import Kernel
from sepjax.model.one_row.shape import ENTRIES, THREADS, Shape
from sepjax.model.one_row.warps import Warps

type Layer = tuple[Any, ...]  # matrices of q, k, v; output; gate with up; down; both norms' weights


@functools.lru_cache(maxsize=8)
def _kernel(shape: Shape) -> Any:
    L, D, K, C, H = shape.L, shape.D, shape.K, shape.C, shape.H

    def s(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    numbers = functools.partial(s, dtype=jnp.float32)
    layer = (
        s((shape.N + 2 * K) * H, D), s(D, shape.N * H), s(2 * shape.F, D), s(D, shape.F), numbers(D), numbers(D),
    )  # fmt: skip
    table = numbers(shape.zones, H // 2)
    told = table, table, numbers(C), s(C // 64 + 1, dtype=jnp.int32), s(1, dtype=jnp.int32)
    caches = (s(K, C, H),) * (2 * L)
    packets = s(shape.packets_at["end"] // 4, dtype=jnp.int32)

    def body(_: Any, *refs: Any) -> None:
        *refs, (memory,) = refs
        given, rest = refs[: 6 * L], refs[6 * L :]
        told, entries, others = rest[:5], rest[5 : 5 + 2 * L], rest[5 + 2 * L :]
        arrays = []
        for i in range(L):
            pair = entries[i], entries[L + i]
            arrays += [*given[6 * i : 6 * i + 6], *pair, *pair]
        assert len(arrays) == ENTRIES * L
        Kernel(shape, Warps([*arrays, *told, *others], memory), (C * H, H)).run()

    size = shape.shared_at["end"] + shape.stages * shape.stage
    with mlir.make_ir_context(), ir.Location.unknown():
        return mosaic_gpu.as_gpu_kernel(
            body, (shape.blocks, 1, 1), (THREADS + 32, 1, 1), (*layer * L, *told), s(D // 2, dtype=jnp.int32),
            (jax.ShapeDtypeStruct((size,), jnp.int8),), module_name="one_row", inout_shape=(*caches, packets),
        )  # fmt: skip


def run(
    shape: Shape, layers: Sequence[Layer], x: jax.Array, told: Sequence[jax.Array], k: Sequence[jax.Array],
    v: Sequence[jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:  # fmt: skip
    """What leaves the last layer, and the caches with the token.

    Args:
      shape: what it is made for.
      layers: of each layer its six arrays.
      x: bfloat16[D], what enters the first.
      told: cosine and sine [Z, H/2] of the zones, the bias [C] and the tiles of `decode.Seen`, and the token's slot.
      k: of each layer [K, C, H]; v: the same.
    """
    L, n = shape.L, shape.packets_at["end"] // 4 - x.size
    pairs = jax.lax.bitcast_convert_type(x.reshape(-1, 2), jnp.int32)
    first = jnp.stack([pairs, jnp.ones_like(pairs)], axis=1).reshape(-1)
    packets = jnp.concatenate([first, jnp.zeros(n, jnp.int32)])
    found = _kernel(shape)(*(y for layer in layers for y in layer), *told, *k, *v, packets)
    out, *caches = found
    hidden = jax.lax.bitcast_convert_type(out, jnp.bfloat16).reshape(-1)
    return hidden, tuple(caches[:L]), tuple(caches[L : 2 * L])
