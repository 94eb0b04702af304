"""Where a row stands, in two arrays: keys and values of all layers side by side, and the bytes of everything else.

A state has some hundred arrays. To start a program with them, or to copy them between a device and its host, costs the
host a while for each, which is longer than the copy itself; two cost nothing. Of a cache whose layers have several
sizes there is an array of keys and values for each shape.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Float, UInt8
from sepjax.generation.device_loop import DecodeState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays."""

    kv: tuple[Float[Array, "M K C H"], ...]  # keys and values of layers that have one shape, for every shape
    rest: UInt8[Array, "_"]

    __no_type_check__ = True


class Bytes:
    """How all arrays of a pytree become the bytes of one array, on a device or its host."""

    def __init__(self, like: Any):
        """`like`: such a pytree, or its shapes."""
        leaves, self._structure = jax.tree.flatten(like)
        self._like = tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in leaves)
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._like]
        self._ends: list[int] = np.cumsum(sizes).tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bytes) and (self._like, self._structure) == (other._like, other._structure)

    def __hash__(self) -> int:
        return hash((self._like, self._structure))

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return self._ends[-1]

    def of(self, tree: Any) -> UInt8[jax.Array, "_"]:
        """For a program on the device."""
        return jnp.concatenate([_bytes(x) for x in jax.tree.leaves(tree)])

    def tree(self, data: UInt8[Array, "_"]) -> Any:
        """For a program on the device."""
        return self._unflatten([_of_bytes(x, *like) for x, like in self._parts(data)])

    def of_host(self, tree: Any) -> UInt8[np.ndarray, "_"]:
        """Of arrays wherever they are. Raises ValueError where they are not alike: all behind would be misread."""
        leaves: list[Any] = jax.tree.leaves(tree)
        if not all(isinstance(x, np.ndarray) for x in leaves):  # asking JAX takes ten times as long as all else
            leaves = jax.device_get(leaves)
        found = tuple((np.shape(x), np.asarray(x).dtype) for x in leaves)
        if found != self._like:
            raise ValueError(f"arrays to be packed are {found}, expected {self._like}; give those of the same pytree")
        return np.concatenate([np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in leaves])

    def tree_on_host(self, data: UInt8[np.ndarray, "_"]) -> Any:
        """Of arrays in the host's memory."""
        return self._unflatten([x.copy().view(dtype).reshape(shape) for x, (shape, dtype) in self._parts(data)])

    def _parts(self, data: Any) -> list[tuple[Any, tuple[tuple[int, ...], Any]]]:
        begins = [0, *self._ends[:-1]]
        return [(data[a:b], like) for a, b, like in zip(begins, self._ends, self._like, strict=True)]

    def _unflatten(self, leaves: list) -> Any:
        return jax.tree.unflatten(self._structure, leaves)


class Form:
    """How states of one row with one kind of bounded cache are packed."""

    def __init__(self, like: DecodeState):
        """`like`: such a state, or its shapes."""
        cache, bare = _cache(like), _bare(like)
        self.rest = Bytes(bare)
        self.ends_when_stuck: bool = cache.ends_when_stuck  # see `Cache`
        shapes = [(tuple(x.shape[1:]), jnp.dtype(x.dtype)) for x in cache.entries]
        kinds = list(dict.fromkeys(shapes))
        self._stacks = tuple(kinds.index(shape) for shape in shapes)  # of every array of keys or values
        self.kv_like = tuple(
            jax.ShapeDtypeStruct((self._stacks.count(i), *shape), dtype) for i, (shape, dtype) in enumerate(kinds)
        )
        key: Any = bare.key
        self.kv_nbytes: int = sum(x.size * x.dtype.itemsize for x in self.kv_like)
        self.nbytes: int = self.kv_nbytes + self.rest.nbytes - key.size * key.dtype.itemsize  # but for the random key's

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._all == other._all

    def __hash__(self) -> int:
        return hash(self._all)

    @property
    def _all(self) -> tuple[Any, ...]:
        return self.rest, self._stacks, self.kv_like

    def pack(self, state: DecodeState) -> Packed:
        """For a program on the device."""
        stacks = self._stacked(_cache(state).entries)
        return Packed(tuple(jnp.concatenate(stack) for stack in stacks), self.rest.of(_bare(state)))

    def unpack(self, packed: Packed) -> DecodeState:
        """For a program on the device."""
        return self._with(packed.kv, self.rest.tree(packed.rest))

    def empty(self) -> Packed:
        """Of a row that has seen nothing, for a program on the device. The random key is to be replaced."""
        kv = tuple(jnp.zeros(like.shape, like.dtype) for like in self.kv_like)
        return Packed(kv, jnp.zeros(self.rest.nbytes, jnp.uint8))

    def packed_on_host(self, state: DecodeState) -> Packed:
        """Of a state wherever it is."""
        stacks = self._stacked(jax.device_get(_cache(state).entries))
        return Packed(tuple(np.concatenate(stack) for stack in stacks), self.rest.of_host(_bare(state)))

    def unpacked_on_host(self, packed: Packed) -> DecodeState:
        """Its arrays in the host's memory, keys and values those of `packed`; the random key is a JAX array."""
        return self._with(packed.kv, self.rest.tree_on_host(np.asarray(packed.rest)))

    def _stacked(self, entries: Sequence[Any]) -> list[list[Any]]:
        """Arrays of keys and values by their shapes."""
        return [
            [x for x, stack in zip(entries, self._stacks, strict=True) if stack == i] for i in range(len(self.kv_like))
        ]

    def _with(self, kv: Sequence[Any], bare: DecodeState) -> DecodeState:
        """`kv` on a device or its host."""
        rows = [iter(range(len(stack))) for stack in kv]
        places = [(stack, next(rows[stack])) for stack in self._stacks]
        cache = _cache(bare).with_entries([kv[stack][i : i + 1] for stack, i in places])
        return dataclasses.replace(bare, cache=cache, key=jax.random.wrap_key_data(bare.key))


