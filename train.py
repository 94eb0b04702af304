"""The training run, top to bottom.

    python train.py --config=configs/sep_tiny.py --workdir=runs/tiny [--config.training.steps=100 ...]

Started again on the same workdir, it resumes from the newest checkpoint, bit for bit, whatever ended it
(docs/reliability.md). On a TPU pod or a cluster that JAX recognises, start the same command on every host.
"""

from sepjax import interrupt  # isort: skip

if __name__ == "__main__":  # first, for the imports below take seconds
    interrupt.end_in_one_line()
elif __name__ == "__mp_main__":  # a reader of data, which imports the program
    interrupt.leave_to_parent()

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sepjax import sharding
from sepjax.begin import adopt_shape, conversation_form, given_tokenizer, pretrained_state
from sepjax.command.flags import run_settings
from sepjax.config import Config
from sepjax.console import say
from sepjax.data.batch import Batch
from sepjax.data.pipeline import evaluation_passes, prepare_tokenizer, training_batches
from sepjax.data.tokenizer import Tokenizer
from sepjax.flops import flops_report, peak_flops
from sepjax.programs.train import Settings
from sepjax.progress import counted, working
from sepjax.run.checkpoint import Checkpointer, directory
from sepjax.run.checkpoint_files import steps_on_disk
from sepjax.run.guard import StepGuard, StopNotice, Watchdog
from sepjax.run.metrics import MetricWriter, Throughput, has_known_peak, peak_memory, run_meta
from sepjax.run.profile import Profile, parse_steps
from sepjax.run.start import Start
from sepjax.run.trackers import Trackers, check_trackers
from sepjax.run.workdir import claim_workdir, hold_workdir
from sepjax.separators import warn_of_few
from sepjax.training.ahead import Ahead, Compiled, beside, compile_ahead
from sepjax.training.step import (
    TrainState,
    abstract_batch,
    abstract_state,
    create_state,
    eval_step,
    model_graph,
    scanned,
    train_step,
)


def train(
    config: Config,
    workdir: Path,
    *,
    new_data: bool = False,
    step_timeout: float = 0.0,
    download: bool = False,
    log_to: Sequence[str] = (),
    profile_steps: str = "",
    began: float | None = None,
) -> TrainState:
    """Trains until `config.training.steps`, or from the newest checkpoint on; returns the last state.

    Args:
      config: the experiment.
      workdir: folder of the run, which no other process may use meanwhile.
      new_data: whether the data section may be another than before (`sepjax.run.workdir`); data then start anew.
      step_timeout: seconds after which a step that hangs ends the program; 0: never.
      download: whether `training.init_from` may be fetched from the Hugging Face hub.
      log_to: who gets the metrics besides, "wandb" or "trackio" (`sepjax.run.trackers`).
      profile_steps: "10:15": the steps that are recorded (`sepjax.run.profile`).
      began: when the program began, by `time.monotonic()`; None: now. What is said of the start counts from it.
    """
    check_trackers(log_to)
    profiled = parse_steps(profile_steps, config.training.steps)
    with hold_workdir(workdir):
        return _train(config, workdir, Asked(Start(began), new_data, step_timeout, download, log_to), profiled)


@dataclasses.dataclass(frozen=True)
class Asked:
    """Of a start, not of the experiment: see `train`."""

    timed: Start
    new_data: bool
    step_timeout: float
    download: bool
    log_to: Sequence[str]


