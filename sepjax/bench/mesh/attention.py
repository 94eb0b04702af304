"""Attention over rows that all devices share, against sending every key: part of `sepjax.bench.mesh`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.attention import dense_attention, separator_attention
from sepjax.attention.context_parallel import ContextPlan, context_attention, fits, gathered_keys
from sepjax.config import ConfigError
from sepjax.layout import SeparatorLayout, build_layout
from sepjax.measure import Timing, time_calls
from sepjax.training.compiled import Program

type Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; letters as in DESIGN."""

    lengths: tuple[int, ...] = (2**17, 2**19, 2**20)
    dense_lengths: tuple[int, ...] = (2**17, 2**19)  # of those, where one device also computes dense rows with cuDNN
    density: float = 0.12
    room: float = 1.1  # for global keys, over those that the density lets expect
    window_size: int = 256
    num_sinks: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"
    passes: tuple[str, ...] = ("forward", "forward+backward")
    seconds: float = 1.0

    def plans(self, length: int, ways: int) -> dict[str, ContextPlan]:
        """Separators: the packed global keys and a halo are sent. Dense: all keys."""
        room = math.ceil((self.room * self.density * length + self.num_sinks) / ways)
        return {
            "separators": ContextPlan(ways, halo=self.window_size - 1, capacity=min(room, length // ways)),
            "dense": ContextPlan(ways, halo=length, capacity=0, dense=True),
        }


def measure(settings: Settings) -> Iterator[Figures]:
    """Yields, for each length, both ways on all devices, and what one device does alone."""
    devices = jax.devices()
    for length in settings.lengths:
        for pattern in ("separators", "dense"):
            yield _figures(settings, length, pattern, devices)
        yield _figures(settings, length, "separators", devices[:1])
        if length in settings.dense_lengths and jax.default_backend() == "gpu":
            yield _cudnn(settings, length)


def _figures(settings: Settings, length: int, pattern: str, devices: list[Any]) -> Figures:
    ways = len(devices)
    plan = settings.plans(length, ways)[pattern]
    mesh = jax.make_mesh((ways,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    with jax.set_mesh(mesh):
        layout = jax.jit(functools.partial(_layout, settings, length, pattern))()
        is_roomy = plan.dense or bool(fits(layout, ways, plan.capacity))
        if not is_roomy:
            raise ConfigError(f"a device has more than {plan.capacity} global keys at T={length}; raise Settings.room")
        arrays = _inputs(settings, length, mesh)
        figures = {
            "part": "attention",
            "pattern": pattern,
            "devices": ways,
            "length": length,
            "shape": [settings.num_heads, settings.num_kv_heads, settings.head_dim],
            "pairs": int(layout.num_pairs().sum()),
        }
        for passes in settings.passes:
            run = jax.jit(_attention(plan, passes)).lower(*arrays, layout).compile()
            figures[passes] = _timed(functools.partial(run, *arrays, layout), settings)
        if ways == 1:
            return figures
        send = jax.jit(_sending(plan)).lower(*arrays[1:3], layout).compile()
        sent = Program(send.as_text() or "").collectives()
        figures["sending_keys"] = _timed(functools.partial(send, *arrays[1:3], layout), settings)
        figures["bytes_received"] = sum(_received(x.kind, x.bytes, ways) for x in sent)
        figures["collectives"] = [dataclasses.asdict(x) for x in sent]
    return figures


def _received(kind: str, size: int, ways: int) -> int:
    """Bytes that reach a device: of what is gathered, all but its own part."""
    return size * (ways - 1) // ways if kind == "all-gather" else size


def _timed(run: Callable[[], Any], settings: Settings) -> dict[str, Any]:
    timing: Timing = time_calls(run, repeats=3, seconds=settings.seconds)
    return {"milliseconds": timing.milliseconds, "samples": timing.samples}


def _layout(settings: Settings, length: int, pattern: str) -> SeparatorLayout:
    is_separator = jax.random.bernoulli(jax.random.key(0), settings.density, (1, length))
    if pattern == "dense":
        return build_layout(jnp.zeros_like(is_separator), window_size=length, num_sinks=0)
    return build_layout(is_separator, window_size=settings.window_size, num_sinks=settings.num_sinks)


def _inputs(settings: Settings, length: int, mesh: jax.sharding.Mesh) -> list[jax.Array]:
    """Random q, k, v and cotangent, split over the mesh."""
    heads = (settings.num_heads, settings.num_kv_heads, settings.num_kv_heads, settings.num_heads)
    rows = jax.NamedSharding(mesh, jax.P(None, "context"))

    def draw(seed: jax.Array, n: int) -> jax.Array:
        shape = (1, length, n, settings.head_dim)
        return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(settings.dtype))

    return [jax.jit(draw, static_argnums=1, out_shardings=rows)(i, n) for i, n in enumerate(heads)]


def _over_mesh(op: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(op, mesh=None, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _attention(plan: ContextPlan, passes: str) -> Callable[..., Any]:
    rows = jax.P(None, "context")

    def op(q: jax.Array, k: jax.Array, v: jax.Array, layout: SeparatorLayout) -> Any:
        if plan.ways == 1:
            return separator_attention(q, k, v, layout)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, layout: SeparatorLayout) -> Any:
            return context_attention(q, k, v, layout, True, plan=plan)[0]

        run: Any = _over_mesh(attend, (rows, rows, rows, jax.P()), rows)
        return run(q, k, v, layout)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, layout: SeparatorLayout) -> Any:
        return op(q, k, v, layout)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, layout: SeparatorLayout) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: op(q, k, v, layout), q, k, v)
        return out, vjp(cotangent)

    return forward if passes == "forward" else both


def _sending(plan: ContextPlan) -> Callable[..., Any]:
    """The keys and values that a device's queries may see, as they arrive there."""
    rows = jax.P(None, "context")

    def op(k: jax.Array, v: jax.Array, layout: SeparatorLayout) -> Any:
        send: Any = functools.partial(gathered_keys, plan=plan)
        run: Any = _over_mesh(send, (rows, rows, jax.P()), rows)
        return run(k, v, layout)

    return op


def _cudnn(settings: Settings, length: int) -> Figures:
    """Dense rows on one device: over the number of devices, what dense context parallelism cannot beat."""
    mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    q, k, v, cotangent = _inputs(settings, length, mesh)

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
        out, vjp = jax.vjp(dense_attention, q, k, v)
        return out, vjp(cotangent)

    figures: Figures = {"part": "attention", "pattern": "dense, cuDNN", "devices": 1, "length": length}
    figures["forward"] = _timed(functools.partial(jax.jit(dense_attention), q, k, v), settings)
    figures["forward+backward"] = _timed(functools.partial(both, q, k, v, cotangent), settings)
    return figures
