"""The gate's lesson: a small network learns, from hidden states, which tokens of a stretch are worth most."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float32

from sepjax.array_typing import Array, Bool
from sepjax.config import AttentionConfig
from sepjax.keeping.teacher import Observed
from sepjax.layout import build_layout
from sepjax.model.gate import keep_best
from sepjax.model.transformer import Params, merge
from sepjax.progress import counted
from sepjax.sharding import placed_like

LOSSES = ("log", "top", "share")


class Rows(NamedTuple):
    """Rows of text as a gate reads them, on the host; every array has them along its first axis."""

    segment_ids: np.ndarray
    hidden: np.ndarray
    worth: np.ndarray
    is_judged: np.ndarray


class Grade(NamedTuple):
    """How a gate chooses on judged stretches of held-out rows."""

    recall: float  # share of the tokens worth most that it keeps too; chance: gate_keep / gate_stretch
    captured: float  # worth of what it keeps over the worth of those


def learn(
    graph: nnx.GraphDef,
    params: Params,
    rows: Rows,
    attention: AttentionConfig,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> dict[str, Params]:
    """For each loss a gate's parameters after `steps` steps of Adam over random rows, `batch` at a time.

    All read the same rows in the same step, which is one program.

    Losses: "log", squared error of log worth, a stretch's mean taken off both sides; "top", cross-entropy of being
    among the `gate_keep` best of the stretch; "share", cross-entropy of the share that each token has of its stretch's
    worth, so that scores tell expected worth: what is seldom needed, but then sharply, counts.

    Args:
      graph: the gate's, from `sepjax.model.transformer.split`, with `params`.
      params: to begin with, by each loss.
      rows: to learn from.
      attention: the gated pattern.
      steps: of the optimizer.
      batch: rows of a step.
      learning_rate: at first; a cosine takes it to 0.
      seed: of the order of rows.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    floor = 1e-3 * float(np.sum(rows.worth * rows.is_judged)) / max(int(np.sum(rows.is_judged)), 1)
    losses = {x: functools.partial(_LOSSES[x], attention=attention, floor=max(floor, 1e-30)) for x in LOSSES}

    def measure(gates: dict[str, Params], rows: Rows) -> jax.Array:
        # No gate is in another's loss, so the sum's gradient of each is that of its own.
        return sum((losses[x](merge(graph, gate)(rows.hidden), rows) for x, gate in gates.items()), jnp.float32(0))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(gates: dict[str, Params], moments: Any, rows: Rows) -> tuple[dict[str, Params], Any]:
        updates, moments = optimizer.update(jax.grad(measure)(gates, rows), moments, gates)
        updated: Any = optax.apply_updates(gates, updates)
        return updated, moments

    gates = {x: jax.tree.map(jnp.array, params) for x in LOSSES}  # copies: the caller's are not used up
    moments, rng = placed_like(gates, jax.jit(optimizer.init)(gates)), np.random.default_rng(seed)
    for _ in counted(range(steps), f"learning by the losses {', '.join(LOSSES)}", steps, "steps"):
        some = rng.choice(len(rows.worth), batch, replace=len(rows.worth) < batch)
        gates, moments = step(gates, moments, Rows(*(x[some] for x in rows)))
    return gates


@functools.partial(jax.jit, static_argnums=(0, 3))
def _count(graph: nnx.GraphDef, params: Params, rows: Rows, attention: AttentionConfig) -> jax.Array:
    best = _best(rows.worth, rows, attention) & rows.is_judged
    chosen = _best(merge(graph, params)(rows.hidden), rows, attention) & rows.is_judged
    worth = jnp.asarray(rows.worth)
    sums = [jnp.sum(x, dtype=jnp.float32) for x in (best & chosen, best, worth * chosen, worth * best)]
    return jnp.stack(sums)


def grade(graph: nnx.GraphDef, params: Params, rows: Rows, attention: AttentionConfig, *, batch: int) -> Grade:
    """How the gate chooses among tokens of rows that it has not learned from, `batch` at a time."""
    parts = [Rows(*(x[i : i + batch] for x in rows)) for i in range(0, len(rows.worth), batch)]
    counts = [np.asarray(_count(graph, params, part, attention), np.float64) for part in parts]
    both, best, captured, most = np.sum(counts, axis=0)
    return Grade(float(both / max(best, 1)), float(captured / max(most, 1e-30)))


def gather(observe: Callable[..., Observed], batches: Iterable[Any]) -> Rows:
    """Runs `observe(tokens, positions, segment_ids)` over batches and brings what it saw to the host."""
    parts = []
    for batch in batches:
        seen = observe(batch.tokens, batch.positions, batch.segment_ids)
        parts.append(Rows(np.asarray(batch.segment_ids), *(np.asarray(x) for x in seen)))
    return Rows(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _best(scores: Float32[Array, "B T"], rows: Rows, attention: AttentionConfig) -> Bool[Array, "B T"]:
    return keep_best(jnp.asarray(scores), _documents(rows), attention)


def _documents(rows: Rows) -> Any:
    segments = jnp.asarray(rows.segment_ids)
    return build_layout(segments > 0, window_size=1, num_sinks=0, segment_ids=segments)


def _log_error(scores: jax.Array, rows: Rows, *, attention: AttentionConfig, floor: float) -> jax.Array:
    difference = scores - jnp.log(jnp.asarray(rows.worth) + floor)
    judged = jnp.asarray(rows.is_judged, jnp.float32)
    total = functools.partial(_of_stretch, rows, attention)
    centred = difference - total(difference) / jnp.maximum(total(jnp.ones_like(judged)), 1)
    return jnp.sum(centred**2 * judged) / jnp.maximum(jnp.sum(judged), 1)


def _top_error(scores: jax.Array, rows: Rows, *, attention: AttentionConfig, floor: float) -> jax.Array:
    is_best = _best(rows.worth, rows, attention)
    judged = jnp.asarray(rows.is_judged, jnp.float32)
    errors = optax.sigmoid_binary_cross_entropy(scores, is_best.astype(jnp.float32))
    return jnp.sum(errors * judged) / jnp.maximum(jnp.sum(judged), 1)


def _share_error(scores: jax.Array, rows: Rows, *, attention: AttentionConfig, floor: float) -> jax.Array:
    judged = jnp.asarray(rows.is_judged, jnp.float32)
    total = functools.partial(_of_stretch, rows, attention)
    scores = scores - jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))  # which changes no share
    says = scores - jnp.log(jnp.maximum(total(jnp.exp(scores)), 1e-30))
    worth = jnp.asarray(rows.worth) + floor
    share = worth / jnp.maximum(total(worth), floor)
    stretches = jnp.sum(judged / jnp.maximum(total(jnp.ones_like(judged)), 1))
    return -jnp.sum(share * says * judged) / jnp.maximum(stretches, 1)


def _of_stretch(rows: Rows, attention: AttentionConfig, x: jax.Array) -> jax.Array:
    """The sum of `x` over the judged tokens of each token's stretch."""
    i = jnp.arange(x.shape[1])
    stretch = i - (i - _documents(rows).document_start) % attention.gate_stretch  # by its first token
    x = x * jnp.asarray(rows.is_judged, jnp.float32)
    return jax.vmap(lambda x, to: jnp.zeros_like(x).at[to].add(x)[to])(x, stretch)


_LOSSES = {"log": _log_error, "top": _top_error, "share": _share_error}
