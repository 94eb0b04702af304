"""A gate for a model as it is: observed, learned, graded and written as a workdir, the model's parameters untouched."""

import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sepjax.begin import adopt_shape, conversation_form, given_tokenizer
from sepjax.config import Config, ConfigError, under
from sepjax.console import say
from sepjax.data.pipeline import evaluation_batches, prepare_tokenizer, training_batches
from sepjax.hub.convert import keep_origin
from sepjax.keeping import Lesson
from sepjax.keeping.lesson import Grade, Rows, gather, grade, learn
from sepjax.keeping.teacher import Observed, observe
from sepjax.loading import load, locate
from sepjax.model.transformer import abstract, merge, split
from sepjax.progress import counted
from sepjax.run.checkpoint import save_params
from sepjax.training.step import with_gate


def distill(config: Config, workdir: Path, lesson: Lesson, *, download: bool = False) -> dict[str, Grade]:
    """Writes a workdir with the model of `training.init_from` and a gate that has learned from its dense attention.

    A gate learns by each loss; the one that keeps more of what the dense model looks at is written.

    Args:
      config: with a gated pattern; its data section says what is read. Rows that are observed and learned from at a
        time are those of a micro-batch.
      workdir: a folder that is new or empty; `sepjax.load` and `training.init_from` read it afterwards.
      lesson: how much.
      download: whether a hub id may be fetched.

    Returns:
      For each loss how its gate chose on held-out rows.

    Raises:
      ConfigError: no gated pattern, no source, or too few rows that anything can be learned from.
      OSError, UserError: as `sepjax.load` and the data pipeline.
    """
    config = _checked(config, workdir, download)
    source = locate(config.training.init_from, download=download)
    data_dir = config.data.data_dir or str(workdir / "data")
    tokenizer = prepare_tokenizer(config, data_dir, workdir / "tokenizer", given_tokenizer(config, download=download))
    model, _ = load(source, param_dtype="float32")
    params = split(model)[1] | {}
    if (params_gate := params.pop("gate", None)) is None:
        params_gate = jax.jit(lambda: with_gate(config, {})["gate"])()  # nothing else of a random model is made

    graph = abstract(config.model, under(config.attention, "sink_window"))[0]

    @jax.jit
    def see(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> Observed:
        return observe(merge(graph, params), tokens, positions, segment_ids, config.attention)

    size = config.data.batch_size // config.optimizer.accumulation_steps
    began = time.perf_counter()
    form = conversation_form(config, tokenizer)
    train = training_batches(config, tokenizer, data_dir, seed=config.training.seed, form=form)
    watch = functools.partial(_watched, functools.partial(see, params), size)
    held_out = watch(evaluation_batches(config, tokenizer, data_dir, form=form), lesson.held_out, "held-out rows")
    rows = watch(train, lesson.rows, "rows")
    _check_judged(config, rows, held_out)
    say(f"{workdir}: observed {len(rows.worth) + len(held_out.worth)} rows in {time.perf_counter() - began:.0f} s")

    gate_graph = split(merge(*_gated(config, params, params_gate)).gate)[0]
    gates = learn(
        gate_graph, params_gate, rows, config.attention,
        steps=lesson.steps, batch=size, learning_rate=lesson.learning_rate, seed=config.training.seed,
    )  # fmt: skip
    grades = {loss: grade(gate_graph, gate, held_out, config.attention, batch=size) for loss, gate in gates.items()}
    best = max(grades, key=lambda loss: grades[loss].captured)
    keep_origin(source, workdir)
    save_params(workdir, config, params | {"gate": gates[best]})
    for line in _report(config, grades, best, workdir):
        say(line, error=False)
    return grades


def _gated(config: Config, params: Any, gate: Any) -> tuple[Any, Any]:
    return abstract(config.model, config.attention)[0], params | {"gate": gate}


def _checked(config: Config, workdir: Path, download: bool) -> Config:
    if config.attention.pattern != "gated":
        raise ConfigError(
            f"attention.pattern={config.attention.pattern!r} has no gate; use a config with 'gated', such as "
            "configs/post_gated.py"
        )
    if config.lora.rank:
        raise ConfigError(f"lora.rank={config.lora.rank}, but a gate is distilled for a model as it is; set it to 0")
    if not config.training.init_from:
        raise ConfigError("training.init_from is empty; it names the model that the gate is for, and learns from")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"{workdir} is there already; choose a --workdir that is new or empty")
    attention = config.attention
    # Queries beyond the window of a first stretch that ends before them, in a document as long as a row.
    if config.data.sequence_length - attention.window_size - attention.gate_stretch + 1 < attention.gate_stretch:
        raise _unjudged(config, "training")
    return adopt_shape(config, workdir, download=download)


def _watched(see: Any, size: int, batches: Iterable[Any], rows: int, what: str) -> Rows:
    """What is seen in the first so many rows, `size` at a time."""

    def parts() -> Iterator[Any]:
        for batch in batches:
            for first in range(0, len(batch.tokens), size):
                part = jax.tree.map(lambda x, first=first: x[first : first + size], batch)
                if np.any(part.segment_ids):
                    yield part

    passes = -(-rows // size)
    parts_of = itertools.islice(parts(), passes)
    return gather(see, counted(parts_of, f"observing {what}", passes * size, "rows", lambda part: size))


def _check_judged(config: Config, rows: Rows, held_out: Rows) -> None:
    for name, seen in (("training", rows), ("evaluation", held_out)):
        if not np.any(seen.is_judged):
            raise _unjudged(config, name)


def _unjudged(config: Config, name: str) -> ConfigError:
    return ConfigError(
        f"no stretch of the {name} rows is seen by {config.attention.gate_stretch} queries beyond its window: "
        f"rows of data.sequence_length={config.data.sequence_length} tokens, or their documents, are too short "
        "for attention.window_size; lengthen them or lower it"
    )


def _report(config: Config, grades: dict[str, Grade], best: str, workdir: Path) -> list[str]:
    chance = config.attention.gate_keep / config.attention.gate_stretch
    lines = [f"{'loss':<8}{'recall':>9}{'worth kept':>12}    (chance: {chance:.1%} of the tokens)"]
    lines += [f"{loss:<8}{x.recall:>9.1%}{x.captured:>12.1%}" for loss, x in grades.items()]
    return [*lines, f"{workdir}: the gate by the loss {best!r}; begin a run with --config.training.init_from={workdir}"]
