"""The kernels of implementation="mosaic_gpu" one by one: milliseconds, and TFLOP/s by needed pairs.

    sepjax bench kernels [--lengths=2048,32768 --num_heads=32 --num_kv_heads=8 --head_dim=128]

What docs/kernels.md logs. Inputs are those of `sepjax.bench.attention`; it needs a Hopper GPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from sepjax.attention import mosaic_gpu, mosaic_gpu_kernels
from sepjax.attention.ranges import whole_rows
from sepjax.bench.attention import Shapes, make_inputs
from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast
from sepjax.config import ConfigError
from sepjax.measure import heading, provenance, time_calls

# FLOPs of one (query, key) pair, over N * H, where a kernel computes pairs.
_FLOPS = {"forward": 4, "dQ": 6, "dK and dV": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shapes):
    """What is measured."""

    lengths: Annotated[tuple[int, ...], AtLeast(1)] = (2048, 4096, 32768)  # tokens of a row, T
    seconds: Annotated[float, AtLeast(0)] = 0.2  # for the timed loops of a figure


def stages(
    q: jax.Array, k: jax.Array, v: jax.Array, layout: Any, d_out: jax.Array
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, a call of the compiled kernel) of everything that a training step runs, in its order."""
    q, k, v, layout = mosaic_gpu._aligned((q, k, v), layout)
    shape = mosaic_gpu._shape(q, k, layout, q.shape[-1] ** -0.5)
    tiles = mosaic_gpu._key_gradient_tiles(shape)

    def compiled(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        return functools.partial(jax.jit(f), *args)

    run = compiled(lambda layout: mosaic_gpu._ranges(whole_rows(layout), shape.padded), layout)
    yield "ranges", run
    ranges = run()
    run = compiled(lambda k, v, layout: mosaic_gpu._pack(shape, k, v, layout), k, v, layout)
    yield "packing", run
    keys = k, v, *run(), ranges
    run = compiled(mosaic_gpu_kernels.forward(shape, mosaic_gpu.forward_tiles(shape)), q, *keys)
    yield "forward", run
    out, lse = run()
    kernel = mosaic_gpu_kernels.query_gradient(shape, mosaic_gpu._query_gradient_tiles(shape))
    run = compiled(kernel, q, *keys, d_out, out, lse, jnp.zeros_like(lse))
    yield "dQ", run
    _, delta = run()
    run = compiled(lambda layout: mosaic_gpu._visitors(whole_rows(layout), shape, tiles.keys), layout)
    yield "visitors", run
    kernel = mosaic_gpu_kernels.key_gradients(shape, tiles)
    yield "dK and dV", compiled(kernel, q, *keys, d_out, lse, delta, *run())


def main(settings: Settings) -> None:
    """Prints a line for each length.

    Raises:
      ConfigError: the kernels cannot serve these settings on this device.
    """
    reason = mosaic_gpu.unsupported(jnp.empty((1, 1, settings.num_heads, settings.head_dim), settings.dtype))
    if reason is not None:
        raise ConfigError(f"these kernels cannot run: {reason}")
    print(heading(provenance()), settings, "milliseconds (TFLOP/s by needed pairs)", sep="\n", flush=True)
    for length in settings.lengths:
        inputs = make_inputs(settings, settings.rows(length), length)
        flops = int(inputs[3].num_pairs().sum()) * settings.num_heads * settings.head_dim
        times = []
        for name, run in stages(*inputs):
            timing = time_calls(run, repeats=settings.repeats, seconds=settings.seconds)
            rate = f" ({_FLOPS[name] * flops / timing.milliseconds / 1e9:.0f})" if name in _FLOPS else ""
            times.append(f"{name} {timing.milliseconds:.3f}{rate}")
        print(f"T = {length}, {settings.rows(length)} rows: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
