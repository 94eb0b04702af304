"""One decoder-only Transformer. Its `ModelConfig` expresses Llama, Qwen, Gemma, OLMo, GPT-NeoX and the like.

Flax NNX modules behind a functional boundary: `split` a model once into a hashable graph definition and a plain nested
dict of arrays, hand the dict through `jax.jit` and `jax.grad`, and `merge` inside.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sepjax.array_typing import Array, Float, Int32, Positions, Tokens
from sepjax.config import AttentionConfig, ModelConfig
from sepjax.model import quantised
from sepjax.model.folded import folded
from sepjax.model.gate import Gate
from sepjax.model.layers import Attend, Block, make_norm
from sepjax.model.quantised import QuantisedMatrix
from sepjax.sharding import constrain, parameter_shardings

type Params = dict[str, Any]


class Embedding(nnx.Embed):
    """`nnx.Embed` that reads rows before it converts them, so that tokens add up their gradients in float32.

    Attributes:
      scales: of the rows, [V], where they are codes (`sepjax.model.quantised`); None: they are numbers.
    """

    scales: nnx.Param[jax.Array] | None = None

    def __call__(self, ids: Int32[Array, "B T"]) -> Float[jax.Array, "B T D"]:
        """The rows of ids[B, T], [B, T, D] in the activations' dtype.

        On a mesh every device of `fsdp` reads its part of D for the tokens of all of them, and an all-to-all brings
        each its own tokens. The table, far larger than the activations, stays where it is; so does its gradient.
        """
        ids = constrain(jnp.asarray(ids), "rows of fsdp", "length")
        x = jnp.take(self.embedding[...], ids, axis=0)
        if self.scales is not None:
            x = x.astype(jnp.float32) * jnp.take(self.scales[...], ids)[..., None]
        x = x.astype(self.dtype)
        return constrain(constrain(x, "rows of fsdp", "length", "embed"), "batch", "length", "hidden")

    def matrix(self) -> Float[jax.Array, "V D"] | QuantisedMatrix:
        """All rows, as they are."""
        return self.embedding[...] if self.scales is None else QuantisedMatrix(self.embedding[...], self.scales[...])


class Transformer(nnx.Module):
    """Embedding, L scanned blocks, final norm, head.

    Attributes:
      config: the shape.
      attention: who attends to whom, by default; callers may pass another attention config to what uses it.
      kept: what bounded caches have in its place, if something was measured for the model (`sepjax.kept`); else None.
      folds: whether norms' weights are multiplied into the matrices that read them (`sepjax.model.folded`).
      layers: one `Block` whose parameters have a leading axis L.
      gate: what scores tokens for pattern="gated"; None where `attention` has another.
    """

    def __init__(self, config: ModelConfig, attention: AttentionConfig | None = None, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = attention or AttentionConfig()
        self.kept: AttentionConfig | None = None
        self.folds = False
        self.embedding = _embedding(config.vocab_size, config, rngs, is_output=config.tie_embeddings)
        learned = config.position_embedding == "learned"
        self.position_embedding = _embedding(config.max_positions, config, rngs) if learned else None
        self.layers = _stack(config, rngs)
        self.final_norm = make_norm(config, rngs)
        self.head = None if config.tie_embeddings else _embedding(config.vocab_size, config, rngs, is_output=True)
        # The last: with and without it, the other parameters are drawn alike.
        self.gate = Gate(config, rngs=rngs) if self.attention.pattern == "gated" else None

    def __repr__(self) -> str:
        return f"Transformer({self.config.in_words()}; {self.attention.in_words()})"

    __str__ = __repr__  # NNX has another, of every parameter

    def __call__(
        self, tokens: Tokens, positions: Positions, attend: Attend, layer_inputs: Any = None
    ) -> tuple[Float[jax.Array, "B T D"], Any]:
        """Runs the blocks.

        Args:
          tokens: int32[B, T].
          positions: int32[B, T] within each document; read by learned position embeddings only.
          attend: the attention, called once a layer (see `sepjax.model.layers.Attend`).
          layer_inputs: a pytree of arrays with a leading axis L; each layer's `attend` gets its slice.

        Returns:
          The hidden states after the final norm, [B, T, D], and what `attend` returned, stacked along L.
        """
        x, layer_outputs = self.run_layers(self.embed(tokens, positions), attend, layer_inputs)
        return self.final_norm(x), layer_outputs

    def embed(self, tokens: Tokens, positions: Positions) -> Float[jax.Array, "B T D"]:
        """What enters the first layer; arguments as in `__call__`."""
        # Behind the barrier the rows are written once, in 16 bits; without, every use of x would gather them again.
        return jax.lax.optimization_barrier(self.embedded(tokens, positions))

    def embedded(self, tokens: Tokens, positions: Positions) -> Float[jax.Array, "B T D"]:
        """`embed` as a part of whatever kernel reads it."""
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        return constrain(x, "batch", "length", "hidden")

    def run_layers(
        self,
        x: Float[jax.Array, "B T D"],
        attend: Attend,
        layer_inputs: Any = None,
        first: int = 0,
        last: int | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], Any]:
        """Runs the layers first ... last - 1 (None: to the end) on what enters the first of them.

        `layer_inputs` are of all L layers; what `attend` returned is stacked along an axis of those that ran. Arguments
        as in `__call__`.
        """
        graph, params = split(self.layers)
        inputs = params, layer_inputs
        if (first, last) != (0, None):
            inputs = jax.tree.map(lambda x: x[first:last], inputs)

        def layer(x: jax.Array, inputs: tuple[Params, Any]) -> tuple[jax.Array, Any]:
            params, layer_input = inputs
            block = merge(graph, folded(params, self.config) if self.folds else params)
            block.folds = self.folds
            return block(x, attend, layer_input)

        unroll = 1 if self.config.scan_layers else self.config.num_layers
        return jax.lax.scan(_rematerialised(layer, self.config), x, inputs, unroll=unroll)

    def logits(self, hidden: Float[jax.Array, "*B D"]) -> Float[jax.Array, "*B V"]:
        """Scores of the next token, float32[..., V], from hidden states [..., D]."""
        return scaled_logits(self.output_products(hidden), self.config)

    def output_products(self, hidden: Float[jax.Array, "*B D"]) -> Float[jax.Array, "*B V"]:
        """Products of hidden states and `output_matrix`, float32."""
        dtype, matrix = jnp.dtype(self.config.dtype), self.output_matrix()
        if isinstance(matrix, QuantisedMatrix):
            return quantised.product_by_outputs(hidden.astype(dtype), matrix, jnp.float32)
        kernel = matrix.astype(dtype)
        return jnp.einsum("...d,vd->...v", hidden.astype(dtype), kernel, preferred_element_type=jnp.float32)

    def output_embedding(self) -> Float[jax.Array, "V D"]:
        """A row for each token: the head's, or the tied embedding's; those of 8 bits as numbers of the matmuls' type.

        Its product with a hidden state is the token's logit but for `scaled_logits`, which callers are to apply.
        """
        matrix = self.output_matrix()
        return matrix.numbers(self.config.dtype) if isinstance(matrix, QuantisedMatrix) else matrix

    def output_matrix(self) -> Float[jax.Array, "V D"] | QuantisedMatrix:
        """`output_embedding` as it is."""
        return (self.head or self.embedding).matrix()


def scaled_logits(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """Products of hidden states and output embeddings as the config has them: divided, capped, or as they are."""
    if config.logit_divisor != 1:
        logits = logits / config.logit_divisor
    return config.final_softcap * jnp.tanh(logits / config.final_softcap) if config.final_softcap else logits


def create(config: ModelConfig, attention: AttentionConfig | None, key: jax.Array) -> Transformer:
    """A new model with random parameters."""
    return Transformer(config, attention, rngs=nnx.Rngs(params=key))


def in_8_bits(model: Transformer, mesh: Mesh | None = None) -> Transformer:
    """A model with codes and scales for the matrices of `model` (`sepjax.model.quantised`), which is used up.

    `mesh`: where the parameters lie; None: on one device.
    """
    config = dataclasses.replace(model.config, weight_dtype="int8")
    graph, _ = abstract(config, model.attention)
    params = quantised.in_8_bits(split(model)[1], tied=config.tie_embeddings)
    made = merge(graph, params if mesh is None else jax.device_put(params, parameter_shardings(params, mesh)))
    made.kept = model.kept
    return made


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model's hashable structure and its parameters as a nested dict of arrays."""
    graph, state = nnx.split(model)
    return graph, _values(state)


