"""TrainState and the pure functions over it: `create_state`, `train_step`, `eval_step`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from sepjax.array_typing import Array, Bool, Float, InShapes, Int32
from sepjax.config import Config, TrainingConfig, with_own_window
from sepjax.data.batch import Batch
from sepjax.model import folded
from sepjax.model.attend import in_context_order, layer_layouts, run_rows
from sepjax.model.gate import exploring
from sepjax.model.lora import abstract_adapted, create_adapted, divided, joined
from sepjax.model.transformer import Params, abstract, create, merge, split
from sepjax.model.unrolled import working_copy
from sepjax.sharding import batch_sharding, constrain, parameter_shardings
from sepjax.training.loss import cross_entropy_sums
from sepjax.training.optimizer import learning_rate_schedule, make_optimizer

type Metrics = dict[str, Array]


_MEAN_OF = 50  # steps that the running mean of the loss is taken over, about


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """What is known of the steps so far."""

    __no_type_check__ = True

    skipped: Int32[Array, ""]  # steps that were not applied
    loss_mean: Float[Array, ""]  # running mean of the loss of those that were, in nats a token; 0 before the first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TrainState(InShapes):
    """Everything that a step changes, and what it reads besides. Parameters and moments are float32."""

    # It is also a tree of shapes or shardings (`abstract_state`): jaxtyping must not check __init__.
    __no_type_check__ = True

    step: Int32[Array, ""]  # steps done, those that were not applied included
    params: Params  # what learns
    optimizer: Any  # optax state
    health: Health
    # What does not: with `lora.rank` the base, in `model.dtype` as layers read it, vectors float32. Else empty.
    frozen: Params = dataclasses.field(default_factory=dict)

    @property
    def all_params(self) -> Params:
        """What `model_graph` is merged with."""
        return joined(self.frozen, self.params)


def create_state(config: Config, params: Params | None = None) -> TrainState:
    """A fresh state; jit it with `out_shardings` so that it is born sharded.

    Args:
      config: the experiment.
      params: of a plain model, to begin with: float32, with `lora.rank` of any type (without a base, the state has
        none); None: random ones from `training.seed`. So is a gate that they lack and the pattern needs, and so are
        adapters.
    """
    key = jax.random.key(config.training.seed)
    if params is None:
        _, params = split(create(config.model, config.attention, key))
    params, frozen = with_gate(config, params), {}
    if config.lora.rank:
        adapters, _ = divided(split(create_adapted(config.model, None, config.lora, key))[1])
        gate, base = divided(jax.tree.map(lambda x: x.astype(jnp.float32), params))
        params, frozen = adapters | gate, working_copy(base, config.model)
    optimizer = make_optimizer(config.optimizer, config.training.steps).init(params)
    health = Health(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer, health, frozen)


def with_gate(config: Config, params: Params) -> Params:
    """The parameters, and where the pattern needs a gate that they lack, one drawn from `training.seed`."""
    if "gate" in params or config.attention.pattern != "gated":
        return params
    _, fresh = split(create(config.model, config.attention, jax.random.key(config.training.seed)))
    return params | {"gate": fresh["gate"]}


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its memory. Moments lie as their parameters do."""
    shapes = jax.eval_shape(lambda: create_state(config))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh),
    )


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a step's batch, over all devices."""
    shape, sharding = (config.data.batch_size, config.data.sequence_length), batch_sharding(mesh)
    integers, flags = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.int32, jnp.bool_))
    arrays: dict[str, Any] = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), integers)
    arrays |= dict.fromkeys(("loss_mask", "is_separator"), flags)
    return Batch(**arrays)


def model_graph(config: Config) -> nnx.GraphDef:
    """The model's structure, to be merged with `TrainState.all_params`."""
    if config.lora.rank:
        return abstract_adapted(config.model, config.attention, config.lora)[0]
    return abstract(config.model, config.attention)[0]


def scanned(config: Config) -> tuple[Config, nnx.GraphDef]:
    """What `eval_step` is to close over: the config and `model_graph`, with layers scanned.

    A scan costs a forward pass nothing, for nothing is kept for a backward one; and it compiles in a fraction.
    """
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=True))
    return config, model_graph(config)


