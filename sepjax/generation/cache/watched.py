"""Watched tokens: a bounded cache that keeps what was looked at sharply while it was in the window.

Whoever attends has the weights at hand. The score of an entry is its sharpest look so far, faded by the time since,

    score = max over looks of  log2(weight) + t / half_life            t: the looking token's time

from the age of `after` tokens on (younger ones are looked at by everything). Times are those of the looks, not of the
reading, so nothing has to fade in every step and the order of two scores never changes by itself. When a row compacts,
the best s of its kept zone and its past window stay; an entry that stays keeps its slot, and those that come take the
slots that are left. It does so whenever recent entries fill what sinks and a full kept zone leave of c + 1, so that the
kept zone fills up before anything is lost:

    kept zone   3 8 5 1        past window   . 9 . 4 .              stays: 8 5, comes: 9 4
    after       9 8 5 4

Every key head of a watched layer keeps a set of its own ("head"), or all layers and heads share one ("model"). A layer
that is not watched keeps its newest tokens, which is a plain window: looks of the lower layers say little about what
is worth keeping (docs/keeping.md).
"""

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.attention.decode import Looks
from sepjax.config import AttentionConfig, ModelConfig
from sepjax.generation.cache import gated
from sepjax.generation.cache.stored import Vectors, changed, in_each_array, of_few_layers
from sepjax.generation.cache.turning import turn_of_moves
from sepjax.model.rope import rotate

if TYPE_CHECKING:
    from sepjax.generation.cache.bounded import StreamingCache

_LEAST = 1e-30  # of a weight, so that its logarithm is finite
_FIRST = 1024.0  # what separators that go first have more than all others: scores are between -100 and 2^15 / 256
_FIRST_OF_NEWEST = 2.0**20  # the same where scores are times
_CLOCK = 2**15  # times begin again here, so that they stay exact


