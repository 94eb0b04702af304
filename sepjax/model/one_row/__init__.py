"""A decode step of one row as one kernel of all layers, on a Hopper GPU: who is served, and the call.

A step of one row reads every matrix once and computes next to nothing, so of a small model it is the time between its
kernels: nine a layer that wait for each other. `kernel.py` says how one kernel does without. It needs the whole GPU:
its blocks wait for each other, so all of them must run at once. Two programs that use it on one GPU at the same time
are safe where the driver gives them turns, and may wait for each other for ever under NVIDIA's MPS, which does not:
SEPJAX_ONE_ROW=0 in the environment leaves steps of one row to XLA.
"""

import importlib
import os
from typing import Any

import jax

from sepjax.array_typing import Array, Float
from sepjax.attention.target import target
from sepjax.config import ModelConfig
from sepjax.model.one_row.shape import Shape
from sepjax.model.transformer import Params

_H100_SMS = 132  # where the device does not tell
_PLAIN = ("xla", "reference", "tpu")  # implementations by whose names a step is plain XLA
# What the kernel does not compute, by field of `ModelConfig`: the value that it takes for granted.
_GRANTED = {
    "norm": "rmsnorm", "norm_offset": False, "norm_position": "pre", "activation": "silu",
    "gated_mlp": True, "attention_bias": False, "mlp_bias": False, "parallel_residual": False,
    "position_embedding": "rope", "no_rope_layers": (), "residual_scale": 1.0, "attention_scale": 0.0,
    "dtype": "bfloat16",
}  # fmt: skip


def shape_of(config: ModelConfig, slots: int, ends: tuple[int, ...] = (), *, stacked: bool = False) -> Shape:
    """What the kernel is made for.

    ends: where zones of slots end, all but the last (`sepjax.attention.decode`); stacked: whether the caches of all
    layers are one array.
    """
    return Shape(
        config.num_layers, config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.mlp_dim,
        slots, ends, config.norm_epsilon, target().num_cores or _H100_SMS, stacked=stacked,
        codes=config.weight_dtype == "int8", biased=config.qkv_bias,
        head_norms=config.qk_norm == "head",
    )  # fmt: skip


def unsupported(config: ModelConfig, shape: Shape, implementation: str | None = None) -> str | None:
    """Why the kernel cannot serve a step of one row on the device that is traced for, or None when it can.

    Of layers that see different things nothing is asked here: there must be none.
    """
    if implementation in _PLAIN:
        return f"attention.implementation={implementation!r} asks for plain XLA"
    if os.environ.get("SEPJAX_ONE_ROW", "1") == "0":
        return "SEPJAX_ONE_ROW=0 in the environment"
    device = target()
    if device.capability != "9.0":
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), the device is {device}"
    if jax.sharding.get_abstract_mesh().size > 1:
        return "it runs on one device, the mesh has several"
    if config.qk_norm == "width":
        return "it computes norms of heads, model.qk_norm='width' is one of all heads"
    other = [name for name, value in _GRANTED.items() if getattr(config, name) != value]
    if other:
        return f"it computes model.{other[0]}={_GRANTED[other[0]]!r}, got {getattr(config, other[0])!r}"
    if config.rope.fraction != 1:
        return f"it rotates whole heads, model.rope.fraction={config.rope.fraction}"
    return shape.fault()


def step(
    shape: Shape,
    params: Params,
    x: Float[Array, "1 1 D"],
    told: tuple[Any, ...],
    k: Any,
    v: Any,
    *,
    in_place: bool = True,
) -> tuple[Float[jax.Array, "1 1 D"], Any, Any]:
    """Runs all layers and the last norm on one token. Returns its result, and keys and values with the token's own.

    Not `in_place`, of `shape.stacked`, these are the token's alone, [L, 1, K, H], for whoever appends them.

    Args:
      shape: of `shape_of`, which `unsupported` has nothing against.
      params: of `sepjax.model.unrolled.by_layer`, whose matrices lie by their outputs.
      x: what enters the first layer.
      told: cosine and sine [Z, H/2] of the query's position in each zone, the last of which has the token's own key;
        bias float32[C], 0 for a slot that is seen and -inf for others; and the token's slot, int32[1], which nobody
        sees yet.
      k: keys of each layer, bfloat16[1, K, C, H], to be donated; or of all, [L, 1, K, C, H].
      v: values.
      in_place: whether the kernel writes the token's into these arrays; else they stay as they are.

    Raises:
      NotImplementedError: the shape is not served.
    """
    if fault := shape.fault():
        raise NotImplementedError(f"a step of one row as one kernel: {fault}")
    call = importlib.import_module("sepjax.model.one_row.call")
    flat = [_arrays(shape, layer) for layer in params["layers"]]
    told = *told, params["final_norm"]["scale"]
    if shape.stacked:
        hidden, k, v = call.run(shape, flat, x[0, 0], told, (k[:, 0],), (v[:, 0],), in_place=in_place)
        return hidden[None, None], k[0][:, None], v[0][:, None]
    given = (tuple(y[0] for y in ys) for ys in (k, v))
    hidden, k, v = call.run(shape, flat, x[0, 0], told, *given, in_place=in_place)
    return hidden[None, None], tuple(y[None] for y in k), tuple(y[None] for y in v)


def _arrays(shape: Shape, layer: Params) -> tuple[Any, ...]:
    """As `sepjax.model.one_row.call.arrays_of` has them."""
    attention, mlp = layer["attention"], layer["mlp"]
    matrices = [x["rows"] for x in (attention["query+key+value"], attention["out"], mlp["gate+up"], mlp["down"])]
    norms = layer["attention_norm"]["scale"], layer["mlp_norm"]["scale"]
    others = [attention["query+key+value"]["bias"]] if shape.biased else []
    others += [attention[name]["scale"] for name in ("query_norm", "key_norm")] if shape.head_norms else []
    if not shape.codes:
        return *matrices, *norms, *others
    return *(x.codes for x in matrices), *norms, *(x.scales for x in matrices), *others
