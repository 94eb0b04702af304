"""A Hopper GPU simulated on a CPU: warpgroups, barriers, copies, shared memory; races and deadlocks are found.

The simulator knows no wgmma with a factor in registers, nor accumulators that start from registers; here they are sums.
It also wants a fence between reading shared memory and a copy into it. A read whose value went into what was computed
before an arrival is over by then, on the real one too: here an arrival counts as that fence.
"""

import functools

import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from sepjax.attention import mosaic_gpu_kernels


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the kernels that are traced from here on run on the simulator; `assert_no_races` afterwards."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=params))
    monkeypatch.setattr(plgpu, "wgmma", _wgmma)
    monkeypatch.setattr(plgpu, "barrier_arrive", _arrive)
    monkeypatch.setattr(mosaic_gpu_kernels, "accumulate", _accumulate)


def assert_no_races() -> None:
    """That nothing read what another thread was writing."""
    assert not gpu_callbacks.get_races().races_found


class _Sum:
    def __init__(self, value):
        self.value = value


def _accumulate(products, *sums):
    sums = [_Sum(x) for x in sums]
    products(*sums)
    return tuple(x.value for x in sums)


def _wgmma(accumulator, a, b, wgmma=plgpu.wgmma):
    if not isinstance(accumulator, _Sum):
        return wgmma(accumulator, a, b)
    product = jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")
    accumulator.value += product
    return None


def _arrive(barrier, arrive=plgpu.barrier_arrive):
    plgpu.commit_smem()
    arrive(barrier)
