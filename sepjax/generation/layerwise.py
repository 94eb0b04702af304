"""A model for single steps: a layer has arrays of its own, and matrices that read the same input are one.

`Transformer` scans over stacked parameters. That compiles fast, but a step of one token then copies each layer's
matrices out of their stack before it reads them, and small products wait for one another where one would do. Decoding
is nothing but reading matrices, so they are laid out for it once. On a mesh of several devices matrices are not joined:
side by side, the heads of a device would not be.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sepjax.array_typing import Float, Positions, Tokens
from sepjax.config import ModelConfig
from sepjax.generation.weights import working_copy
from sepjax.model.layers import ACTIVATIONS, Attend, Block, output_bias
from sepjax.model.transformer import Params, Transformer, merge, split
from sepjax.sharding import on_one_device

_QKV, _INTO = ("query", "key", "value"), ("gate", "up")


def by_layer(params: Params, config: ModelConfig) -> Params:
    """Parameters for `Layerwise`, in the matmuls' type: "layers" is a tuple of a dict for each."""
    params, join = working_copy(params, config), on_one_device()
    layers = tuple(_take(params["layers"], jnp.int32(i), join=join) for i in range(config.num_layers))
    return params | {"layers": layers}


@functools.partial(jax.jit, static_argnames="join")
def _take(layers: Params, i: jax.Array, *, join: bool) -> Params:
    layer = jax.tree.map(lambda x: x[i], layers)
    if not join:
        return layer
    return layer | {"attention": _join(_one_bias(layer["attention"]), _QKV), "mlp": _join(layer["mlp"], _INTO)}


def _one_bias(attention: Params) -> Params:
    """`attention` with the bias of values in that of the output, where `Attention` has it too."""
    value, out = attention["value"], attention["out"]
    if "bias" not in value or "bias" not in out:
        return attention
    bias = output_bias(value["bias"], out["kernel"], out["bias"])
    return attention | {"value": value | {"bias": jnp.zeros_like(value["bias"])}, "out": out | {"bias": bias}}


def _join(matrices: Params, names: Sequence[str]) -> Params:
    """The matrices of these names as one under "a+b", flat in its outputs; the others as they are."""
    names = [name for name in names if name in matrices]
    parts = [matrices[name] for name in names]
    joined = {"kernel": jnp.concatenate([x["kernel"].reshape(x["kernel"].shape[0], -1) for x in parts], axis=1)}
    if "bias" in parts[0]:
        joined["bias"] = jnp.concatenate([x["bias"].reshape(-1) for x in parts])
    return {name: x for name, x in matrices.items() if name not in names} | {_name(names): joined}


def _name(names: Sequence[str]) -> str:
    return "+".join(names)


def _stand_ins(matrices: Params) -> Params:
    """`matrices` with every name of a joined one: modules want their arrays, but nobody calls those."""
    return {name: x for names, x in matrices.items() for name in names.split("+")}


class Layerwise:
    """`Transformer` over the parameters of `by_layer`: called the same, with the same results to rounding."""

    def __init__(self, graph: nnx.GraphDef, params: Params):
        """`graph` is the Transformer's, from `sepjax.model.transformer.split`."""
        layers = [
            layer | {"attention": _stand_ins(layer["attention"]), "mlp": _stand_ins(layer["mlp"])}
            for layer in params["layers"]
        ]
        self._model: Transformer = merge(graph, params | {"layers": layers[0]})
        block, _ = split(self._model.layers)
        self._blocks: list[Block] = [merge(block, layer) for layer in layers]
        self._layers = params["layers"]
        self.config = self._model.config
        self.gate = self._model.gate
        self.embed = self._model.embed
        self.final_norm = self._model.final_norm
        self.logits = self._model.logits
        self.output_embedding = self._model.output_embedding

    def __call__(
        self, tokens: Tokens, positions: Positions, attend: Attend, layer_inputs: Any
    ) -> tuple[Float[jax.Array, "B T D"], Any]:
        """See `Transformer.__call__`; `layer_inputs` is a tuple whose items have an entry for each layer."""
        x, outputs = self.run_layers(self.embed(tokens, positions), attend, layer_inputs)
        return self.final_norm(x), outputs

    def run_layers(
        self, x: Float[jax.Array, "B T D"], attend: Attend, layer_inputs: Any, first: int = 0, last: int | None = None
    ) -> tuple[Float[jax.Array, "B T D"], Any]:
        """See `Transformer.run_layers`. Of no layers there are no outputs, not even empty ones."""
        outputs = []
        for i in range(self.config.num_layers)[first:last]:
            x, output = self._block(self._blocks[i], self._layers[i], x, attend, tuple(y[i] for y in layer_inputs))
            outputs.append(output)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs) if outputs else None

    def _block(self, block: Block, layer: Params, x: jax.Array, attend: Attend, layer_input: Any) -> Any:
        """`Block.__call__`, with joined matrices where they are."""
        if _name(_QKV) not in layer["attention"]:
            return block(x, attend, layer_input)
        normed = block.attention_norm(x)
        q, k, v = self._heads(_product(normed, layer["attention"][_name(_QKV)]))
        out, layer_output = attend(q, k, v, layer_input)
        attended = block.attention.out(out)
        if not block.parallel:
            x = x + attended
        normed = normed if block.mlp_norm is None else block.mlp_norm(x)
        into = layer["mlp"][_name(_INTO if self.config.gated_mlp else _INTO[1:])]
        added = block.mlp.down(self._activated(_product(normed, into)))
        return x + (attended + added if block.parallel else added), layer_output

    def _heads(self, qkv: jax.Array) -> list[jax.Array]:
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        parts = jnp.split(qkv, [N * H, (N + K) * H], axis=-1)
        return [part.reshape(*part.shape[:-1], -1, H) for part in parts]

    def _activated(self, hidden: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        if not self.config.gated_mlp:
            return activation(hidden)
        gate, up = jnp.split(hidden, 2, axis=-1)
        return activation(gate) * up


def _product(x: jax.Array, matrix: Params) -> jax.Array:
    y = x.astype(matrix["kernel"].dtype) @ matrix["kernel"]
    return y if "bias" not in matrix else y + matrix["bias"].astype(y.dtype)


def runner(graph: nnx.GraphDef, params: Params) -> Transformer | Layerwise:
    """The model of parameters of either kind. Cheap; meant for use inside jitted functions."""
    return Layerwise(graph, params) if isinstance(params["layers"], tuple) else merge(graph, params)
