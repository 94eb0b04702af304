"""Attention of one new token a row over the slots of a cache: what every decoding step does in every layer.

    queries   [B, K, Z, G, H]   G query heads of a key head, turned to fit the keys of each of Z zones of slots
    cache     [B, K, C, H]      keys and values in slots, of which each row sees some; the token sees itself, too
    zones     slots [0, ends[0]), [ends[0], ends[1]), ... [ends[-1], C)    of codes each row's may end elsewhere

Plain XLA is the definition and runs anywhere. On a Hopper GPU one kernel (`mosaic_gpu_decode_kernels.py`) reads each
key and value once, of those *parts* alone, a few slots each, in which the row sees something:

    parts     0 1 . . 4 . 6 7 8 9 . .     those that the row sees something of
    tiles     [0 1 4 6] [7 8 9 9]         of 64 slots, as a product takes them; the last part fills up the last tile

Codes of 8 bits have a kernel of their own (`mosaic_gpu_decode_int8_kernels.py`), whose parts are whole tiles. Both
give, where watched tokens are kept by them, the largest weight of each slot (`looks`).
"""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float32, Int8

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.attention.packing import unserved
from sepjax.attention.target import target

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_TYPES = (jnp.bfloat16, jnp.float16)
_PLAIN = ("xla", "reference", "tpu")  # implementations of `separator_attention` by whose names decoding is plain XLA
_H100_SMS = 132  # where the device does not tell
TILE = 64  # slots that the kernel computes with at a time: the rows of one product
_PART, _WAVES = 16, 8  # slots that it reads at a time, where there are more blocks than so many for each SM: `part_of`
_STAGES = {64: 4, 128: 3, 256: 2}  # by head size, tiles of keys and of values in shared memory
_STAGES_OF_CODES = 2  # three and four are slower: fewer blocks share an SM
_KEPT = {64: 48, 128: 32, 256: 64}  # KiB of scores that a block keeps for its looks, so that as many share an SM
_BLOCKS = 2  # of the kernel that an SM takes at a time
_SHARED = 226 * 2**10  # bytes of shared memory that a block of a Hopper GPU may have, but for its barriers
_LEAST_STAGES = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Which slots each row sees. Made by `seen_slots`, once for all layers that see the same."""

    visible: Bool[jax.Array, "B C"]
    bias: Float32[jax.Array, "B C"] | None  # of the kernel, its parts in the order of `live`: 0 where visible, or -inf
    live: Int32[jax.Array, "B X+1"] | None  # the number of tiles, and the X parts: those with a visible slot, the last
    place: Int32[jax.Array, "B X"] | None  # where each part is among them; X: nowhere

    __no_type_check__ = True  # see `StreamingCache`

    @property
    def kernel(self) -> bool:
        """Whether the kernel runs."""
        return self.live is not None

    def in_slots(self, looks: Float32[Array, "B K C"]) -> Float32[jax.Array, "B K C"]:
        """Looks of `attend` in the order of slots. The kernel's are in that of its parts, and anything beyond the last.

        Where they are read: they are read in any order as fast, and a copy of them is as much as the reading.
        """
        return Looks(jnp.asarray(looks), self.place).in_slots()

    def told_to(self, shape: tuple[int, ...], dtype: DTypeLike, *, codes: bool) -> "Seen":
        """For queries [B, K, Z, G, H] of this type, which codes do not tell, and of heads that a cache does not tell.

        The kernel serves not all: of many and large heads a block's shared memory has no room.
        """
        _, _, Z, G, H = shape
        fits = self.kernel and _shared_bytes(H, G, Z, _LEAST_STAGES, codes=codes, splits=2) <= _SHARED
        return self if fits and jnp.dtype(dtype) in map(jnp.dtype, _TYPES) else Seen(self.visible, None, None, None)

    def turns(self, shape: tuple[int, ...], rotated: int, *, looks: bool) -> bool:
        """Whether the kernel turns queries [B, K, Z, G, H] itself, of which so many of H numbers rotate: see `Turn`.

        It does so where a block has a row's key head to itself: of heads of 64 up to eight, one after the other. Eights
        of larger ones are copied as tiles, so the array that has them must be of eights, too.
        """
        (_, K, _, G, H), C = shape, self.visible.shape[1]
        if not self.kernel or rotated != H or (G > 8 if H < 128 else G % 8 == 0 and 2 * K % 8):
            return False
        return _stages_and_splits((*shape, C), _STAGES[H], codes=False, looks=looks)[1] == 1


class Looks(NamedTuple):
    """What a step's tokens looked at: looks of `attend`, and where the parts of their slots are among them.

    Of all layers one behind the other, or of one. place: None where they are in the order of slots.
    """

    found: Float32[jax.Array, "*L B K C"]
    place: Int32[jax.Array, "*L B X"] | None

    def of_layer(self, i: int) -> "Looks":
        """Those of one layer, of all."""
        return Looks(self.found[i], None if self.place is None else self.place[i])

    def in_slots(self) -> Float32[jax.Array, "B K C"]:
        """Those of one layer in the order of slots."""
        if self.place is None:
            return self.found
        X = self.place.shape[1]
        parts, at = self.found.reshape(*self.found.shape[:2], X, -1), self.place[:, None, :, None]
        found = jnp.take_along_axis(parts, jnp.minimum(at, X - 1), axis=2, mode="promise_in_bounds")
        return jnp.where(at < X, found, 0.0).reshape(self.found.shape)


class Turn(NamedTuple):
    """What the kernel turns queries with, to fit the keys of each zone (`Seen.turns`): it reads one copy, and not Z.

    It turns the token's own key, too, by the last zone's, where there is room for it beside the queries.
    """

    cos: Float32[jax.Array, "Z B R"]
    sin: Float32[jax.Array, "Z B R"]
    flat: Float[jax.Array, "B (G+2)*K H"]  # as projected: the queries of all heads, then the keys, then the values


def unsupported(dtype: DTypeLike, head_dim: int, slots: int, implementation: str | None = None) -> str | None:
    """Why the kernel cannot serve a decoding step on the device that is traced for, or None when it can.

    Args:
      dtype: of the cache; int8: of codes, to be multiplied by queries of 16 bits (`Seen.told_to`, which knows of
        their heads, too).
      head_dim: H.
      slots: C.
      implementation: what the config names for `separator_attention`. A decoding step has two forms: the plain ones'
        names ("xla", "reference", "tpu") mean the plain one here, others and None the kernel where it can serve.
    """
    if implementation in _PLAIN:
        return f"attention.implementation={implementation!r} asks for plain XLA"
    device = target()
    if device.capability != "9.0":
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), the device is {device}"
    if jax.sharding.get_abstract_mesh().size > 1:
        return "it runs on one device, the mesh has several"
    if not slots or slots % TILE:
        return f"it reads {TILE} slots at a time, the cache has {slots}"
    return unserved(jnp.dtype(jnp.bfloat16 if jnp.dtype(dtype) == jnp.int8 else dtype), head_dim, _TYPES)


def part_of(blocks: int, *, codes: bool) -> int:
    """Slots that the kernel reads at a time: fewer than a tile where it has many blocks, the key heads of all rows.

    More copies take longer to begin. Of many blocks others read meanwhile, of few all would wait. Copies of codes
    are half as long, and stay whole.
    """
    return TILE if codes or not _are_many(blocks) else _PART


def _are_many(blocks: int) -> bool:
    """Whether so many blocks hide one another's beginnings: some always read while others begin."""
    return blocks > _WAVES * (target().num_cores or _H100_SMS)