class PackedState:
    """A packed state, on a device, on the host, or still to come: whoever wants it waits."""

    is_pooled = False  # whether it has a place in a pool (`sepjax.generation.slot_pool`)

    def __init__(self, form: Form, packed: "Packed | Future[Packed]"):
        self.form, self._packed = form, packed

    @property
    def packed(self) -> Packed:
        """The arrays; waits until the program that makes them has been started."""
        found = self._packed  # looked at once: another thread may be waiting, too
        if isinstance(found, Future):
            found = self._packed = found.result()
        return found

    @property
    def is_on_host(self) -> bool:
        """Whether no device holds it."""
        found = self._packed
        return not isinstance(found, Future) and isinstance(found.rest, np.ndarray)

    def on_host(self) -> "PackedState":
        """The same in the host's memory; waits for it."""
        return self if self.is_on_host else Copying(self).result()

    def ask(self) -> "Packed | Future[Packed]":
        """The arrays, or what will have them: of several states all can be asked for before one is waited for."""
        return self._packed

    def state(self) -> DecodeState:
        """Unpacked, on the host."""
        return self.form.unpacked_on_host(self.on_host().packed)

    def bare(self) -> DecodeState:
        """Unpacked, on the host, without keys and values, which stay where they are."""
        state = self.form.rest.tree_on_host(np.asarray(self.packed.rest))
        return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))


class Copying:
    """A copy of a packed state to the host's memory, on its way: begun at once, gone on with by `send` and `result`.

    The device copies to memory that it knows, beside what it computes, and from there the host does to its own. A copy
    straight into the host's memory holds up all other copies from the device, and a processor, for as long as it takes.
    And memory that the device knows is to be little, and the same again and again: to have more of it takes the driver
    longer than any copy, and nothing else is begun meanwhile.
    """

    def __init__(self, state: PackedState):
        self._form, self._asked = state.form, state.ask()
        self._sent: Packed | None = None

    def send(self) -> None:
        """Has the device copy what was asked for, once the program that makes it was started."""
        asked = self._asked
        if self._sent is None:
            self._sent = jax.tree.map(_staged, asked.result() if isinstance(asked, Future) else asked)
            self._asked = self._sent  # the device's own copy has done its part

    def result(self) -> PackedState:
        """The state in the host's memory; waits for it."""
        self.send()
        sent: Any = self._sent
        kv, rest = jax.tree.map(_of_the_host, (sent.kv, sent.rest))
        return PackedState(self._form, Packed(kv, rest))


COPIES = 8  # that are begun before one is waited for: no more memory is needed that the device knows
_KNOWN = "pinned_host"  # which that is


def _staged(x: Any) -> Any:
    """An array of a GPU in memory of the host that the GPU knows; any other as it is."""
    if not isinstance(x, jax.Array) or next(iter(x.sharding.device_set)).platform != "gpu":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(_KNOWN))


def _of_the_host(x: Any) -> np.ndarray:
    """The same in memory of the host's own: what JAX gives of arrays in memory that a GPU knows is that memory."""
    found = np.asarray(x)
    return found.copy() if isinstance(x, jax.Array) and x.sharding.memory_kind == _KNOWN else found


def _cache(state: DecodeState) -> Any:
    return state.cache


def _bare(state: DecodeState) -> DecodeState:
    """Without keys and values; the random key as plain numbers."""
    key: Any = state.key
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.eval_shape(jax.random.key_data, key) if isinstance(key, jax.ShapeDtypeStruct) else _key_data(key)
    return dataclasses.replace(state, cache=_cache(state).bare(), key=key)


_key_data = jax.jit(jax.random.key_data)


def _bytes(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.uint8)
    return x.reshape(-1)


def _of_bytes(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.bool_):
        return x.reshape(shape) != 0
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(x.reshape(shape), dtype)
    return jax.lax.bitcast_convert_type(x.reshape(*shape, dtype.itemsize), dtype)
