"""Finds which layers are to keep watched tokens, and in how much of the memory, by what each choice does to the model.

All layers have a narrow window first. Each is then let keep what a watched cache would keep for it, and the one by
which the model comes nearest to its dense self stays so; again, with the layers that were chosen, until no layer gains
more than its error. A layer's gain is measured beside those that were chosen before: layers that look far, sharply and
in vain, gain nothing, and of two that find the same one is enough.

What is not worth it is not tried: after the first row half of the layers go on to the second, a quarter to the third;
and once some are chosen, a layer is tried again only while what it gained before exceeds the best of this time (other
layers, once chosen, mostly leave a layer less to gain). Then sizes: numbers of layers, widths of the other layers'
windows, shares of the kept zone, all in the same bytes, one after the other.

Rows much shorter than what will be read tell which layers use the distant past, and no more (`rank_layers`): in a row
of four times the slots nearly all that a kept zone could hold still fits into it, so a large one looks good, and a
row of a thousand tokens costs a CPU as many seconds as all else that it is good for. Then each layer is tried alone,
which needs a quarter of the passes, and shares memory as those do that were best wherever rows were long.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from sepjax.config import AttentionConfig, ConfigError, ModelConfig
from sepjax.keeping.layers import split_memory
from sepjax.keeping.trial import Geometry, Row
from sepjax.progress import Work, working

_NUMBERS = (1 / 10, 1 / 6, 1 / 4, 1 / 3, 5 / 12, 1 / 2)  # of the layers
_OTHERS = (0.5, 0.625, 0.75, 0.875)
_ZONES = (0.125, 0.25, 0.375, 0.5, 0.625)
_ROUNDS = 2  # over all three: the best of one depends a little on the others
_AT_LEAST = 3  # candidates of each step, whatever they gained before
# What short rows cannot tell, from searches on rows of ten times the slots (docs/keeping.md): at most 2 % from the best
OF_LAYERS, _OTHERS_OF_SHORT, _ZONE_OF_SHORT = 1 / 4, 0.75, 0.25


@dataclasses.dataclass(frozen=True)
class Step:
    """A layer that was chosen. Nats a token."""

    layer: int
    gain: float
    error: float | None  # one standard error over rows; None: there was one row


@dataclasses.dataclass(frozen=True)
class Tried:
    """A split of the memory and what it costs, in nats a token."""

    attention: AttentionConfig
    others: float
    zone: float
    divergence: float  # from the dense model
    loss: float


@dataclasses.dataclass(frozen=True)
class _Standing:
    """The rows under the layers chosen so far."""

    keeps: np.ndarray  # bool[L]
    sums: np.ndarray  # [R] divergences
    states: tuple[jax.Array, ...]  # of each row: what enters each layer


type _Gains = dict[int, tuple[int, list[float]]]  # of a layer, beside how many others, and what on each row


def geometry_of(attention: AttentionConfig, scale: float = 1.0) -> Geometry:
    """Sizes of `split_memory`'s settings, or of a plain window's, in which no layer keeps, times `scale`.

    Scaled down, they do to short rows what they do to long ones: which layers use the distant past is the same.
    """

    def scaled(size: int) -> int:
        return max(1, round(size * scale))

    x = attention
    if not x.kept_layers:
        return Geometry(x.num_sinks, 0, 0, scaled(x.window_size))
    narrow = next(n for i, n in enumerate(x.layer_windows) if i not in x.kept_layers)
    return Geometry(x.num_sinks, scaled(x.max_separators), scaled(x.window_size), scaled(narrow))


def choose_layers(rows: Sequence[Row], geometry: Geometry, num_layers: int, most: int, *, fixed: bool) -> list[Step]:
    """The layers that gain most by keeping, one beside the other, the best first.

    Args:
      rows: of text, all of one model.
      geometry: of a cache of the size that there will be.
      num_layers: L.
      most: layers to choose.
      fixed: so many in any case; False: until a layer gains no more than its error.

    Raises:
      ConfigError: the model's predictions are not finite.
    """
    until = [row.until(geometry) for row in rows]
    standing = _stand(rows, np.zeros(num_layers, bool), geometry, until)
    _check_finite(standing.sums)
    gains: _Gains = {}
    steps: list[Step] = []
    expected = 2 * num_layers + 3 * len(rows) * (most - 1)  # roughly
    with working("trying layers", expected, "trials") as work:
        while len(steps) < most:
            layer = _best(rows, geometry, until, standing, gains, work)
            gained = np.array(gains[layer][1])
            steps.append(_step(layer, gained, rows))
            if not fixed and steps[-1].gain <= max(0.0, steps[-1].error or 0.0):
                return steps[:-1]
            keeps = standing.keeps | (np.arange(num_layers) == layer)
            standing = _stand(rows, keeps, geometry, until, standing, layer)
    return steps


def rank_layers(rows: Sequence[Row], geometry: Geometry, num_layers: int, most: int, *, fixed: bool) -> list[Step]:
    """The layers that gain most by keeping when all others have windows alone, the best first.

    All layers are tried on the first row; each further one has the better half, but a few more than will be chosen.

    Args:
      rows: of text, all of one model.
      geometry: of a cache of the size that there will be.
      num_layers: L.
      most: layers to choose.
      fixed: so many in any case; False: of these, those that gain more than their error.

    Raises:
      ConfigError: the model's predictions are not finite.
    """
    left, gained = list(range(num_layers)), np.zeros((num_layers, 0))
    with working("trying layers", num_layers + len(rows) * (most + _AT_LEAST), "trials") as work:
        for row in rows:
            until = row.until(geometry)
            standing = _stand([row], np.zeros(num_layers, bool), geometry, [until])
            _check_finite(standing.sums)
            found = np.zeros((num_layers, 1))
            for layer in left:
                keeps = np.arange(num_layers) == layer
                found[layer] = standing.sums - row.run(keeps, geometry, until, layer, standing.states[0])[0][0]
                work.add()
            gained = np.concatenate([gained, found], axis=1)
            order = sorted(left, key=lambda layer: -gained[layer].sum())
            left = order[: max(most + _AT_LEAST, math.ceil(len(left) / 2))]
    steps = [_step(layer, gained[layer], rows) for layer in left[:most]]
    return steps if fixed else [x for x in steps if x.gain > max(0.0, x.error or 0.0)]


def _check_finite(sums: np.ndarray) -> None:
    if not np.isfinite(sums).all():
        raise ConfigError("on these rows the model's predictions are not finite; lower --length")


def _step(layer: int, gained: np.ndarray, rows: Sequence[Row]) -> Step:
    from sepjax.evaluation.slices import ratio_error

    return Step(layer, *ratio_error(gained, np.array([row.size for row in rows])))


def _stand(
    rows: Sequence[Row],
    keeps: np.ndarray,
    geometry: Geometry,
    until: Sequence[jax.Array],
    before: _Standing | None = None,
    first: int = 0,
) -> _Standing:
    sums, states = [], []
    for i, row in enumerate(rows):
        found, state = row.run(keeps, geometry, until[i], first, before and before.states[i])
        sums.append(found[0])
        states.append(state)
    return _Standing(keeps, np.array(sums), tuple(states))


def _best(
    rows: Sequence[Row],
    geometry: Geometry,
    until: Sequence[jax.Array],
    standing: _Standing,
    gains: _Gains,
    work: Work,
) -> int:
    """The layer that gains most beside those that keep; `gains` has what it gained on every row."""
    chosen = int(standing.keeps.sum())

    def measure(layer: int, number: int) -> None:
        keeps = standing.keeps.copy()
        keeps[layer] = True
        beside, measured = gains.get(layer, (chosen, []))
        measured = measured if beside == chosen else []
        for i in range(len(measured), number):
            found, _ = rows[i].run(keeps, geometry, until[i], layer, standing.states[i])
            measured = [*measured, float(standing.sums[i] - found[0])]
            work.add()
        gains[layer] = chosen, measured

    def mean(layer: int) -> float:
        _, measured = gains[layer]
        return sum(measured) / sum(row.size for row in rows[: len(measured)])

    left = np.flatnonzero(~standing.keeps).tolist()
    if not chosen:
        for number in range(1, len(rows) + 1):
            for layer in left:
                measure(layer, number)
            left = sorted(left, key=mean, reverse=True)[: max(_AT_LEAST, math.ceil(len(left) / 2))]
        return max(left, key=mean)
    fresh: list[int] = []
    for layer in sorted(left, key=mean, reverse=True):
        if len(fresh) >= _AT_LEAST and mean(layer) <= max(map(mean, fresh)):
            break
        measure(layer, len(rows))
        fresh.append(layer)
    return max(fresh, key=mean)


def choose_sizes(
    rows: Sequence[Row],
    order: Sequence[int],
    config: ModelConfig,
    slots: int,
    base: AttentionConfig,
    number: int = 0,
) -> list[Tried]:
    """Splits of the memory for the first layers of an order, tried one after the other; the best first.

    Args:
      rows: of text, all of one model.
      order: layers, the best first.
      config: of the model.
      slots: see `split_memory`.
      base: see there.
      number: of layers; 0: what serves best.
    """
    numbers = {number} if number else {min(len(order), max(1, round(x * config.num_layers))) for x in _NUMBERS}
    tried: dict[AttentionConfig, Tried] = {}

    def attempt(number: int, others: float, zone: float) -> None:
        try:
            attention = split_memory(config, sorted(order[:number]), slots, base, others=others, zone=zone)
        except ConfigError:  # no room for this one
            return
        if attention not in tried:
            tried[attention] = Tried(attention, others, zone, *cost(rows, attention, config.num_layers))
            work.add()

    def best() -> Tried:
        return min(tried.values(), key=lambda x: x.divergence)

    with working("trying sizes", len(numbers) + len(_OTHERS) + len(_ZONES), "splits") as work:
        others, zone = 0.75, 0.5
        for _ in range(_ROUNDS):
            for x in sorted(numbers):
                attempt(x, others, zone)
            if not tried:  # says why
                split_memory(config, sorted(order[: max(numbers)]), slots, base)
            for others in _OTHERS:
                attempt(len(best().attention.kept_layers), others, best().zone)
            for zone in _ZONES:
                attempt(len(best().attention.kept_layers), best().others, zone)
            others, zone = best().others, best().zone
    return sorted(tried.values(), key=lambda x: x.divergence)


def usual_sizes(layers: Sequence[int], config: ModelConfig, slots: int, base: AttentionConfig) -> AttentionConfig:
    """The split of the memory that is taken where rows are too short to try any; see `split_memory`."""
    return split_memory(config, sorted(layers), slots, base, others=_OTHERS_OF_SHORT, zone=_ZONE_OF_SHORT)


def cost(rows: Sequence[Row], attention: AttentionConfig, num_layers: int) -> tuple[float, float]:
    """Divergence from the dense model and loss of these settings on the rows, in nats a token."""
    geometry = geometry_of(attention)
    keeps = np.isin(np.arange(num_layers), attention.kept_layers)
    sums = sum(row.run(keeps, geometry, row.until(geometry))[0] for row in rows)
    divergence, loss = np.asarray(sums) / sum(row.size for row in rows)
    return float(divergence), float(loss)
