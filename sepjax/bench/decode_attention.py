"""Attention of one new token over bounded caches: the kernel against plain XLA, and the errors of both.

    sepjax bench decode_attention [--rows=1,760 --cache_sizes=325,800 --shapes=9/3/64,32/8/128]
                                            [--cache_dtypes=model,int8]

A call is the attention of so many layers that the device's own caches do not hold their keys, each reading what the one
before gave, rotation of queries included; a figure is a layer's share of it. The token's own key and value are not
written: where the kernel of a step does that too, `bench steps` has it. Caches are as after a long text, rows at
different distances from their next compaction. The share of bandwidth is the time to read the keys and values that rows
*hold* once, at the memory's own speed, over the time taken; errors are the largest, against float32, of the first rows
of a layer. The last line is JSON.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from sepjax.attention import decode
from sepjax.bench.steps import caches_of, full_cache, memory_bandwidth
from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast, OneOf
from sepjax.command.settings import Settings as _Settings
from sepjax.config import CACHE_DTYPES, AttentionConfig, Config, ConfigError, ModelConfig
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.bounded_pass import attend_run, pass_inputs
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.cache.stored import Quantised, Vectors, quantised, vector_bytes
from sepjax.measure import heading, provenance, time_calls

_CHECKED = 4  # rows whose errors are looked at: the reference takes room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is measured."""

    shapes: tuple[str, ...] = ("9/3/64", "32/8/128")  # query heads/KV heads/head size
    cache_sizes: Annotated[tuple[int, ...], AtLeast(325)] = (325, 800, 4096)  # c, of caches 4/64/256/c
    rows: Annotated[tuple[int, ...], AtLeast(1)] = (1, 16, 64, 256, 760)  # rows of a step
    pattern: str = "separator"  # pattern of the caches
    dtype: str = "bfloat16"  # dtype of queries, keys and values
    cache_dtypes: Annotated[tuple[str, ...], OneOf(CACHE_DTYPES)] = ("model",)  # dtype of keys and values in caches
    gigabytes: Annotated[float, AtLeast(0)] = 1.0  # minimum size of keys and values in a call
    seconds: Annotated[float, AtLeast(0)] = 0.2  # time for each figure


@dataclasses.dataclass(frozen=True)
class Figure:
    """One form at one shape."""

    shape: str
    cache_dtype: str
    slots: int  # of a row, C
    rows: int
    form: str  # "kernel" or "xla"
    milliseconds: float  # a layer
    held_bytes: int  # keys and values that the rows hold in a layer
    share_of_bandwidth: float
    error: float  # the largest, against float32


def model_of(shape: str, dtype: str, num_layers: int) -> ModelConfig:
    """A model of so many query heads, key heads and their size, such as "9/3/64"; the rest does not matter."""
    numbers = shape.split("/")
    if len(numbers) != 3 or not all(x.isdecimal() and int(x) for x in numbers) or int(numbers[0]) % int(numbers[1]):
        raise ConfigError(f"--shapes takes query heads/key heads/head size, like 9/3/64, got {shape!r}")
    heads, kv_heads, head_dim = map(int, numbers)
    return ModelConfig(
        num_layers=num_layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )  # fmt: skip


def measure(settings: Settings) -> Iterator[Figure]:
    """Yields the kernel's figure, where it serves, and plain XLA's, for each shape, cache size and number of rows."""
    bandwidth = memory_bandwidth()
    for case in itertools.product(settings.shapes, settings.cache_dtypes, settings.cache_sizes, settings.rows):
        yield from _figures(settings, *case, bandwidth)


def _figures(
    settings: Settings, shape: str, cache_dtype: str, size: int, rows: int, bandwidth: float
) -> Iterator[Figure]:
    model = model_of(shape, settings.dtype, 1)
    budget = f"4/64/256/{size}"
    (attention,) = caches_of(AttentionConfig(cache_dtype=cache_dtype), 1, budget, 0, (settings.pattern,)).values()
    sizes = StreamSizes.create(model, attention)
    a_slot = 2 * model.num_kv_heads * vector_bytes(model, cache_dtype)
    layers = max(1, min(64, round(settings.gigabytes * 2**30 / (a_slot * sizes.slots * rows))))
    model = dataclasses.replace(model, num_layers=layers)
    cache = filled(Config(model=model, attention=attention), sizes, rows)
    q, k, v = inputs(model, rows)
    held = int(cache.held().sum()) * a_slot
    exact = _exact(cache, q, k, v)
    for form, implementation in (("kernel", None), ("xla", "xla")):
        if form == "kernel" and _no_kernel(settings, model, cache_dtype, sizes.slots) is not None:
            continue
        run = functools.partial(jax.jit(functools.partial(layers_of, implementation=implementation)), cache, q, k, v)
        error = float(jnp.max(jnp.abs(run()[0][: len(exact)].astype(jnp.float32) - exact)))
        milliseconds = time_calls(run, repeats=3, seconds=settings.seconds).milliseconds / layers
        share = held / bandwidth / milliseconds * 1e3
        yield Figure(shape, cache_dtype, sizes.slots, rows, form, milliseconds, held, share, error)


