"""The gate: which tokens it keeps, that no choice depends on what comes later, and what the layers above then see."""

import dataclasses
import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig
from sepjax.layout import build_layout
from sepjax.model.attend import forward, layer_layouts, run_rows
from sepjax.model.gate import keep_best, straight_through
from sepjax.model.transformer import create, merge, split
from sepjax.sharding import make_mesh
from tests.models import random_model

V, T = 97, 29
MODEL = ModelConfig(vocab_size=V, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
GATED = AttentionConfig(
    "gated", num_sinks=2, window_size=7, gate_layer=1, gate_stretch=5, gate_keep=2, implementation="reference"
)


@pytest.fixture(scope="module")
def model():
    return random_model(MODEL, GATED)


def row(seed=0, B=1):
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32), positions, np.zeros((B, T), bool)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(graph, params, attention, batch, noise):
    rows = run_rows(merge(graph, params), *batch, attention=attention, gate_noise=noise)
    return rows.hidden, rows.is_separator, rows.scores


def run(model, batch, attention=GATED, noise=None):
    """Hidden states, flags and scores."""
    graph, params = split(model)
    return _run(graph, params, attention, batch, noise)


def _scan(step, carry, inputs, *, unroll):
    """`jax.lax.scan` in Python: NumPy cuts layers, where XLA compiles each cut of each parameter."""
    given, outputs = jax.tree.map(np.asarray, inputs), []
    for i in range(len(jax.tree.leaves(given)[0])):
        carry, output = step(carry, jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), given))
        outputs.append(output)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def hidden_of(model, batch, attention, flags=None):
    """Hidden states of (tokens, positions, flags), or where other tokens are separators.

    One operation after another: patterns have most in common, and a program of each takes 2 to 3 seconds to compile.
    """
    tokens, positions, own = jax.tree.map(jnp.asarray, batch)
    with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "scan", _scan)
        if flags is None:
            return np.asarray(run_rows(model, tokens, positions, own, attention=attention).hidden)
        return np.asarray(forward(model, tokens, positions, jnp.asarray(flags), None, attention)[0])


_keep_best = jax.jit(keep_best, static_argnums=2)


@given(
    scores=hnp.arrays(np.float32, (2, T), elements=st.sampled_from([-1.5, 0.0, 0.5, 2.0])),  # many are equal
    ids=hnp.arrays(np.int32, (2, 4), elements=st.integers(0, 2)),
    cuts=st.lists(st.integers(0, T), min_size=3, max_size=3),
    sizes=st.sampled_from([(1, 1, 0), (5, 2, 3), (5, 0, 1), (8, 3, 2), (T + 3, 2, 1)]),  # each is a program
)
def test_the_best_of_every_stretch_are_kept(scores, ids, cuts, sizes):
    stretch, keep, num_sinks = sizes
    segments = np.repeat(ids, np.diff([0, *sorted(cuts), T]), axis=1)
    attention = dataclasses.replace(GATED, gate_stretch=stretch, gate_keep=keep, num_sinks=num_sinks)
    layout = build_layout(segments > 0, window_size=stretch, num_sinks=num_sinks, segment_ids=segments)
    expected = np.zeros((2, T), bool)
    for b in range(2):
        starts = [i for i in range(T) if i == 0 or segments[b, i] != segments[b, i - 1]]
        for start, end in zip(starts, [*starts[1:], T], strict=True):
            for first in range(start, end, stretch) if segments[b, start] else ():
                tokens = range(max(first, start + num_sinks), min(first + stretch, end))
                expected[b, sorted(tokens, key=lambda i: -scores[b, i])[:keep]] = True
    np.testing.assert_array_equal(_keep_best(jnp.asarray(scores), layout, attention), expected)


