"""The kernel that multiplies digits by codes, simulated, against whole numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.model import digits_product
from sepjax.model.digits_product import Tiling
from sepjax.model.quantised import QuantisedMatrix, product, product_by_outputs
from tests.attention.simulator import assert_no_races, simulate


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(64, 384, 256), (128, 256, 128), (64, 1024, 128)],
    ids=["low", "tall", "two blocks a sum"],
)
def test_sums_of_both_digits_are_exact(monkeypatch, rows, inputs, outputs):
    simulate(monkeypatch)
    monkeypatch.setattr(digits_product, "_MANY", 128)
    random = np.random.default_rng(3)
    high, low = (random.integers(-128, 128, (rows, inputs)) for _ in range(2))
    codes = random.integers(-127, 128, (outputs, inputs))
    units, scales = 2.0 ** random.integers(-9, 9, rows), random.uniform(0.001, 0.1, outputs).astype(np.float32)
    tiling = Tiling.of(rows, inputs, outputs, 2)
    assert tiling.splits == (2 if inputs == 1024 else 1)
    given = (jnp.asarray(x, jnp.int8) for x in (high, low))
    got = digits_product.product(
        *given, jnp.asarray(units, jnp.float32), jnp.asarray(codes, jnp.int8), jnp.asarray(scales), jnp.float32, tiling
    )
    exact = ((256 * high + low) @ codes.T) * units[:, None] * scales.astype(np.float64)
    assert np.abs(np.asarray(got, np.float64) - exact).max() <= 4 * np.finfo(np.float32).eps * np.abs(exact).max()
    assert_no_races()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 300, 1030])
def test_products_on_a_gpu(rows):
    """As near to float64 as those of converted codes, within twice; the same bits twice."""
    random = np.random.default_rng(4)
    x = jnp.asarray(random.standard_normal((rows, 1408)) * np.exp(random.standard_normal((rows, 1408))), jnp.bfloat16)
    codes = jnp.asarray(random.integers(-127, 128, (15_360, 1408)), jnp.int8)
    matrix = QuantisedMatrix(codes, jnp.asarray(random.uniform(0.001, 0.1, 15_360), jnp.float32))
    exact = np.asarray(x, np.float64) @ np.asarray(matrix.numbers(jnp.float32), np.float64).T
    first, second = (np.asarray(jax.jit(product_by_outputs)(x, matrix), np.float64) for _ in range(2))
    converted = np.asarray(jax.jit(product)(x, codes.T, matrix.scales), np.float64)
    assert np.sqrt(((first - exact) ** 2).mean()) <= 2 * np.sqrt(((converted - exact) ** 2).mean())
    assert np.array_equal(first, second)
    assert "mosaic_gpu" in jax.jit(product_by_outputs).lower(x, matrix).as_text()
