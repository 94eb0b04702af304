"""Norms folded into matrices: the same function with the same gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention.target import Target
from sepjax.config import AttentionConfig, Config, DataConfig, LoraConfig, ModelConfig
from sepjax.model import folded
from sepjax.model.attend import run_rows
from sepjax.model.transformer import create, merge, split

SHAPE = ModelConfig(vocab_size=31, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
BIASES = {"attention_bias": True, "mlp_bias": True, "gated_mlp": False, "activation": "gelu"}
SHAPES = {
    "serial": SHAPE,
    "parallel": dataclasses.replace(SHAPE, norm="layernorm", parallel_residual=True, scan_layers=False, **BIASES),
    "shared": dataclasses.replace(SHAPE, norm="layernorm", parallel_residual=True, shared_norm=True, **BIASES),
    "both": dataclasses.replace(SHAPE, norm_offset=True, norm_position="both", qk_norm="head"),
}


def loss_and_gradients(config: ModelConfig, params, folds: bool):
    graph, _ = split(create(config, AttentionConfig("dense"), jax.random.key(0)))
    tokens = np.random.default_rng(1).integers(0, 31, (2, 12)).astype(np.int32)

    def loss(params):
        model = merge(graph, params)
        model.folds = folds
        rows = run_rows(model, tokens, np.tile(np.arange(12, dtype=np.int32), (2, 1)), np.zeros((2, 12), bool))
        return jnp.mean(jnp.sin(3 * rows.hidden.astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss))(params)


def random_params(config: ModelConfig):
    """Norms' weights and biases are no ones and zeros, as they are where a model begins."""
    _, params = split(create(config, AttentionConfig("dense"), jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten([x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_folded_model_is_the_same_function_with_the_same_gradients(config):
    """In float32 to the last bits; in 16 bits it may err twice as much as norms and matrices by themselves."""
    params = random_params(config)
    loss, gradients = loss_and_gradients(config, params, folds=False)
    folded_loss, folded_gradients = loss_and_gradients(config, params, folds=True)
    np.testing.assert_allclose(folded_loss, loss, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), folded_gradients, gradients)
    if config is SHAPES["parallel"]:
        config = dataclasses.replace(config, dtype="bfloat16")
        plain, of_folded = (errors(config, params, gradients, folds) for folds in (False, True))
        assert np.all(of_folded <= 2 * plain), of_folded / plain


def errors(config: ModelConfig, params, exact, folds: bool) -> np.ndarray:
    """Root mean squares, of the gradient of each array."""
    _, gradients = loss_and_gradients(config, params, folds)
    return np.array(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.mean((x - y) ** 2)) ** 0.5, gradients, exact)))


def test_only_a_step_on_a_gpu_in_16_bits_folds(monkeypatch):
    data = DataConfig(tokenizer_vocab_size=31)
    config = Config(model=dataclasses.replace(SHAPE, dtype="bfloat16"), data=data)
    assert not folded.pays(config)
    monkeypatch.setattr(folded, "target", lambda: Target("gpu", "NVIDIA H200", 132, "9.0"))
    assert folded.pays(config)
    without = functools.partial(dataclasses.replace, config.model)
    for model in (
        without(dtype="float32"),
        without(norm_position="post"),
        without(norm="layernorm"),
        without(norm="layernorm", mlp_bias=True),
    ):
        assert not folded.pays(dataclasses.replace(config, model=model))
    assert folded.pays(dataclasses.replace(config, model=without(norm="layernorm", mlp_bias=True, qkv_bias=True)))
    assert not folded.pays(dataclasses.replace(config, lora=LoraConfig(rank=4)))
