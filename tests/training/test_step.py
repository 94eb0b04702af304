"""The train step: what it must not depend on, and one golden step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sepjax.config import AttentionConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from sepjax.data.batch import Batch
from sepjax.model.attend import forward
from sepjax.model.transformer import merge
from sepjax.sharding import batch_sharding, make_mesh, replicated
from sepjax.training.optimizer import decayed_parameters, learning_rate_schedule
from sepjax.training.step import (
    _loss,
    abstract_state,
    attention_statistics,
    create_state,
    eval_step,
    model_graph,
    train_step,
)

V, B, T = 61, 8, 32
# The op has tests of its own; its definition compiles in half the time. The step on a mesh below has what users get.
CONFIG = Config(
    model=ModelConfig(vocab_size=V, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32),
    attention=AttentionConfig(num_sinks=2, window_size=6, implementation="reference"),
    data=DataConfig(tokenizer_vocab_size=V, sequence_length=T, batch_size=B),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.2),
    # No step here is a spike; reliability/test_numbers.py has some, and this program.
    training=TrainingConfig(steps=100, spike_factor=1.5),
)


GATED = dataclasses.replace(
    CONFIG,
    attention=dataclasses.replace(CONFIG.attention, pattern="gated", gate_layer=1, gate_stretch=5, gate_keep=2),
)


def make_batch(seed: int = 0, lengths: tuple[int, ...] = (12, 20)) -> Batch:
    """Rows of documents of these lengths, then padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, V, (B, T + 1)).astype(np.int32)
    segments, positions = np.zeros(T, np.int32), np.zeros(T, np.int32)
    start = 0
    for number, length in enumerate(lengths, start=1):
        segments[start : start + length] = number
        positions[start : start + length] = np.arange(length)
        start += length
    segments, positions = (np.tile(x, (B, 1)) for x in (segments, positions))
    mask = (segments > 0) & (rng.random((B, T)) < 0.8)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, positions, segments, rng.random((B, T)) < 0.15)


@functools.cache
def first_state(config: Config):
    """What a run of it begins with; nothing changes it."""
    return jax.jit(lambda: create_state(config))()


@functools.cache
def compiled(config: Config):
    """The step of a config, traced once for all tests of it."""
    graph = model_graph(config)
    return jax.jit(lambda state, batch: train_step(config, graph, state, batch))


def run(config: Config, batches: list[Batch]):
    step = compiled(config)
    state, metrics = first_state(dataclasses.replace(config, optimizer=CONFIG.optimizer)), {}
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.soak  # the golden step and runs of test_train.py
def test_loss_falls_on_a_repeated_batch():
    batch = make_batch()
    _, first = run(CONFIG, [batch])
    state, last = run(CONFIG, [batch] * 60)
    assert float(first["train/loss"]) == pytest.approx(np.log(V), abs=0.2)  # a new model knows nothing
    assert float(last["train/loss"]) < 0.5 * float(first["train/loss"])
    assert int(state.step) == 60


@pytest.mark.parametrize("config", [CONFIG, pytest.param(GATED, marks=pytest.mark.soak)], ids=["separators", "gated"])
def test_micro_batches_add_up_to_the_whole_batch(config):
    """Sums over tokens, not means of means: micro-batches with different token counts must give the same step."""
    batch = make_batch()
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & (np.arange(B)[:, None] % 4 != 1))
    whole, metrics = run(config, [batch] * 3)
    micro = dataclasses.replace(config, optimizer=dataclasses.replace(CONFIG.optimizer, accumulation_steps=4))
    parts, part_metrics = run(micro, [batch] * 3)
    assert_close(whole.params, parts.params, 2e-5)
    assert_close(metrics, part_metrics, 1e-4)


