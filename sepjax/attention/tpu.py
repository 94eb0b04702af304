"""separator_attention on TPUs: what surrounds the kernels' calls of `tpu_calls`.

Kernels take near and far keys in two arrays, and the ranges that the queries see of both: `attend_ranges`. `attend` is
the case in which both come from the queries' own rows; it packs the far keys, and brings their gradients back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32

from sepjax.array_typing import Array, Keys, Queries
from sepjax.attention import tpu_calls as calls
from sepjax.attention.examples import over_examples
from sepjax.attention.packing import (
    pack,
    scaled,
    unpack,
    unserved,
    value_gradients,
    vary_alike,
    with_filled_heads,
    with_positive_scale,
    with_room,
)
from sepjax.attention.ranges import Ranges, whole_rows
from sepjax.attention.target import target
from sepjax.layout import SeparatorLayout

_LONGEST = 2**19  # tokens of a row whose visits are sure to fit scalar memory


def unsupported(q: Queries) -> str | None:
    """Why the kernels cannot serve a call on the device that is traced for, or None when they can."""
    device = target()
    if device.platform != "tpu":
        return f"it needs a TPU, the device is {device}"
    reason = unserved(q.dtype, q.shape[3], (jnp.bfloat16, jnp.float32), fills=True)
    if reason is None and q.shape[1] > _LONGEST:
        return f"it serves rows of up to {_LONGEST} tokens, whose visits fit scalar memory, got {q.shape[1]}"
    return reason


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend(
    q: Queries,
    k: Keys,
    v: Keys,
    layout: SeparatorLayout,
    far_scale: Float32[Array, "B T"] | None = None,
    *,
    scale: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`separator_attention` and its log-sum-exp; the arguments are checked there.

    `interpret` runs the kernels on a CPU, for tests: as plain JAX (True), or in the simulator of a TPU's memories.
    """
    q, scale = with_positive_scale(q, scale)
    q, k, v, layout, far_scale = vary_alike((q, k, v, layout, far_scale))
    return with_filled_heads((q, k, v), lambda heads: _attend(*heads, layout, far_scale, scale, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, layout, far_scale, scale, interpret):
    return _attend_forward(q, k, v, layout, far_scale, scale, interpret)[0]


def _attend_forward(q, k, v, layout, far_scale, scale, interpret):
    def rows(q, k, v, layout, far_scale):
        far = pack(k, layout), scaled(pack(v, layout), far_scale, layout)
        return calls.forward(q, (k, v), far, whole_rows(layout), is_whole=True, scale=scale, interpret=interpret)

    @over_examples
    def all_rows(q, k, v, layout, far_scale):
        def run(layout):
            return _in_row_groups(rows, (q, k, v, layout, far_scale), layout.capacity, is_whole=True)

        return with_room(layout, run)

    out, top, total = all_rows(q, k, v, layout, far_scale)
    return (out, _lse(top, total, scale)), (q, k, v, layout, far_scale, out, top, total)


def _attend_backward(scale, interpret, residuals, cotangents):
    q, k, v, layout, far_scale, out, top, total = residuals
    arrays = vary_alike((q, k, v, layout, far_scale, cotangents[0], _rows(out, top, total, cotangents)))

    def rows(q, k, v, layout, far_scale, d_out, rows):
        far = pack(k, layout), scaled(pack(v, layout), far_scale, layout)
        dq, d_near, d_far = calls.backward(
            q, (k, v), far, whole_rows(layout), d_out, rows, is_whole=True, scale=scale, interpret=interpret
        )
        far_dk, far_dv = (_to_tokens(x, layout) for x in d_far)
        dv, d_scale = value_gradients(d_near[1], far_dv, v, far_scale)
        return dq, (d_near[0] + far_dk).astype(k.dtype), dv, d_scale

    @over_examples
    def all_rows(q, k, v, layout, *others):
        def run(layout):
            return _in_row_groups(rows, (q, k, v, layout, *others), layout.capacity, is_whole=True)

        return with_room(layout, run)

    dq, dk, dv, d_scale = all_rows(*arrays)
    return dq, dk, dv, None, d_scale


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend_ranges(
    q: Queries,
    near: tuple[Array, Array],
    far: tuple[Array, Array],
    seen: Ranges,
    *,
    scale: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`attend` over near and far (k, v), each [B, keys, K, H], of which the queries see `seen`."""
    q, scale = with_positive_scale(q, scale)
    q, near, far, seen = vary_alike((q, near, far, seen))
    return with_filled_heads((q, near, far), lambda heads: _attend_ranges(*heads, seen, scale, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_ranges(q, near, far, seen, scale, interpret):
    return _attend_ranges_forward(q, near, far, seen, scale, interpret)[0]


def _attend_ranges_forward(q, near, far, seen, scale, interpret):
    def rows(q, k, v, far, seen):
        return calls.forward(q, (k, v), far, seen, is_whole=False, scale=scale, interpret=interpret)

    @over_examples
    def all_rows(*arrays):
        return _in_row_groups(rows, arrays, far[0].shape[1], is_whole=False)

    out, top, total = all_rows(q, *near, far, seen)
    return (out, _lse(top, total, scale)), (q, near, far, seen, out, top, total)


def _attend_ranges_backward(scale, interpret, residuals, cotangents):
    q, near, far, seen, out, top, total = residuals

    def rows(q, k, v, far, seen, d_out, rows):
        dq, d_near, d_far = calls.backward(
            q, (k, v), far, seen, d_out, rows, is_whole=False, scale=scale, interpret=interpret
        )
        # Far tiles without keys were never written.
        is_key = (jnp.arange(far[0].shape[1]) < seen.num_far[:, None])[..., None, None]
        d_far = (jnp.where(is_key, x, 0) for x in d_far)
        return dq, *(tuple(x.astype(k.dtype) for x in pair) for pair in (d_near, d_far))

    arrays = vary_alike((q, *near, far, seen, cotangents[0], _rows(out, top, total, cotangents)))

    @over_examples
    def all_rows(*arrays):
        return _in_row_groups(rows, arrays, far[0].shape[1], is_whole=False)

    return *all_rows(*arrays), None


_attend_ranges.defvjp(_attend_ranges_forward, _attend_ranges_backward)


def _lse(top, total, scale):
    return jnp.where(total > 0, top * scale + jnp.log(total), -jnp.inf)


def _rows(out, top, total, cotangents):
    """What the backward pass needs of each query, float32[B, 3, T, N]."""
    # As in xla.py, weights are recomputed as exp(S - top) / total: exp(S - lse) would carry the rounding of the lse.
    d_out, d_lse = cotangents
    norm = jnp.where(total > 0, 1 / total, 0.0)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    return jnp.stack([top, norm, delta], axis=1)


def _to_tokens(far: jax.Array, layout: SeparatorLayout) -> jax.Array:
    """Gradients [B, S, K, H] of packed keys -> [B, T, K, H] of tokens, by a gather.

    Far tiles that hold no key were never written: nothing of them may reach a sum, not even as 0 * NaN.
    """
    if far.shape[1]:
        return unpack(far, layout, axis=1)
    return jnp.zeros((far.shape[0], layout.length, *far.shape[2:]), far.dtype)


def _in_row_groups(run: Callable[..., Any], arrays: Any, room: int, *, is_whole: bool) -> Any:
    """`run` on as many rows at a time as have their visits in scalar memory together: all of them, as a rule.

    arrays: queries, near keys, and others whose first axis is that of the rows; room: far keys that fit a row.
    """
    q, k = arrays[:2]
    B, rows = q.shape[0], calls.rows_at_once(q, k, room, is_whole)
    if rows == B:
        return run(*arrays)
    split = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), arrays)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), lax.map(lambda arrays: run(*arrays), split))