def seen_slots(visible: Bool[Array, "B C"], *, kernel: bool, part: int = TILE) -> Seen:
    """What `attend` is told of who sees what.

    Args:
      visible: the slots that each row sees.
      kernel: for the kernel (`unsupported`), otherwise for plain XLA.
      part: slots of a part: of `part_of`.
    """
    visible = jnp.asarray(visible)
    if not kernel:
        return Seen(visible, None, None, None)
    parts = visible.reshape(len(visible), -1, part)
    is_live = jnp.any(parts, axis=-1)
    place = jnp.cumsum(is_live, axis=-1, dtype=jnp.int32) - 1
    count, X = place[:, -1:] + 1, is_live.shape[1]
    i, rows = jnp.arange(X, dtype=jnp.int32), jnp.arange(len(visible))[:, None]
    # Nothing is sorted: a GPU gives a large sort to a library, which cannot be part of a program that is one graph.
    to = jnp.where(is_live, place, X + i)
    order = jnp.zeros_like(place).at[rows, to].set(jnp.broadcast_to(i, to.shape), mode="drop", unique_indices=True)
    order = jnp.where(i < count, order, jnp.max(jnp.where(is_live, i, 0), axis=-1, keepdims=True))
    is_seen = jnp.take_along_axis(parts, order[..., None], axis=1) & (i < count)[..., None]
    tiles = -(-count * part // TILE)
    return Seen(
        visible,
        bias=jnp.where(is_seen, 0.0, -jnp.inf).reshape(visible.shape),
        live=jnp.concatenate([tiles, order], axis=1),
        place=jnp.where(is_live, place, X),
    )


def attend(
    queries: Float[Array, "B K Z G H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    k_cache: Float[Array, "B K C H"] | Int8[Array, "B K C H"],
    v_cache: Float[Array, "B K C H"] | Int8[Array, "B K C H"],
    seen: Seen,
    ends: tuple[int, ...] | Int32[Array, "B Y"] = (),
    scales: tuple[Float[Array, "B K C"], Float[Array, "B K C"]] | None = None,
    *,
    own: int = -1,
    looks: bool = False,
    turn: Turn | None = None,
) -> tuple[Float[jax.Array, "B K G H"], Float32[jax.Array, "B K C"] | None]:
    """The attention, in v's dtype, computed in float32; and the looks, if they are asked for, else None.

    Args:
      queries: those of each zone, turned to fit its keys.
      k: the token's own key; v: its value. They are not in the cache yet.
      k_cache: keys in slots; v_cache: values. For the kernel codes as they are stored.
      seen: of `seen_slots`, which says whether the kernel runs.
      ends: where the zones but the last end; of codes, for the kernel, each row's or none.
      scales: by which keys and values in slots are to be multiplied; None: they are as they are. For the kernel they
        are those of codes of 8 bits.
      own: the zone whose queries fit `k`.
      looks: whether to give, of the weights of each slot, the largest among the query heads of a key head: 0 where none
        sees it. They are in the order that `seen.in_slots` mends.
      turn: of the kernel, which then turns `queries` [B, K, 1, G, H] itself; None: they are turned.
    """
    if seen.kernel:
        return _by_kernel(queries, k, v, k_cache, v_cache, seen, ends, scales, own, turn, looks=looks)
    out, weights = _plainly(queries, k, v, k_cache, v_cache, seen, ends, scales, own)
    return out, jnp.max(weights, axis=2) if looks else None


def can_write() -> bool:
    """Whether the kernel can write the token into the cache (`attend_and_write`) on the device that is traced for.

    A thread stores two bytes, which JAX 0.12 refuses to compile for a GPU.
    """
    return jax.__version_info__ < (0, 12) or target().platform != "gpu"


def attend_and_write(
    queries: Float[Array, "B K 1 G H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    k_cache: Float[Array, "B K C H"],
    v_cache: Float[Array, "B K C H"],
    seen: Seen,
    ends: tuple[int, ...],
    turn: Turn,
    to: Int32[Array, "B"],
    *,
    looks: bool = False,
) -> tuple[tuple[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]:
    """What `attend` gives, by the kernel that turns (`Seen.turns`); and keys and values with the token's own in them.

    They are written where they are read, without a copy where nobody else reads them. `to`: the slot of each row's
    token, which the row does not see yet.
    """
    assert seen.kernel
    return _kernel(queries, k, v, k_cache, v_cache, (seen.bias, seen.live), turn, to, ends=ends, looks=looks)


def _plainly(
    queries: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, seen: Seen, ends: Any, scales: Any, own: int
) -> tuple[jax.Array, jax.Array]:
    """In plain XLA: the result, and the weights [B, K, G, C]. All zones are rows of one product, which cost nothing."""
    of_keys, of_values = (None, None) if scales is None else (x.astype(jnp.float32)[:, :, None] for x in scales)
    scores = _einsum("BKZGH,BKCH->BKZGC", queries, k_cache)
    scores = scores if of_keys is None else scores * of_keys[:, :, None]
    scores = jnp.where(seen.visible[:, None, None], _of_zones(scores, ends), -jnp.inf)
    of_own = _einsum("BKGH,BKH->BKG", queries[:, :, own], k)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([scores, of_own], axis=-1) * k.shape[-1] ** -0.5, axis=-1)
    shares = weights[..., :-1] if of_values is None else weights[..., :-1] * of_values
    out = _einsum("BKGC,BKCH->BKGH", shares.astype(v.dtype), v_cache)
    out += weights[..., -1:] * v[:, :, None]
    return out.astype(v.dtype), weights[..., :-1]


def _of_zones(scores: jax.Array, ends: Any) -> jax.Array:
    """Of scores [B, K, Z, G, C] with queries of every zone those of each slot's own, [B, K, G, C]."""
    if isinstance(ends, tuple):
        bounds = [0, *ends, scores.shape[-1]]
        return jnp.concatenate([scores[:, :, z, :, bounds[z] : bounds[z + 1]] for z in range(len(ends) + 1)], axis=-1)
    i, found = jnp.arange(scores.shape[-1]), scores[:, :, -1]
    for z in reversed(range(scores.shape[2] - 1)):
        found = jnp.where(i < ends[:, z, None, None, None], scores[:, :, z], found)
    return found


def _by_kernel(
    queries: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, seen: Seen, ends: Any, scales: Any, own: int,
    turn: Turn | None, *, looks: bool,
) -> Any:  # fmt: skip
    """The result, and the looks or None."""
    own %= queries.shape[2] if turn is None else len(turn.cos)
    told = seen.bias, seen.live
    if scales is None:
        assert own == len(ends), "of zones that are known the last has the token's own key"
        return _kernel(queries, k, v, k_cache, v_cache, told, turn, ends=ends, looks=looks)
    codes = (k_cache, scales[0]), (v_cache, scales[1])
    of_rows = None if isinstance(ends, tuple) else ends
    assert of_rows is not None or not ends, "codes of several zones have ends of each row"
    return _kernel_of_codes(queries, k, v, codes, told, of_rows, own=own, looks=looks)


def _shared_bytes(H: int, G: int, Z: int, stages: int, *, codes: bool, splits: int, kept: int = 0) -> int:
    """Shared memory of a block: queries, tiles ahead, weights, scores that are kept, and what it writes through."""
    columns, width = -(-G // 8) * 8, 1 if codes else 2
    a_tile = TILE * (2 * H * width + (8 if codes else 4))
    converted = TILE * H * 2 if codes else 0
    out = columns * H * 2 if splits == 1 else columns * (H + 2) * 4
    turned = 0 if codes or splits > 1 else H if H >= 128 else 2 * H  # queries as they come (`Seen.turns`)
    return columns * (Z * H + turned + TILE) * 2 + stages * a_tile + converted + kept + out


def _stages_and_splits(shape: tuple[int, ...], stages: int, *, codes: bool, looks: bool) -> tuple[int, int]:
    """Tiles in shared memory; and how many blocks share the slots of a row's key head, so that all SMs have some.

    Scores for looks take the room of tiles ahead. Too many of them go through memory: blocks then share a row.
    """
    B, K, Z, G, H, C = shape
    wanted = -(-_BLOCKS * (target().num_cores or _H100_SMS) // (B * K))
    splits = max(1, min(wanted, C // TILE // 2))
    if looks:
        stages, kept = _LEAST_STAGES, 4 * C * (-(-G // 8) * 8)
        fits = _shared_bytes(H, G, Z, stages, codes=codes, splits=1, kept=kept) <= _SHARED
        return stages, splits if kept <= _KEPT[H] * 2**10 and fits else max(splits, 2)
    if H == 64 and not codes and _are_many(B * K):  # five of them share an SM then, in place of three
        stages = _LEAST_STAGES
    while stages > _LEAST_STAGES and _shared_bytes(H, G, Z, stages, codes=codes, splits=splits) > _SHARED:
        stages -= 1
    return stages, splits


@functools.partial(jax.jit, static_argnames=("ends", "looks"))  # one for all layers: its lowering takes seconds
def _kernel(
    queries: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, told: Any, turn: Any, to: Any = None, *,
    ends: tuple[int, ...], looks: bool,
) -> Any:  # fmt: skip
    module = importlib.import_module("sepjax.attention.mosaic_gpu_decode_kernels")
    (B, K, _, G, H), C = queries.shape, k_cache.shape[2]
    stages, splits = _stages_and_splits((B, K, len(ends) + 1, G, H, C), _STAGES[H], codes=False, looks=looks)
    part, does = C // (told[1].shape[1] - 1), (looks, turn is not None, to is not None)
    shape = module.Shape(B, K, G, H, C, ends, jnp.dtype(v.dtype), H**-0.5, TILE, part, stages, splits, *does)
    if to is None:
        return module.run(shape, (queries, k, v), k_cache, v_cache, told, turn)
    refs = tuple(map(jax.new_ref, (k_cache, v_cache)))
    return module.run(shape, (queries, k, v), *refs, told, turn, to), tuple(ref[...] for ref in refs)


@functools.partial(jax.jit, static_argnames=("own", "looks"))
def _kernel_of_codes(queries: Any, k: Any, v: Any, codes: Any, told: Any, ends: Any, *, own: int, looks: bool) -> Any:
    module = importlib.import_module("sepjax.attention.mosaic_gpu_decode_int8_kernels")
    (B, K, Z, G, H), C = queries.shape, codes[0][0].shape[2]
    stages, splits = _stages_and_splits((B, K, Z, G, H, C), _STAGES_OF_CODES, codes=True, looks=looks)
    shape = module.Shape(
        B, K, G, H, C, (), jnp.dtype(v.dtype), H**-0.5, TILE, TILE, stages, splits, looks, False, False, Z, own
    )
    return module.run(shape, queries, k, v, codes, *told, ends)


def scores_of_run(q: Float[Array, "B T N H"], k: Float[Array, "B K S H"]) -> Float[jax.Array, "B K G T S"]:
    """Scores of a run of queries a row against slots, float32, scaled; query heads go with their key heads in order.

    Queries are laid out as the product has them: else a GPU writes scores with the keys in front, and then turns all of
    them round.
    """
    B, T, _, H = q.shape
    grouped = jnp.transpose(q.reshape(B, T, k.shape[1], -1, H), (0, 2, 3, 1, 4))
    rows = grouped.reshape(B, k.shape[1], -1, H)
    return _einsum("BKMH,BKSH->BKMS", rows, k).reshape(*grouped.shape[:4], -1) * H**-0.5