def test_packing_is_invisible_to_documents():
    """The same documents scored in rows of two or in rows of one: the same summed loss."""
    graph, params = model_graph(CONFIG), first_state(CONFIG).params
    packed, score = make_batch(lengths=(12, 20)), jax.jit(functools.partial(eval_step, CONFIG, graph))
    nll, count = score(params, packed)

    def only(part: slice) -> Batch:
        def cut(x):
            return np.pad(x[:, part], ((0, 0), (0, T - (part.stop - part.start))))

        return jax.tree.map(cut, packed)

    apart = [score(params, only(part)) for part in (slice(0, 12), slice(12, 32))]
    assert float(nll) == pytest.approx(sum(float(a[0]) for a in apart), rel=1e-5)
    assert float(count) == sum(float(a[1]) for a in apart) == packed.loss_mask.sum()


def test_same_seed_same_bits():
    batches = [make_batch(seed) for seed in range(3)]
    (first, _), (second, _) = run(CONFIG, batches), run(CONFIG, batches)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (CONFIG, MeshConfig(data=2, fsdp=2, tensor=2)),
        pytest.param(GATED, MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.soak),
        pytest.param(GATED, MeshConfig(data=1, fsdp=2, tensor=2, context=2), marks=pytest.mark.soak),
        pytest.param(GATED, MeshConfig(data=1, context=2), marks=pytest.mark.soak),
    ],
    ids=["separators", "gated", "gated, all", "gated, context"],
)
def test_meshes_give_the_same_step(config, sizes):
    batches = [make_batch(seed) for seed in range(3)]
    expected, expected_metrics = run(config, batches)
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, implementation=None))
    devices = jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor * sizes.context]
    mesh, graph = make_mesh(sizes, devices), model_graph(config)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: create_state(config), out_shardings=shardings)()
        step = jax.jit(lambda s, b: train_step(config, graph, s, b), out_shardings=(shardings, None), donate_argnums=0)
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        assert step._cache_size() == 1
    assert_close(metrics, expected_metrics, 1e-4)
    # Adam divides by the root of the second moment: where a gradient is nearly zero its rounding decides the direction,
    # so parameters agree to a fraction of the learning rate, not to rounding.
    assert_close(state.params, expected.params, 0.1 * CONFIG.optimizer.learning_rate)


@pytest.mark.soak  # its hidden states and its choice are the same on such a mesh: tests/model/test_gate.py
def test_parts_of_rows_give_a_gated_model_the_same_loss():
    """What `context` adds to a gate, without gradients; with them above, with -m soak."""
    graph, params, batch = model_graph(GATED), first_state(GATED).params, make_batch()
    expected = jax.jit(functools.partial(eval_step, GATED, graph))(params, batch)
    mesh = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, batch_sharding(mesh))
        got = jax.jit(functools.partial(eval_step, GATED, graph))(jax.device_put(params, replicated(mesh)), placed)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_decay_spares_biases_and_norms():
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, norm="layernorm", attention_bias=True, mlp_bias=True)
    )
    flat = jax.tree_util.tree_leaves_with_path(decayed_parameters(jax.eval_shape(lambda: create_state(config)).params))
    decayed = {path[-1].key for path, decays in flat if decays}
    spared = {path[-1].key for path, decays in flat if not decays}
    assert decayed == {"kernel", "embedding"}
    assert spared == {"scale", "bias"}


def test_schedule_warms_up_and_ends_where_it_should():
    optimizer = OptimizerConfig(learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=10)
    schedule = learning_rate_schedule(optimizer, 100)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(3e-4)
    assert float(schedule(10)) == pytest.approx(6e-4)
    assert float(schedule(55)) == pytest.approx(3.3e-4, rel=1e-3)
    assert float(schedule(100)) == float(schedule(1000)) == pytest.approx(6e-5)


def test_statistics_are_counted_from_the_mask():
    config = dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, layer_windows=(6, T)))
    batch = make_batch()
    got = jax.jit(functools.partial(attention_statistics, config))(batch)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    fractions, kept, pairs = [], [], []
    for n in (6, T):
        seg = batch.segment_ids
        causal = (seg[:, :, None] == seg[:, None]) & (j <= i)
        visible = causal & (batch.is_separator[:, None] | (batch.positions[:, None] < 2) | (i - j < n))
        fractions.append(visible.sum() / causal.sum())
        pairs.append(visible.sum() / B)
        kept.append(np.mean([visible[:, 11].sum(1) / 12, visible[:, 31].sum(1) / 20]))
    assert float(got["sep/attention_fraction"]) == pytest.approx(np.mean(fractions), rel=1e-5)
    assert float(got["sep/kv_kept"]) == pytest.approx(np.mean(kept), rel=1e-5)
    assert float(got["sep/pairs_per_row"]) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert float(got["sep/separator_fraction"]) == pytest.approx(batch.is_separator.mean(), rel=1e-5)


