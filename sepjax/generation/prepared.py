"""What generation needs of a model, a tokenizer and a pattern, made once: weights laid out, tables, checks.

The weights of a model are laid out once for as long as it lives, whoever asks. A model is not held by what was made of
it: drop it, and one copy of the weights remains, in the layout that generates.
"""

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sepjax.array_typing import Bool
from sepjax.config import AttentionConfig, ModelConfig, validate_attention, with_own_window
from sepjax.config.checks import check_type
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.prompts import check_vocabulary
from sepjax.model.transformer import Params, Transformer, split
from sepjax.model.unrolled import by_layer, working_copy
from sepjax.separators import configured_table
from sepjax.sharding import placed_like

_LARGE = 2**30  # bytes of all layers that are not to be in memory twice


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prepared:
    """Made by `create`."""

    config: ModelConfig
    graph: nnx.GraphDef
    params: Params  # those of `by_layer`, for prompts and for steps
    tokenizer: Tokenizer
    attention: AttentionConfig
    table: Bool[np.ndarray, "_"]  # separators among the tokenizer's ids
    table_on_device: Bool[jax.Array, "_"]

    @classmethod
    def create(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        attention: AttentionConfig | None = None,
        *,
        consume: bool = False,
    ) -> "Prepared":
        """Checks that they belong together. `consume`: see `Generator`.

        Raises:
          ConfigError: a pattern out of range, or a tokenizer with more tokens than the model has embeddings.
        """
        attention, table = _ready(pattern_of(model, tokenizer, attention), model.config, tokenizer)
        check_vocabulary(model.config, tokenizer)
        weights = laid_out(model, consume=consume)
        return cls(
            model.config, weights.graph, weights.params, tokenizer, attention, table, jnp.asarray(table)
        )  # fmt: skip

    def under(self, attention: AttentionConfig) -> "Prepared":
        """The same weights under another pattern; raises ConfigError for one out of range."""
        attention, table = _ready(dataclasses.replace(attention), self.config, self.tokenizer)
        return dataclasses.replace(self, attention=attention, table=table, table_on_device=jnp.asarray(table))

    def placed[T](self, state: T) -> T:
        """Fresh arrays put where the weights were put: see `placed_like`."""
        return placed_like(self.params, state)


def _ready(
    attention: AttentionConfig, config: ModelConfig, tokenizer: Tokenizer
) -> tuple[AttentionConfig, Bool[np.ndarray, "_"]]:
    """A pattern as the model computes it, and the separators' table."""
    attention = validate_attention(with_own_window(attention, config), config.num_layers)
    return attention, np.asarray(configured_table(tokenizer, attention))


def pattern_of(model: Transformer, tokenizer: Tokenizer, attention: AttentionConfig | None) -> AttentionConfig:
    """A copy of the pattern that is asked for, or of the model's own; raises ConfigError for things of other types."""
    check_type("model", model, Transformer)
    check_type("tokenizer", tokenizer, Tokenizer)
    if attention is not None:
        check_type("attention", attention, AttentionConfig)
    return dataclasses.replace(attention or model.attention)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Weights:
    """A model's, laid out for generation under one mesh."""

    graph: nnx.GraphDef
    params: Params
    sources: tuple[Any, ...]  # weak references to the model's own arrays
    mesh: Any
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)  # what else was made of them, for whoever knows how
    lock: Any = dataclasses.field(default_factory=threading.RLock)  # of `made`

    def are_of(self, params: Params) -> bool:
        """Whether a model with these parameters still has those that were laid out."""
        leaves = jax.tree.leaves(params)
        same = len(leaves) == len(self.sources) and all(
            source() is x for source, x in zip(self.sources, leaves, strict=True)
        )
        return same and self.mesh == jax.sharding.get_mesh()


_of_models: weakref.WeakKeyDictionary[Transformer, Weights] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def laid_out(model: Transformer, *, consume: bool = False) -> Weights:
    """The weights of a model, laid out at the first call; at a later one again if it has other arrays by then.

    `consume`: whether the first call may delete the layers' arrays (`by_layer`), which it does where they are large:
    that takes a little longer.
    """
    with _lock:
        graph, params = split(model)
        weights = _of_models.get(model)
        if weights is None or not weights.are_of(params):
            sources = tuple(map(weakref.ref, jax.tree.leaves(params)))
            large = sum(x.nbytes for x in jax.tree.leaves(params["layers"])) >= _LARGE
            made = by_layer(params, model.config, consume=consume and large)
            weights = Weights(graph, made, sources, jax.sharding.get_mesh())
            _of_models[model] = weights
        return weights


def to_read_rows(model: Transformer) -> Params:
    """The weights for passes over whole rows: the model's own, in the matmuls' type; or, where these were given up, as
    they were laid out, for a `runner` that scans.
    """
    own = split(model)[1]
    if any(x.is_deleted() for x in jax.tree.leaves(own["layers"])):
        return laid_out(model).params
    return working_copy(own, model.config)


def marks_of(params: Params) -> Iterator[bytes]:
    """Of every array what tells its weights from others: shape, type, and sums of all of its bits.

    Parts of them would not do: an adapter changes matrices and leaves norms as they are, and another step of training
    may change a single matrix.
    """
    for leaf in jax.tree.leaves(params):
        yield f"{leaf.shape}{leaf.dtype}{np.asarray(_sums(leaf)).tolist()}".encode()


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """Two sums of the bits, as whole numbers, so that the order does not matter: plain, and by place."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32).reshape(-1)
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * (jnp.arange(bits.size, dtype=jnp.uint32) | 1))])
