"""Parameters laid out for inference: a layer has arrays of its own, and matrices that read the same input are one.

`Transformer` scans over stacked parameters. That compiles fast, but a step of one token then copies each layer's
matrices out of their stack before it reads them, and small products wait for one another where one would do. Decoding
is nothing but reading matrices, so they are laid out for it once. On a mesh of several devices matrices are not joined:
side by side, the heads of a device would not be.

On one GPU matrices lie by their outputs, "rows" [O, I] in place of "kernel" [I, O]: as many bytes, as fast for prompts,
and a step of a single row reads along memory (`sepjax.model.few_rows`).

The same arrays serve prompts: there the layers are scanned, each round taking its layer's matrices by number, which
compiles as fast as a scan over a stack and copies no more.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sepjax.array_typing import Float, Positions, Tokens
from sepjax.attention.target import target
from sepjax.config import ModelConfig
from sepjax.model import few_rows, quantised
from sepjax.model.layers import ACTIVATIONS, Attend, Block, output_bias
from sepjax.model.quantised import QuantisedMatrix
from sepjax.model.transformer import Params, Transformer, merge, scaled_logits, split
from sepjax.sharding import on_one_device

_QKV, _INTO = ("query", "key", "value"), ("gate", "up")


def by_layer(params: Params, config: ModelConfig, *, by_output: bool | None = None, consume: bool = False) -> Params:
    """Parameters for `Layerwise`, in the matmuls' type: "layers" is a tuple of a dict for each.

    by_output: whether matrices lie by their outputs, on one device alone; None: where that is a GPU.
    consume: whether the layers' arrays are given up, and deleted one after the other: at most one of them is in memory
      twice at a time, where else all are.
    """
    join, dtype = on_one_device(), jnp.dtype(config.dtype)
    turn = join and (target().platform == "gpu" if by_output is None else by_output)
    around = {name: x for name, x in params.items() if name != "layers"}
    lay = functools.partial(_laid_out, dtype=dtype, join=join, turn=turn)
    if consume:
        layers = tuple(map(lay, _taken_apart(params["layers"], config.num_layers)))
    else:
        take = functools.partial(_take, params["layers"], dtype=dtype, join=join, turn=turn)
        layers = tuple(take(jnp.int32(i)) for i in range(config.num_layers))
    return working_copy(around, config) | {"layers": layers}


def _taken_apart(stacks: Params, num_layers: int) -> Iterator[Params]:
    """The layers of stacked arrays, which are deleted; each is the receiver's alone."""
    leaves, tree = jax.tree.flatten(stacks)
    parts = []
    for stack in leaves:
        parts.append([_part(stack, jnp.int32(i)) for i in reversed(range(num_layers))])
        jax.block_until_ready(parts[-1])  # or the next ones had memory before this one is gone
        stack.delete()
    for _ in range(num_layers):
        yield jax.tree.unflatten(tree, [part.pop() for part in parts])


@jax.jit
def _part(stack: jax.Array, i: jax.Array) -> jax.Array:
    return stack[i]


