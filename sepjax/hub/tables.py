"""How the tensors of other projects become ours and ours theirs: a row of a table each.

Reading is by views (reshape, transpose, slice), so a shard copies only its own numbers out of the mapped file.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from sepjax.config import ModelConfig
from sepjax.hub.fields import Fields

type Shape = tuple[int, ...]


@runtime_checkable
class Kind(Protocol):
    """How one of their tensors lies in one or several of ours."""

    def theirs(self, shapes: Sequence[Shape]) -> Shape:
        """Their tensor's shape, from those of ours."""
        ...

    def split(self, x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Ours from theirs: views where strides allow."""
        ...

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Theirs from ours."""
        ...


class _Same:
    """Embeddings and norms: as they are."""

    def theirs(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def split(self, x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [x]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return parts[0]


class _Flat:
    """A bias, ours by heads."""

    def theirs(self, shapes: Sequence[Shape]) -> Shape:
        return (math.prod(shapes[0]),)

    def split(self, x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [x.reshape(shapes[0])]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return parts[0].reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix: ours [*inputs, *outputs], theirs [outputs, inputs] (torch's Linear) or [inputs, outputs] (Conv1D)."""

    inputs: int  # axes of ours that are inputs
    outputs_first: bool

    def theirs(self, shapes: Sequence[Shape]) -> Shape:
        i, o = math.prod(shapes[0][: self.inputs]), math.prod(shapes[0][self.inputs :])
        return (o, i) if self.outputs_first else (i, o)

    def split(self, x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [(x.T if self.outputs_first else x).reshape(shapes[0])]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        x = parts[0].reshape(math.prod(parts[0].shape[: self.inputs]), -1)
        return x.T if self.outputs_first else x


class _Grouped:
    """Q, K and V by groups, one a key head: its G queries, its key, its value (GPT-NeoX: G = 1, Falcon-7B: one group).

    theirs [K * (G + 2) * H, D] or, of biases, [K * (G + 2) * H]
    """

    def theirs(self, shapes: Sequence[Shape]) -> Shape:
        rows = sum(math.prod(shape[-2:]) for shape in shapes)
        return (rows, *shapes[0][:-2])

    def split(self, x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        (*_, N, H), (*_, K, _), _ = shapes
        x = x.reshape(K, N // K + 2, H, *x.shape[1:])
        if x.ndim == 4:
            x = np.moveaxis(x, -1, 0)
        parts = x[..., :-2, :], x[..., -2:-1, :], x[..., -1:, :]
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        *lead, K, H = parts[1].shape
        x = np.concatenate([part.reshape(*lead, K, -1, H) for part in parts], axis=-2)
        x = np.moveaxis(x, 0, -1) if lead else x
        return x.reshape(-1, *lead)


class _SideBySide:
    """Q, K and V side by side: theirs [D, 3 * N * H] or, of biases, [3 * N * H] (GPT-2)."""

    def theirs(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][:-2], sum(math.prod(shape[-2:]) for shape in shapes))

    def split(self, x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        x = x.reshape(*x.shape[:-1], 3, *shapes[0][-2:])
        return [x[..., i, :, :] for i in range(3)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        x = np.stack(parts, axis=-3)
        return x.reshape(*x.shape[:-3], -1)


class _Stacked:
    """Matrices that read the same input, one below the other: theirs [all outputs, D] (Phi-3)."""

    def theirs(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(math.prod(shape[1:]) for shape in shapes), shapes[0][0])

    def split(self, x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        ends = np.cumsum([math.prod(shape[1:]) for shape in shapes])[:-1]
        return [part.T.reshape(shape) for part, shape in zip(np.split(x, ends), shapes, strict=True)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([part.reshape(part.shape[0], -1).T for part in parts])


SAME, FLAT, GROUPED, SIDE_BY_SIDE, STACKED = _Same(), _Flat(), _Grouped(), _SideBySide(), _Stacked()
LINEAR, LINEAR_OUT = _Matrix(1, True), _Matrix(2, True)
CONV, CONV_OUT = _Matrix(1, False), _Matrix(2, False)


@dataclasses.dataclass(frozen=True)
class Row:
    """One of their tensors; `{}` in its name is the layer."""

    theirs: str
    kind: Kind
    ours: tuple[str, ...]  # paths of our parameters, "attention/query/kernel"; a layer's are stacked under "layers"

    @property
    def in_layers(self) -> bool:
        """Whether every layer has one."""
        return "{}" in self.theirs


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face transformers."""

    name: str  # "llama"
    model_types: tuple[str, ...]  # of config.json that are read as this family
    architecture: str  # class that opens it, for config.json
    prefix: str  # of tensor names, which files of the bare model leave out
    read_config: Callable[[Fields], ModelConfig]
    write_config: Callable[[ModelConfig], dict]  # of config.json; raises HubError, with the reason, if it cannot be
    table: Callable[[ModelConfig], tuple[Row, ...]]  # rows for what the config does not have are left out by callers
    ignored: re.Pattern[str]  # tensors that hold no weights: masks and rotary tables that old files carry
    features: frozenset[str] = frozenset()  # fields of a ModelConfig that Llama, GPT and Falcon leave at their defaults
    layer_types: tuple[str, ...] | None = ("full_attention",)  # kinds of layers that a config may list; None: it reads


def make_rows(prefix: str, *table: tuple[str, Kind, str]) -> tuple[Row, ...]:
    """Rows from (their name behind `prefix`, kind, paths of ours divided by spaces)."""
    return tuple(Row(prefix + theirs, kind, tuple(ours.split())) for theirs, kind, ours in table)
