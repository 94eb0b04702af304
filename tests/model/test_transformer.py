"""The decoder: every family's shape, who may influence whom, and that scan, remat and sharding change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from sepjax.config import AttentionConfig, MeshConfig, ModelConfig, RopeConfig
from sepjax.model.attend import forward
from sepjax.model.layers import Block
from sepjax.model.transformer import Transformer, abstract, create, merge, split
from sepjax.sharding import make_mesh, parameter_shardings
from tests.models import random_model

V, T = 97, 24
LLAMA = ModelConfig(
    vocab_size=V, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, tie_embeddings=False
)
BIASED = {"norm": "layernorm", "gated_mlp": False, "attention_bias": True, "mlp_bias": True}
FAMILIES = {
    "llama": LLAMA,
    "gpt_neox": dataclasses.replace(
        LLAMA, num_kv_heads=4, activation="gelu", parallel_residual=True, rope=RopeConfig(fraction=0.25), **BIASED
    ),
    "gpt2": dataclasses.replace(
        LLAMA, num_kv_heads=4, activation="gelu_tanh", position_embedding="learned", tie_embeddings=True, **BIASED
    ),
    "falcon": dataclasses.replace(
        LLAMA,
        num_kv_heads=1,
        norm="layernorm",
        activation="gelu",
        gated_mlp=False,
        parallel_residual=True,
        shared_norm=True,
        tie_embeddings=True,
    ),
}
FAMILIES["layers of every kind"] = dataclasses.replace(
    LLAMA,
    norm_position="both",
    norm_offset=True,
    qk_norm="width",
    qkv_bias=True,
    sliding_window=8,
    full_layers=(1, 2),
    no_rope_layers=(2,),
    sliding_rope=RopeConfig(base=100.0),
    embedding_scale=3.0,
    residual_scale=0.5,
    attention_scale=0.1,
    logit_divisor=2.0,
    final_softcap=10.0,
)
# The op has tests of its own; its definition compiles quickest.
ATTENTION = AttentionConfig(num_sinks=2, window_size=4, implementation="reference")


def rows(seed: int = 0, B: int = 2):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return tokens, positions, rng.random((B, T)) < 0.2


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logits(graph, params, batch, attention):
    model = merge(graph, params)
    return model.logits(forward(model, *batch, attention=attention)[0])


def logits(model: Transformer, *batch, attention: AttentionConfig = ATTENTION):
    return _logits(*split(model), batch, attention)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return random_model(FAMILIES[request.param], ATTENTION)


# Who sees whom, and the loop over layers, do not know most of what a family is: one with everything, the rest with
# -m soak.
ONE = [pytest.param(x, marks=[] if x == "layers of every kind" else pytest.mark.soak) for x in FAMILIES]
of_one_family = pytest.mark.parametrize("model", ONE, indirect=True, scope="module")


def test_families_give_float32_logits(model):
    out = logits(model, *rows())
    assert out.shape == (2, T, V)
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()


def test_parameters_are_float32_and_named_in_the_sharding_table(model):
    _, params = split(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    mesh = make_mesh(MeshConfig(data=-1))
    shardings = jax.tree.leaves(parameter_shardings(params, mesh))
    assert len(shardings) == len(jax.tree.leaves(params))


@of_one_family
def test_gradient_follows_the_mask(model):
    """d logits[i] / d embedding of token j is zero exactly where no path of layers leads from j to i."""
    tokens, positions, is_separator = rows(B=1)
    segment_ids = np.repeat([[1, 2]], T // 2, axis=1).astype(np.int32)
    positions = np.concatenate([positions[:, : T // 2]] * 2, axis=1)
    graph, params = split(model)
    clean = params["embedding"]["embedding"]
    # Each position reads a row of its own, so that the gradient tells positions apart.
    table = np.concatenate([np.asarray(clean)[tokens[0]], clean])

    def output(table, i):
        changed = merge(graph, params | {"embedding": {"embedding": table}})
        row = jnp.arange(T, dtype=jnp.int32)[None]
        return jnp.sum(forward(changed, row, positions, is_separator, segment_ids)[0][0, i] ** 2)

    gradient = jax.jit(jax.grad(output))
    for i in (0, 5, T // 2, T - 1):
        touched = np.abs(np.asarray(gradient(table, i))[:T]).sum(axis=1) > 0
        start = 0 if i < T // 2 else T // 2
        assert not touched[:start].any(), "another document leaked in"
        assert not touched[i + 1 :].any(), "the future leaked in"
        assert touched[i]
        assert touched[start]  # a sink


def test_a_far_token_reaches_nobody_but_through_separators():
    """One layer, no sinks: exactly the tokens of the mask's row have a gradient."""
    config = dataclasses.replace(LLAMA, num_layers=1)
    model = random_model(config, dataclasses.replace(ATTENTION, num_sinks=0), seed=1)
    tokens, positions, _ = rows(B=1)
    is_separator = np.zeros((1, T), bool)
    is_separator[0, [3, 11]] = True
    graph, params = split(model)
    table = np.asarray(params["embedding"]["embedding"])[tokens[0]]

    def output(table):
        changed = merge(graph, params | {"embedding": {"embedding": table}})
        return jnp.sum(forward(changed, jnp.arange(T, dtype=jnp.int32)[None], positions, is_separator)[0][0, 20] ** 2)

    touched = np.flatnonzero(np.abs(jax.jit(jax.grad(output))(table)).sum(axis=1) > 0)
    np.testing.assert_array_equal(touched, [3, 11, 17, 18, 19, 20])