def test_no_later_token_changes_what_an_earlier_one_sees(model):
    """Bit for bit: hidden states before the change, and the flags of every stretch that was over by then."""
    tokens, *rest = row()
    hidden, flags, _ = (np.asarray(x) for x in run(model, (tokens, *rest)))
    changed_flags = 0
    for t in range(1, T):
        other = tokens.copy()
        other[0, t] = (tokens[0, t] + 1) % V
        after, after_flags, _ = (np.asarray(x) for x in run(model, (other, *rest)))
        np.testing.assert_array_equal(after[:, :t], hidden[:, :t])
        over = t // 5 * 5
        np.testing.assert_array_equal(after_flags[:, :over], flags[:, :over])
        changed_flags += (after_flags != flags).sum()
    assert changed_flags, "the measure itself: some choice depends on the tokens"


def test_documents_are_alone_in_their_row(model):
    """No gradient from another document or from the future, that of the scores included; the same choice as alone."""
    tokens, positions, flags = row()
    first = 12
    segments = np.repeat([[1, 2]], [first, T - first], axis=1).astype(np.int32)
    positions = np.concatenate([positions[:, :first], positions[:, : T - first]], axis=1)
    graph, params = split(model)
    table = np.asarray(params["embedding"]["embedding"])[tokens[0]]

    @jax.jit
    @jax.grad
    def gradient(table, i):
        changed = merge(graph, params | {"embedding": {"embedding": table}})
        batch = jnp.arange(T, dtype=jnp.int32)[None], positions, flags, segments, GATED
        return jnp.sum(run_rows(changed, *batch, gate_noise=jnp.zeros((1, T))).hidden[0, i] ** 2)

    for i in (first - 1, first, T - 1):
        touched = np.abs(np.asarray(gradient(table, i))).sum(axis=1) > 0
        start = 0 if i < first else first
        assert touched[i], i
        assert not touched[:start].any(), i
        assert not touched[i + 1 :].any(), i

    packed = run(model, (tokens, positions, flags, segments))
    second = np.where(segments == 2, segments, 0)
    alone = run(model, tuple(np.roll(x, -first, axis=1) for x in (tokens, positions, flags, second)))  # then padding
    np.testing.assert_allclose(packed[0][:, first:], alone[0][:, :-first], atol=1e-5)
    np.testing.assert_array_equal(packed[1][:, first:], alone[1][:, :-first])


def test_layers_above_see_what_was_kept_and_layers_below_do_not(model):
    batch, hidden = row(), {}
    for name, attention in {
        "the bare window": dataclasses.replace(GATED, pattern="sink_window"),
        "nothing kept": dataclasses.replace(GATED, gate_keep=0),
        "some kept": GATED,
        "some kept, other windows": dataclasses.replace(GATED, layer_windows=(12, 7, 9)),
        "all kept, other windows": dataclasses.replace(GATED, gate_keep=5, layer_windows=(12, 7, 9)),
        "dense above, the other window below": dataclasses.replace(
            GATED, pattern="sink_window", layer_windows=(12, T, T)
        ),
    }.items():
        hidden[name] = hidden_of(model, batch, attention)
    for same in (
        ("the bare window", "nothing kept"),
        ("all kept, other windows", "dense above, the other window below"),
    ):
        np.testing.assert_allclose(*(hidden[name] for name in same), atol=1e-5)
    for other in (
        ("some kept", "nothing kept"),
        ("some kept", "some kept, other windows"),
        ("some kept, other windows", "all kept, other windows"),
    ):
        assert np.abs(hidden[other[0]] - hidden[other[1]]).max() > 1e-3, other


@pytest.mark.soak  # kept layers of caches, against whole passes, are in generation/cache/test_mixed.py
def test_what_is_kept_for_some_layers_only_they_see(model):
    """Layers above the gate that see nothing of its choice are windows."""
    batch = row()
    only = dataclasses.replace(GATED, gate_keep=5, kept_layers=(2,))
    alike = dataclasses.replace(GATED, pattern="sink_window", layer_windows=(7, 7, T))
    np.testing.assert_allclose(hidden_of(model, batch, only), hidden_of(model, batch, alike), atol=1e-5)
    # All flagged: the same, without a gate.
    only = dataclasses.replace(only, pattern="separator", gate_layer=2, kept_layers=(1,))
    alike = dataclasses.replace(alike, layer_windows=(7, T, 7))
    got = hidden_of(model, batch, only, np.ones((1, T), bool))
    np.testing.assert_allclose(got, hidden_of(model, batch, alike), atol=1e-5)


