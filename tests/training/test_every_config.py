"""Every config in configs/ builds a model, and one of a kind traces one training step, at full size, without memory."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sepjax.config import load_config, validate
from sepjax.data.batch import Batch
from sepjax.flops import matmul_parameters
from sepjax.training.step import create_state, model_graph, train_step

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
CONFIGS = [path for path in CONFIGS if path.stem != "__init__"]

# Parameters of the shapes that the files name: Pythia's reports; Llama 3's 8.03 B.
PARAMETERS = {"sep_small": 162.3e6, "sep_medium": 405.3e6, "sep_large": 1414.6e6, "llama3_8b": 8030.3e6}


def test_the_folder_is_not_empty():
    assert len(CONFIGS) >= 8


@functools.cache
def config_and_state(path):
    config = validate(load_config(path))
    return config, jax.eval_shape(lambda: create_state(config))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_is_a_config_of_a_model(path):
    config, state = config_and_state(path)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert matmul_parameters(config.model) <= count
    if path.stem in PARAMETERS:
        assert count == pytest.approx(PARAMETERS[path.stem], rel=2e-3)


# A second and more each: two families, layers in a loop and not, a gate with dense layers. The others
# with -m soak.
TRACED = ("sep_small", "llama3_8b", "post_gated_dense")


@pytest.mark.parametrize(
    "path", [pytest.param(x, id=x.stem, marks=[] if x.stem in TRACED else pytest.mark.soak) for x in CONFIGS]
)
def test_one_step_traces(path):
    config, state = config_and_state(path)
    shape = (config.data.batch_size, config.data.sequence_length)
    integers, flags = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
    batch = Batch(integers, integers, flags, integers, integers, flags)
    after, metrics = jax.eval_shape(functools.partial(train_step, config, model_graph(config)), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"train/loss", "optim/grad_norm", "sep/attention_fraction", "sep/kv_kept"} <= metrics.keys()
