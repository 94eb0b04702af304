"""Parameters put together from a source of named tensors, each shard from its own part."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from sepjax.config import ModelConfig
from sepjax.hub.errors import HubError
from sepjax.hub.families import flat, rows_of, shapes_of
from sepjax.hub.tables import Family, Row, Shape
from sepjax.model.quantised import inputs_of, quantise_on_host
from sepjax.model.transformer import Params, abstract
from sepjax.model.unrolled import is_matmuls
from sepjax.progress import working
from sepjax.sharding import parameter_shardings

WORKING = "working"  # in place of a dtype: see `assemble`


@runtime_checkable
class Source(Protocol):
    """Named tensors of a checkpoint."""

    path: Any  # for messages

    def shapes(self) -> Mapping[str, Shape]:
        """Every tensor's shape, by its full name in the family's table."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """A tensor's type."""
        ...

    def view(self, name: str) -> np.ndarray:
        """A tensor, read no sooner than its numbers are used if that can be."""
        ...


def assemble(
    source: Source,
    family: Family,
    config: ModelConfig,
    *,
    param_dtype: str | None = None,
    matrix_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Our parameters from a source, straight into their shards: no host array ever holds more than a shard's part.

    Args:
      source: the tensors.
      family: the table of their names.
      config: the shape that they must have.
      param_dtype: of the parameters; None: the source's own; "working": the same, but matrices of more bytes than
        `config.dtype` has in that, as `sepjax.model.unrolled.working_copy` would convert them. Matrices of a config
        with weight_dtype="int8" have 8 bits whatever this is; a layer at a time they are rounded on the host.
      matrix_dtype: of matrices and embeddings where `param_dtype` names none; None: the source's own, too.
      mesh: where they go (`sepjax.sharding.parameter_shardings`); None: the first device.

    Raises:
      HubError: a tensor is missing, unknown or of another shape or no floating-point numbers; names it.
    """
    tree = abstract(dataclasses.replace(config, weight_dtype="model"))[1]
    shapes = shapes_of(tree)
    rows = rows_of(family, config, shapes)
    _check(source, family, config, rows, shapes)
    where = {name: (row, i) for row in rows for i, name in enumerate(row.ours)}
    used, of_all = np.dtype(jax.numpy.dtype(config.dtype)), None if param_dtype == WORKING else param_dtype
    arrays = {}
    for name, in_layers, leaf in flat(tree):
        row, part = where[name]
        inputs = inputs_of(name, in_layers, config.tie_embeddings) if config.weight_dtype == "int8" else None
        is_matrix = is_matmuls(name.split("/"), leaf.ndim - in_layers)
        wanted = "float32" if inputs else of_all or (matrix_dtype if is_matrix else None)
        dtype = _dtype(source, row, config, wanted)
        if param_dtype == WORKING and is_matrix and not inputs:
            dtype = min(dtype, used, key=lambda x: x.itemsize)
        read = _reader(source, row, part, [shapes[ours] for ours in row.ours], leaf.shape, dtype)
        key = tuple(f"{'layers/' * in_layers}{name}".split("/"))
        if inputs is None:
            arrays[key] = leaf.shape, dtype, read
            continue
        rounded = _Rounded(read, leaf.shape, inputs)
        arrays[key] = leaf.shape, np.dtype(np.int8), rounded.codes
        outputs = tuple(n for axis, n in enumerate(leaf.shape) if axis not in inputs)
        arrays[*key[:-1], "scales"] = outputs, np.dtype(np.float32), rounded.scales
    return _built(source, arrays, mesh)


type _Read = Callable[[tuple[slice, ...] | None], np.ndarray]


def _built(
    source: Source, arrays: Mapping[tuple[str, ...], tuple[Shape, np.dtype, _Read]], mesh: Mesh | None
) -> Params:
    """The parameters of these names, shapes, types and what reads them."""
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype, _) in arrays.items()}
    made: Params = {}
    with working(f"loading {source.path}", sum(sizes.values()), "bytes") as work:
        # The largest first: a parameter is in memory twice for a moment, and by then little else is.
        for key in sorted(arrays, key=lambda key: -sizes[key]):
            (shape, dtype, read), (*names, last) = arrays[key], key
            holder = made
            for name in names:
                holder = holder.setdefault(name, {})
            like = {names[-1]: {last: jax.ShapeDtypeStruct(shape, dtype)}}
            sharding = jax.tree.leaves(parameter_shardings(like, mesh))[0] if mesh else _first_device()
            holder[last] = jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read))
            work.add(sizes[key])
    return made


class _Rounded:
    """Reads parts of a matrix as codes, and the scales of their outputs (`sepjax.model.quantised`): whole inputs at a
    time, and of stacked layers one after the other."""

    def __init__(self, read: _Read, shape: Shape, inputs: tuple[int, ...]):
        self._read, self._shape, self._inputs = read, shape, inputs
        self._outputs = tuple(axis for axis in range(len(shape)) if axis not in inputs)
        self._scales: dict[tuple[range, ...], np.ndarray] = {}

    def codes(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """int8 of that part."""
        index = tuple(slice(None) for _ in self._shape) if index is None else index
        return self._rounded([index[axis] for axis in self._outputs])[(*self._cut(index),)]

    def scales(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """float32 of the outputs of a part."""
        index = tuple(slice(None) for _ in self._outputs) if index is None else index
        if self._key(index) not in self._scales:
            self._rounded(index)
        return self._scales[self._key(index)]

    def _cut(self, index: Sequence[slice]) -> list[slice]:
        return [x if axis in self._inputs else slice(None) for axis, x in enumerate(index)]

    def _key(self, outputs: Sequence[slice]) -> tuple[range, ...]:
        return tuple(range(self._shape[axis])[x] for axis, x in zip(self._outputs, outputs, strict=True))

    def _rounded(self, outputs: Sequence[slice]) -> np.ndarray:
        key = self._key(outputs)
        whole = [slice(None)] * len(self._shape)
        for axis, x in zip(self._outputs, outputs, strict=True):
            whole[axis] = x
        if len(self._shape) == 2:  # an embedding: no layers are stacked
            numbers = self._read(tuple(whole))
            own = numbers if numbers.flags.writeable else numbers.copy()  # or it is the mapped file
            codes, self._scales[key] = quantise_on_host(own, self._inputs)
            return codes
        parts = []
        codes = np.empty([len(range(n)[x]) for n, x in zip(self._shape, whole, strict=True)], np.int8)
        for target, i in zip(codes, key[0], strict=True):
            numbers = self._read((slice(i, i + 1), *whole[1:]))
            found, scales = quantise_on_host(numbers, self._inputs)
            target[...] = found[0]
            parts.append(scales)
        self._scales[key] = np.concatenate(parts)
        return codes


def check_sizes(source: Source, config: ModelConfig) -> None:
    """Raises HubError for a shape that no tensor of the source has room for, before anything of that size is made."""
    shapes = source.shapes()
    numbers = max((math.prod(shape) for shape in shapes.values()), default=0)
    rows = {
        "vocab_size": config.vocab_size,
        "num_heads * head_dim": config.num_heads * config.head_dim,
        "num_kv_heads * head_dim": config.num_kv_heads * config.head_dim,
        "mlp_dim": config.mlp_dim,
        "max_positions": config.max_positions if config.position_embedding == "learned" else 1,
    }
    for name, size in rows.items():
        if size * config.embed_dim > numbers:
            raise HubError(
                f"{str(source.path)!r}: its config has {name} = {size} and embed_dim = {config.embed_dim}, but the "
                f"largest tensor has {numbers} numbers; they do not belong together"
            )
    if config.num_layers > len(shapes):
        raise HubError(
            f"{str(source.path)!r}: its config has {config.num_layers} layers, but there are {len(shapes)} tensors in "
            "all; they do not belong together"
        )


def _first_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


def _reader(
    source: Source, row: Row, part: int, shapes: Sequence[Shape], whole: Shape, dtype: np.dtype
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """Reads the part of a parameter that an index selects: of stacked layers one after the other."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        index = tuple(slice(None) for _ in whole) if index is None else index
        if not row.in_layers:
            return np.ascontiguousarray(row.kind.split(source.view(row.theirs), shapes)[part][index], dtype)
        layers = range(whole[0])[index[0]]
        out = np.empty((len(layers), *(len(range(n)[i]) for n, i in zip(whole[1:], index[1:], strict=True))), dtype)
        for target, layer in zip(out, layers, strict=True):
            target[...] = row.kind.split(source.view(row.theirs.format(layer)), shapes)[part][index[1:]]
        return out

    return read


def _dtype(source: Source, row: Row, config: ModelConfig, wanted: str | None) -> np.dtype:
    found = {source.dtype(name) for name in _names([row], config)}
    strange = [dtype for dtype in found if not jax.numpy.issubdtype(dtype, jax.numpy.floating) or dtype.itemsize < 2]
    if strange:
        raise HubError(
            f"{str(source.path)!r}: tensor {row.theirs.format(0)!r} holds {strange[0]} numbers; quantised checkpoints "
            "are not supported: take one in float32, float16 or bfloat16, or a GGUF file"
        )
    if wanted is not None:
        return np.dtype(jax.numpy.dtype(wanted))
    return found.pop() if len(found) == 1 and found != {np.dtype(np.float64)} else np.dtype(np.float32)


def _names(rows: Iterable[Row], config: ModelConfig) -> list[str]:
    return [row.theirs.format(i) for row in rows for i in (range(config.num_layers) if row.in_layers else (0,))]


def _check(
    source: Source, family: Family, config: ModelConfig, rows: Sequence[Row], shapes: Mapping[str, Shape]
) -> None:
    there = source.shapes()
    names = _names(rows, config)
    missing = [name for name in names if name not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise HubError(
            f"{str(source.path)!r} lacks tensor {missing[0]!r}{more}; its config describes a {family.name} of "
            f"{config.num_layers} layers: the files do not belong together, or some are missing"
        )
    for row in rows:
        expected = row.kind.theirs([shapes[name] for name in row.ours])
        for name in _names([row], config):
            if there[name] != expected:
                raise HubError(
                    f"{str(source.path)!r}: tensor {name!r} has shape {list(there[name])}, expected {list(expected)} "
                    "by its config; the files do not belong together"
                )
    known = {*names, *(row.theirs for row in family.table(config) if config.tie_embeddings and "head/" in row.ours[0])}
    unknown = sorted(name for name in set(there) - known if not family.ignored.fullmatch(name))
    if unknown:
        raise HubError(
            f"{str(source.path)!r} has tensor {unknown[0]!r}, which a {family.name} with its config does not have; the "
            "result would not be that model"
        )