def working_copy(params: Params, config: ModelConfig) -> Params:
    """The matrices in the type of the matmuls; vectors (norms and biases) and a gate stay float32, as they are used.

    Matrices of 8 bits stay that, and their scales float32.

    The results are those of the parameters themselves, bit for bit: layers convert a matrix before they use it.
    Parameters that have their type already are returned as they are.
    """
    dtype = jnp.dtype(config.dtype)
    return params if all(x.dtype == dtype for x in jax.tree.leaves(params)) else _convert(params, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _convert(params: Params, dtype: jnp.dtype) -> Params:
    return _converted(params, dtype)


def _converted(params: Params, dtype: jnp.dtype) -> Params:
    def convert(path: tuple, x: jax.Array) -> jax.Array:
        names = [getattr(key, "key", None) for key in path]
        is_code = x.dtype == jnp.int8 or names[-1] == "scales"
        return x.astype(dtype) if is_matmuls(names, x.ndim - ("layers" in names)) and not is_code else x

    return jax.tree_util.tree_map_with_path(convert, params)


def is_matmuls(path: Sequence[str | None], ndim: int) -> bool:
    """Whether `working_copy` converts the parameter of a path that has so many axes, that of the layers aside."""
    is_gate = path[0] == "gate"  # small, and half of it computes in float32
    return ndim >= 2 and path[-1] != "bias" and not is_gate


@functools.partial(jax.jit, static_argnames=("dtype", "join", "turn"))
def _take(layers: Params, i: jax.Array, *, dtype: jnp.dtype, join: bool, turn: bool) -> Params:
    return _laid_out(jax.tree.map(lambda x: x[i], layers), dtype=dtype, join=join, turn=turn)


@functools.partial(jax.jit, static_argnames=("dtype", "join", "turn"))
def _laid_out(layer: Params, *, dtype: jnp.dtype, join: bool, turn: bool) -> Params:
    layer = _converted(layer, dtype)
    if not join:
        return layer
    joined = {"attention": _join(_one_bias(layer["attention"]), _QKV), "mlp": _join(layer["mlp"], _INTO)}
    return layer | ({name: _by_output(x) for name, x in joined.items()} if turn else joined)


def _by_output(matrices: Params) -> Params:
    """Matrices with their outputs in front; what normalises heads is left as it is."""

    def turned(x: Params) -> Params:
        if "kernel" not in x:
            return x
        rows = x["kernel"].reshape(-1, x["kernel"].shape[-1]).T
        rows = QuantisedMatrix(rows, x["scales"]) if "scales" in x else rows
        return {name: y for name, y in x.items() if name not in ("kernel", "scales")} | {"rows": rows}

    return {name: turned(x) for name, x in matrices.items()}


def _one_bias(attention: Params) -> Params:
    """`attention` with the bias of values in that of the output, where `Attention` has it too."""
    value, out = attention["value"], attention["out"]
    if "bias" not in value or "bias" not in out:
        return attention
    kernel = quantised.numbers(out["kernel"], out["scales"]) if "scales" in out else out["kernel"]
    bias = output_bias(value["bias"], kernel, out["bias"])
    return attention | {"value": value | {"bias": jnp.zeros_like(value["bias"])}, "out": out | {"bias": bias}}


def _join(matrices: Params, names: Sequence[str]) -> Params:
    """The matrices of these names as one under "a+b", flat in its outputs; the others as they are."""
    names = [name for name in names if name in matrices]
    parts = [matrices[name] for name in names]
    joined = {"kernel": jnp.concatenate([x["kernel"].reshape(x["kernel"].shape[0], -1) for x in parts], axis=1)}
    for vector in ("bias", "scales"):
        if vector in parts[0]:
            joined[vector] = jnp.concatenate([x[vector].reshape(-1) for x in parts])
    return {name: x for name, x in matrices.items() if name not in names} | {_name(names): joined}


def _name(names: Sequence[str]) -> str:
    return "+".join(names)


def _stand_in(layer: Params) -> Params:
    """`layer` as `Block` has it."""
    return layer | {"attention": _stand_ins(layer["attention"]), "mlp": _stand_ins(layer["mlp"])}


def _stand_ins(matrices: Params) -> Params:
    """`matrices` with every name of a joined one: modules want their arrays, but nobody calls those."""

    def kernels(x: Params) -> Params:
        if isinstance(rows := x.get("rows"), QuantisedMatrix):
            return {name: y for name, y in x.items() if name != "rows"} | {"kernel": rows.codes, "scales": rows.scales}
        return {"kernel" if name == "rows" else name: y for name, y in x.items()}

    return {name: kernels(x) for names, x in matrices.items() for name in names.split("+")}


class Layerwise:
    """`Transformer` over the parameters of `by_layer`: called the same, with the same results to rounding."""

    def __init__(self, graph: nnx.GraphDef, params: Params, *, scan: bool = False):
        """`graph` is the Transformer's, from `sepjax.model.transformer.split`.

        scan: for passes over many tokens, whose compilation counts and whose copies of matrices do not.
        """
        self._params, self._layers, self._scan = params, params["layers"], scan
        self._model: Transformer = merge(graph, params | {"layers": _stand_in(self._layers[0])})
        self._graph, _ = split(self._model.layers)
        self.config = self._model.config
        self.attention = self._model.attention
        self.gate = self._model.gate
        self.embed, self.embedded = self._model.embed, self._model.embedded
        self.final_norm = self._model.final_norm
        self.output_embedding = self._model.output_embedding
        self.output_matrix = self._model.output_matrix

    def __call__(
        self, tokens: Tokens, positions: Positions, attend: Attend, layer_inputs: Any
    ) -> tuple[Float[jax.Array, "B T D"], Any]:
        """See `Transformer.__call__`; `layer_inputs`: an array, or a tuple of items with an entry a layer, or None."""
        x, outputs = self.run_layers(self.embed(tokens, positions), attend, layer_inputs)
        return self.final_norm(x), outputs

    def logits(self, hidden: Float[jax.Array, "*B D"]) -> Float[jax.Array, "*B V"]:
        """See `Transformer.logits`."""
        if "rows" not in self._layers[0]["mlp"]["down"]:
            return self._model.logits(hidden)
        matrix = self.output_matrix()
        if not isinstance(matrix, QuantisedMatrix):
            matrix = matrix.astype(self.config.dtype)
        return scaled_logits(few_rows.products(hidden, matrix, dtype=jnp.float32)[0], self.config)

    def run_layers(
        self, x: Float[jax.Array, "B T D"], attend: Attend, layer_inputs: Any, first: int = 0, last: int | None = None
    ) -> tuple[Float[jax.Array, "B T D"], Any]:
        """See `Transformer.run_layers`. Of no layers there are no outputs, not even empty ones, unless scanned."""
        numbers = range(self.config.num_layers)[first:last]
        if self._scan:
            return self._scan_layers(x, attend, layer_inputs, numbers)
        outputs = []
        for i in numbers:
            x, output = self._block(self._layers[i], x, attend, _of_layer(layer_inputs, i))
            outputs.append(output)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs) if outputs else None

    @property
    def by_output(self) -> Params | None:
        """The parameters, if matrices of all layers are joined and lie by their outputs; else None."""
        return self._params if "rows" in self._layers[0]["mlp"]["down"] else None

    def _scan_layers(self, x: jax.Array, attend: Attend, layer_inputs: Any, numbers: range) -> tuple[jax.Array, Any]:
        # A branch for each layer; of no layers, one that is never taken.
        takes = [lambda i=i: (self._layers[i], _of_layer(layer_inputs, i)) for i in numbers or range(1)]

        def layer(x: jax.Array, number: jax.Array) -> tuple[jax.Array, Any]:
            layer, layer_input = jax.lax.switch(number, takes)
            return self._block(layer, x, attend, layer_input)

        return jax.lax.scan(layer, x, jnp.arange(len(numbers)))

    def _block(self, layer: Params, x: jax.Array, attend: Attend, layer_input: Any) -> Any:
        """`Block.__call__`, with joined matrices where they are."""
        block: Block = merge(self._graph, _stand_in(layer))
        if _name(_QKV) not in layer["attention"]:
            return block(x, attend, layer_input)

        matrices, into = layer["attention"], layer["mlp"][_name(_INTO if self.config.gated_mlp else _INTO[1:])]

        def attention(normed: Any) -> tuple[jax.Array, Any]:
            (qkv,) = _products(normed, matrices[_name(_QKV)])
            q, k, v = self._heads(qkv)
            out, layer_output = attend(*block.attention.prepared(q, k), v, layer_input)
            return _products((None, out.reshape(*x.shape[:-1], -1)), matrices["out"])[0], layer_output

        def mlp(normed: Any) -> jax.Array:
            hidden = self._activated(*_products(normed, into, 1 + self.config.gated_mlp))
            return _products((None, hidden), layer["mlp"]["down"])[0]

        return block.run(x, attention, mlp, lambda norm, x: (norm, x))

    def _heads(self, qkv: jax.Array) -> list[jax.Array]:
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        parts = jnp.split(qkv, [N * H, (N + K) * H], axis=-1)
        return [part.reshape(*part.shape[:-1], -1, H) for part in parts]

    def _activated(self, first: jax.Array, *up: jax.Array) -> jax.Array:
        activated = ACTIVATIONS[self.config.activation](first)
        return activated * up[0] if up else activated


