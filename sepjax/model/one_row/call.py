"""The kernel as an operation of JAX."""

import functools
import itertools
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
    """A layer's: matrices of q, k, v; output; gate with up; down; both norms' weights; and what `Shape.entries` has."""
    D, F, outputs = shape.D, shape.F, (shape.N + 2 * shape.K) * shape.H
    sizes = (outputs, D), (D, shape.N * shape.H), (2 * F, D), (D, F)
    matrices = [jax.ShapeDtypeStruct(x, jnp.int8 if shape.codes else jnp.bfloat16) for x in sizes]
    vectors = [D, D, *([x[0] for x in sizes] if shape.codes else []), *([outputs] if shape.biased else [])]
    vectors += [shape.H, shape.H] if shape.head_norms else []
    return *matrices, *(jax.ShapeDtypeStruct((x,), jnp.float32) for x in vectors)


def _told_at(shape: Shape) -> tuple[list[int], int]:
    """Where cosine, sine, bias and slot lie behind the packets, and where that ends, in numbers of 4 bytes."""
    table, begin = shape.zones * shape.H // 2, shape.packets_at["end"] // 4
    *at, end = itertools.accumulate((table, table, shape.C, 1), initial=begin)
    return at, end


def _packets(shape: Shape, x: jax.Array, told: Sequence[jax.Array]) -> jax.Array:
    """What enters the first layer as packets, room for the others, and what the kernel is told: int32[...].

    Number by number, so that XLA makes one kernel of all that a step needs to know; a kernel costs more than its work.
    """
    halves = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32).reshape(-1, 2)
    pairs = halves[:, 0] | (halves[:, 1] << 16)
    first = jnp.stack([pairs, jnp.ones_like(pairs)], axis=1).reshape(-1)
    rest = jnp.zeros(shape.packets_at["end"] // 4 - first.size, jnp.int32)
    bits = [jax.lax.bitcast_convert_type(y.reshape(-1), jnp.int32) for y in told]
    return jnp.concatenate([first, rest, *bits])


@functools.lru_cache(maxsize=8)
def _kernel(shape: Shape, in_place: bool) -> Any:
    L, D, K, C, H = shape.L, shape.D, shape.K, shape.C, shape.H

    def s(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    numbers = functools.partial(s, dtype=jnp.float32)
    layer = arrays_of(shape)
    entries = (s(L, K, C, H),) * 2 if shape.stacked else (s(K, C, H),) * (2 * L)
    at, end = _told_at(shape)
    packets = s(end, dtype=jnp.int32)
    out: Any = s(D // 2, dtype=jnp.int32)

    def body(_: Any, *refs: Any) -> None:
        *given, (memory,) = refs
        each = len(layer)
        given, final_norm, rest = given[: each * L], given[each * L], given[each * L + 1 :]
        *caches, packets, out = rest if in_place else rest[:4]
        if shape.stacked:
            caches = [(x, i * K * C * H * 2) for x in caches for i in range(L)]
        new = caches if in_place else [(x, i * K * H * 2) for x in rest[4:] for i in range(L)]
        entries = [(*caches[i::L], *new[i::L]) for i in range(L)]
        arrays = [x for i in range(L) for x in (*given[each * i : each * (i + 1)], *entries[i])]
        told = *((packets, 4 * i) for i in at), final_norm
        strides = (C * H, H) if in_place else (H, 0)
        Kernel(shape, Warps([*arrays, *told, packets, out], memory), strides).run()

    size = shape.shared_at["end"] + shape.stages * shape.stage
    ins, inouts, outs = (*layer * L, numbers(D)), (*entries, packets), out
    if not in_place:
        ins, inouts, outs = (*ins, *entries), (packets,), (out, *(s(L, K, H),) * 2)
    with mlir.make_ir_context(), ir.Location.unknown():
        return mosaic_gpu.as_gpu_kernel(
            body, (shape.blocks, 1, 1), (THREADS + 32, 1, 1), ins, outs, (jax.ShapeDtypeStruct((size,), jnp.int8),),
            module_name="one_row", inout_shape=inouts,
        )  # fmt: skip


def run(
    shape: Shape, layers: Sequence[Layer], x: jax.Array, told: Sequence[jax.Array], k: Sequence[jax.Array],
    v: Sequence[jax.Array], *, in_place: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:  # fmt: skip
    """What leaves the last norm, and the caches with the token; or, not `in_place`, its own keys and values [L, K, H].

    Args:
      shape: what it is made for.
      layers: of each layer its arrays, as `arrays_of` has them.
      x: bfloat16[D], what enters the first.
      told: cosine and sine [Z, H/2] of the zones, the slots' bias [C], the token's slot, and the last norm's weights.
      k: of each layer [K, C, H], or one of all [L, K, C, H]; v: the same.
    """
    packets = _packets(shape, x, told[:-1])
    out, *found = _kernel(shape, in_place)(*(y for layer in layers for y in layer), told[-1], *k, *v, packets)
    hidden = jax.lax.bitcast_convert_type(out, jnp.bfloat16).reshape(-1)
    if in_place:
        return hidden, tuple(found[: len(k)]), tuple(found[len(k) : 2 * len(k)])
    return hidden, tuple(found[:1]), tuple(found[1:2])