def test_noise_explores_and_the_factor_is_one(model):
    batch = row()
    hidden, flags, scores = run(model, batch)
    still = run(model, batch, noise=np.zeros((1, T), np.float32))
    np.testing.assert_allclose(still[0], hidden, atol=1e-5)
    np.testing.assert_array_equal(still[1], flags)
    noise = np.random.default_rng(1).gumbel(size=(1, T)).astype(np.float32)
    assert (run(model, batch, noise=noise)[1] != flags).any()
    np.testing.assert_allclose(run(model, batch, noise=noise)[2], scores, atol=1e-6)

    @jax.jit
    def factor(score, times):
        return straight_through(score), jax.grad(lambda s: times * straight_through(s).sum())(score)

    far_below, slope = factor(np.full((1, 1), -1e4, np.float32), np.float32(1))
    assert float(far_below[0, 0]) == 1.0
    assert np.isfinite(slope).all()
    for score in (-88.0, -100.0, 0.0):  # at the end of what a sigmoid holds in float32, and times what gradients may be
        _, slope = factor(np.full((1, 1), score, np.float32), np.float32(1e3))
        np.testing.assert_allclose(slope, 1e3 / (1 + np.exp(score)), rtol=1e-6)


def test_keys_are_counted_with_each_layers_own_layout(model):
    _, flags, _ = run(model, row())
    layouts = layer_layouts(flags, None, GATED, 3)
    assert [share for _, share in layouts] == [1 / 3, 2 / 3]
    only = layer_layouts(flags, None, dataclasses.replace(GATED, kept_layers=(2,)), 3)
    assert [(share, int(x.far_end[0, -1])) for x, share in only] == [
        (2 / 3, 2),
        (1 / 3, int(layouts[1][0].far_end[0, -1])),
    ]
    far = [int(layout.far_end[0, -1]) for layout, _ in layouts]
    assert far == [2, 2 + int(flags[0, : T - 7].sum())]


def test_a_model_without_a_gate_is_refused():
    plain = random_model(MODEL, dataclasses.replace(GATED, pattern="separator"))
    with pytest.raises(ConfigError, match="'gated' needs a model with a gate, and this one has none; train one"):
        forward(plain, *row(), attention=GATED)


@pytest.mark.soak  # `create` of two shapes
def test_a_gate_leaves_other_parameters_as_they_are():
    plain = create(MODEL, dataclasses.replace(GATED, pattern="separator"), jax.random.key(0))
    with_gate = split(create(MODEL, GATED, jax.random.key(0)))[1]
    jax.tree.map(np.testing.assert_array_equal, {k: v for k, v in with_gate.items() if k != "gate"}, split(plain)[1])
    half = dataclasses.replace(MODEL, dtype="bfloat16")
    assert jax.eval_shape(lambda: run(create(half, GATED, jax.random.key(0)), row())[2]).dtype == jnp.float32


@pytest.mark.soak  # three programs; generation/cache/test_growing_pass.py has such a gate
def test_a_gate_that_reads_embeddings_has_no_layers_below_on_any_mesh():
    attention = dataclasses.replace(GATED, gate_layer=0)
    model = random_model(MODEL, attention)
    tokens = np.random.default_rng(0).integers(0, V, (1, 32)).astype(np.int32)
    batch = tokens, np.arange(32, dtype=np.int32)[None], np.zeros((1, 32), bool)
    expected, kept, _ = run(model, batch, attention)
    assert kept.any()
    # The choice is made before any layer: it is a separator pattern with these flags.
    same = dataclasses.replace(attention, pattern="separator")
    plain = jax.jit(lambda flags: forward(model, *batch[:2], flags, None, same)[0])(kept)
    np.testing.assert_allclose(expected, plain, atol=1e-5)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1, 2), jax.devices()[:2])):
        hidden, flags, _ = run(model, batch, attention)
    np.testing.assert_array_equal(flags, kept)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
