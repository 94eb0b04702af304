"""Matrices of 8 bits: how far they are off, and that whoever multiplies by them multiplies by the same numbers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sepjax
from sepjax.attention.target import Target
from sepjax.config import Config, ConfigError, MeshConfig, validate
from sepjax.generation.saved import StreamStateError
from sepjax.hub.errors import HubError
from sepjax.hub.export import save_folder
from sepjax.model import few_rows, quantised
from sepjax.model.quantised import (
    QuantisedMatrix,
    numbers,
    product,
    product_of_digits,
    quantise,
    quantise_on_host,
)
from sepjax.model.transformer import abstract, in_8_bits, merge, split
from sepjax.model.unrolled import by_layer
from sepjax.serve.served import fingerprint
from sepjax.sharding import make_mesh, parameter_shardings
from tests.generation.tiny import ATTENTION, ROWS, SHAPE, TEXTS, tiny_engine, tiny_model, tiny_tokenizer
from tests.model.test_unrolled import MODELS, run
from tests.models import random_split

EPSILON = float(np.finfo(np.float32).eps)


def matrices(params, change):
    """`params` with `change(codes or numbers, scales)` for its matrices of 8 bits."""
    if "scales" in params:
        name = "kernel" if "kernel" in params else "embedding"
        plain = {key: x for key, x in params.items() if key != "scales"}
        return plain | {name: change(name, params[name], params["scales"])}
    return {key: matrices(x, change) if isinstance(x, dict) else x for key, x in params.items()}


def plain_copy(params):
    """The parameters of a plain model that are those of 8 bits in float32."""

    def change(name, codes, scales):
        if name == "embedding":
            return codes.astype(jnp.float32) * scales[:, None]
        return jax.vmap(numbers)(codes, scales)

    return matrices(params, change)


def test_no_number_is_off_by_more_than_half_a_scale():
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 40, 4, 8), np.float32) * random.uniform(1e-6, 1e6, (3, 1, 4, 8)).astype(np.float32)
    x[1, :, 2, 3] = 0
    for inputs in ((1,), (1, 2)):
        codes, scales = map(np.asarray, jax.jit(quantise, static_argnums=1)(jnp.asarray(x), inputs))
        wide = np.expand_dims(scales, inputs)
        off = np.abs(codes * wide.astype(np.float64) - x)
        assert (off <= (0.5 + 127 * 3 * EPSILON) * wide).all()  # a code is of a scale and its reciprocal, both rounded
        assert np.array_equal(np.abs(codes).max(inputs), np.where(scales > 0, 127, 0))
        for got, expected in zip(quantise_on_host(x.copy(), inputs), (codes, scales), strict=True):
            assert np.array_equal(got, expected)
    x[1, 2, 3, 4] = np.nan
    assert np.isnan(quantise_on_host(x, (1,))[1]).sum() == 1, "and no warning of NumPy's"


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_are_of_what_the_codes_stand_for(rows, dtype):
    """Sums of codes are larger than float16 has room for: they are scaled before they are rounded."""
    random = np.random.default_rng(1)
    codes, scales = random.integers(-127, 128, (6, 512)), random.uniform(0.001, 0.1, 6).astype(np.float32)
    x = jnp.asarray(random.uniform(0, 8, (rows, 512)), dtype)
    matrix = QuantisedMatrix(jnp.asarray(codes, jnp.int8), jnp.asarray(scales))
    got = jnp.concatenate(few_rows.products(x, matrix, parts=2), axis=-1)
    assert got.dtype == x.dtype
    wide, exact = np.asarray(x, np.float64), codes * scales.astype(np.float64)[:, None]
    # Codes and features are exact; a sum in float32, of terms in any order, and a rounding.
    bound = np.abs(wide) @ np.abs(exact).T * 512 * EPSILON + np.abs(wide @ exact.T) * float(jnp.finfo(dtype).eps)
    assert (np.abs(np.asarray(got, np.float64) - wide @ exact.T) <= bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_digits_are_as_near_as_products_of_converted_codes(dtype):
    """Rows of any size, with one number far above the others; zeros; and what is not finite stays so."""
    random = np.random.default_rng(2)
    x = random.standard_normal((9, 4, 512)) * 2.0 ** random.integers(-12, 12, (9, 4, 1))
    x[3, :, 7], x[5] = 60_000, 0
    x, codes = jnp.asarray(x, dtype), jnp.asarray(random.integers(-127, 128, (64, 512)), jnp.int8)
    matrix = QuantisedMatrix(codes, jnp.asarray(random.uniform(0.001, 0.1, 64), jnp.float32))
    exact = np.asarray(x, np.float64) @ np.asarray(matrix.numbers(jnp.float32), np.float64).T
    for result in (jnp.dtype(dtype), jnp.float32):
        got = np.asarray(product_of_digits(x, matrix, result), np.float64)
        rounded = np.asarray(product(x, codes.T, matrix.scales, dtype), np.float64)  # as results of 16 bits are
        assert (rms(got - exact) <= 2 * rms(rounded - exact)).all()
    assert not np.isfinite(np.asarray(product_of_digits(x.at[1, 2, 3].set(jnp.inf), matrix), np.float64))[1, 2].any()
    assert not np.isfinite(np.asarray(product_of_digits(x.at[1, 2, 3].set(jnp.nan), matrix), np.float64))[1, 2].any()


def rms(x):
    return np.sqrt((x**2).mean(-1))


def test_digits_are_for_many_rows_of_bfloat16_on_a_gpu(monkeypatch):
    matrix, asked = QuantisedMatrix(jnp.ones((256, 128), jnp.int8), jnp.ones(256)), []
    monkeypatch.setattr(quantised, "product_of_digits", lambda x, *_: asked.append(x.shape) or x)
    few_rows.products(jnp.ones((100, 128), jnp.bfloat16), matrix)
    assert not asked, "on a CPU"
    monkeypatch.setattr(quantised, "target", lambda: Target("gpu", "NVIDIA H200", 4, "9.0"))
    few_rows.products(jnp.ones((100, 128), jnp.bfloat16), matrix)
    assert not asked, "a small matrix"
    monkeypatch.setattr(quantised, "_LEAST_SIZE", 0)
    for rows, kind in ((100, "bfloat16"), (64, "bfloat16"), (100, "float32"), (100, "float16"), (129, "bfloat16")):
        few_rows.products(jnp.ones((rows, 128), kind), matrix)
    assert asked == [(100, 128), (129, 128)], "64 rows would leave half of the SMs idle"
    with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])):
        few_rows.products(jnp.ones((100, 128), jnp.bfloat16), matrix)
    assert len(asked) == 2, "over several devices"
    few_rows.products(jnp.ones((200, 100), jnp.bfloat16), QuantisedMatrix(matrix.codes[:, :100], matrix.scales))
    assert len(asked) == 2, "features by 128"


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("neox", 1),
        pytest.param("layers of every kind", 5, marks=pytest.mark.soak),
        pytest.param("gpt2", 5, marks=pytest.mark.soak),
    ],
)
def test_a_model_of_8_bits_is_its_plain_copy(name, length):
    """Stacked, and laid out both ways; with biases of values and output, which become one."""
    config = MODELS[name]
    plain_graph, given = random_split(config, None, 4)
    graph, params = split(in_8_bits(merge(plain_graph, given)))
    assert graph == abstract(dataclasses.replace(config, weight_dtype="int8"))[0]
    expected = run(plain_graph, plain_copy(params), length)
    kind = dataclasses.replace(config, weight_dtype="int8")
    for laid_out in (params, *(by_layer(params, kind, by_output=x) for x in (False, True))):
        codes = [x for x in jax.tree.leaves(laid_out) if x.dtype == jnp.int8]
        assert sum(x.size for x in codes) > 0.5 * sum(x.size for x in jax.tree.leaves(laid_out))
        got = run(graph, laid_out, length)
        for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
            roundings = ((5 * 3 + 1) * config.mlp_dim) ** 0.5  # as in test_unrolled.py
            assert np.abs(x - y).max() <= roundings * EPSILON * np.abs(x).max()


def test_what_was_rounded_is_let_go_matrix_by_matrix():
    model = merge(*random_split(MODELS["llama"], None, 4))
    own = split(model)[1]
    made = split(in_8_bits(model))[1]
    for path, x in jax.tree_util.tree_leaves_with_path(own):
        name = path[-1].key
        assert x.is_deleted() == (name == "kernel" or path[0].key == "embedding"), name
    assert made["embedding"]["embedding"].dtype == jnp.int8, "which is the head, too"


def test_a_stream_goes_on_under_the_same_weights_alone(tmp_path):
    ours = sepjax.Generator(in_8_bits(tiny_model()), tiny_tokenizer(), ATTENTION)
    assert "weights int8" in repr(ours)
    stream = ours.stream(TEXTS[0])
    for _ in range(3):
        next(stream)
    stream.save(tmp_path / "saved")
    assert next(ours.stream(resume=tmp_path / "saved")) == next(stream)
    with pytest.raises(StreamStateError, match=r"saved with model\.weight_dtype='int8', expected 'model'"):
        tiny_engine().stream(resume=tmp_path / "saved")
    assert fingerprint(ours) != fingerprint(tiny_engine()), "nor does a server go on with the other's state"


@pytest.mark.soak  # of logits the test above says so; whole ways to a token are slow to compile
def test_text_is_that_of_the_plain_copy():
    tokenizer, plain, model = tiny_tokenizer(), tiny_model(), in_8_bits(tiny_model())
    plain = merge(split(plain)[0], plain_copy(split(model)[1]))
    engines = [sepjax.Generator(x, tokenizer, ATTENTION) for x in (model, plain)]
    for bounded in (False, True):
        found = [x.generate(TEXTS[:ROWS], max_new_tokens=12, bounded=bounded, stop_at_eos=False) for x in engines]
        assert [x.token_ids for x in found[0]] == [x.token_ids for x in found[1]]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    graph, params = split(in_8_bits(tiny_model()))
    with jax.set_mesh(mesh):
        over = merge(graph, jax.device_put(params, parameter_shardings(params, mesh)))
        split_up = sepjax.Generator(over, tokenizer, ATTENTION)
        again = split_up.generate(TEXTS[:ROWS], max_new_tokens=12, bounded=True, stop_at_eos=False)
    assert [x.token_ids for x in again] == [x.token_ids for x in found[0]], "nor do devices matter"


def test_what_needs_numbers_is_refused(tmp_path):
    model = dataclasses.replace(SHAPE, weight_dtype="int8")
    with pytest.raises(ConfigError, match=r"model\.weight_dtype='int8' is for inference"):
        validate(Config(model=model))
    with pytest.raises(ConfigError, match=re.escape("model.weight_dtype='int4'")):
        validate(Config(model=dataclasses.replace(SHAPE, weight_dtype="int4")))
    with pytest.raises(ConfigError, match=re.escape("weight_dtype='int4'")):
        sepjax.load(tmp_path, weight_dtype="int4")
    with pytest.raises(HubError, match="weight_dtype='int8' has rounded weights"):
        save_folder(in_8_bits(tiny_model()), tiny_tokenizer(), tmp_path / "out")
