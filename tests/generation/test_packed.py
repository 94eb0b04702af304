"""Packed rows: every bit comes back, of caches of one size and of several."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig
from sepjax.generation.cache.mixed import bounded_sizes, empty_cache
from sepjax.generation.device_loop import DecodeState
from sepjax.generation.packed import Form, PackedState
from tests.generation.tiny import ATTENTION, SHAPE

V = 50
MIXED = AttentionConfig(
    "watched", num_sinks=2, max_separators=4, window_size=6, cache_size=16, watch_after=3,
    layer_windows=(190, 6, 6, 3), kept_layers=(1, 2),
)  # fmt: skip


def empty_state(attention: AttentionConfig, dtype: str, seed: int = 7) -> DecodeState:
    config = dataclasses.replace(SHAPE, num_layers=4, dtype=dtype)
    cache = empty_cache(config, 1, bounded_sizes(config, attention), by_layer=True)
    return DecodeState.create(cache, jax.random.split(jax.random.key(seed), 1), V)


def filled(state: DecodeState) -> DecodeState:
    """With numbers of all kinds everywhere, those included that arithmetic would change."""
    rng = np.random.default_rng(3)

    def fill(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        if jnp.issubdtype(x.dtype, jnp.floating):
            odd = [-0.0, np.inf, -np.inf, np.nan, 1e-39]
            numbers = np.where(rng.random(x.shape) < 0.2, rng.choice(odd, x.shape), rng.normal(size=x.shape))
            return jnp.asarray(numbers.astype(x.dtype))
        return jnp.asarray(rng.integers(0, 2 if x.dtype == bool else 2**15, x.shape).astype(x.dtype))

    return jax.tree.map(fill, state)


def bits(state: DecodeState) -> list[tuple[Any, Any, bytes]]:
    key: Any = jax.random.key_data(state.key)
    leaves = jax.device_get(jax.tree.leaves(dataclasses.replace(state, key=key)))
    return [(x.shape, x.dtype, np.ascontiguousarray(x).tobytes()) for x in leaves]


ONE, SEVERAL = (ATTENTION, 1), (MIXED, 2)
EVERY = [(*kind, dtype) for dtype in ("bfloat16", "float32", "int8") for kind in (ONE, SEVERAL)]
OFTEN = [(*ONE, "bfloat16"), (*SEVERAL, "int8")]  # the others with -m soak


@pytest.mark.parametrize(
    ("attention", "arrays", "dtype"), [x if x in OFTEN else pytest.param(*x, marks=pytest.mark.soak) for x in EVERY]
)
def test_a_row_comes_back_bit_for_bit(attention, arrays, dtype):
    if dtype == "int8":  # codes and scales
        attention, arrays, dtype = dataclasses.replace(attention, cache_dtype=dtype), 2 * arrays, "bfloat16"
    like = empty_state(attention, dtype)
    form, state = Form(jax.eval_shape(lambda: like)), filled(like)
    assert form == Form(state)
    packed = jax.jit(form.pack)(state)
    assert len(packed.kv) == arrays
    unpack = jax.jit(form.unpack)
    assert bits(unpack(packed)) == bits(state)
    others = jax.tree.map(lambda x: np.asarray(x).astype(bool), form.rest.tree_on_host(np.asarray(packed.rest)))
    with pytest.raises(ValueError, match="arrays to be packed"):
        form.rest.of_host(others)
    held = PackedState(form, packed)
    assert not held.is_on_host
    moved = held.on_host()
    assert moved.is_on_host
    assert bits(moved.state()) == bits(state)
    on_host = form.packed_on_host(state)
    pairs = zip(jax.tree.leaves(packed), jax.tree.leaves(on_host), strict=True)
    assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
    assert form.nbytes == sum(x.nbytes for x in jax.tree.leaves(dataclasses.replace(state, key=None)))
    empty = unpack(form.empty())
    assert bits(dataclasses.replace(empty, key=like.key)) == bits(like)


def test_caches_of_other_sizes_have_another_form():
    forms = [
        Form(empty_state(attention, dtype))
        for attention in (
            ATTENTION,
            MIXED,
            dataclasses.replace(MIXED, layer_windows=(6, 6, 190, 3), kept_layers=(0, 1)),
        )
        for dtype in ("bfloat16", "float32")
    ]
    forms.append(Form(empty_state(dataclasses.replace(MIXED, cache_dtype="int8"), "float32")))
    assert len(set(forms)) == len(forms)