def train_step(config: Config, graph: nnx.GraphDef, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer step over `optimizer.accumulation_steps` micro-batches.

    A step fails where loss or gradient norm are not finite, or the loss is a spike (`training.spike_factor`): then
    parameters and moments stay as they are, bit for bit, and `optim/skipped_steps` counts one more.

    Pure. Close over `config` and `graph`, jit, and donate `state`.

    Returns:
      The next state, and float32 scalars under the names that are logged.
    """
    (gradients, objective, nll, count), kept = _accumulate(
        config, graph, state, batch, _gate_noise(config, state, batch)
    )
    scale = 1.0 / jnp.maximum(count, 1.0)
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    norm = optax.tree.norm(gradients)
    good = jnp.isfinite(objective) & jnp.isfinite(norm)
    good, health = _judge(config.training, state.health, nll * scale, good)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (params, moments), (state.params, state.optimizer)
    )
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    metrics = {
        "train/loss": nll * scale,
        "train/objective": objective * scale,
        "optim/grad_norm": norm,
        "optim/learning_rate": schedule(state.step - state.health.skipped),
        "optim/skipped_steps": health.skipped.astype(jnp.float32),
        **attention_statistics(config, dataclasses.replace(batch, is_separator=kept)),
    }
    return TrainState(state.step + 1, params, moments, health, state.frozen), metrics


def _judge(
    training: TrainingConfig, health: Health, loss: Float[Array, ""], good: Bool[Array, ""]
) -> tuple[Bool[Array, ""], Health]:
    """Whether a step is applied, and what is known after it."""
    is_first = health.loss_mean == 0
    if training.spike_factor:
        good &= is_first | (loss <= training.spike_factor * health.loss_mean)
    mean = jnp.where(is_first, loss, health.loss_mean + (loss - health.loss_mean) / _MEAN_OF)
    return good, Health(health.skipped + ~good, jnp.where(good, mean, health.loss_mean))


def eval_step(config: Config, graph: nnx.GraphDef, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums over a batch: negative log-likelihood in nats, and tokens scored (both float32 scalars).

    `params` are all of them (`TrainState.all_params`).
    """
    _, (_, nll, _) = _loss(params, {}, config, graph, batch)
    return nll, jnp.sum(batch.loss_mask, dtype=jnp.float32)


def attention_statistics(config: Config, batch: Batch) -> Metrics:
    """What the layouts of this batch let through, counted and averaged over layers (METHOD section 5).

    batch: with a gated pattern, `is_separator` must be what the gate chose.
    """
    attention = with_own_window(config.attention, config.model)
    is_separator = batch.is_separator & (attention.pattern == config.attention.pattern)  # a model's own window has none
    layers = layer_layouts(is_separator, batch.segment_ids, attention, config.model.num_layers)
    is_token = batch.segment_ids != 0
    return {
        "sep/attention_fraction": sum((seen.attention_fraction() * w for seen, w in layers), jnp.zeros(())),
        "sep/kv_kept": sum((seen.kv_kept() * w for seen, w in layers), jnp.zeros(())),
        "sep/separator_fraction": jnp.sum(batch.is_separator & is_token) / jnp.maximum(jnp.sum(is_token), 1),
        "sep/pairs_per_row": sum((jnp.mean(seen.num_pairs()) * w for seen, w in layers), jnp.zeros(())),
    }


def _gate_noise(config: Config, state: TrainState, batch: Batch) -> Float[jax.Array, "B T"] | None:
    """What is added to a gate's scores in this step; None for other patterns. Same seed and step, same noise."""
    if config.attention.pattern != "gated":
        return None
    key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
    left = 1 - state.step / config.training.steps
    return constrain(exploring(key, batch.tokens.shape, config.training.gate_noise * left), "batch", None)


def _loss(
    params: Params, frozen: Params, config: Config, graph: nnx.GraphDef, batch: Batch, gate_noise: Any = None
) -> tuple[jax.Array, Any]:
    """The objective, summed, and (itself, negative log-likelihood, who was kept)."""
    model = merge(graph, joined(frozen, params))
    model.folds = folded.pays(config)
    inputs = batch.tokens, batch.positions, batch.is_separator, batch.segment_ids
    rows = run_rows(model, *inputs, config.attention, context_order=True, gate_noise=gate_noise)
    targets, loss_mask = in_context_order(batch.targets), in_context_order(batch.loss_mask)
    hidden, head = rows.hidden, model.output_embedding()
    if config.model.logit_divisor != 1:
        hidden = hidden / config.model.logit_divisor
    sums = cross_entropy_sums(hidden, head, targets, loss_mask, config.optimizer.z_loss, config.model.final_softcap)
    return sums[0], (*sums, rows.is_separator)


def _accumulate(config: Config, graph: nnx.GraphDef, state: TrainState, batch: Batch, gate_noise: Any) -> Any:
    """(summed gradients, objective, negative log-likelihood, token count) over the micro-batches, and who was kept."""
    steps = config.optimizer.accumulation_steps
    gradient = jax.value_and_grad(_loss, has_aux=True)

    def micro(batch: Batch, gate_noise: Any) -> Any:
        (_, (objective, nll, kept)), gradients = gradient(state.params, state.frozen, config, graph, batch, gate_noise)
        return (gradients, objective, nll, jnp.sum(batch.loss_mask, dtype=jnp.float32)), kept

    if steps == 1:
        return micro(batch, gate_noise)
    # Micro-batch m takes the rows b with b % steps == m, so that every device keeps its own rows.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, steps, x.shape[1]), 1, 0), (batch, gate_noise))

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        sums, kept = micro(*part)
        return jax.tree.map(jnp.add, total, sums), kept

    shapes, _ = jax.eval_shape(lambda: micro(*jax.tree.map(lambda x: x[0], parts)))
    totals, kept = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
    return totals, jnp.moveaxis(kept, 0, 1).reshape(batch.tokens.shape)