def _train(config: Config, workdir: Path, asked: Asked, profiled: range) -> TrainState:
    # Mesh: every device of every host. Workdir: one config for its whole life. Post-training: another model's shape.
    config = adopt_shape(config, workdir, download=asked.download)
    mesh = _mesh(config)
    claim_workdir(workdir, config, new_data=asked.new_data)
    run_meta(workdir, seed=config.training.seed)
    asked.timed.done("shape and devices")

    # State and steps: a compiler needs nothing but shapes, so it begins here, and data are prepared beside it.
    target, calls = _programs(config, mesh)
    step_fn, eval_fn, fresh = (function for function, *_ in calls.values())
    peak = peak_flops(config.model.dtype)  # measured, where no table has it: before compilers take the processor
    ahead = compile_ahead(mesh, {name: calls[name] for name in _needed(config, workdir)})

    # Data: text -> tokens -> packed rows. Each host reads its own share of the documents: for the rows on its devices.
    data_dir = config.data.data_dir or str(workdir / "data")
    given = given_tokenizer(config, download=asked.download)
    tokenizer = prepare_tokenizer(config, data_dir, workdir / "tokenizer", given)
    share, form = sharding.row_share(mesh, config.data.batch_size), conversation_form(config, tokenizer)
    here: dict[str, Any] = {"process_index": share.index, "process_count": share.count, "form": form}
    batches = training_batches(config, tokenizer, data_dir, seed=config.training.seed, **here)
    held_out = evaluation_passes(config, tokenizer, data_dir, **here)  # a split that is not there is said now
    place = functools.partial(_place, share, sharding.batch_sharding(mesh))
    asked.timed.done("data")

    evaluate = functools.partial(_evaluate, config, eval_fn, held_out, place)
    remake = functools.partial(_remake, config, workdir, tokenizer)
    keep = config.training.keep_checkpoints
    with (
        jax.set_mesh(mesh),
        Checkpointer(workdir, keep, remake) as checkpoints,
        Watchdog(asked.step_timeout) as watchdog,
    ):
        make = fresh
        if is_begun := checkpoints.latest_step is not None:
            make = functools.partial(checkpoints.restore, target, batches, config, new_data=asked.new_data)
        elif config.training.init_from:
            make = functools.partial(pretrained_state, config, workdir, mesh, target, download=asked.download)
        state, first_batch, made = _begin(ahead, make, batches, asked.timed, is_begun=is_begun, is_drawn=make is fresh)
        start = int(state.step)
        _announce(config, workdir, mesh, state, peak)

        # The loop. The host runs two steps ahead of the devices, and waits for them where it reads metrics.
        trackers = Trackers(asked.log_to, workdir, config, resume_step=start)
        throughput, most = Throughput(), config.training.max_skipped_steps
        profile = Profile(workdir, profiled, done=start, pauses=(throughput.pause, watchdog.pause))
        about: dict[str, Any] = {"total_steps": config.training.steps, "resume_step": start, "trackers": trackers}
        with MetricWriter(workdir, **about) as writer, profile, contextlib.ExitStack() as from_here:
            if start == 0 and config.training.init_from:  # what the model was before
                with throughput.pause(), watchdog.pause():
                    writer.write(0, evaluate(state))
                asked.timed.done("evaluation")
            notice = from_here.enter_context(StopNotice())  # before, there is nothing to save, and nothing to wait for
            guard = StepGuard(watchdog, most, int(state.health.skipped), checkpoints.describe)
            for step in range(start + 1, config.training.steps + 1):
                batch = first_batch() if step == start + 1 else next(batches)
                tokens = share.count * int(np.count_nonzero(batch.segment_ids))  # no padding; of others as many
                with profile.step(step):
                    state, metrics = step_fn(state, place(batch))
                guard.follow(step, metrics)
                if step == start + 1:
                    _tell_start(workdir, metrics, asked.timed, made)
                profile.end(step, metrics)
                throughput.add(tokens)
                stops = notice.reached(step)
                if _due(step, config.training.log_every, config):
                    guard.catch_up()
                    writer.write(step, _report(config, metrics, tokens, throughput, peak))
                if _due(step, config.training.eval_every, config):
                    guard.catch_up()
                    with throughput.pause(), watchdog.pause():
                        writer.write(step, evaluate(state))
                if stops or _due(step, config.training.checkpoint_every, config):
                    guard.catch_up()
                    with throughput.pause(), watchdog.pause():
                        checkpoints.save(state, batches, config)
                if stops and step < config.training.steps:
                    checkpoints.check()
                    raise notice.stopped(step)
    return state


def _programs(config: Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, dict[str, tuple[Any, ...]]]:
    """The state's shapes, and the programs: pure functions under plain jit, with the shapes of their arguments.

    They are "step", "evaluation" and, for random parameters, "weights"; parameters are born in their shards.
    """
    target, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, target)
    step_fn = functools.partial(train_step, config, model_graph(config))
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    eval_fn = jax.jit(functools.partial(eval_step, *scanned(config)))
    fresh = jax.jit(functools.partial(create_state, config), out_shardings=shardings)
    return target, {
        "step": (step_fn, target, batch),
        "evaluation": (eval_fn, target.all_params, batch),
        "weights": (fresh,),
    }


def _needed(config: Config, workdir: Path) -> list[str]:
    """The programs of a start: of a run that has its steps none, and "weights" where random numbers are drawn."""
    saved = steps_on_disk(directory(workdir))
    if max(saved, default=0) >= config.training.steps:
        return []
    return ["step", "evaluation"] + ["weights"] * (not saved and not config.training.init_from)


