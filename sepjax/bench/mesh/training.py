"""Training steps and checkpoints on a mesh against one device: parts of `sepjax.bench.mesh`."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sepjax.bench.training import random_batch
from sepjax.config import Config, MeshConfig, load_config, validate
from sepjax.config.checkout import root
from sepjax.data.batch import Batch
from sepjax.flops import flops_report, peak_flops
from sepjax.measure import time_calls
from sepjax.sharding import batch_sharding, make_mesh, replicated
from sepjax.training.compiled import Program
from sepjax.training.step import TrainState, abstract_state, create_state, model_graph, train_step

LOSS_BOUND = 5e-3  # nats, at losses near 10: what the rounding of 16-bit activations in another order may change
AXES = ("data", "fsdp", "tensor", "context")
CONFIGS = root() / "configs"

type Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      configs: names of files in configs/.
      axes: meshes, each of one axis over all devices.
      length: T; `long_length` on the mesh `context`.
      tokens: of a device's micro-batch; models wider than 1024 take half.
      micro_batches: of a step on the mesh.
      density: share of separators.
      longest: T of single rows that one device trains on, layer inputs kept and all else computed again.
      steps: whose losses are compared.
      seconds: of the timed loops of a figure.
      scan_layers: one compiled layer in place of each config's own choice. Unrolled ones are faster (docs/decisions.md,
        18), but on four meshes and one device they take most of a measurement to compile.
    """

    configs: tuple[str, ...] = ("sep_small", "sep_large")
    axes: tuple[str, ...] = AXES
    length: int = 2048
    long_length: int = 32768
    tokens: int = 32768
    micro_batches: int = 2
    density: float = 0.12
    longest: tuple[int, ...] = (2**19, 2**20)
    steps: int = 4
    seconds: float = 3.0
    scan_layers: bool = True


def measure(settings: Settings) -> Iterator[Figures]:
    """Yields the figures of each config on one device and on each mesh."""
    devices = jax.devices()
    for name in settings.configs:
        alone: dict[int, Figures] = {}
        for axis in settings.axes:
            length = settings.long_length if axis == "context" else settings.length
            config, _ = _config(name, settings, length, axis, len(devices))
            if length not in alone:
                one, micro_rows = _config(name, settings, length, "data", 1)
                one = _with_batch(one, config.data.batch_size, config.data.batch_size // micro_rows)
                alone[length] = _figures(name, one, devices[:1], settings)
                yield alone[length]
            yield _figures(name, config, devices, settings, alone[length])


def longest(settings: Settings) -> Iterator[Figures]:
    """Yields the figures of one device at rows of `settings.longest` tokens: one row a step, remat "full"."""
    for length in settings.longest:
        name = settings.configs[0]
        yield _figures(
            name, longest_config(name, length), jax.devices()[:1], dataclasses.replace(settings, steps=2, seconds=0.0)
        )


def longest_config(name: str, length: int) -> Config:
    """One row of `length` tokens a step, with as little kept for the backward pass as there is a setting for."""
    config = load_config(CONFIGS / f"{name}.py")
    config.mesh = MeshConfig(1, 1, 1, 1)
    config.model.remat, config.model.scan_layers = "full", True
    config.model.max_positions = max(config.model.max_positions, length)
    config.data.sequence_length = length
    config.optimizer.warmup_steps = 0
    return _with_batch(config, 1, 1)


def _config(name: str, settings: Settings, length: int, axis: str, ways: int) -> tuple[Config, int]:
    """The config on a mesh of one axis, and the rows of a micro-batch."""
    config = load_config(CONFIGS / f"{name}.py")
    tokens = settings.tokens if config.model.embed_dim <= 1024 else settings.tokens // 2
    share = 1 if axis == "tensor" else ways  # activations between the matrices are whole on each device of `tensor`
    split = ways if axis in ("data", "fsdp") else 1
    rows = max(split, share * tokens // length)
    steps = settings.micro_batches * ways * tokens // (rows * length) or 1
    config.mesh = MeshConfig(**{x: ways if x == axis else 1 for x in AXES})
    config.data.sequence_length = length
    config.model.scan_layers |= settings.scan_layers
    # The optimizer begins at once, since losses that fall tell more of the gradients than those of a random model; at a
    # tenth of the rate, since at all of it they rise first, and small differences grow with them.
    config.optimizer.warmup_steps = 0
    config.optimizer.learning_rate *= 0.1
    return _with_batch(config, rows * steps, steps), rows


def _with_batch(config: Config, rows: int, steps: int) -> Config:
    config.data.batch_size, config.optimizer.accumulation_steps = rows, steps
    return validate(config)


def _figures(
    name: str, config: Config, devices: list[Any], settings: Settings, alone: Figures | None = None
) -> Figures:
    run = Run(config, devices)
    batch = run.place(random_batch(config, settings.density))
    state, losses, pairs, milliseconds = run.fresh_state(), [], 0.0, 0.0
    for _ in range(settings.steps):
        start = time.perf_counter()
        state, metrics = run.step(state, batch)
        losses.append(float(metrics["train/loss"]))
        pairs = float(metrics["sep/pairs_per_row"])
        milliseconds = (time.perf_counter() - start) * 1e3

    def again() -> Any:
        nonlocal state
        state, metrics = run.step(state, batch)
        return metrics

    if milliseconds < 3e3 * settings.seconds:  # else the last of the steps above says it
        milliseconds = time_calls(again, repeats=3, seconds=settings.seconds).milliseconds
    rate = config.data.batch_size * config.data.sequence_length / milliseconds * 1e3
    peak = peak_flops(config.model.dtype)
    peak = dataclasses.replace(peak, flops_per_second=peak.flops_per_second / jax.device_count() * len(devices))
    figures = {
        "part": "training",
        "config": name,
        "mesh": {x: n for x, n in dataclasses.asdict(config.mesh).items() if n > 1},
        "devices": len(devices),
        "length": config.data.sequence_length,
        "rows": config.data.batch_size,
        "micro_batches": config.optimizer.accumulation_steps,
        "milliseconds": milliseconds,
        "tokens_per_second": rate,
        "mfu": flops_report(config, pairs, rate, peak)["throughput/mfu"],
        "losses": losses,
        "collectives": [dataclasses.asdict(x) for x in run.collectives],
        "memory_bytes": run.memory,
    }
    if alone:
        difference = max(abs(x - y) for x, y in zip(losses, alone["losses"], strict=True))
        figures["efficiency"] = rate / alone["tokens_per_second"] / len(devices)
        figures |= {"largest_loss_difference": difference, "losses_agree": difference <= LOSS_BOUND}
    return figures


class Run:
    """The compiled step of a config on some devices."""

    def __init__(self, config: Config, devices: list[Any]):
        self.config, self.mesh = config, make_mesh(config.mesh, devices)
        self.target = abstract_state(config, self.mesh)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.target)
        step = functools.partial(train_step, config, model_graph(config))
        step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, replicated(self.mesh)))
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(self.mesh)),
            random_batch(config, 0.0),
        )
        with jax.set_mesh(self.mesh):
            self.step = step.lower(self.target, batch).compile()
        self.collectives = Program(self.step.as_text() or "").collectives()
        sizes: Any = self.step.memory_analysis()
        self.memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes

    def fresh_state(self) -> TrainState:
        """A new state, born in its shards."""
        with jax.set_mesh(self.mesh):
            return jax.jit(functools.partial(create_state, self.config), out_shardings=self.shardings)()

    def place(self, batch: Batch) -> Batch:
        """A batch on the mesh."""
        return jax.device_put(batch, batch_sharding(self.mesh))