@dataclasses.dataclass(frozen=True)
class Watch:
    """Which looks count, hashable: a part of `StreamSizes`. Made by `create`."""

    layers: tuple[bool, ...]  # for each layer: whether its looks count
    per_head: bool  # every key head of those layers keeps its own; False: all layers keep the same
    after: int  # age in tokens from which looks count
    half_life: int  # tokens
    separators_first: bool

    @classmethod
    def create(cls, config: ModelConfig, attention: AttentionConfig) -> "Watch":
        """What an attention config with the pattern "watched" asks for."""
        layers = attention.watch_layers or range(config.num_layers // 2, config.num_layers)
        return cls(
            layers=tuple(i in layers for i in range(config.num_layers)),
            per_head=attention.kept_set == "head",
            after=attention.watch_after,
            half_life=attention.watch_half_life or gated.NEVER,
            separators_first=attention.separators_first,
        )

    def scores(self, config: ModelConfig, batch_size: int, size: int) -> Float[jax.Array, "G B N S"]:
        """Scores of `size` entries each, for an empty cache."""
        layers, heads = (config.num_layers, config.num_kv_heads) if self.per_head else (1, 1)
        return jnp.zeros((layers, batch_size, heads, size), jnp.float32)

    def by_newest(self) -> Bool[jax.Array, "G 1 1 1"]:
        """The sets that keep their newest tokens."""
        newest = [not watched for watched in self.layers] if self.per_head else [False]
        return jnp.array(newest)[:, None, None, None]


def looks_of_one(cache: "StreamingCache", looks: Looks) -> Float[jax.Array, "L B K S"]:
    """The sharpest look of one token at each entry of kept zone and ring, and at itself: 0 where none counts.

    Args:
      cache: before it.
      looks: at the C slots in every layer. A look at itself never counts.
    """
    counts = _is_kept_or_old(cache, cache.next_recent[:, None])
    found = jnp.stack([looks.of_layer(i).in_slots() for i in range(len(looks.found))])
    counted = jnp.where(counts, found[..., cache.sizes.num_sinks :], 0.0)
    return jnp.pad(counted, [(0, 0)] * (counted.ndim - 1) + [(0, 1)])


def looks_of_many(
    cache: "StreamingCache", weights: Float[Array, "B K G T A"], counts: Int32[Array, "B"]
) -> Float[jax.Array, "B K S"]:
    """The same of a run of tokens: of their looks at each entry the sharpest, faded to the time of the last token.

    Args:
      cache: before them.
      weights: of their attention to the sinks, the kept zone, the ring and one another.
      counts: how many of the T tokens are taken up.
    """
    sizes, watch = cache.sizes, cache.sizes.watch
    assert watch is not None
    T = weights.shape[-2]
    i = jnp.arange(T, dtype=jnp.int32)
    fading = jnp.exp2(-(T - 1 - i).astype(jnp.float32) / watch.half_life)
    fading = jnp.where(i < counts[:, None], fading, 0.0)  # [B, T]
    query = cache.next_recent[:, None] + i
    old = _is_kept_or_old(cache, query)  # [B, T, s + R]
    own = (i[:, None] - i >= watch.after)[None]
    factor = jnp.where(jnp.concatenate([old, jnp.broadcast_to(own, (len(counts), T, T))], -1), fading[..., None], 0.0)
    return jnp.max(weights[..., sizes.num_sinks :] * factor[:, None, None], axis=(2, 3))


def _is_kept_or_old(cache: "StreamingCache", query: Int32[Array, "B T"]) -> Bool[jax.Array, "B T S"]:
    """Which entries of kept zone and ring are old enough for the looks of queries at these positions to count."""
    watch = cache.sizes.watch
    assert watch is not None
    old = query[..., None] - cache.recent_positions()[:, None] >= watch.after
    return jnp.concatenate([jnp.ones((*query.shape, cache.sizes.max_separators), bool), old], axis=-1)


def seen_by(
    cache: "StreamingCache", looks: Float[Array, "L B K S"], counts: Int32[Array, "B"]
) -> tuple[Float[jax.Array, "G B N M"], Float[jax.Array, "G B N T"]]:
    """The scores after a run of T tokens: of kept zone and ring, and of the tokens themselves.

    Args:
      cache: before them.
      looks: of `looks_of_one`, or `looks_of_many` in every layer.
      counts: how many of the T tokens each row takes up; where none, the scores stay.
    """
    watch, scores = cache.sizes.watch, cache.scores
    assert watch is not None
    assert scores is not None
    T = looks.shape[-1] - scores.shape[-1]
    last = (cache.clock + (T - 1)).astype(jnp.float32)[:, None, None] / watch.half_life
    taken = (counts > 0)[:, None, None]

    def value_of(look: Array, counted: Any) -> jax.Array:
        value = jnp.log2(jnp.maximum(look, _LEAST)) + last
        return jnp.where(taken & counted, value, -jnp.inf)

    def higher(old: jax.Array, value: jax.Array) -> jax.Array:
        first = jnp.where(old > _FIRST / 2, _FIRST, 0.0) if watch.separators_first else 0.0
        return jnp.maximum(old, value + first)

    if not watch.per_head:
        value = value_of(looks, jnp.array(watch.layers)[:, None, None, None])
        value = jnp.max(value, axis=(0, 2), keepdims=True)
        return higher(scores, value[..., :-T]), value[..., -T:]
    # Layer by layer: in one piece XLA asks at every number which layer's array it is of. In place, without a copy of
    # what it reads, XLA updates only where it sees that both are at one index, and sees so only of one it cannot fold.
    own = []
    for i, counted in enumerate(watch.layers):
        value = value_of(looks[i : i + 1], counted)
        own.append(value[..., -T:])
        if counted:
            at = jax.lax.optimization_barrier(jnp.int32(i))
            new = higher(jax.lax.dynamic_slice_in_dim(scores, at, 1), value[..., :-T])
            scores = jax.lax.dynamic_update_slice_in_dim(scores, new, at, axis=0)
    return scores, jnp.concatenate(own)


def _raised_by_kernel(
    cache: "StreamingCache", looks: Looks, counts: Int32[Array, "B"]
) -> tuple[Float[jax.Array, "G B N M"], Float[jax.Array, "G B N 1"]]:
    """What `seen_by` gives for `looks_of_one`, but that scores of empty slots stay."""
    watch, scores = cache.sizes.watch, cache.scores
    assert watch is not None
    assert scores is not None
    time = jnp.where(counts > 0, cache.clock.astype(jnp.float32) / watch.half_life, -jnp.inf)
    counted = _is_kept_or_old(cache, cache.next_recent[:, None])[:, 0]
    layers = {i: looks.of_layer(i) for i, watched in enumerate(watch.layers) if watched}
    if not (cache.sizes.reach or cache.sizes.sees_kept):  # all see the same
        place = looks.of_layer(0).place
        layers = {i: looks._replace(place=place) for i, looks in layers.items()}
    first = _FIRST if watch.separators_first else None
    own = jnp.where(jnp.array(watch.layers)[:, None], jnp.log2(_LEAST) + time, -jnp.inf)
    own = jnp.broadcast_to(own[..., None, None], (*scores.shape[:3], 1))
    kernel = importlib.import_module("sepjax.generation.cache.raising")  # a second, that only a GPU needs
    return kernel.raised(scores, layers, counted, time, _LEAST, first), own


def scores_after(
    cache: "StreamingCache",
    looks: Array | Looks | None,
    gate_scores: Array | None,
    counts: Int32[Array, "B"],
    in_ring: Int32[Array, "B T"],
) -> jax.Array | None:
    """A cache's scores once the tokens of `StreamingCache.append` are in these slots of the ring; looks as there."""
    scores, rows = cache.scores, jnp.arange(len(counts))[:, None]
    at = cache.sizes.max_separators + in_ring
    if scores is None:
        return None
    if looks is not None:
        watch = cache.sizes.watch
        if isinstance(looks, Looks) and looks.place is not None and watch is not None and watch.per_head:
            scores, own = _raised_by_kernel(cache, looks, counts)
        else:
            looks = looks_of_one(cache, looks) if isinstance(looks, Looks) else jnp.asarray(looks)
            scores, own = seen_by(cache, looks, counts)
        own = jnp.moveaxis(own, (1, 3), (0, 1))
        return scores.at[:, rows, :, at].set(own, mode="drop", unique_indices=True)
    if gate_scores is not None:
        return scores.at[0, rows, 0, at].set(gate_scores, mode="drop", unique_indices=True)
    return scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Choice:
    """What a compaction keeps, for each of s slots of the kept zone."""

    comes: Bool[jax.Array, "G B N s"]  # whether another entry comes into it
    source: Int32[jax.Array, "G B N s"]  # p of that
    scores: Float[jax.Array, "G B N S"]  # of kept zone and ring, afterwards
    rivals: Int32[jax.Array, "B"]  # how many entries the s were chosen from

    __no_type_check__ = True


def keep_best(cache: "StreamingCache") -> "StreamingCache":
    """Compacts as many full rows as `full_rows` gives: of kept zone and past window the best s stay, and the last w."""
    a, s, w, best = cache.sizes.num_sinks, cache.sizes.max_separators, cache.sizes.window_size, cache.sizes.keeps_best
    assert best is not None
    assert cache.scores is not None
    full = cache.full_rows()
    few = cache.of_rows(full)
    choice = _choose(few)
    kept = choice.rivals
    place = jnp.moveaxis(few.place_in_text(jnp.moveaxis(choice.source, 1, 0)), 0, 1)
    slots = jnp.arange(s, dtype=jnp.int32)
    by = turn_of_moves(cache, slots, choice.source)
    turn = None if by is None else cache.angles(by)

    def move(x: Vectors, comes: jax.Array, source: jax.Array, *turn: jax.Array) -> Vectors:  # [B, K, C, (H)]
        rows, heads = cache.places(full)[:, None, None], jnp.arange(x.shape[1])[:, None]
        to = jnp.where(comes, a + slots, cache.sizes.slots + slots)  # beyond the end: nowhere
        taken = lambda x: x.at[rows, heads, a + s + source % cache.sizes.ring].get(mode="clip")  # noqa: E731
        put = lambda x, found: x.at[rows, heads, to].set(found, mode="drop", unique_indices=True)  # noqa: E731
        found = in_each_array(taken, x)
        if turn:
            found = changed(lambda k: rotate(k[..., None, :], (turn[0], turn[1]))[..., 0, :], found)
        return in_each_array(put, x, found)

    def move_all(x: Vectors, number: int | None, given: tuple[jax.Array, ...]) -> Vectors:
        if number is not None:
            return move(x, *(y[number % len(y)] for y in given))  # one set for all layers is each layer's
        return jax.vmap(move)(x, *(jnp.broadcast_to(y, (len(best.layers), *y.shape[1:])) for y in given))

    where, turns = (choice.comes, choice.source), turn or ()
    if turn is not None and cache.sizes.layer_ropes:  # [Z, G, ...], of every kind of layer
        kinds, sets = np.array(cache.sizes.layer_ropes), np.arange(len(best.layers)) % turn[0].shape[1]
        turns = tuple(x[kinds, sets] for x in turn)
    restarts = few.clock // _CLOCK * _CLOCK  # a cycle of a large cache may be longer

    return dataclasses.replace(
        cache.with_rows(
            full,
            scores=_restarted(few, choice.scores, restarts),
            clock=few.clock - restarts,
            num_separators=jnp.minimum(kept, s),
            num_recent=w,
            next_separator=jnp.minimum(kept, s),  # a kept entry's position is its slot's
            dropped=jnp.minimum(few.dropped + jnp.maximum(kept - s, 0), 2**30),
            kept_at=jnp.where(choice.comes, place, few.kept_at),
        ),
        k=of_few_layers(move_all, cache.k, (*where, *turns)),
        v=of_few_layers(move_all, cache.v, where),
    )


def rivals(cache: "StreamingCache") -> Int32[jax.Array, "B"]:
    """How many entries the next compaction of each row will choose from."""
    return jnp.sum(_contenders(cache)[2], axis=-1, dtype=jnp.int32)


def _contenders(
    cache: "StreamingCache",
) -> tuple[Int32[jax.Array, "B M"], Float[jax.Array, "G B N M"], Bool[jax.Array, "B E"]]:
    """The p of the past window's slots, what their tokens count, and which of kept zone and these are there."""
    sizes = cache.sizes
    i = jnp.arange(sizes.ring_limit - sizes.window_size, dtype=jnp.int32)
    p = (cache.next_recent - cache.num_recent)[:, None] + i
    is_past = i < (cache.num_recent - sizes.window_size)[:, None]
    if sizes.gate:
        candidates, is_best = gated.candidates(cache, p, _time(cache, p))
        is_past &= is_best
    else:
        candidates = _watched_candidates(cache, p)
    is_kept = jnp.arange(sizes.max_separators) < cache.num_separators[:, None]
    return p, candidates, jnp.concatenate([is_kept, is_past], axis=1)


def _choose(cache: "StreamingCache") -> _Choice:
    scores, s = cache.scores, cache.sizes.max_separators
    assert scores is not None
    p, candidates, there = _contenders(cache)
    there, width = there[:, None], p.shape[1]
    ranked = jnp.where(there, jnp.concatenate([scores[..., :s], candidates], axis=-1), -jnp.inf)
    best = jax.lax.top_k(ranked, s)[1]
    stays, comes = jnp.split(_marked(best, ranked.shape[-1]) & there, [s], axis=-1)
    # The entries that come, in their order, into the slots that are free, in theirs.
    rank, free = (jnp.cumsum(x, axis=-1, dtype=jnp.int32) - 1 for x in (comes, ~stays))
    i = jnp.arange(width, dtype=jnp.int32)
    order = _put_at(jnp.where(comes, rank, s + i), i, s)  # those that come, in their order: s at most
    source = jnp.take_along_axis(order, free, axis=-1)
    source = jnp.where(stays, 0, source)
    filled = ~stays & (free <= rank[..., -1:])
    new = jnp.take_along_axis(candidates, jnp.minimum(source, width - 1), axis=-1)
    zone = jnp.where(filled, new, scores[..., :s])
    source = jnp.take_along_axis(jnp.broadcast_to(p[None, :, None], (1, len(p), 1, width)), source, axis=-1)
    number = jnp.sum(there[:, 0], axis=-1, dtype=jnp.int32)
    return _Choice(filled, source, jnp.concatenate([zone, scores[..., s:]], axis=-1), number)


def _time(cache: "StreamingCache", p: Int32[jax.Array, "B N"]) -> Float[jax.Array, "B N"]:
    """When the ring's tokens came, on each row's clock."""
    return (cache.clock[:, None] + p - cache.next_recent[:, None]).astype(jnp.float32)


def _watched_candidates(cache: "StreamingCache", p: Int32[jax.Array, "B M"]) -> Float[jax.Array, "G B N M"]:
    """What the tokens in slots p of the ring count among kept ones."""
    watch, scores, sizes = cache.sizes.watch, cache.scores, cache.sizes
    assert watch is not None
    assert scores is not None
    at = jnp.broadcast_to((sizes.max_separators + p % sizes.ring)[None, :, None], (1, len(p), 1, p.shape[1]))
    found = jnp.where(watch.by_newest(), _time(cache, p)[:, None], jnp.take_along_axis(scores, at, axis=-1))
    if not watch.separators_first:
        return found
    flagged = jnp.take_along_axis(cache.is_separator, p % sizes.ring, axis=1)
    return found + jnp.where(flagged[:, None], jnp.where(watch.by_newest(), _FIRST_OF_NEWEST, _FIRST), 0.0)


def _marked(index: jax.Array, size: int) -> jax.Array:
    """bool[..., size], true at `index`[..., s]."""
    return _put_at(index, jnp.array(True), size)


def _put_at(index: jax.Array, x: jax.Array, size: int) -> jax.Array:
    """[..., size] with `x` at `index`[..., s], where it is below `size`; zeros elsewhere."""
    flat = index.reshape(-1, index.shape[-1])
    at = jnp.zeros((len(flat), size), x.dtype).at[jnp.arange(len(flat))[:, None], flat]
    return at.set(x, mode="drop", unique_indices=True).reshape(*index.shape[:-1], size)


def _restarted(cache: "StreamingCache", scores: jax.Array, restarts: Int32[jax.Array, "B"]) -> jax.Array:
    """Scores of rows whose times begin again, `restarts` earlier."""
    watch, gate = cache.sizes.watch, cache.sizes.gate
    if gate:  # those of the ring have no times yet
        rate = jnp.where(jnp.arange(scores.shape[-1]) < cache.sizes.max_separators, 1.0 / gate.half_life, 0.0)
    else:
        assert watch is not None
        rate = jnp.where(watch.by_newest(), 1.0, 1.0 / watch.half_life)
    return scores - rate * restarts.astype(jnp.float32)[:, None, None]