@pytest.mark.soak  # its slope is in model/test_gate.py, what it learns in keeping/test_distill.py
def test_a_gate_learns_by_far_use_and_its_choice_is_counted():
    """Everything else held still, the straight-through gradient alone must lower the loss."""
    batch = make_batch(lengths=(32,))
    config = dataclasses.replace(
        GATED,
        training=dataclasses.replace(CONFIG.training, gate_noise=0.0),
        optimizer=dataclasses.replace(CONFIG.optimizer, clip_norm=1.0),
    )
    graph, params = model_graph(config), run(config, [batch] * 30)[0].params
    gate = first_state(GATED).params["gate"]

    @jax.jit
    def value_and_gradient(gate):
        def mean_loss(gate):
            loss, (_, _, kept) = _loss(params | {"gate": gate}, {}, config, graph, batch, jnp.zeros((B, T)))
            return loss / batch.loss_mask.sum(), kept

        return jax.value_and_grad(mean_loss, has_aux=True)(gate)

    adam = optax.adam(3e-3)

    @jax.jit
    def update(gate, moments, gradient):
        updates, moments = adam.update(gradient, moments)
        return optax.apply_updates(gate, updates), moments

    moments, losses = adam.init(gate), []
    for _ in range(60):
        (loss, kept), gradient = value_and_gradient(gate)
        assert all(np.asarray(x).any() for x in jax.tree.leaves(gradient))
        losses.append(float(loss))
        gate, moments = update(gate, moments, gradient)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.01

    got = jax.jit(functools.partial(attention_statistics, config))(dataclasses.replace(batch, is_separator=kept))
    kept = np.asarray(kept)
    assert (kept[:, :25].sum(1) == 2 * 5).all()  # two of each stretch
    held = np.stack([np.full(B, 2 + 6), 2 + 6 + kept[:, :26].sum(1)])  # by the last query of the two layers
    assert float(got["sep/kv_kept"]) == pytest.approx(np.mean(held) / 32, rel=1e-5)


def test_golden_step():
    """Two steps against a loop written out here: plain logits, optax's cross-entropy, clip, AdamW.

    Clipping bounds the step, but not the norm that is reported.
    """
    batch, graph = make_batch(), model_graph(CONFIG)
    params = first_state(CONFIG).params

    def mean_loss(params):
        model = merge(graph, params)
        hidden, _ = forward(model, batch.tokens, batch.positions, batch.is_separator, batch.segment_ids)
        nll = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), batch.targets)
        return jnp.sum(nll * batch.loss_mask) / batch.loss_mask.sum()

    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
    adam = optax.adamw(lambda step: 5e-3 * step, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask)  # warm-up: 0, 5e-3
    optimizer = optax.chain(optax.clip_by_global_norm(0.2), adam)
    moments = optimizer.init(params)

    @jax.jit
    def update(params, moments):
        gradient = jax.grad(mean_loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, optax.tree.norm(gradient)

    for _ in range(2):
        params, moments, norm = update(params, moments)
    state, metrics = run(CONFIG, [batch] * 2)
    assert float(metrics["optim/grad_norm"]) == pytest.approx(float(norm), rel=1e-3)
    assert float(norm) > CONFIG.optimizer.clip_norm, "it is clipped"
    assert_close(
        state.params, params, 0.02 * 5e-3
    )  # Adam turns rounding of near-zero gradients into a share of its step


def test_a_run_shorter_than_its_warm_up_ends_within_it():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1e-3, warmup_steps=50), 5)
    assert float(schedule(4)) == pytest.approx(1e-3 * 4 / 50)
