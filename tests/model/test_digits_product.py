"""The kernel that multiplies digits by codes, simulated, against whole numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.model import digits_product
from sepjax.model.digits_product import Tiling
from tests.attention.simulator import assert_no_races, simulate


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(64, 256, 128), (128, 128, 64)], ids=["low", "tall"])
def test_sums_of_both_digits_are_exact(monkeypatch, rows, inputs, outputs):
    simulate(monkeypatch)
    random = np.random.default_rng(3)
    high, low = (random.integers(-128, 128, (rows, inputs)) for _ in range(2))
    codes = random.integers(-127, 128, (outputs, inputs))
    units, scales = 2.0 ** random.integers(-9, 9, rows), random.uniform(0.001, 0.1, outputs).astype(np.float32)
    tiling = Tiling.of(rows, outputs, 2)
    given = (jnp.asarray(x, jnp.int8) for x in (high, low))
    got = digits_product.product(
        *given, jnp.asarray(units, jnp.float32), jnp.asarray(codes, jnp.int8), jnp.asarray(scales), jnp.float32, tiling
    )
    exact = ((256 * high + low) @ codes.T) * units[:, None] * scales.astype(np.float64)
    assert np.abs(np.asarray(got, np.float64) - exact).max() <= 4 * np.finfo(np.float32).eps * np.abs(exact).max()
    assert_no_races()
