"""Decoding steps with weights and cache split over `tensor`, against one device: part of `sepjax.bench.mesh`."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.bench.mesh.training import CONFIGS
from sepjax.config import Config, MeshConfig, load_config
from sepjax.generation.device_loop import Request, make_advance, start
from sepjax.generation.sampling import Sampling
from sepjax.model.transformer import Params, abstract, create, split
from sepjax.model.unrolled import by_layer, working_copy
from sepjax.sharding import make_mesh, parameter_shardings
from sepjax.training.step import model_graph

type Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured: rows of prompts, tokens of each, and steps after them that are timed."""

    config: str = "sep_large"
    rows: int = 64
    prompt: int = 1024
    new: int = 128
    capacity: int = 512  # global slots of a row's cache
    density: float = 0.12


def measure(settings: Settings) -> Iterator[Figures]:
    """Yields tokens/s with random weights on one device and on all; the steps run twice, and the second is timed."""
    config = load_config(CONFIGS / f"{settings.config}.py")
    expected: np.ndarray | None = None
    for devices in (jax.devices()[:1], jax.devices()):
        figures, tokens = _figures(settings, config, devices)
        expected = tokens if expected is None else expected
        yield figures | {"same_tokens": float((tokens == expected).mean())}


def _figures(settings: Settings, config: Config, devices: list[Any]) -> tuple[Figures, np.ndarray]:
    rows, new, graph = settings.rows, settings.new, model_graph(config)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, len(devices), 1), devices)) as _:
        params = _params(config)
        step_params = by_layer(params, config.model)
        request = _request(settings, config)
        prompts = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, settings.prompt), np.int32)
        keys, lengths = jax.random.split(jax.random.key(2), rows), np.full(rows, settings.prompt, np.int32)
        sizes = {"window_size": config.attention.window_size, "capacity": settings.capacity}
        state, first = start(graph, params, prompts, lengths, keys, request, config.attention, **sizes)
        advance, going = make_advance(graph, config.attention, new), np.zeros(rows, bool)
        state, steps = jax.block_until_ready(advance(step_params, state, going, request))
        tokens = np.concatenate([first.token, steps.token], axis=1)
        begin = time.perf_counter()
        state, steps = jax.block_until_ready(advance(step_params, state, going, request))
        seconds = time.perf_counter() - begin
    figures = {
        "part": "generation",
        "config": settings.config,
        "devices": len(devices),
        "rows": rows,
        "milliseconds": seconds / new * 1e3,
        "tokens_per_second": rows * new / seconds,
        "all_steps_ran": bool((np.asarray(steps.token) >= 0).all()),
        "cache_bytes_per_device": _bytes_here(state.cache),
        "weight_bytes_per_device": _bytes_here(step_params),
    }
    return figures, tokens


def _params(config: Config) -> Params:
    """Random weights in the type of the matmuls, born in their shards on the ambient mesh."""
    mesh = jax.sharding.get_mesh()
    shapes = abstract(config.model, config.attention)[1]

    @functools.partial(jax.jit, out_shardings=parameter_shardings(shapes, mesh))
    def make() -> Params:
        return working_copy(split(create(config.model, config.attention, jax.random.key(0)))[1], config.model)

    return make()


def _request(settings: Settings, config: Config) -> Request:
    """Greedy, without an end within the steps that run."""
    table = jax.random.uniform(jax.random.key(1), (config.model.vocab_size,)) < settings.density
    return Request(table, Sampling.create(), jnp.full(1, -1), jnp.int32(2 * settings.new + 2))


def _bytes_here(tree: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
