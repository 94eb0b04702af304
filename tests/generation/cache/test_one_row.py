"""Steps of one row by the kernel of all layers, on simulated warps, against XLA's."""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention.target import Target
from sepjax.config import AttentionConfig, ModelConfig
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.one_row_pass import shape_of_one_row
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.model import one_row
from sepjax.model.one_row import shape
from sepjax.model.one_row.kernel import Kernel
from sepjax.model.one_row.shape import THREADS
from sepjax.model.quantised import in_8_bits
from sepjax.model.transformer import abstract
from sepjax.model.unrolled import by_layer, runner
from tests.model import simulated_warps
from tests.models import random_split

MODEL = ModelConfig(
    vocab_size=64, num_layers=2, embed_dim=64, num_heads=3, num_kv_heads=1, head_dim=64, mlp_dim=128, dtype="bfloat16"
)
PATTERN = AttentionConfig(num_sinks=2, max_separators=30, window_size=40, cache_size=90)
TABLE = np.arange(64) < 16
FIRST, STEPS = 90, 2  # tokens before, and those of the kernel: the row compacts among them


def simulated(s, layers, x, told, k, v, *, in_place):
    """`sepjax.model.one_row.call.run` by simulated warps."""
    news = jax.ShapeDtypeStruct((s.L, s.K, s.H), x.dtype)

    def run(layers, x, told, k, v):
        k, v = ([np.array(y) for y in (ys[0] if s.stacked else ys)] for ys in (k, v))
        new = [np.zeros(news.shape, x.dtype) for _ in range(2)] if not in_place else (k, v)
        entries = zip(layers, k, v, *new, strict=True)
        arrays = [y for layer, *entry in entries for y in (*map(np.asarray, layer), *entry)]
        packets = np.zeros((s.packets_at["end"] // 8, 2), np.uint32)
        packets[: x.size // 2] = np.stack([np.array(x).view(np.uint32), np.ones(x.size // 2, np.uint32)], axis=1)
        out = np.zeros(x.size // 2, np.uint32)
        arrays += [*map(np.asarray, told), packets, out]
        strides = (s.H, 0) if not in_place else (s.C * s.H, s.H)
        body = lambda m: Kernel(s, m, strides).run()  # noqa: E731
        size = s.shared_at["end"] + s.stages * s.stage
        simulated_warps.run(body, arrays, s.blocks, THREADS // 32 + 1, size)
        return out.view(jnp.bfloat16), *new_of(new)

    def new_of(new):
        return [(y,) for y in new] if s.stacked else [tuple(y) for y in new]

    result = (x, k, v) if in_place else (x, (news,), (news,))
    return jax.pure_callback(run, result, layers, x, told, k, v)


@pytest.fixture
def on_three_sms(monkeypatch):
    calls = []

    def run(s, *given, **how):
        calls.append(s)
        return simulated(s, *given, **how)

    monkeypatch.setattr(one_row, "target", lambda: Target("gpu", "NVIDIA H100 80GB HBM3", 3, "9.0"))
    monkeypatch.setitem(sys.modules, "sepjax.model.one_row.call", types.SimpleNamespace(run=run))
    return calls


def steps(dtype, attention, tokens, model=MODEL):
    """Hidden states of the last steps, and the cache after them; of a pattern without a bound a growing one."""
    config = dataclasses.replace(model, dtype=dtype)
    graph, params = random_split(dataclasses.replace(config, weight_dtype="model"), attention, 1, scale=8)
    if config.weight_dtype == "int8":
        graph, _ = abstract(config, attention)
        params = in_8_bits(params, tied=config.tie_embeddings)
    params = by_layer(params, config, by_output=True)
    if attention.cache_size:
        cache = StreamingCache.create(config, 1, StreamSizes.create(config, attention), by_layer=True)
    else:
        cache = SeparatorCache.create(config, 1, window_size=attention.window_size, capacity=88)

    @functools.partial(jax.jit, static_argnums=3)
    def take_up(params, cache, tokens, size):
        hidden, cache = cache.take_up(runner(graph, params), tokens, jnp.full(1, size), TABLE, attention)
        return hidden, cache.compact()

    _, cache = take_up(params, cache, tokens[:, :FIRST], FIRST)
    found = []
    for i in range(FIRST, tokens.shape[1]):
        hidden, cache = take_up(params, cache, tokens[:, i : i + 1], 1)
        found.append(np.asarray(hidden, np.float32))
    return np.stack(found), cache


@pytest.mark.parametrize(
    ("changes", "zones", "stage", "form"),
    [
        ({}, 3, shape.STAGE, {"qk_norm": "head"}),
        ({"cache_size": 0}, 1, 1024, {"qkv_bias": True}),  # rows in parts, as those of large matrices
        # Its zones as those of growing ones.
        pytest.param({"stream_positions": "absolute"}, 1, shape.STAGE, {}, marks=pytest.mark.soak),
        # Rows in parts, and whole ones of half a block of columns. One step: compaction does not look at the weights.
        ({}, 3, 1024, {"weight_dtype": "int8"}),
        pytest.param({}, 3, shape.STAGE, {"weight_dtype": "int8"}, marks=pytest.mark.soak),
    ],
    ids=["bounded, norms of heads", "growing, biases", "positions of the text", "8 bits in parts", "8 bits"],
)
def test_the_kernel_steps_as_xla(on_three_sms, monkeypatch, changes, zones, stage, form):
    monkeypatch.setattr(shape, "STAGE", stage)
    model = dataclasses.replace(MODEL, **form)
    attention = dataclasses.replace(PATTERN, **changes)
    number = 1 if form.get("weight_dtype") == "int8" and stage == 1024 else STEPS
    tokens = np.random.default_rng(0).integers(0, 64, (1, FIRST + STEPS))[:, : FIRST + number]
    plain = dataclasses.replace(attention, implementation="xla")
    exact, _ = steps("float32", plain, tokens, model)
    rough, plain_cache = steps("bfloat16", plain, tokens, model)
    assert not on_three_sms, "asked for by its name, plain XLA runs"
    got, cache = steps("bfloat16", attention, tokens, model)
    assert on_three_sms
    assert on_three_sms[0].zones == zones
    error, allowed = (np.sqrt(np.mean((x - exact) ** 2)) for x in (got, rough))
    assert 0 < error <= 2 * allowed
    for own, other in zip(jax.tree.leaves(cache), jax.tree.leaves(plain_cache), strict=True):
        own, other = (np.asarray(x, np.float32) for x in (own, other))
        near = 0.05 * np.abs(other).max() if other.ndim > 3 else 0  # keys and values; each lies in its slot
        np.testing.assert_allclose(own, other, rtol=0, atol=near)


def test_who_is_served(on_three_sms, monkeypatch):
    def reason(implementation=None, **changes):
        config = dataclasses.replace(MODEL, **changes)
        return one_row.unsupported(config, one_row.shape_of(config, 128, (2, 32)), implementation) or ""

    assert not reason()
    assert not reason(qk_norm="head", qkv_bias=True)
    assert "model.qk_norm='width' is one of all heads" in reason(qk_norm="width")
    assert "norm_offset=False, got True" in reason(norm_offset=True)
    assert "bfloat16" in reason(dtype="float16")
    assert "heads of 64 and 128, got 32" in reason(head_dim=32)
    assert "64 numbers of a row at a time, the model is 48 wide" in reason(embed_dim=48)
    assert "asks for plain XLA" in reason("xla")
    monkeypatch.setenv("SEPJAX_ONE_ROW", "0")
    assert "SEPJAX_ONE_ROW=0" in reason()
    monkeypatch.setattr(one_row, "target", lambda: Target("cpu", "cpu"))
    monkeypatch.delenv("SEPJAX_ONE_ROW")
    assert "needs an NVIDIA Hopper GPU" in reason()


def test_rows_and_caches_that_it_does_not_serve(on_three_sms):
    def served(attention=PATTERN, rows=1, **changes):
        config = dataclasses.replace(MODEL, **changes)
        cache = StreamingCache.create(config, rows, StreamSizes.create(config, attention), by_layer=True)
        model = types.SimpleNamespace(by_output={}, config=config)
        return shape_of_one_row(model, cache, attention)

    assert served() is not None
    assert served(rows=2) is None
    assert served(dataclasses.replace(PATTERN, cache_dtype="int8")) is None
    assert served(dataclasses.replace(PATTERN, pattern="watched")) is None
    assert served(dataclasses.replace(PATTERN, kept_layers=(1,))) is None
    assert served(sliding_window=70, full_layers=(1,)) is None


ON_A_GPU = {
    "SmolLM2-135M's shape": (ModelConfig(64, 3, 576, 9, 3, 64, 1536), {}),
    "rows in parts, heads of 128": (ModelConfig(64, 2, 1024, 16, 4, 128, 14336), {}),
    "growing": (ModelConfig(64, 3, 576, 9, 3, 64, 1536), {"cache_size": 0}),
    "8 bits": (ModelConfig(64, 3, 576, 9, 3, 64, 1536, weight_dtype="int8"), {}),
    "Qwen3-0.6B's shape": (ModelConfig(64, 3, 1024, 16, 8, 128, 3072, qk_norm="head"), {}),
    "Qwen2.5-0.5B's shape": (ModelConfig(64, 3, 896, 14, 2, 64, 4864, qkv_bias=True), {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU)
def test_the_kernel_on_a_gpu(case, monkeypatch):
    """The 2x rule, and the same bits again."""
    model, changes = ON_A_GPU[case]
    attention = dataclasses.replace(PATTERN, **changes)
    tokens = np.random.default_rng(0).integers(0, 64, (1, FIRST + STEPS))
    with jax.default_matmul_precision("highest"):
        exact, _ = steps("float32", dataclasses.replace(attention, implementation="xla"), tokens, model)
    got, again = (steps("bfloat16", attention, tokens, model)[0] for _ in range(2))
    np.testing.assert_array_equal(got, again)
    monkeypatch.setenv("SEPJAX_ONE_ROW", "0")
    rough, _ = steps("bfloat16", attention, tokens, model)
    assert (got != rough).any(), "two programs"
    error, allowed = (np.sqrt(np.mean((x - exact) ** 2)) for x in (got, rough))
    assert error <= 2 * allowed
