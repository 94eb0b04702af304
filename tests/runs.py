"""Runs of train.py in this process, and what they leave; used by several suites."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train as program
from sepjax.config import Config
from sepjax.data.batch import Batch
from sepjax.training.step import Metrics, TrainState, create_state, eval_step, train_step
from tests.models import random_params


def losses(workdir: Path) -> dict[int, float]:
    """The last loss written of every step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


_jit, _jitted = jax.jit, {}
ONCE: list[Callable] = [create_state, train_step, eval_step]


def _jit_once(function: Callable | None = None, **settings: Any) -> Any:
    """`jax.jit` that knows train.py's steps again: tracing them anew is most of what a start here costs."""
    if not isinstance(function, functools.partial) or function.func not in ONCE:
        return _jit(**settings) if function is None else _jit(function, **settings)  # `@jax.jit(...)` gives none
    config = function.args[0]
    # Of data a step knows the shapes alone; what is told, judged and saved, and when, is the host's.
    hosts = dict.fromkeys(("log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints"), 1)
    training = dataclasses.replace(config.training, init_from="", max_skipped_steps=0, **hosts)
    known = dataclasses.replace(config, data=type(config.data)(), training=training)
    key = function.func, known, settings.get("donate_argnums")
    return _jitted.setdefault(key, _jit(function, **settings))


def start_quickly(patch: pytest.MonkeyPatch) -> None:
    """On one device (tests/test_meshes.py has several), and each step of a config traced once for all its runs here.

    That processes of their own, which trace and load anew, give the same bits is in test_kill.py.
    """
    some = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: some)
    patch.setattr(jax, "jit", _jit_once)
    patch.setattr(program, "model_graph", _model_graph)
    patch.setattr(program, "abstract_state", _abstract_state)
    patch.setattr(program, "scanned", _scanned)
    measure_once(patch)


def measure_once(patch: pytest.MonkeyPatch) -> None:
    """How fast this machine is, not anew in every run."""
    patch.setattr(program, "peak_flops", _peak_flops)


def step_that_tells_all(config: Config, graph: Any, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """In place of `train_step`, for tests of what is around it: it compiles in no time.

    Its loss tells each number of the state and of the batch from its neighbours, and depends on all steps before.
    """

    def weights(x):
        return jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def moved(x):
        return jnp.sin(x + weights(x) * (state.step + 1)) if x.dtype == jnp.float32 else x + 1

    before = state.params, state.optimizer
    numbers = [10 * x for x in jax.tree.leaves(before) if x.dtype == jnp.float32]
    loss = sum(jnp.mean(x * weights(x)) for x in (*numbers, batch.tokens / 100, batch.positions / 100))
    params, moments = jax.tree.map(moved, before)
    names = ("optim/grad_norm", "optim/learning_rate", "sep/pairs_per_row", "sep/separator_fraction")
    metrics = dict.fromkeys(names, loss * 0 + 1) | {"train/loss": loss}
    metrics["optim/skipped_steps"] = state.health.skipped.astype(jnp.float32)
    return dataclasses.replace(state, step=state.step + 1, params=params, optimizer=moments), metrics


def scores_of_nothing(config: Config, graph: Any, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """In place of `eval_step`."""
    return jnp.float32(1), jnp.sum(batch.loss_mask, dtype=jnp.float32)


def state_of_numpy(config: Config, params: Any = None) -> TrainState:
    """In place of train.py's `create_state`, whose random numbers take three seconds to compile."""
    if params is not None:
        return create_state(config, params)
    shapes = jax.eval_shape(lambda: create_state(config))
    drawn = random_params(shapes.params, config.training.seed, norm=0.0 if config.model.norm_offset else 1.0)
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)
    return dataclasses.replace(zeros, params=drawn)


def tell_all(patch: pytest.MonkeyPatch) -> None:
    """Runs with the three functions above."""
    patch.setattr(program, "create_state", state_of_numpy)
    patch.setattr(program, "train_step", step_that_tells_all)
    patch.setattr(program, "eval_step", scores_of_nothing)


ONCE += [step_that_tells_all, scores_of_nothing, state_of_numpy]
_peak_flops = functools.cache(program.peak_flops)
_model_graph, _abstract_state = functools.cache(program.model_graph), functools.cache(program.abstract_state)
_scanned = functools.cache(program.scanned)
