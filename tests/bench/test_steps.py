"""The benchmark of single steps on a shape that takes no time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.bench import steps
from sepjax.bench.steps import (
    StepSpeed,
    caches_of,
    full_cache,
    in_types,
    measure,
    memory_bandwidth,
    random_params,
    times_of_dense,
)
from sepjax.config import Config, ConfigError, DataConfig, ModelConfig
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.measure import counted_compilations
from sepjax.model.quantised import QuantisedMatrix

MODEL = ModelConfig(
    vocab_size=300, num_layers=1, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
    tie_embeddings=False, dtype="bfloat16",
)  # fmt: skip
CONFIG = Config(model=MODEL, data=DataConfig(tokenizer_vocab_size=300))


@pytest.mark.parametrize("name", ["dense 50", pytest.param("watched int8", marks=pytest.mark.soak)])
def test_every_cache_and_batch_size_gets_a_figure(monkeypatch, name):
    monkeypatch.setattr("sepjax.bench.steps.memory_bandwidth", lambda: 1e9)  # a second; it has a test of its own
    attention = dataclasses.replace(CONFIG.attention, watch_after=4)  # below the window of 6
    caches = caches_of(attention, 1, "2/3/6/20", 50, ("separator", "watched"))
    assert in_types(caches, ()) == caches
    assert list(in_types(caches, ("model", "int8"))) == [f"{x}{kind}" for x in caches for kind in ("", " int8")]
    del caches["separator 2/3/6/20"]  # a program of seconds each: watched tokens, in codes, have what it has
    caches = in_types({"watched": caches.pop("watched 2/3/6/20")}, ("int8",)) | caches
    assert [*caches] == ["watched int8", "dense 50"]
    figures = list(measure(CONFIG, {name: caches[name]}, ["2"], seconds=0.01))
    assert [(x.name, x.rows) for x in figures] == [(name, 2)]
    read = 2 * (300 * 32 + 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 4 * 3 * 32  # bfloat16; norms float32
    for x in figures:
        assert x.weight_bytes == read
        assert x.tokens_per_second == pytest.approx(x.rows / x.milliseconds * 1e3)
        assert x.share_of_bandwidth / x.share_of_weights == pytest.approx((read + x.cache_bytes) / read)
        cache = full_cache(CONFIG, StreamSizes.create(MODEL, caches[x.name]), 2)
        assert x.cache_bytes == cache.nbytes


def test_bounded_caches_are_told_beside_a_dense_one_each_at_its_best():
    def figure(name, rows, tokens):
        return StepSpeed(name, rows, 1.0, tokens, 1, 1, 1.0, 1.0)

    figures = [figure("a", 1, 10.0), figure("a", 8, 45.0), figure("dense 50", 1, 9.0), figure("dense 50", 2, 6.0)]
    assert list(times_of_dense(figures)) == ["a, 8 rows: 5.0 times the tokens of dense 50, 1 rows"]
    assert not list(times_of_dense(figures[:2]))


def test_full_caches_are_full_and_rows_are_not_in_step():
    attention = caches_of(CONFIG.attention, 1, "2/3/6/20", 0)["separator 2/3/6/20"]
    cache = full_cache(CONFIG, StreamSizes.create(MODEL, attention), 8)
    held = np.asarray(cache.held())
    assert held.min() >= 2 + 3 + 6
    assert held.max() <= 20
    assert len(set(held.tolist())) > 4
    assert not np.asarray(cache.is_full()).any()
    assert np.asarray(cache.visible_old()).all()


def test_a_dense_cache_sees_everything_at_its_own_place():
    attention = caches_of(CONFIG.attention, 1, "2/3/6/20", 50)["dense 50"]
    sizes = StreamSizes.create(MODEL, attention)
    assert (sizes.num_sinks, sizes.max_separators, sizes.window_size, sizes.absolute) == (0, 0, 50, True)
    assert sizes.cache_size == 50 + 64


def test_random_parameters_have_the_shapes_and_scales_they_should():
    shapes = {"a": jax.ShapeDtypeStruct((64, 64), np.float32), "b": jax.ShapeDtypeStruct((8,), np.float32)}
    params = random_params(shapes)
    assert np.std(params["a"]) == pytest.approx(0.02, rel=0.1)
    assert (params["b"] == 1).all()
    matrix: Any = jax.eval_shape(lambda: QuantisedMatrix(jnp.zeros((64, 64), np.int8), jnp.zeros(64)))
    params = random_params({"rows": matrix})
    assert np.std(params["rows"].numbers(np.float32)) == pytest.approx(0.02, rel=0.1)


def test_matrices_of_each_type_are_measured():
    settings = steps.Settings(config=CONFIG, weight_dtypes=("model", "int8"))
    found = settings.configs()
    assert found == {"": CONFIG, ", int8 weights": found[", int8 weights"]}
    assert found[", int8 weights"].model == dataclasses.replace(MODEL, weight_dtype="int8")


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ConfigError, match="sinks/separators/window/cache"):
        caches_of(CONFIG.attention, 1, "4/64", 0)
    for size in ("x", "-1", "0"):
        with pytest.raises(ConfigError, match=rf"--batch_sizes takes whole numbers of 1 or more.*, got '{size}'"):
            steps.Settings(config=CONFIG, batch_sizes=("1", size))
    with pytest.raises(ConfigError, match="cache_size"):
        caches_of(CONFIG.attention, 1, "4/64/256/300", 0)
    caches = caches_of(dataclasses.replace(CONFIG.attention), 1, "2/3/6/20", 0)
    if jax.default_backend() == "cpu":
        with pytest.raises(ConfigError, match="give numbers instead"):
            next(measure(CONFIG, caches, ["auto"], seconds=0.01))


def test_the_memory_speed_is_not_that_of_the_compiler():
    with counted_compilations() as compiled:
        assert memory_bandwidth() > 0
    assert len(compiled) <= 4  # the array, its maximum, its negative: not one more a call
