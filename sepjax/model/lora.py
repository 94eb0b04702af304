"""Low-rank adapters in a `Transformer`: W x + alpha / rank * B A x, where A and B learn and W stays as it is.

`nnx.LoRA` wraps a layer of two axes; ours have matrices by heads, stacked over layers, and products that several of
them share. So an adapter is two more parameters of our `Linear`, in the same scan and beside the same kernel:

    layers/attention/query/kernel    [L, D, N, H]    frozen
                          /lora_a    [L, D, R]       learns; begins with random numbers
                          /lora_b    [L, R, N, H]    learns; begins with 0, so that the first step's model is the base

What learns and what is frozen are two trees (`divided`), each without what the other has; `joined` makes them one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sepjax.config import AttentionConfig, LoraConfig, ModelConfig
from sepjax.config.lora import targets_of
from sepjax.model.layers import Linear
from sepjax.model.transformer import Params, Transformer, create, split

_PARTS = ("lora_a", "lora_b")


def create_adapted(
    config: ModelConfig, attention: AttentionConfig | None, lora: LoraConfig, key: jax.Array
) -> Transformer:
    """A new model with adapters on its layers' matrices; everything drawn from `key`."""
    model = create(config, attention, key)
    block, targets = model.layers, targets_of(lora, config)
    linears = {name: x for part in (block.attention, block.mlp) for name, x in vars(part).items()}
    for number, (name, linear) in enumerate(linears.items()):
        if isinstance(linear, Linear):
            linear.is_frozen = True
            if name in targets:
                _adapt(linear, config.num_layers, lora, jax.random.fold_in(key, number))
    return model


def _adapt(linear: Linear, layers: int, lora: LoraConfig, key: jax.Array) -> None:
    inputs, outputs = tuple(linear.in_features), tuple(linear.out_features)
    most = math.prod(inputs) ** -0.5  # as others begin: uniform, of the size of a new matrix
    a = jax.random.uniform(key, (layers, *inputs, lora.rank), jnp.float32, -most, most)
    linear.lora_a = nnx.Param(a)
    linear.lora_b = nnx.Param(jnp.zeros((layers, lora.rank, *outputs), jnp.float32))
    linear.lora_scale = lora.scale


def abstract_adapted(config: ModelConfig, attention: AttentionConfig | None, lora: LoraConfig) -> tuple[Any, Params]:
    """`sepjax.model.transformer.abstract` of a model with adapters."""
    return split(nnx.eval_shape(lambda: create_adapted(config, attention, lora, jax.random.key(0))))


def divided(params: Params) -> tuple[Params, Params]:
    """(what learns, what is frozen): adapters and a gate, which is small and may be new; and all else."""

    def learns(path: tuple[str, ...]) -> bool:
        return path[-1] in _PARTS or path[0] == "gate"

    return _chosen(params, learns), _chosen(params, lambda path: not learns(path))


def joined(frozen: Params, trained: Params) -> Params:
    """The inverse of `divided`."""
    both = {name: joined(frozen[name], trained[name]) for name in frozen.keys() & trained.keys()}
    return frozen | trained | both


def merged(params: Params, lora: LoraConfig) -> Params:
    """The parameters of a plain model that computes what the adapted one does: float32, W + alpha / rank * B A."""
    if not all(name in params for name in _PARTS):
        return {
            name: merged(x, lora) if isinstance(x, dict) else jnp.asarray(x, jnp.float32) for name, x in params.items()
        }
    kernel, a, b = (jnp.asarray(params[name], jnp.float32) for name in ("kernel", *_PARTS))
    layers, rank = a.shape[0], a.shape[-1]
    flat = jnp.einsum(
        "lir,lro->lio", a.reshape(layers, -1, rank), b.reshape(layers, rank, -1), precision=jax.lax.Precision.HIGHEST
    )
    rest = {name: jnp.asarray(x, jnp.float32) for name, x in params.items() if name not in ("kernel", *_PARTS)}
    return rest | {"kernel": kernel + lora.scale * flat.reshape(kernel.shape)}


def _chosen(params: Params, keep: Any, path: tuple[str, ...] = ()) -> Params:
    found = {}
    for name, x in params.items():
        if isinstance(x, dict):
            if inner := _chosen(x, keep, (*path, name)):
                found[name] = inner
        elif keep((*path, name)):
            found[name] = x
    return found
