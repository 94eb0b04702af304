"""separator_attention against dense attention, over sequence lengths: one table.

    sepjax bench attention [--lengths=2048,32768 --implementations=best,xla --json=bench.json]

Every call has the same number of tokens (a longer row: as many as it has), so that a dense forward pass costs in
proportion to T. Columns:

    ms          `separator_attention`, packing of keys and return of packed gradients included; the layout, made once a
                batch and shared by all layers, is timed apart (in the table's foot)
    dense       cuDNN's causal flash attention over whole rows, and on devices without cuDNN what stands in for it
    window      the same with a sliding window of n keys: the lower bound of the band, without sinks and separators
    speed-up    dense over ms; its ideal is dense pairs over visible pairs

On a CPU, which has neither memory nor time for the defaults, try
`--lengths=256,512 --tokens=512 --num_heads=4 --num_kv_heads=2 --head_dim=64 --dtype=float32`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.attention import dense_attention, separator_attention
from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast, AtMost, OneOf
from sepjax.command.settings import Settings as _Settings
from sepjax.config import ConfigError, first_line
from sepjax.files import write_text
from sepjax.layout import SeparatorLayout, build_layout
from sepjax.measure import Timing, heading, provenance, time_calls

BEST = "best"  # the name on the command line of implementation=None
# FLOPs of one (query, key) pair, over N * H. Backward computes the weights again: five products after forward's two.
FLOPS_PER_PAIR = {"forward": 4, "forward+backward": 14}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes(_Settings):
    """Of which rows. The defaults are the shapes of the project's bars."""

    lengths: Annotated[tuple[int, ...], AtLeast(1)] = (2048, 4096, 8192, 16384, 32768, 131072)  # tokens of a row, T
    tokens: Annotated[int, AtLeast(1)] = 32768  # tokens of a call, B * T; B is at least 1
    density: Annotated[float, AtLeast(0), AtMost(1)] = 0.12  # share of tokens that are separators, drawn at random
    window_size: Annotated[int, AtLeast(1)] = 256  # keys of the window, n
    num_sinks: Annotated[int, AtLeast(0)] = 4  # first tokens always visible, a
    num_heads: Annotated[int, AtLeast(1)] = 32  # query heads, N
    num_kv_heads: Annotated[int, AtLeast(1)] = 8  # KV heads, K
    head_dim: Annotated[int, AtLeast(1)] = 128  # head size, H
    dtype: Annotated[str, OneOf(("bfloat16", "float16", "float32"))] = "bfloat16"  # of queries and keys
    # packed documents, repeated until a row is full; default: a row is a document
    document_lengths: Annotated[tuple[int, ...], AtLeast(1)] = ()
    repeats: Annotated[int, AtLeast(1)] = 5  # timed loops of a figure
    seconds: Annotated[float, AtLeast(0)] = 0.5  # for the timed loops of a figure

    def rows(self, length: int) -> int:
        """B, the rows of a call."""
        return max(1, self.tokens // length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Shapes):
    """What is measured."""

    implementations: tuple[str, ...] = (BEST,)  # of separator_attention; best: what None picks
    json: str | None = None  # file for all figures and settings


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no figure: an implementation does not take the shape, or the device's memory is full."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: an implementation at one length, with its baselines."""

    length: int
    rows: int
    passes: str  # a key of FLOPS_PER_PAIR
    implementation: str
    ours: Timing | Failure
    dense: Timing | Failure
    window: Timing | Failure
    pairs: int  # visible (query, key) pairs of the call
    dense_pairs: int
    layout_milliseconds: float

    def derived(self, settings: Settings) -> dict[str, float | None]:
        """Speed-up, its ideal and rates by needed pairs; None where a figure is missing."""
        flops = FLOPS_PER_PAIR[self.passes] * settings.num_heads * settings.head_dim
        ours, dense = _milliseconds(self.ours), _milliseconds(self.dense)
        return {
            "speedup": dense / ours if dense and ours else None,
            "ideal_speedup": self.dense_pairs / self.pairs,
            "tflops_per_second": flops * self.pairs / ours / 1e9 if ours else None,
            "dense_tflops_per_second": flops * self.dense_pairs / dense / 1e9 if dense else None,
        }


def check(settings: Settings) -> None:
    """Raises `ConfigError` for settings that cannot work."""
    if not settings.lengths or not settings.implementations:
        raise ConfigError("--lengths and --implementations need one entry or more")
    for name in settings.implementations:
        try:
            jax.eval_shape(lambda name=name: _separator(name)(*make_inputs(settings, 1, 256)[:4]))
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"--implementations={name}: {error}") from error


