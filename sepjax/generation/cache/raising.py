"""Scores of watched tokens raised by a step's looks, of all layers by one kernel (Pallas, Triton).

XLA makes a kernel for each layer, which computes at every number of the cache where its look lies, and reads and
writes what no token sees, too. This one reads looks and scores of visible parts alone, and writes the scores that rise:
few do, once a text has gone on for a while.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sepjax.array_typing import Array, Bool, Float
from sepjax.attention.decode import Looks
from sepjax.attention.target import target

_AT_ONCE = 3  # layers whose numbers are read before any is written: reading would wait for that
_WARPS = 4


def raised(
    scores: Float[Array, "G B K S"],
    layers: Mapping[int, Looks],
    counts: Bool[Array, "B S"],
    time: Float[Array, "B"],
    least: float,
    first: float | None = None,
) -> Float[jax.Array, "G B K S"]:
    """max(score, log2(look) + time) of what is visible, in place.

    Args:
      scores: of all layers.
      layers: those that are watched, by their numbers, each with its looks [B, K, C] as the kernel of `decode` gives
        them. Scores are of the last S of the C slots.
      counts: which slots' looks count; others are 0.
      time: of each row's token; -inf: its scores stay.
      least: smaller looks count as much.
      first: what entries have more that are to stay first: those that have more than half of it.
    """
    scores = jnp.asarray(scores)
    _, B, K, S = scores.shape
    places = list({id(looks.place): looks.place for looks in layers.values()}.values())
    which = tuple([place is looks.place for place in places].index(True) for looks in layers.values())
    (found, place), *_ = layers.values()
    assert place is not None
    C = found.shape[-1]
    shape = tuple(layers), which, C // place.shape[-1], C - S, least, first
    kernel = functools.partial(_kernel, *shape, len(places))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    given = scores, jnp.asarray(counts).astype(jnp.int8), time, *places, *(looks.found for looks in layers.values())
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(scores.shape, scores.dtype),
        grid=(B, K),
        in_specs=[whole] * len(given),
        out_specs=whole,
        input_output_aliases={0: 0},
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=target().platform != "gpu",
        name="raise_scores",
    )(*given)


def _kernel(
    numbers: tuple[int, ...], which: tuple[int, ...], part: int, before: int, least: float, first: float | None,
    num_places: int, scores: Any, counts: Any, time: Any, *refs: Any,
) -> None:  # fmt: skip
    """A block has a row's key head in all layers."""
    places, looks, out = refs[:num_places], refs[num_places:-1], refs[-1]
    b, head, S = pl.program_id(0), pl.program_id(1), scores.shape[-1]
    slot = jnp.arange(pl.next_power_of_2(S), dtype=jnp.int32)
    inside, at, now = slot < S, slot + before, time[b]
    counted = plt.load(counts.at[b, slot], mask=inside, other=0) != 0
    X = places[0].shape[-1]
    lie = [plt.load(place.at[b, at // part], mask=inside, other=X) for place in places]

    def read(i: int) -> tuple[Any, ...]:
        place = lie[which[i]]
        live = place < X
        look = plt.load(looks[i].at[b, head, place * part + at % part], mask=live, other=0.0)
        return live, look, plt.load(scores.at[numbers[i], b, head, slot], mask=live, other=0.0)

    for begin in range(0, len(numbers), _AT_ONCE):
        group = range(begin, min(begin + _AT_ONCE, len(numbers)))
        for i, (live, look, old) in zip(group, [read(i) for i in group], strict=True):
            value = jnp.log2(jnp.maximum(jnp.where(counted, look, 0.0), least)) + now
            if first is not None:
                value = value + jnp.where(old > first / 2, first, 0.0)
            plt.store(out.at[numbers[i], b, head, slot], value, mask=live & (value > old))