def _products(given: tuple[Any, jax.Array], matrix: Params, parts: int = 1) -> list[jax.Array]:
    """norm(x) @ matrix of a norm (or None) and x, with its bias, in so many parts of as many outputs."""
    norm, x = given
    if "scales" in matrix:
        x = x if norm is None else norm(x)
        outs = jnp.split(quantised.product(x, matrix["kernel"], matrix["scales"]), parts, axis=-1)
    elif "rows" in matrix:
        outs = few_rows.products(x, matrix["rows"], norm, parts)
    else:
        kernel = matrix["kernel"].reshape(x.shape[-1], -1)
        outs = jnp.split((x if norm is None else norm(x)).astype(kernel.dtype) @ kernel, parts, axis=-1)
    if "bias" not in matrix:
        return outs
    return [y + bias.astype(y.dtype) for y, bias in zip(outs, jnp.split(matrix["bias"], parts), strict=True)]


def _of_layer(layer_inputs: Any, i: int) -> Any:
    """Layer i's: of every item of a tuple, or of an array. What is None stays None."""
    if isinstance(layer_inputs, tuple):
        items = tuple(None if x is None else x[i] for x in layer_inputs)
        make = getattr(layer_inputs, "_make", tuple)  # a tuple with names keeps them
        return make(items)
    return None if layer_inputs is None else layer_inputs[i]


def runner(graph: nnx.GraphDef, params: Params, *, scan: bool = False) -> Transformer | Layerwise:
    """The model of parameters of either kind. Cheap; meant for use inside jitted functions. See `Layerwise`."""
    return Layerwise(graph, params, scan=scan) if isinstance(params["layers"], tuple) else merge(graph, params)