def _values(state: Any) -> Any:
    """The arrays of a state, nested as it is.

    Like `_paths` in place of `nnx.to_pure_dict` and of what `nnx.merge` does to a dict: these leave all arrays in a
    circle of references, so that a model that was dropped keeps its memory until Python looks for such circles.
    """
    if isinstance(state, Mapping):
        return {name: _values(part) for name, part in sorted(state.items())}
    return state.get_value() if isinstance(state, nnx.Variable) else state


def _paths(params: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every array of nested dicts, with the names that lead to it."""
    if not isinstance(params, Mapping):
        yield path, params
        return
    for name, part in params.items():
        yield from _paths(part, (*path, name))


def merge(graph: nnx.GraphDef, params: Params) -> Any:
    """The inverse of `split`. Cheap; meant for use inside jitted functions."""
    return nnx.merge(graph, nnx.FlatState(_paths(params), sort=True))


def abstract(config: ModelConfig, attention: AttentionConfig | None = None) -> tuple[nnx.GraphDef, Params]:
    """`split` of a model without its memory: the leaves are `jax.ShapeDtypeStruct`."""
    attention = attention or AttentionConfig()
    model = merge(*_traced(config, attention.pattern == "gated", jax.sharding.get_abstract_mesh()))
    model.attention = attention  # of which the parameters know no more than whether there is a gate
    return split(model)


@functools.lru_cache(maxsize=64)
def _traced(config: ModelConfig, gated: bool, _: jax.sharding.AbstractMesh) -> tuple[nnx.GraphDef, Params]:
    """`abstract` of some attention. A tenth of a second each, and loading a model asks for the same shapes thrice."""
    attention = AttentionConfig("gated") if gated else None
    return split(nnx.eval_shape(lambda: create(config, attention, jax.random.key(0))))


def _embedding(rows: int, config: ModelConfig, rngs: nnx.Rngs, *, is_output: bool = False) -> Embedding:
    init = nnx.initializers.normal(0.02)
    table = Embedding(rows, config.embed_dim, embedding_init=init, dtype=jnp.dtype(config.dtype), rngs=rngs)
    if is_output and config.weight_dtype == "int8":
        codes, scales = quantised.quantise(table.embedding.get_value(), (1,))
        table.embedding.set_value(codes)
        table.scales = nnx.Param(scales)
    return table


def _stack(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """One block whose every parameter has a leading axis of layers, each layer drawn from a key of its own."""
    graphs: list[nnx.GraphDef] = []

    def layer(key: jax.Array) -> Params:
        graph, params = split(Block(config, rngs=nnx.Rngs(params=key)))
        graphs.append(graph)
        return params

    params = jax.vmap(layer)(jax.random.split(rngs.params(), config.num_layers))
    return nnx.merge(graphs[0], params)


def _rematerialised(layer: Any, config: ModelConfig) -> Any:
    if config.remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(layer, policy=policy, prevent_cse=not config.scan_layers)  # a scan keeps the passes apart