def measure(settings: Settings) -> Iterator[Row]:
    """Yields the lines of the table as they are measured."""
    for length in settings.lengths:
        rows = settings.rows(length)
        inputs = make_inputs(settings, rows, length)
        layout = inputs[3]
        make_layout = jax.jit(functools.partial(_layout, settings, rows, length))
        layout_time = time_calls(make_layout, repeats=settings.repeats, seconds=settings.seconds / 5)
        for passes in FLOPS_PER_PAIR:
            dense, window = (
                _time(settings, functools.partial(_passes(op, passes), *inputs))
                for op in (_dense, functools.partial(_window, settings))
            )
            for name in settings.implementations:
                yield Row(
                    length=length,
                    rows=rows,
                    passes=passes,
                    implementation=name,
                    ours=_time(settings, functools.partial(_passes(_separator(name), passes), *inputs)),
                    dense=dense,
                    window=window,
                    pairs=int(layout.num_pairs().sum()),
                    dense_pairs=rows * length * (length + 1) // 2,
                    layout_milliseconds=layout_time.milliseconds,
                )


def baseline(settings: Settings) -> str:
    """What runs in the columns `dense` and `window`."""
    if _has_cudnn(settings.dtype):
        return "cuDNN flash attention"
    return f"jax.nn.dot_product_attention without cuDNN ({jax.default_backend()}, {settings.dtype})"


type Op = Callable[[jax.Array, jax.Array, jax.Array, SeparatorLayout], Any]


def _separator(name: str) -> Op:
    return functools.partial(separator_attention, implementation=None if name == BEST else name)


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, layout: SeparatorLayout) -> Any:
    return dense_attention(q, k, v)


def _window(settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, layout: SeparatorLayout) -> Any:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=(settings.window_size - 1, 0),
        implementation="cudnn" if _has_cudnn(settings.dtype) else None,
    )


def _has_cudnn(dtype: str) -> bool:
    return jax.default_backend() == "gpu" and dtype != "float32"


def _passes(op: Op, passes: str) -> Callable[..., Any]:
    """`op` forward, or its output and all three gradients for a given cotangent, compiled."""
    if passes == "forward":
        return jax.jit(lambda q, k, v, layout, cotangent: op(q, k, v, layout))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, layout: SeparatorLayout, cotangent: jax.Array) -> Any:
        out, gradients = jax.vjp(lambda q, k, v: op(q, k, v, layout), q, k, v)
        return out, gradients(cotangent)

    return jax.jit(both)


def make_inputs(settings: Shapes, rows: int, length: int) -> tuple[Any, ...]:
    """Random (q, k, v, layout, cotangent of the output)."""

    def draw(key: jax.Array, heads: int) -> jax.Array:
        return jax.random.normal(key, (rows, length, heads, settings.head_dim), jnp.dtype(settings.dtype))

    heads = (settings.num_heads, settings.num_kv_heads, settings.num_kv_heads, settings.num_heads)
    q, k, v, cotangent = (jax.jit(draw, static_argnums=1)(jax.random.key(i), n) for i, n in enumerate(heads, start=1))
    return q, k, v, jax.jit(lambda: _layout(settings, rows, length))(), cotangent


def _layout(settings: Shapes, rows: int, length: int) -> SeparatorLayout:
    is_separator = jax.random.bernoulli(jax.random.key(0), settings.density, (rows, length))
    return build_layout(
        is_separator,
        window_size=settings.window_size,
        num_sinks=settings.num_sinks,
        segment_ids=_segment_ids(settings, rows, length),
    )


