"""Decode steps of a config's shape, random weights and full bounded caches, against the memory they must read.

    sepjax bench steps --config=configs/llama3_8b.py [--budget=4/64/256/800 --batch_sizes=1,auto]

A step at batch 1 reads every weight once; the lower bound is the time that this takes at the memory bandwidth,
measured here on a large array. "auto" is the largest batch that fits. `--patterns=separator,watched` measures caches
of several patterns at that budget, `--cache_dtypes=model,int8` each in both dtypes, `--weight_dtypes=model,int8` also
with matrices in both, `--dense_context=32768` a dense cache of that many tokens, with the ratio of tokens per second,
each at its best batch. The last line is JSON.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast, OneOf
from sepjax.command.settings import Settings as _Settings
from sepjax.config import CACHE_DTYPES, WEIGHT_DTYPES, AttentionConfig, Config, ConfigError, under, validate_attention
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.device_loop import DecodeState, Request, make_advance
from sepjax.generation.sampling import Sampling
from sepjax.measure import heading, provenance, time_calls
from sepjax.model.transformer import Params, abstract
from sepjax.model.unrolled import by_layer

_STEPS = 32  # in a call
_SPARE = 0.06  # of the memory, for what a step computes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfCaches(_Settings):
    """The shape and the caches of which something is measured."""

    config: Config  # a config file; its shape is used
    budget: str = "4/64/256/800"  # sizes of the bounded caches: sinks/separators/window/cache
    patterns: tuple[str, ...] = ("separator",)  # patterns of the bounded caches
    cache_dtypes: Annotated[tuple[str, ...], OneOf(CACHE_DTYPES)] = ()  # dtypes of all caches; default: the config's
    weight_dtypes: Annotated[tuple[str, ...], OneOf(WEIGHT_DTYPES)] = ("model",)  # dtypes of the matrices

    def caches(self, dense_context: int = 0) -> dict[str, AttentionConfig]:
        """By name; `dense_context`: as `caches_of` has it."""
        config = self.config
        caches = caches_of(config.attention, config.model.num_layers, self.budget, dense_context, self.patterns)
        return in_types(caches, self.cache_dtypes)

    def configs(self) -> dict[str, Config]:
        """The config with matrices of each of `weight_dtypes`, by what the name of a cache is followed by."""
        found = {}
        for kind in self.weight_dtypes:
            model = dataclasses.replace(self.config.model, weight_dtype=kind)
            found["" if kind == "model" else f", {kind} weights"] = dataclasses.replace(self.config, model=model)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OfCaches):
    """What is measured."""

    batch_sizes: tuple[str, ...] = ("1", "auto")  # rows of a step; auto: as many as fit
    # tokens of a dense cache to measure as well; 0: none
    dense_context: Annotated[int, AtLeast(0)] = 0
    seconds: Annotated[float, AtLeast(0)] = 3.0  # time for each figure

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.batch_sizes:
            if size != "auto" and not (size.isdecimal() and int(size)):
                raise ConfigError(f"--batch_sizes takes whole numbers of 1 or more and auto, got {size!r}")


@dataclasses.dataclass(frozen=True)
class StepSpeed:
    """Steps of one cache at one batch size."""

    name: str
    rows: int
    milliseconds: float  # a step
    tokens_per_second: float
    weight_bytes: int  # that a step reads: all but the rows of the embedding
    cache_bytes: int
    share_of_bandwidth: float  # the time to read weights and keys and values once, over the time of the step
    share_of_weights: float  # the same for the weights alone: the bar at batch 1


def measure(
    config: Config, caches: dict[str, AttentionConfig], batch_sizes: Sequence[str], seconds: float
) -> Iterator[StepSpeed]:
    """Yields a figure for each cache and batch size, a number or "auto"."""
    graph, shapes = abstract(config.model, config.attention)
    params = random_params(jax.eval_shape(lambda x: by_layer(x, config.model), shapes))
    bandwidth = memory_bandwidth()
    for name, attention in caches.items():
        for size in batch_sizes:
            yield _largest(config, graph, params, name, attention, size, bandwidth, seconds)


def random_params(shapes: Params) -> Params:
    """Arrays of these shapes: ones where vectors, else normal with deviation 0.02, or codes of such a deviation."""

    def make(x: jax.ShapeDtypeStruct, are_scales: bool) -> jax.Array:
        if are_scales:
            return jnp.full(x.shape, 0.02 / 73, x.dtype)
        if x.ndim == 1:
            return jnp.ones(x.shape, x.dtype)
        if x.dtype == jnp.int8:
            return jax.random.randint(jax.random.key(0), x.shape, -127, 128, jnp.int8)
        return 0.02 * jax.random.normal(jax.random.key(0), x.shape, x.dtype)

    def of(path: Any, x: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, bool]:
        return x, getattr(path[-1], "key", getattr(path[-1], "name", "")) == "scales"

    kinds = jax.tree_util.tree_map_with_path(of, shapes)
    made = {kind: jax.jit(lambda kind=kind: make(*kind)) for kind in {*jax.tree.leaves(kinds, is_leaf=_is_kind)}}
    return jax.tree.map(lambda kind: made[kind](), kinds, is_leaf=_is_kind)


def _is_kind(x: object) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], bool)


def memory_bandwidth() -> float:
    """Bytes a second of reading, or of copying where that is faster, a gigabyte (64 MB on a CPU)."""
    size = 2**25 if jax.default_backend() == "cpu" else 2**29
    x = jnp.ones(size, jnp.bfloat16)
    reading, copying = jax.jit(jnp.max), jax.jit(jnp.negative)
    read = time_calls(lambda: reading(x), repeats=5, seconds=0.5)
    copy = time_calls(lambda: copying(x), repeats=5, seconds=0.5)
    return max(x.nbytes / read.milliseconds, 2 * x.nbytes / copy.milliseconds) * 1e3


def _largest(config, graph, params, name, attention, size, bandwidth, seconds) -> StepSpeed:
    """The figure at `size` rows; of "auto", at as many as fit."""
    sizes = StreamSizes.create(config.model, attention)
    row = jax.eval_shape(lambda: StreamingCache.create(config.model, 1, sizes, by_layer=True))
    rows = _that_fit(_nbytes(params), _nbytes(row)) if size == "auto" else int(size)
    while True:
        try:
            return _speed(config, graph, params, name, attention, sizes, rows, bandwidth, seconds)
        except jax.errors.JaxRuntimeError as error:
            if size != "auto" or "RESOURCE_EXHAUSTED" not in str(error) or rows == 1:
                raise
            rows = max(1, min(rows - 1, rows * 15 // 16))


def _that_fit(weights: int, row: int) -> int:
    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ConfigError("--batch_sizes=auto needs a device that tells its memory; give numbers instead")
    rows = max(1, int((stats["bytes_limit"] * (1 - _SPARE) - weights) / row))
    return rows if rows < 16 else rows // 8 * 8


def loop_speed(
    config: Config, params: Params, attention: AttentionConfig, rows: int, seconds: float, vocab_size: int
) -> StepSpeed:
    """The figure of one cache at so many rows, with the parameters given, drawing from so many tokens."""
    graph, _ = abstract(config.model, attention)
    sizes = StreamSizes.create(config.model, attention)
    bandwidth = memory_bandwidth()
    return _speed(config, graph, params, "", attention, sizes, rows, bandwidth, seconds, vocab_size)


def _speed(config, graph, params, name, attention, sizes, rows, bandwidth, seconds, vocab_size=0) -> StepSpeed:
    vocab_size = vocab_size or config.model.vocab_size
    advance = make_advance(graph, attention, _STEPS)
    keys = jax.random.split(jax.random.key(0), rows)
    state = DecodeState.create(full_cache(config, sizes, rows), keys, vocab_size)
    cache_bytes = state.cache.nbytes
    table = jax.random.uniform(jax.random.key(1), (vocab_size,)) < 0.12
    request = Request(table, Sampling.create(), jnp.full(1, -1), jnp.int32(-1))
    none = np.zeros(rows, bool)

    def run() -> jax.Array:
        nonlocal state
        state, steps = advance(params, state, none, request)
        return steps.token

    milliseconds = time_calls(run, repeats=3, seconds=seconds).milliseconds / _STEPS
    weights = _nbytes(params) - (0 if config.model.tie_embeddings else _nbytes(params["embedding"]))
    return StepSpeed(
        name=name,
        rows=rows,
        milliseconds=milliseconds,
        tokens_per_second=rows / milliseconds * 1e3,
        weight_bytes=weights,
        cache_bytes=cache_bytes,
        share_of_bandwidth=(weights + cache_bytes) / bandwidth / milliseconds * 1e3,
        share_of_weights=weights / bandwidth / milliseconds * 1e3,
    )


def full_cache(config: Config, sizes: StreamSizes, rows: int) -> StreamingCache:
    """A cache as after a long text: every zone full, the rows at different distances from their next compaction."""
    cache = StreamingCache.create(config.model, rows, sizes, by_layer=True)
    b = jnp.arange(rows, dtype=jnp.int32)
    free = sizes.cache_size + 1 - sizes.num_sinks - sizes.max_separators - sizes.window_size
    recent = sizes.window_size + b * 37 % free
    return dataclasses.replace(
        cache,
        is_separator=jax.random.uniform(jax.random.key(2), cache.is_separator.shape) < 0.12,
        num_sinks=cache.num_sinks + sizes.num_sinks,
        num_separators=cache.num_separators + sizes.max_separators,
        num_recent=recent,
        next_separator=cache.next_separator + sizes.max_separators,
        next_recent=recent + sizes.num_sinks,
        seen_low=recent + sizes.num_sinks,
    )


def _nbytes(tree: object) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def caches_of(
    attention: AttentionConfig,
    num_layers: int,
    budget: str,
    dense_context: int,
    patterns: Sequence[str] = ("separator",),
) -> dict[str, AttentionConfig]:
    """Bounded caches of a budget a/s/w/c, and one of the last `dense_context` tokens and a few more; 0: none."""
    numbers = budget.split("/")
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"--budget takes sinks/separators/window/cache, like 4/64/256/800, got {budget!r}")
    a, s, w, c = map(int, numbers)
    sizes = {"num_sinks": a, "max_separators": s, "window_size": w, "cache_size": c}
    bounded = dataclasses.replace(attention, layer_windows=(), kept_layers=(), **sizes)
    caches = {f"{pattern} {budget}": validate_attention(under(bounded, pattern), num_layers) for pattern in patterns}
    if dense_context:
        room = dense_context + 64  # then the oldest go, in bursts, which only moves a number
        dense = dataclasses.replace(
            bounded, pattern="sink_window", num_sinks=0, window_size=dense_context, cache_size=room,
            stream_positions="absolute",
        )  # fmt: skip
        caches[f"dense {dense_context}"] = validate_attention(dense, num_layers)
    return caches


def in_types(caches: dict[str, AttentionConfig], cache_dtypes: Sequence[str]) -> dict[str, AttentionConfig]:
    """Every cache in each of these types, by a name that tells it; of no type: as it is."""
    found = [(name, dataclasses.replace(x, cache_dtype=kind)) for name, x in caches.items() for kind in cache_dtypes]
    found = found or [*caches.items()]
    return {name if x.cache_dtype == "model" else f"{name} {x.cache_dtype}": x for name, x in found}


def times_of_dense(figures: Sequence[StepSpeed]) -> Iterator[str]:
    """Lines that say how many times a dense cache's tokens a second others give, each at its best batch size."""
    best: dict[str, StepSpeed] = {}
    for x in figures:
        if x.name not in best or x.tokens_per_second > best[x.name].tokens_per_second:
            best[x.name] = x
    dense = [x for x in best.values() if x.name.startswith("dense ")]
    for one in (x for x in best.values() if x not in dense):
        for other in dense:
            times = one.tokens_per_second / other.tokens_per_second
            yield f"{one.name}, {one.rows} rows: {times:.1f} times the tokens of {other.name}, {other.rows} rows"


def main(settings: Settings) -> None:
    """Prints a line a figure, then JSON."""
    source, s = provenance(), settings
    print(heading(source))
    columns = f"{'ms/step':>10}{'tokens/s':>12}{'weights':>10}{'all':>8}{'cache bytes':>18}"
    print(f"{'cache':<38}{'rows':>6}{columns}   (weights, all: time to read them once over the step's)")
    figures = []
    measured = (
        dataclasses.replace(x, name=x.name + kind)
        for kind, config in s.configs().items()
        for x in measure(config, s.caches(s.dense_context), s.batch_sizes, s.seconds)
    )
    for x in measured:
        shares = f"{x.share_of_weights:>10.1%}{x.share_of_bandwidth:>8.1%}{x.cache_bytes:>18,}"
        print(f"{x.name:<38}{x.rows:>6}{x.milliseconds:>10.3f}{x.tokens_per_second:>12,.0f}{shares}", flush=True)
        figures.append(x)
    for line in times_of_dense(figures):
        print(line)
    print(json.dumps(source | {"figures": [dataclasses.asdict(x) for x in figures]}))


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