def _begin(
    ahead: Ahead,
    make: Callable[[], TrainState],
    batches: Iterator[Batch],
    timed: Start,
    *,
    is_begun: bool,
    is_drawn: bool,
) -> tuple[TrainState, Callable[[], Batch], list[Compiled]]:
    """The state to go on from, what gives its first batch, and what was compiled.

    What a start waits for goes on side by side: the steps' compilations, the readers' first batch, parameters that are
    read. Python itself does one thing after another, so these wait until XLA has all that it needs to begin. Parameters
    that are drawn wait for their program, which is one of those that compile.
    """
    first_batch = batches.__next__ if is_begun else beside(batches.__next__)
    ahead.wait_for_lowering()
    timed.done("lowering")
    read = None if is_drawn else make()
    timed.done("weights")
    with working("compiling the step"):
        programs = ahead.wait()
    timed.done("compiling")
    return read or make(), first_batch, programs


def _tell_start(workdir: Path, metrics: Any, timed: Start, programs: Sequence[Compiled]) -> None:
    """Says where the time until the first step went; waits for that step."""
    jax.block_until_ready(metrics)
    timed.done("first step")
    if jax.process_index() == 0:
        say(f"{workdir}: {timed.in_words(programs)}", error=False)


def _mesh(config: Config) -> jax.sharding.Mesh:
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.data.batch_size // config.optimizer.accumulation_steps)
    sharding.check_heads(mesh, config.model.num_heads)
    sharding.check_length(mesh, config.data.sequence_length)
    return mesh


def _remake(config: Config, workdir: Path, tokenizer: Tokenizer) -> None:
    """Puts back what is in a workdir besides checkpoints, where it has vanished."""
    claim_workdir(workdir, config)
    tokenizer.save(workdir / "tokenizer")
    run_meta(workdir, seed=config.training.seed)


def _due(step: int, every: int, config: Config) -> bool:
    return step % every == 0 or step == config.training.steps


def _place(share: sharding.RowShare, batch_sharding: jax.sharding.NamedSharding, batch: Batch) -> Batch:
    """From this host's rows to arrays over the whole mesh."""
    return jax.tree.map(lambda x: share.place(x, batch_sharding), batch)


def _report(config: Config, metrics: dict[str, Any], tokens: int, speed: Throughput, peak: Any) -> dict[str, float]:
    """What is written of a step: its metrics as numbers, which waits for them, and speed; `tokens`: without padding."""
    batch_tokens = config.data.batch_size * config.data.sequence_length
    found = {name: float(value) for name, value in metrics.items()}
    pairs = found.pop("sep/pairs_per_row") * batch_tokens / max(tokens, 1)  # of rows without padding
    if config.attention.pattern == "separator" and jax.process_index() == 0:
        warn_of_few(found["sep/separator_fraction"], batch_tokens, "the training data")
    return found | flops_report(config, pairs, speed.rate(), peak) | peak_memory()


def _evaluate(
    config: Config,
    eval_fn: Callable[..., Any],
    held_out: Callable[[], Iterable[Batch]],
    place: Callable[[Batch], Batch],
    state: TrainState,
) -> dict[str, float]:
    """The loss on the first `training.eval_batches` of the held-out batches."""
    batches = list(map(place, itertools.islice(held_out(), config.training.eval_batches)))
    told = counted(batches, "evaluating", len(batches), "batches")
    sums = [eval_fn(state.all_params, batch) for batch in told]
    loss = sum(float(nll) for nll, _ in sums) / max(sum(float(count) for _, count in sums), 1.0)
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}


def _announce(config: Config, workdir: Path, mesh: jax.sharding.Mesh, state: TrainState, peak: object) -> None:
    if jax.process_index() != 0:
        return
    learn, frozen = (sum(leaf.size for leaf in jax.tree.leaves(x)) for x in (state.params, state.frozen))
    parameters = f"{learn + frozen:,} parameters" + (f" of which {learn:,} learn" if frozen else "")
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind} {dict(mesh.shape)}"
    devices += f", peak {peak}" if has_known_peak() else ""
    begins = f"resumes at step {int(state.step)}" if int(state.step) else "starts"
    print(f"{workdir}: {begins}; {parameters}, {config.attention.pattern} attention; {devices}", flush=True)


def main(settings: Settings) -> None:
    """Trains as the command line asks. In a process of its own it comes after `sharding.join_cluster`."""
    names = ("new_data", "step_timeout", "download", "log_to", "profile_steps")
    options: dict[str, Any] = {name: getattr(settings, name) for name in names}
    train(settings.config, Path(settings.workdir), began=interrupt.BEGAN, **options)


if __name__ == "__main__":
    run_settings(Settings, main, __doc__ or "", begin=sharding.join_cluster)
