"""separator_attention over rows that a mesh axis splits: who sends what, and what each device then computes.

Only the packed global keys, about an eighth of a text, travel to every device. The band needs the last tokens of the
chunk to the left, the *halo*. With C devices a row is cut into 2C chunks and device c has chunks c and 2C - 1 - c, an
early and a late one: later queries see more global keys, and so every device has nearly the same work.

    chunks        0 1 2 3 4 5 6 7          C = 4
    device 0      0             7
    device 1        1         6            "context order": 0 7 1 6 2 5 3 4
    device 2          2     5
    device 3            3 4

    far keys      every device's global keys, packed there, gathered, then packed again without the gaps between devices
    near keys     | halo | chunk c | halo | chunk 2C - 1 - c |        on device c

Ranges in these two arrays never decrease along a device's queries, so the kernels are those of a single device
(`attend_ranges`). Gradients of keys go back the way that the keys came: a reduce-scatter, and permutes to the left.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float32, Int32

from sepjax.array_typing import Array, Keys, Queries
from sepjax.attention.op import choose
from sepjax.attention.packing import scaled
from sepjax.attention.ranges import Ranges
from sepjax.layout import SeparatorLayout


@dataclasses.dataclass(frozen=True)
class ContextPlan:
    """What is fixed when a program is compiled.

    Attributes:
      ways: C, devices along the axis; twice as many must divide T.
      halo: tokens before a chunk that are sent along: n - 1 for the largest window n that the plan serves. From
        T - T / 2C on, all keys are sent.
      capacity: global keys that a device has room for; a layout with more on some device (`fits`) is served with room
        for all of its T / C tokens.
      dense: every n that the plan serves covers the row. All keys are sent, and none are packed.
      axis: name of the mesh axis.
    """

    ways: int
    halo: int
    capacity: int
    dense: bool = False
    axis: str = "context"

    def sends_all(self, length: int) -> bool:
        """Whether a device gets all near keys of a row of `length` tokens."""
        chunk = length // (2 * self.ways)
        return self.dense or self.halo >= (self.ways - 1) * chunk


def to_context_order(x: Array, ways: int) -> jax.Array:
    """[B, T, ...] in the order of the text -> in context order, of which each of `ways` devices has an equal part."""
    B, T, *rest = x.shape
    if T % (2 * ways):
        raise ValueError(
            f"rows of T={T} tokens do not split over {ways} devices: each gets two chunks, so T must be a multiple of "
            f"{2 * ways}"
        )
    x = jnp.asarray(x).reshape(B, 2, ways, T // (2 * ways), *rest)
    return jnp.stack([x[:, 0], x[:, 1, ::-1]], axis=2).reshape(B, T, *rest)


def from_context_order(x: Array, ways: int) -> jax.Array:
    """The inverse of `to_context_order`."""
    B, T, *rest = x.shape
    x = jnp.asarray(x).reshape(B, ways, 2, T // (2 * ways), *rest)
    return jnp.stack([x[:, :, 0], x[:, ::-1, 1]], axis=1).reshape(B, T, *rest)


def fits(layout: SeparatorLayout, ways: int, capacity: int) -> Bool[Array, ""]:
    """Whether no device has more than `capacity` global keys, and the layout names all of them."""
    counts = _Chunks(layout, ways).device_counts
    return (jnp.max(counts) <= capacity) & ~layout.overflows()


def context_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    layout: SeparatorLayout,
    is_roomy: Bool[Array, ""] | bool,
    *,
    plan: ContextPlan,
    far_scale: Float32[Array, "B row"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Queries, Float32[Array, "B T N"]]:
    """`separator_attention` of one device's queries, inside `jax.shard_map` with check_vma=False.

    Args:
      q: [B, T / C, N, H], this device's part of the rows in context order.
      k: [B, T / C, K, H]; v: like k.
      layout: of whole rows, [B, T] in the order of the text, the same on all devices of the axis.
      is_roomy: `fits(layout, C, plan.capacity)`, the same on all devices of the mesh; or True, where that is known: the
        other case is then not compiled.
      plan: with plan.halo >= n - 1 for the n that the layout was made with; a larger n would miss keys.
      far_scale: as in `separator_attention`, of whole rows in the order of the text, the same on all devices.
      scale, implementation: as in `separator_attention`.

    Returns:
      [B, T / C, N, H] in q's dtype, and the log-sum-exp float32[B, T / C, N]. Differentiable in q, k, v and far_scale.

    Raises:
      ValueError: T does not split into 2C chunks, or q has another part of the row.
    """
    T, chunks = layout.length, 2 * plan.ways
    if T % chunks or q.shape[1] * plan.ways != T:
        raise ValueError(
            f"rows of T={T} tokens on {plan.ways} devices of the axis {plan.axis!r}: T must be a multiple of {chunks}, "
            f"and each device has T / {plan.ways} queries, got {q.shape[1]}"
        )
    if plan.capacity < 1 and not plan.dense:
        raise ValueError(f"capacity={plan.capacity} must be 1 or more; {q.shape[1]} cannot overflow")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    attend = functools.partial(choose(implementation, q).attend_ranges, scale=scale)
    run = functools.partial(_attend, attend, plan)
    if plan.dense or is_roomy is True or plan.capacity >= q.shape[1]:
        return run(min(plan.capacity, q.shape[1]), q, k, v, layout, far_scale)
    return lax.cond(
        is_roomy,
        functools.partial(run, plan.capacity),
        functools.partial(_head_by_head, functools.partial(run, q.shape[1])),
        *(q, k, v, layout, far_scale),
    )


def _head_by_head(run, q, k, v, layout, far_scale):
    """`run` for one key head after the other, which keeps nothing of it for the gradients but computes it again.

    For the case that hardly ever comes: all its keys at once, of every layer, would be most of the memory of a long row
    (and a `cond` keeps what either case needs, filled with zeros for the one that was not taken).
    """
    K = k.shape[2]
    heads = [jnp.moveaxis(x.reshape(*x.shape[:2], K, -1, x.shape[-1]), 2, 0) for x in (q, k, v)]
    results = lax.map(jax.checkpoint(lambda x: run(*x, layout, far_scale)), tuple(heads))
    out, lse = (jnp.moveaxis(x, 0, 2) for x in results)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def gathered_keys(
    k: Keys, v: Keys, layout: SeparatorLayout, *, plan: ContextPlan
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What `context_attention` sends, with room for `plan.capacity` global keys: near (k, v) and far (k, v)."""
    return _keys(plan, plan.capacity, _device(layout, plan), k, v)


