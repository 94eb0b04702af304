"""Random models that take no time.

`sepjax.model.transformer.create` draws each matrix by a dozen operations, each compiled anew for each shape: 1.5
CPU seconds a model outside of jit. Here NumPy draws, and only shapes are traced. Tests of training begin with `create`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig, ModelConfig
from sepjax.model.transformer import Params, Transformer, abstract, merge


def random_params(shapes: Any, seed: int, *, norm: float = 1.0, scale: float = 1.0) -> Any:
    """Numbers in place of shapes: N(0, 0.02) in matrices, those of all layers `scale` times as large, 0 in biases."""
    random = np.random.default_rng(seed)

    def draw(path: Any, x: Any) -> jax.Array:
        name = path[-1].key
        if name in ("kernel", "embedding", "lora_a"):
            drawn = 0.02 * (scale if x.ndim > 2 else 1.0) * random.standard_normal(x.shape, np.float32)
        else:
            drawn = np.full(x.shape, {"scale": norm, "bias": 0.0, "lora_b": 0.0}[name], np.float32)
        return jnp.asarray(drawn, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


_abstract = functools.cache(abstract)


def random_split(
    config: ModelConfig, attention: AttentionConfig | None = None, seed: int = 0, *, scale: float = 1.0
) -> tuple[Any, Params]:
    """A model's structure and random parameters. With `scale=8` its attention matters, as it hardly does at first."""
    graph, shapes = _abstract(config, attention)
    return graph, random_params(shapes, seed, norm=0.0 if config.norm_offset else 1.0, scale=scale)


def random_model(
    config: ModelConfig, attention: AttentionConfig | None = None, seed: int = 0, *, scale: float = 1.0
) -> Transformer:
    """`random_split`, merged."""
    return merge(*random_split(config, attention, seed, scale=scale))