@of_one_family
def test_scan_equals_a_python_loop_over_layers(model):
    tokens, positions, is_separator = rows()
    seen = []

    def loop(model, x, attend, inputs):
        graph, params = split(model.layers)
        for i in range(model.config.num_layers):
            block: Block = merge(graph, jax.tree.map(lambda p, i=i: p[i], params))
            x, _ = block(x, attend, jax.tree.map(lambda y, i=i: y[i], inputs))
            seen.append(i)
        return x, None

    class Unrolled(Transformer):
        run_layers = loop

    graph, _ = split(nnx.eval_shape(lambda: Unrolled(model.config, ATTENTION, rngs=nnx.Rngs(params=0))))
    unrolled = merge(graph, split(model)[1])
    np.testing.assert_allclose(
        logits(unrolled, tokens, positions, is_separator), logits(model, tokens, positions, is_separator), atol=1e-5
    )
    assert seen == [0, 1, 2]


def test_shapes_are_those_of_a_model_whatever_was_asked_for_before():
    """They are traced once: neither another pattern nor what a caller does with them comes back."""
    gated = dataclasses.replace(ATTENTION, pattern="gated", gate_layer=1, gate_stretch=4, gate_keep=2)
    for attention in (ATTENTION, gated):
        expected = split(nnx.eval_shape(lambda attention=attention: create(LLAMA, attention, jax.random.key(0))))
        for _ in range(2):
            graph, shapes = abstract(LLAMA, attention)
            assert (graph, shapes) == expected
            assert hash(graph) == hash(expected[0])
            shapes["layers"].clear()


@functools.cache
def gradient(config):
    graph, _ = abstract(config, ATTENTION)
    params = split(random_model(LLAMA, ATTENTION))[1]
    return jax.jit(jax.grad(lambda p: jnp.sum(logits(merge(graph, p), *rows()) ** 2)))(params)


@functools.cache
def plain_gradient():
    return gradient(LLAMA)


CHANGED = [("dots", False)]
OTHERS = [("dots", True), ("full", False), ("full", True), ("none", not LLAMA.scan_layers)]
REPEATED = [pytest.param(*both, marks=pytest.mark.soak) for both in OTHERS]


@pytest.mark.parametrize(("remat", "scan_layers"), [*CHANGED, *REPEATED])
def test_remat_and_scan_change_no_gradient(remat, scan_layers):
    plain, saved = plain_gradient(), gradient(dataclasses.replace(LLAMA, remat=remat, scan_layers=scan_layers))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * np.abs(a).max()), plain, saved)


@pytest.mark.soak  # windows of layers are in attention/test_op.py and of caches in generation/cache
def test_layer_windows_are_data():
    """H: a dense first layer. Layers that differ in n share one compiled body."""
    model = random_model(LLAMA, ATTENTION)
    batch = rows()
    equal = dataclasses.replace(ATTENTION, layer_windows=(4, 4, 4))
    np.testing.assert_allclose(logits(model, *batch, attention=equal), logits(model, *batch), atol=1e-5)
    dense = dataclasses.replace(ATTENTION, layer_windows=(T, T, T))
    pattern = dataclasses.replace(ATTENTION, pattern="dense")
    np.testing.assert_allclose(
        logits(model, *batch, attention=dense), logits(model, *batch, attention=pattern), atol=1e-4
    )
    head = dataclasses.replace(ATTENTION, layer_windows=(T, 4, 4))
    assert np.abs(logits(model, *batch, attention=head) - logits(model, *batch)).max() > 1e-3


def test_bfloat16_keeps_float32_parameters_and_logits():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    low = random_model(config, ATTENTION)
    batch = rows()
    assert jax.eval_shape(lambda: forward(low, *batch)[0]).dtype == jnp.bfloat16
    out = logits(low, *batch)
    assert out.dtype == jnp.float32
    exact = logits(random_model(LLAMA, ATTENTION), *batch)
    assert np.abs(out - exact).max() < 0.05 * np.abs(exact).max()


ONE_AXIS = [MeshConfig(data=1, fsdp=8), MeshConfig(data=8)]


@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=2, fsdp=2, tensor=2), *(pytest.param(x, marks=pytest.mark.soak) for x in ONE_AXIS)]
)
def test_meshes_change_nothing(sizes):
    model = random_model(LLAMA, ATTENTION)
    batch = rows(B=8)
    expected = logits(model, *batch)
    graph, params = split(model)
    mesh: Mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(params, mesh))
        out = jax.jit(lambda p: logits(merge(graph, p), *batch))(placed)
    np.testing.assert_allclose(out, expected, atol=2e-5)