def _attend(attend, plan, capacity, q, k, v, layout, far_scale):
    if capacity == q.shape[1] and layout.capacity < layout.length:
        layout = layout.with_capacity(layout.length)
    device = _device(layout, plan)
    near, (far_k, far_v) = _keys(plan, capacity, device, k, v)
    if far_scale is not None and not plan.dense:
        far_v = scaled(far_v, far_scale, layout.with_capacity(far_v.shape[1]))
    near_start, near_end = device.near_ranges(plan.halo, plan.sends_all(layout.length))
    far_start, far_end = (device.part(x) for x in (layout.far_start, layout.far_end))
    num_far = jnp.asarray(layout.num_global)
    if plan.dense:
        far_start, far_end, num_far = (jnp.zeros_like(x) for x in (far_start, far_end, num_far))
    return attend(q, near, (far_k, far_v), Ranges(far_start, far_end, near_start, near_end, num_far))


def _device(layout: SeparatorLayout, plan: ContextPlan) -> "_Device":
    return _Device(_Chunks(layout, plan.ways), lax.axis_index(plan.axis))


def _keys(plan, capacity, device, k, v):
    """Near and far (k, v).

    On their way heads are side by side, [B, X, K * H]: rows of [12, 64] would fill a TPU's tiles of 16 x 128.
    """
    heads = k.shape[2:]
    k, v = (jnp.asarray(x).reshape(*x.shape[:2], -1) for x in (k, v))
    if plan.sends_all(device.chunks.layout.length):
        near = tuple(from_context_order(_gathered(x, plan), plan.ways) for x in (k, v))
    else:
        near = tuple(_with_halo(x, plan) for x in (k, v))
    if plan.dense:
        far = k[:, :1], v[:, :1]  # one that nobody sees
    else:
        pack, compact = device.pack_moves(capacity), device.chunks.compact_moves(capacity)
        far = tuple(_move(_gathered(_move(x, *pack), plan), *compact) for x in (k, v))
    near, far = (tuple(x.reshape(*x.shape[:2], *heads) for x in keys) for keys in (near, far))
    return near, far


