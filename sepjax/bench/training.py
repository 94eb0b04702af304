"""Training tokens per second of a config, against the same model with dense attention, over sequence lengths.

    sepjax bench training --config=configs/sep_small.py [--lengths=2048,8192,32768 --json=bench.json]

Whole optimizer steps of `train_step` on random tokens, without a data pipeline; separators are drawn at random with the
density given, a row is one document. The baseline is the config with attention.pattern="dense" and no document mask,
which on NVIDIA GPUs runs in cuDNN's flash attention. A step has --tokens tokens in each micro-batch at every length.
MFU is that of `sepjax.flops`: needed FLOPs, so the separator model is given credit for its own pairs only.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import numpy as np

from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast, AtMost
from sepjax.command.settings import Settings as _Settings
from sepjax.config import Config, ConfigError, under, validate
from sepjax.data.batch import Batch
from sepjax.files import write_text
from sepjax.flops import Peak, flops_report, peak_flops
from sepjax.measure import Timing, heading, provenance, time_calls
from sepjax.sharding import batch_sharding, check_batch, make_mesh, replicated
from sepjax.training.step import abstract_state, create_state, model_graph, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is measured, besides the config."""

    lengths: Annotated[tuple[int, ...], AtLeast(1)] = (2048, 8192, 32768)  # tokens of a row, T
    tokens: Annotated[int, AtLeast(1)] = 32768  # tokens of a micro-batch
    # micro-batches of a step; the optimizer's share shrinks with them
    accumulation_steps: Annotated[int, AtLeast(1)] = 1
    density: Annotated[float, AtLeast(0), AtMost(1)] = 0.12  # share of tokens that are separators, drawn at random
    repeats: Annotated[int, AtLeast(1)] = 5  # timed loops of a figure
    seconds: Annotated[float, AtLeast(0)] = 3.0  # for the timed loops of a figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine(Settings):
    """The same from a command line."""

    config: Config  # a config file: the model and its optimizer
    json: str | None = None  # file for all figures and settings


@dataclasses.dataclass(frozen=True)
class Speed:
    """One model at one length."""

    timing: Timing  # of a step
    tokens_per_second: float
    mfu: float
    mfu_dense_equivalent: float
    attention_fraction: float  # visible pairs over causal pairs


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    length: int
    rows: int  # of a step
    model: Speed  # the config as it is
    dense: Speed


def measure(config: Config, settings: Settings, peak: Peak) -> Iterator[Row]:
    """Yields the lines of the table as they are measured.

    Raises:
      ConfigError: the config is dense itself, or cannot run at one of the lengths.
    """
    if config.attention.pattern == "dense":
        raise ConfigError('attention.pattern="dense" is the baseline itself; give a config with another pattern')
    for configs in [_both(config, settings, length) for length in settings.lengths]:  # all are checked first
        data = configs[0].data
        model, dense = (_speed(config, settings, peak) for config in configs)
        yield Row(data.sequence_length, data.batch_size, model, dense)


def _both(config: Config, settings: Settings, length: int) -> tuple[Config, Config]:
    """The config at one length, and its dense baseline."""
    steps = settings.accumulation_steps
    rows = steps * max(1, settings.tokens // length)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence_length=length, batch_size=rows),
        optimizer=dataclasses.replace(config.optimizer, accumulation_steps=steps),
    )
    if config.model.position_embedding == "learned" and length > config.model.max_positions:
        raise ConfigError(
            f"--lengths={length} exceeds model.max_positions={config.model.max_positions}, the rows of the table of "
            "learned positions; leave it out or raise max_positions"
        )
    attention = under(config.attention, "dense", document_mask=False, implementation=None)
    return validate(config), validate(dataclasses.replace(config, attention=attention))


def _speed(config: Config, settings: Settings, peak: Peak) -> Speed:
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size // config.optimizer.accumulation_steps)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    step = jax.jit(
        functools.partial(train_step, config, model_graph(config)),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(create_state, config), out_shardings=shardings)()
        batch = jax.device_put(random_batch(config, settings.density), batch_sharding(mesh))

        def run() -> dict[str, Any]:
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        timing = time_calls(run, repeats=settings.repeats, seconds=settings.seconds)
        metrics = run()
    rate = config.data.batch_size * config.data.sequence_length / timing.milliseconds * 1e3
    report = flops_report(config, float(metrics["sep/pairs_per_row"]), rate, peak)
    return Speed(
        timing,
        rate,
        report["throughput/mfu"],
        report["throughput/mfu_dense_equivalent"],
        float(metrics["sep/attention_fraction"]),
    )


def random_batch(config: Config, density: float) -> Batch:
    """Random tokens of `config`'s shape, a share `density` of them separators; each row is one document."""
    rng = np.random.default_rng(config.training.seed)
    shape = B, T = config.data.batch_size, config.data.sequence_length
    tokens = rng.integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones(shape, bool),
        positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        segment_ids=np.ones(shape, np.int32),
        is_separator=rng.random(shape) < density,
    )


def table_head(config: Config, settings: Settings, peak: Peak) -> str:
    """The settings in words, and the names of the columns."""
    a, m = config.attention, config.model
    columns = f"{'ms/step':>10}{'tokens/s':>12}{'MFU':>7}"
    return (
        f"L={m.num_layers} D={m.embed_dim} N={m.num_heads} K={m.num_kv_heads} H={m.head_dim} F={m.mlp_dim} "
        f"V={m.vocab_size}, {m.dtype}, remat {m.remat}, {'scanned' if m.scan_layers else 'unrolled'} layers; "
        f"{settings.accumulation_steps} x {settings.tokens} tokens a step\n"
        f"{a.pattern}: n={a.window_size} {a.layer_windows or ''} a={a.num_sinks}, separators {settings.density:.0%} at "
        f"random; peak {peak}\n\n"
        f"{'':13}{a.pattern:>29}{'dense':>29}\n{'T':>7}{'rows':>6}{columns}{columns}{'speed-up':>10}{'pairs':>8}"
    )


def table_line(row: Row) -> str:
    """One line under `table_head`."""
    speeds = "".join(
        f"{s.timing.milliseconds:>10.2f}{s.tokens_per_second:>12,.0f}{s.mfu:>7.1%}" for s in (row.model, row.dense)
    )
    gain = row.model.tokens_per_second / row.dense.tokens_per_second
    return f"{row.length:>7}{row.rows:>6}{speeds}{gain:>10.2f}{row.model.attention_fraction:>8.1%}"


def main(config: Config, settings: Settings, json_file: str | None) -> None:
    """Prints the table line by line, then writes the JSON file."""
    source, peak = provenance(), peak_flops(config.model.dtype)
    print(heading(source), table_head(config, settings, peak), sep="\n", flush=True)
    rows = []
    for row in measure(config, settings, peak):
        rows.append(row)
        print(table_line(row), flush=True)
    if json_file:
        told = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
        report = {"settings": told, "config": dataclasses.asdict(config), "peak": str(peak)}
        report = source | report | {"rows": [dataclasses.asdict(row) for row in rows]}
        write_text(json_file, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_settings(CommandLine, lambda given: main(given.config, given, given.json), str(__doc__))
