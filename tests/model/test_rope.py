"""Rotary embedding: identities first, then the published scalings against formulas written out in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import RopeConfig
from sepjax.model.rope import rope_frequencies, rope_table, rotate

HEAD = 64


def heads(seed: int, fraction: float = 1.0, **rope: float | str | int):
    config = RopeConfig(fraction=fraction, **rope)
    x = jax.random.normal(jax.random.key(seed), (1, 16, 2, HEAD))
    positions = jnp.arange(16, dtype=jnp.int32)[None]
    return x, positions, config


def test_position_zero_is_the_identity():
    x, positions, config = heads(0)
    turned = rotate(x, rope_table(jnp.zeros_like(positions), config, HEAD))
    np.testing.assert_array_equal(turned, x)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_rotation_keeps_lengths_and_passes_the_rest_through(fraction):
    x, positions, config = heads(0, fraction)
    turned = rotate(x, rope_table(positions, config, HEAD))
    rotated = round(HEAD * fraction)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned[..., :rotated], axis=-1), jnp.linalg.norm(x[..., :rotated], axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(turned[..., rotated:], x[..., rotated:])
    assert not np.array_equal(turned[:, 1:, :, :rotated], x[:, 1:, :, :rotated])


def test_scores_depend_on_the_distance_only():
    q, positions, config = heads(0)
    k, _, _ = heads(1)

    def scores(shift):
        table = rope_table(positions + shift, config, HEAD)
        return jnp.einsum("bthd,bshd->bhts", rotate(q, table), rotate(k, table))

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-3)  # angles near 1000 carry 1e-4 of float32 rounding


def test_pairs_are_the_two_halves():
    """Dimension d turns with dimension d + R/2 (Hugging Face's order), by base^(-2d/R) per position."""
    _, _, config = heads(0)
    x = jnp.zeros((1, 1, 1, HEAD)).at[..., 3].set(1.0)
    turned = rotate(x, rope_table(jnp.array([[5]], jnp.int32), config, HEAD))[0, 0, 0]
    angle = 5 * 10_000.0 ** (-6 / HEAD)
    expected = np.zeros(HEAD)
    expected[3], expected[3 + HEAD // 2] = math.cos(angle), math.sin(angle)
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_linear_scaling_stretches_positions():
    _, positions, plain = heads(0)
    _, _, scaled = heads(0, scaling="linear", factor=4.0)
    for a, b in zip(rope_table(positions, plain, HEAD), rope_table(positions * 4, scaled, HEAD), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_llama3_scaling():
    config = RopeConfig(base=500_000.0, scaling="llama3", factor=8.0, original_context=8192)
    frequencies, factor = rope_frequencies(config, 128)
    for d, got in enumerate(np.asarray(frequencies, np.float64)):
        plain = 500_000.0 ** (-2 * d / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            want = plain
        elif wavelength > 8192:
            want = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            want = (1 - smooth) * plain / 8 + smooth * plain
        assert got == pytest.approx(want, rel=1e-4)
    assert factor == 1.0


def test_yarn_scaling():
    config = RopeConfig(base=10_000.0, scaling="yarn", factor=16.0, original_context=4096)
    frequencies, factor = rope_frequencies(config, 128)

    def dimension(turns):
        return 128 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(10_000.0))

    low, high = math.floor(dimension(32)), math.ceil(dimension(1))
    for d, got in enumerate(np.asarray(frequencies, np.float64)):
        plain = 10_000.0 ** (-2 * d / 128)
        ramp = min(max((d - low) / (high - low), 0.0), 1.0)
        assert got == pytest.approx(plain / 16 * ramp + plain * (1 - ramp), rel=1e-4)
    assert factor == pytest.approx(0.1 * math.log(16.0) + 1)


def test_dtype_is_kept():
    x, positions, config = heads(0)
    assert rotate(x.astype(jnp.bfloat16), rope_table(positions, config, HEAD)).dtype == jnp.bfloat16


def test_the_gradient_is_that_of_the_formula():
    """Written as complex numbers, which plain autodiff takes apart by itself."""
    x, positions, config = heads(3, fraction=0.5)
    cos, sin = rope_table(positions, config, HEAD)

    def formula(x):
        quarter = HEAD // 4
        z = (x[..., :quarter] + 1j * x[..., quarter : 2 * quarter]) * (cos + 1j * sin)[..., None, :]
        return jnp.concatenate([z.real, z.imag, x[..., 2 * quarter :]], axis=-1)

    for f, g in zip(*(jax.vjp(f, x) for f in (formula, lambda x: rotate(x, (cos, sin)))), strict=True):
        np.testing.assert_allclose(*((h(jnp.sin(x))[0] if callable(h) else h) for h in (f, g)), atol=1e-6)