def move_checkpoint(settings: Settings) -> Iterator[Figures]:
    """One device -> `fsdp` over all -> one device, two steps on each, against six steps on one device."""
    everywhere, _ = _config(settings.configs[0], settings, settings.length, "fsdp", jax.device_count())
    alone = dataclasses.replace(everywhere, mesh=MeshConfig(1, 1, 1, 1))
    rows = max(1, settings.tokens // settings.length)
    alone = dataclasses.replace(
        alone,
        optimizer=dataclasses.replace(alone.optimizer, accumulation_steps=max(1, alone.data.batch_size // rows)),
    )
    one, many = Run(alone, jax.devices()[:1]), Run(everywhere, jax.devices())
    batch = random_batch(everywhere, settings.density)
    state, expected = one.fresh_state(), []
    for _ in range(6):
        state, metrics = one.step(state, one.place(batch))
        expected.append(float(metrics["train/loss"]))

    state, losses, seconds = one.fresh_state(), [], []
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as files:
        for stage, run in enumerate((one, many, one)):
            if stage:
                start = time.perf_counter()
                files.save(Path(folder) / str(stage), state)
                files.wait_until_finished()
                saved = time.perf_counter()
                restored = files.restore(Path(folder) / str(stage), run.target)
                jax.block_until_ready(restored)
                seconds.append({"save": saved - start, "restore": time.perf_counter() - saved})
                same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), state, restored)
                seconds[-1]["same_bits"] = all(jax.tree.leaves(same))
                state = restored
            for _ in range(2):
                state, metrics = run.step(state, run.place(batch))
                losses.append(float(metrics["train/loss"]))
    difference = max(abs(x - y) for x, y in zip(losses, expected, strict=True))
    yield {
        "part": "checkpoint",
        "config": settings.configs[0],
        "devices": [1, jax.device_count(), 1],
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "moves": seconds,
        "losses": losses,
        "losses_one": expected,
        "largest_loss_difference": difference,
        "losses_agree": difference <= LOSS_BOUND,
    }
