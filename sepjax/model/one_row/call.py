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
from sepjax.model.one_row.shape import THREADS, Shape
from sepjax.model.one_row.warps import Warps

type Layer = tuple[Any, ...]


def arrays_of(shape: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A layer's: matrices of q, k, v; output; gate with up; down; both norms' weights; of codes also their scales."""
    D, F, outputs = shape.D, shape.F, (shape.N + 2 * shape.K) * shape.H
    sizes = (outputs, D), (D, shape.N * shape.H), (2 * F, D), (D, F)
    matrices = [jax.ShapeDtypeStruct(x, jnp.int8 if shape.codes else jnp.bfloat16) for x in sizes]
    vectors = [D, D, *([x[0] for x in sizes] if shape.codes else [])]
    return *matrices, *(jax.ShapeDtypeStruct((x,), jnp.float32) for x in vectors)


@functools.lru_cache(maxsize=8)
def _kernel(shape: Shape) -> Any:
    L, D, K, C, H = shape.L, shape.D, shape.K, shape.C, shape.H

    def s(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    numbers = functools.partial(s, dtype=jnp.float32)
    layer = arrays_of(shape)
    table = numbers(shape.zones, H // 2)
    told = table, table, numbers(C), s(1, dtype=jnp.int32), numbers(D)
    entries = (s(L, K, C, H),) * 2 if shape.stacked else (s(K, C, H),) * (2 * L)
    packets = s(shape.packets_at["end"] // 4, dtype=jnp.int32)
    out: Any = s(D // 2, dtype=jnp.int32)

    def body(_: Any, *refs: Any) -> None:
        *given, (memory,) = refs
        each = len(layer)
        given, told, rest = given[: each * L], given[each * L : each * L + 5], given[each * L + 5 :]
        if shape.stacked:
            (k, v, packets, out), new = rest[:4], rest[4:]
            of_layer = K * C * H * 2
            entries: list[Any] = [
                ((k, i * of_layer), (v, i * of_layer), *((x, i * K * H * 2) for x in new)) for i in range(L)
            ]  # fmt: skip
        else:
            *caches, packets, out = rest
            entries = [(caches[i], caches[L + i], caches[i], caches[L + i]) for i in range(L)]
        arrays = [x for i in range(L) for x in (*given[each * i : each * (i + 1)], *entries[i])]
        strides = (H, 0) if shape.stacked else (C * H, H)
        Kernel(shape, Warps([*arrays, *told, packets, out], memory), strides).run()

    size = shape.shared_at["end"] + shape.stages * shape.stage
    ins, inouts, outs = (*layer * L, *told), (*entries, packets), out
    if shape.stacked:
        ins, inouts, outs = (*ins, *entries), (packets,), (out, *(s(L, K, H),) * 2)
    with mlir.make_ir_context(), ir.Location.unknown():
        return mosaic_gpu.as_gpu_kernel(
            body, (shape.blocks, 1, 1), (THREADS + 32, 1, 1), ins, outs, (jax.ShapeDtypeStruct((size,), jnp.int8),),
            module_name="one_row", inout_shape=inouts,
        )  # fmt: skip


def run(
    shape: Shape, layers: Sequence[Layer], x: jax.Array, told: Sequence[jax.Array], k: Sequence[jax.Array],
    v: Sequence[jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:  # fmt: skip
    """What leaves the last norm, and the caches with the token; of `shape.stacked` its own keys and values [L, K, H].

    Args:
      shape: what it is made for.
      layers: of each layer its arrays, as `arrays_of` has them.
      x: bfloat16[D], what enters the first.
      told: cosine and sine [Z, H/2] of the zones, the slots' bias [C], the token's slot, and the last norm's weights.
      k: of each layer [K, C, H], or one of all [L, K, C, H]; v: the same.
    """
    L = shape.L
    pairs = jax.lax.bitcast_convert_type(x.reshape(-1, 2), jnp.int32)
    first = jnp.stack([pairs, jnp.ones_like(pairs)], axis=1).reshape(-1)
    packets = jnp.pad(first, (0, shape.packets_at["end"] // 4 - first.size))
    out, *found = _kernel(shape)(*(y for layer in layers for y in layer), *told, *k, *v, packets)
    hidden = jax.lax.bitcast_convert_type(out, jnp.bfloat16).reshape(-1)
    if shape.stacked:
        return hidden, tuple(found[:1]), tuple(found[1:2])
    return hidden, tuple(found[:L]), tuple(found[L : 2 * L])