def _segment_ids(settings: Shapes, rows: int, length: int) -> np.ndarray | None:
    if not settings.document_lengths:
        return None
    documents = -(-length // sum(settings.document_lengths)) * len(settings.document_lengths)
    ids = np.repeat(np.arange(1, documents + 1), np.resize(settings.document_lengths, documents))
    return np.tile(ids[:length].astype(np.int32), (rows, 1))


def _time(settings: Settings, run: Callable[[], Any]) -> Timing | Failure:
    try:
        return time_calls(run, repeats=settings.repeats, seconds=settings.seconds)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # JAX's own errors are RuntimeErrors
        return Failure(first_line(error))


def _milliseconds(timing: Timing | Failure) -> float | None:
    return timing.milliseconds if isinstance(timing, Timing) else None


def table_head(settings: Settings) -> str:
    """The settings in words, and the names of the columns."""
    s = settings
    documents = f"documents of {', '.join(map(str, s.document_lengths))} tokens" if s.document_lengths else "whole rows"
    columns = f"{'ms':>10}{'dense':>10}{'window':>10}{'speed-up':>10}{'ideal':>8}{'TFLOP/s':>9}{'dense':>8}"
    return (
        f"{s.num_heads} query and {s.num_kv_heads} key heads of {s.head_dim}, {s.dtype}, {s.tokens} tokens a call, "
        f"{documents}; separators {s.density:.0%} at random, n = {s.window_size}, a = {s.num_sinks}\n"
        f"dense and window: {baseline(s)}\n\n"
        f"{'T':>7}{'rows':>6}  {'pass':<18}{'implementation':<16}{columns}"
    )


def table_line(row: Row, settings: Settings) -> str:
    """One line under `table_head`; a dash where there is no figure."""
    derived = row.derived(settings)
    times = "".join(_number(_milliseconds(x), 10, 3) for x in (row.ours, row.dense, row.window))
    ratios = _number(derived["speedup"], 10, 2) + _number(derived["ideal_speedup"], 8, 2)
    rates = _number(derived["tflops_per_second"], 9, 1) + _number(derived["dense_tflops_per_second"], 8, 1)
    return f"{row.length:>7}{row.rows:>6}  {row.passes:<18}{row.implementation:<16}{times}{ratios}{rates}"


def table_foot(table: list[Row]) -> str:
    """How to read the figures, the layout's own time, and why figures are missing."""
    layouts = {row.length: f"{row.layout_milliseconds:.3f} at {row.length}" for row in table}
    failures = {
        f"- {row.passes}, T = {row.length}, {name}: {timing.reason}"
        for row in table
        for name, timing in ((row.implementation, row.ours), ("dense", row.dense), ("window", row.window))
        if isinstance(timing, Failure)
    }
    note = (
        "\nms a call, median of timed loops; TFLOP/s by needed pairs: 4 N H FLOPs each forward, 14 N H with backward.\n"
        f"The layout, once a batch, is not in them (ms): {', '.join(layouts.values())}"
    )
    return "\n".join([note, *sorted(failures)])


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"


def report(source: dict[str, Any], settings: Settings, table: list[Row]) -> dict[str, Any]:
    """Everything as plain JSON values."""
    rows = [dataclasses.asdict(row) | row.derived(settings) for row in table]
    return source | {"settings": dataclasses.asdict(settings), "baseline": baseline(settings), "rows": rows}


def main(settings: Settings) -> None:
    """Prints the table line by line, then writes the JSON file."""
    check(settings)
    source = provenance()
    print(heading(source), table_head(settings), sep="\n", flush=True)
    table = []
    for row in measure(settings):
        table.append(row)
        print(table_line(row, settings), flush=True)
    print(table_foot(table))
    if settings.json:
        write_text(settings.json, json.dumps(report(source, settings, table), indent=2) + "\n")


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
