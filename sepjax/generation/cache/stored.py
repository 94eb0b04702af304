"""Keys and values as they lie in a cache: in the model's type, or as whole numbers of 8 bits with scales.

`cache_dtype="int8"` keeps a vector of H numbers as H codes from -127 to 127 and one scale, its largest number / 127: of
every key head and slot by itself, since slots are written and move one at a time. A token is rounded when it comes:
others see its codes, and it sees itself as they do, so that a run of tokens gives what they give one by one. To turn
codes is to round them again. So keys of a bounded cache lie rotated by the numbers of their slots, which never start
again (`StreamSizes.turned_by_slot`): one that moves to the kept tokens is rounded once more, and none ever after.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import BFloat16, Int8

from sepjax.array_typing import Array, Float
from sepjax.config import ModelConfig
from sepjax.model.rope import Table, rotate

_MOST = 127  # the largest code: -128 is left out, so that a vector and its negative have the same ones
_TOGETHER = 6  # layers whose keys one kernel rotates
_SCALE = jnp.dtype(jnp.bfloat16)  # the codes are of the rounded scale, so that its 8 bits cost nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Vectors of H numbers, each `codes * scale`. Made by `quantised` or `empty`."""

    codes: Int8[jax.Array, "*S H"]
    scales: BFloat16[jax.Array, "*S"]

    # JAX rebuilds pytrees around leaves that are no arrays (shapes, shardings): jaxtyping must not check __init__.
    __no_type_check__ = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """Of the codes."""
        return self.codes.dtype

    def __getitem__(self, index: Any) -> "Quantised":
        """The same of some vectors: `index` is of the axes before H."""
        return Quantised(self.codes[index], self.scales[index])


type Vectors = Float[Array, "..."] | Quantised  # [..., H]
# All layers in one array, for scans over layers; or an array each, which steps of one token read without a copy.
type Layers = Vectors | tuple[Vectors, ...]


def empty(config: ModelConfig, shape: tuple[int, ...], cache_dtype: str) -> Vectors:
    """Zeros of this shape [..., H]: in the model's type, or `Quantised`."""
    if cache_dtype == "int8":
        return Quantised(_zeros(shape, jnp.dtype(jnp.int8)), _zeros(shape[:-1], _SCALE))
    return _zeros(shape, jnp.dtype(config.dtype))


# A cache has two or more of them for each layer: 12 microseconds each in place of 240.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


def vector_bytes(config: ModelConfig, cache_dtype: str) -> int:
    """Bytes of the key or value of one head in one slot."""
    if cache_dtype == "int8":
        return config.head_dim + _SCALE.itemsize
    return config.head_dim * jnp.dtype(config.dtype).itemsize


def quantised(x: Float[Array, "*S H"]) -> Quantised:
    """Rounds vectors: no number is off by more than half a scale, a 254th of the largest of its vector."""
    x = jnp.asarray(x).astype(jnp.float32)
    scales = (jnp.max(jnp.abs(x), axis=-1) / _MOST).astype(_SCALE)
    wide = scales.astype(jnp.float32)[..., None]
    codes = jnp.round(x / jnp.where(wide > 0, wide, 1.0))
    return Quantised(jnp.clip(codes, -_MOST, _MOST).astype(jnp.int8), scales)


def like(stored: Vectors, x: Float[Array, "*S H"]) -> Vectors:
    """Vectors as those that are stored."""
    return quantised(x) if isinstance(stored, Quantised) else x


def plain(x: Vectors, dtype: Any, turn: Table | None = None) -> jax.Array:
    """The numbers, of codes turned by a table [..., R/2]. What is not quantised is as it is."""
    if not isinstance(x, Quantised):
        return jnp.asarray(x)
    numbers = x.codes.astype(jnp.float32) * x.scales.astype(jnp.float32)[..., None]
    return (numbers if turn is None else rotate(numbers[..., None, :], turn)[..., 0, :]).astype(dtype)


def changed(f: Callable[[jax.Array], jax.Array], x: Vectors) -> Vectors:
    """`f` of vectors [..., H], those of 8 bits in float32 and rounded again."""
    return quantised(f(plain(x, jnp.float32))) if isinstance(x, Quantised) else f(jnp.asarray(x))


def for_products(
    k: Vectors, v: Vectors, dtype: Any, *, kernel: bool = False
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Keys and values for `sepjax.attention.decode.attend`, and their scales; None: they have none.

    `kernel`: for the kernel, which converts codes itself.
    """
    if not isinstance(k, Quantised) or not isinstance(v, Quantised):
        return jnp.asarray(k), jnp.asarray(v), None
    if kernel:
        return k.codes, v.codes, (k.scales, v.scales)
    return k.codes.astype(dtype), v.codes.astype(dtype), (k.scales, v.scales)


def in_each_array(f: Callable[..., Any], x: Vectors, *others: Any) -> Vectors:
    """`f` of an array [..., H]; or of codes [..., H] and of scales [...], each with its part of quantised `others`."""
    if not isinstance(x, Quantised):
        return f(x, *others)

    def part(name: str) -> jax.Array:
        parts = (getattr(other, name) if isinstance(other, Quantised) else other for other in others)
        return f(getattr(x, name), *parts)

    return Quantised(part("codes"), part("scales"))


def of_each_layer(f: Callable[..., Vectors], x: Layers, *others: Any) -> Layers:
    """`f` of the vectors of all layers at once, or of each with its own of `others`[L, ...]."""
    if not isinstance(x, tuple):
        return f(x, *others)
    return tuple(f(layer, *(other[i] for other in others)) for i, layer in enumerate(x))


def of_few_layers(f: Callable[..., Vectors], x: Layers, given: Any) -> Layers:
    """`of_each_layer` of f(layer, number, given), for what rotates: a few layers at a time, each few after the last.

    Of layers of one array each XLA would make one kernel of all, as all read what is `given`. Of 30 layers it took
    longer to compile than the rest of a step together; of a few, XLA compiles one kernel for all.
    """
    if not isinstance(x, tuple):
        return f(x, None, given)
    done: list[Any] = []
    for i, layer in enumerate(x):
        if i and i % _TOGETHER == 0:
            given, done[-1] = jax.lax.optimization_barrier((given, done[-1]))
        done.append(f(layer, i, given))
    return tuple(done)


def in_each_layer(f: Callable[..., jax.Array], x: Layers, *others: Any) -> Layers:
    """`in_each_array` of all layers at once, or of each with its own of `others`[L, ...]."""
    return of_each_layer(lambda layer, *own: in_each_array(f, layer, *own), x, *others)