def _no_kernel(settings: Settings, model: ModelConfig, cache_dtype: str, slots: int) -> str | None:
    """Why the kernel does not serve this."""
    kind = settings.dtype if cache_dtype == "model" else cache_dtype
    return decode.unsupported(kind, model.head_dim, slots)


def filled(config: Config, sizes: StreamSizes, rows: int) -> StreamingCache:
    """`full_cache` with keys and values drawn at random."""
    cache = full_cache(config, sizes, rows)
    given: tuple[Any, Any] = cache.k, cache.v  # for each layer
    number = len(given[0])

    @jax.jit
    def draw(key: jax.Array, x: Vectors) -> Vectors:
        if isinstance(x, Quantised):
            return quantised(jax.random.normal(key, x.shape, config.model.dtype))
        return jax.random.normal(key, x.shape, x.dtype)

    keys = jax.random.split(jax.random.key(3), 2 * number)
    k, v = (tuple(draw(keys[i + at], x) for i, x in enumerate(xs)) for at, xs in zip((0, number), given, strict=True))
    return dataclasses.replace(cache, k=k, v=v)


def inputs(model: ModelConfig, rows: int) -> tuple[jax.Array, ...]:
    """q, k and v of one token a row, [B, 1, heads, H]; large queries, so that weights are not all alike."""
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    keys = jax.random.split(jax.random.key(4), 3)
    q, k, v = (
        jax.random.normal(key, (rows, 1, n, model.head_dim), model.dtype) for key, n in zip(keys, heads, strict=True)
    )
    return 2 * q, k, v


def layers_of(
    cache: StreamingCache, q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str | None
) -> list[jax.Array]:
    """The attention's result in every layer, whose queries are the layer's before."""
    attend = attend_run(cache, 1, jnp.ones(len(q), jnp.int32), implementation)
    layer_inputs, outs = pass_inputs(cache), []
    layers: Any = cache.k
    for i in range(len(layers)):
        out, _ = attend(outs[-1] if outs else q, k, v, tuple(x if x is None else x[i] for x in layer_inputs))
        outs.append(out)
    return outs


def _exact(cache: StreamingCache, *arrays: jax.Array) -> jax.Array:
    """The first rows' result of the first layer, in float32."""
    some = jnp.arange(min(_CHECKED, len(arrays[0])), dtype=jnp.int32)
    few = dataclasses.replace(cache, k=cache.k[:1], v=cache.v[:1]).whole_rows(some)
    few, arrays = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == arrays[0].dtype else x, (few, arrays))
    with jax.default_matmul_precision("highest"):
        return layers_of(few, *(x[some] for x in arrays), implementation="reference")[0]


def main(settings: Settings) -> None:
    """Prints a line a figure, then JSON."""
    source = provenance()
    print(heading(source))
    for shape, kind in itertools.product(settings.shapes, settings.cache_dtypes):
        reason = _no_kernel(settings, model_of(shape, settings.dtype, 1), kind, decode.TILE)
        if reason is not None:
            print(f"{shape} {kind}: no kernel: {reason}")
    print(
        f"{'shape':<10}{'cache':<7}{'slots':>6}{'rows':>6}  {'form':<8}{'ms/layer':>10}{'GB/s held':>11}{'share':>8}"
        f"{'error':>10}"
    )
    figures = []
    for x in measure(settings):
        rate = x.held_bytes / x.milliseconds / 1e6
        print(
            f"{x.shape:<10}{x.cache_dtype:<7}{x.slots:>6}{x.rows:>6}  {x.form:<8}{x.milliseconds:>10.4f}{rate:>11.0f}"
            f"{x.share_of_bandwidth:>8.1%}{x.error:>10.2g}",
            flush=True,
        )
        figures.append(dataclasses.asdict(x))
    print(json.dumps(source | {"figures": figures}))


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
