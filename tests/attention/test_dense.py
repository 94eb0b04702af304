"""dense_attention is the causal mask, and the same documents as a layout whose window holds the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.attention import dense_attention, separator_attention
from sepjax.layout import build_layout

B, T, N, K, H = 2, 24, 4, 2, 8
# Rows with padding before, between and after documents; the first has the same id twice: two documents.
SEGMENT_IDS = np.repeat([[0, 1, 2, 1], [1, 0, 2, 0]], 6, axis=1).astype(np.int32)


def tensors(dtype=jnp.float32):
    draw = np.random.default_rng(0).standard_normal
    return [jnp.asarray(draw((B, T, heads, H)), dtype) for heads in (N, K, K)]


@pytest.mark.parametrize("segment_ids", [None, SEGMENT_IDS], ids=["rows", "documents"])
def test_equals_a_layout_that_sees_everything(segment_ids):
    """Output and gradients; float32 softmax over at most 24 keys, so a few roundings of values near 1 apart."""
    q, k, v = tensors()
    layout = build_layout(np.zeros((B, T), bool), window_size=T, num_sinks=0, segment_ids=segment_ids)

    @jax.jit
    def dense(q, k, v):
        return dense_attention(q, k, v, segment_ids, scale=0.5)

    @jax.jit
    def by_layout(q, k, v):
        return separator_attention(q, k, v, layout, scale=0.5, implementation="reference")

    (out, vjp), (expected, expected_vjp) = jax.vjp(dense, q, k, v), jax.vjp(by_layout, q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for got, want in zip(vjp(q), expected_vjp(q), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_padding_gives_zero_and_takes_no_gradient():
    out, vjp = jax.vjp(jax.jit(lambda *x: dense_attention(*x, SEGMENT_IDS)), *tensors())
    padding = SEGMENT_IDS == 0
    np.testing.assert_array_equal(np.asarray(out).any(axis=(2, 3)), ~padding)
    for gradient in vjp(jnp.ones_like(out)):
        assert not np.asarray(gradient)[padding].any()


def test_keeps_the_dtype():
    q, k, v = tensors(jnp.bfloat16)
    assert dense_attention(q, k, v).dtype == jnp.bfloat16
    assert dense_attention(q, k, v, SEGMENT_IDS).dtype == jnp.bfloat16
