"""Clipping: a gate's gradients by a norm of their own."""

import jax.numpy as jnp
import numpy as np
import optax

from sepjax.config import OptimizerConfig
from sepjax.training.optimizer import clip_apart, make_optimizer


def test_a_gate_is_clipped_by_itself():
    """However large a gate's gradients are, the others' steps are those that they would be without it."""
    params = {"a": {"kernel": jnp.zeros(2)}, "gate": {"kernel": jnp.zeros(2)}}
    gradients = {"a": {"kernel": jnp.array([0.3, 0.4])}, "gate": {"kernel": jnp.array([300.0, 400.0])}}
    clip = clip_apart(1.0)
    clipped, _ = clip.update(gradients, clip.init(params))
    np.testing.assert_allclose(clipped["a"]["kernel"], [0.3, 0.4])
    np.testing.assert_allclose(clipped["gate"]["kernel"], [0.6, 0.8], rtol=1e-6)
    alone, _ = optax.clip_by_global_norm(1.0).update({"a": {"kernel": jnp.array([3.0, 4.0])}}, optax.EmptyState())
    without, _ = clip.update({"a": {"kernel": jnp.array([3.0, 4.0])}}, optax.EmptyState())
    np.testing.assert_array_equal(without["a"]["kernel"], alone["a"]["kernel"])

    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 10)
    steps = [
        optimizer.update(x, optimizer.init(y), y)[0]
        for x, y in ((gradients, params), ({"a": gradients["a"]}, {"a": params["a"]}))
    ]
    np.testing.assert_array_equal(steps[0]["a"]["kernel"], steps[1]["a"]["kernel"])