class _Chunks:
    """Where the 2C chunks of every row begin, in tokens and in global keys; the same on all devices."""

    def __init__(self, layout: SeparatorLayout, ways: int):
        self.layout, self.ways = layout, ways
        self.length = layout.length // (2 * ways)
        # As the last of each chunk: a strided slice of a long row needs more VMEM on a TPU than there is.
        ends = jnp.asarray(layout.global_count).reshape(-1, 2 * ways, self.length)[:, :, -1]
        self.before = jnp.pad(ends, ((0, 0), (1, 0)))  # int32[B, 2C + 1]: global keys before each chunk
        counts = jnp.diff(self.before, axis=1)
        self.early, self.late = counts[:, :ways], counts[:, : ways - 1 : -1]  # int32[B, C]: of a device's two chunks

    @property
    def device_counts(self) -> Int32[Array, "B C"]:
        """Global keys on each device."""
        return self.early + self.late

    def compact_moves(self, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`_move`'s arguments from the gathered keys, `capacity` places a device, to all global keys of the row."""
        C, before = self.ways, self.before
        g = jnp.arange(min(C * capacity, self.layout.length), dtype=jnp.int32)
        chunk = jnp.sum(before[:, 1:-1, None] <= g, axis=1, dtype=jnp.int32)
        device = jnp.where(chunk < C, chunk, 2 * C - 1 - chunk)
        place = g - _take(before, chunk) + jnp.where(chunk < C, 0, _take(self.early, device))
        index = jnp.minimum(device * capacity + place, C * capacity - 1)

        r = jnp.arange(capacity, dtype=jnp.int32)
        early = self.early[..., None]
        key = jnp.where(r < early, before[:, :C, None] + r, before[:, 2 * C - 1 : C - 1 : -1, None] + r - early)
        holds = r < self.device_counts[..., None]
        key = jnp.clip(key, 0, len(g) - 1)
        return index, key.reshape(len(key), C * capacity), holds.reshape(len(holds), C * capacity)


class _Device:
    """One device's part of the rows."""

    def __init__(self, chunks: _Chunks, index: jax.Array):
        self.chunks, self.index = chunks, index
        self.numbers = index, 2 * chunks.ways - 1 - index  # of its two chunks
        self.starts = [number * chunks.length for number in self.numbers]

    def part(self, x: Array) -> jax.Array:
        """[B, T] of the row -> [B, T / C] of this device."""
        return jnp.concatenate(
            [lax.dynamic_slice_in_dim(jnp.asarray(x), s, self.chunks.length, axis=1) for s in self.starts], axis=1
        )

    def near_ranges(self, halo: int, sends_all: bool) -> tuple[jax.Array, jax.Array]:
        """Near ranges of this device's queries, in the whole row or in `_with_halo`'s array."""
        u = self.chunks.length
        shifts = [0, 0] if sends_all else [halo + j * (halo + u) - s for j, s in enumerate(self.starts)]
        shift = jnp.repeat(jnp.stack([jnp.asarray(s, jnp.int32) for s in shifts]), u)
        i = jnp.concatenate([s + jnp.arange(u, dtype=jnp.int32) for s in self.starts])
        start = self.part(self.chunks.layout.near_start) + shift
        return start, jnp.broadcast_to(i + 1 + shift, start.shape)

    def pack_moves(self, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`_move`'s arguments from this device's tokens to its packed global keys, those of the early chunk first."""
        u, layout = self.chunks.length, self.chunks.layout
        early, late = (self.chunks.before[:, n, None] for n in self.numbers)
        count = self.chunks.before[:, self.index + 1, None] - early
        r = jnp.arange(capacity, dtype=jnp.int32)
        key = jnp.where(r < count, early + r, late + r - count)
        token = _take(layout.global_index, jnp.minimum(key, layout.capacity - 1))
        token = jnp.where(r < count, token - self.starts[0], token - self.starts[1] + u)
        is_late = jnp.arange(2 * u) >= u
        place = self.part(layout.global_count) - 1 - jnp.where(is_late, late - count, early)
        return jnp.clip(token, 0, 2 * u - 1), jnp.clip(place, 0, capacity - 1), self.part(layout.is_global())


def _take(x: Array, index: Array) -> jax.Array:
    return jnp.take_along_axis(jnp.asarray(x), jnp.asarray(index), axis=1)


@jax.custom_vjp
def _move(x, index, source, is_moved):
    """x[B, X, F] -> [B, Y, F], y[i] = x[index[i]].

    The gradient is a gather too: x[j], where is_moved[j], went to y[source[j]]; what else y has, nobody looks at.
    """
    return _take(x, index[..., None])


def _move_back(residuals, dy):
    source, is_moved = residuals
    dx = _take(dy, source[..., None])
    return jnp.where(is_moved[..., None], dx, jnp.zeros((), dy.dtype)), None, None, None


_move.defvjp(lambda x, index, source, moved: (_move(x, index, source, moved), (source, moved)), _move_back)


def _gathered(x: jax.Array, plan: ContextPlan) -> jax.Array:
    """[B, X, F] of every device side by side."""
    return lax.all_gather(x, plan.axis, axis=1, tiled=True)


def _with_halo(x: jax.Array, plan: ContextPlan) -> jax.Array:
    """[B, T / C, F] -> the near keys: each of the two chunks behind the `plan.halo` tokens before it.

    A hop fetches from the chunk that is `hop` further left; before the row there are zeros, which nobody sees. Chunk
    2C - 1 - c - hop is the late one of device c + hop or, past the middle of the row, the early one of another.
    """
    C, u = plan.ways, x.shape[1] // 2
    early, late = x[:, :u], x[:, u:]
    c = lax.axis_index(plan.axis)
    halos: list[list[jax.Array]] = [[], []]
    for hop in range(1, -(-plan.halo // u) + 1):
        width = min(u, plan.halo - (hop - 1) * u)
        early_end, late_end = early[:, u - width :], late[:, u - width :]
        send = functools.partial(lax.ppermute, axis_name=plan.axis)
        before_early = send(early_end, perm=[(d, d + hop) for d in range(C - hop)])
        before_late = send(late_end, perm=[(d, d - hop) for d in range(hop, C)])
        if hop == 1:  # the middle of the row is on one device
            turned = early_end
        else:
            turned = send(
                early_end, perm=[(2 * C - 1 - d - hop, d) for d in range(max(C - hop, 0), C) if d + hop < 2 * C]
            )
        halos[0].insert(0, before_early)
        halos[1].insert(0, jnp.where(c + hop < C, before_late, turned))
    return jnp.concatenate([*halos[0], early, *halos[1], late], axis=1)
