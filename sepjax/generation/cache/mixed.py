"""A bounded cache whose layers hold different numbers of entries: parts, each a `StreamingCache` for some layers.

    layer     0 1 2 3 4 5 6 7 8
    part      w w w w k w k k w      k: sinks, kept zone, window      w: sinks and the last tokens, no entry more

The distant past is used by few layers (docs/keeping.md). Where those alone have a kept zone, and the others windows
of their own, the same memory goes further. Every part keeps its own books: it compacts when its own layers are full,
and entry k of a layer has position k there. A run of tokens ends where the first part is full.

Runs of neighbouring layers of one part are one scan; so a model whose kinds of layers alternate compiles longer.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.array_typing import Array, Bool, Float, Int32, SeparatorTable, Tokens
from sepjax.config import AttentionConfig, ConfigError, ModelConfig, sees_kept, under
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.bounded_pass import attend_run, pass_inputs
from sepjax.generation.cache.rows import InPlace
from sepjax.generation.cache.shown import Shown
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.model.gate import needs_gate
from sepjax.separators import flag_separators


@dataclasses.dataclass(frozen=True)
class MixedSizes:
    """Limits of a `MixedCache`, hashable: another value is another program. Made by `bounded_sizes`."""

    parts: tuple[StreamSizes, ...]  # those with a kept zone first
    part_of: tuple[int, ...]  # each layer's part

    @property
    def main(self) -> StreamSizes:
        """Of the first part: where there is a kept zone, it has one."""
        return self.parts[0]

    def layers(self, part: int) -> tuple[int, ...]:
        """The layers of a part, in order."""
        return tuple(i for i, mine in enumerate(self.part_of) if mine == part)

    @property
    def cache_size(self) -> int:
        """The most entries that a layer holds, averaged over the layers and rounded up."""
        return -(-sum(self.parts[part].cache_size for part in self.part_of) // len(self.part_of))

    @property
    def largest(self) -> int:
        """The most entries that any layer holds."""
        return max(part.cache_size for part in self.parts)

    @property
    def slots(self) -> int:
        """Of a layer, averaged over the layers and rounded up: what memory is reckoned by."""
        return -(-sum(self.parts[part].slots for part in self.part_of) // len(self.part_of))

    @property
    def chunk(self) -> int:
        """See `StreamSizes.chunk`."""
        return min(part.chunk for part in self.parts)

    @property
    def num_sinks(self) -> int:
        """a, of all parts."""
        return self.main.num_sinks

    @property
    def max_separators(self) -> int:
        """s of the first part."""
        return self.main.max_separators

    @property
    def window_size(self) -> int:
        """w of the first part."""
        return self.main.window_size

    @property
    def absolute(self) -> bool:
        """See `StreamSizes`."""
        return self.main.absolute

    @property
    def cache_dtype(self) -> str:
        """See `StreamSizes`."""
        return self.main.cache_dtype

    @property
    def sees_kept(self) -> tuple[bool, ...]:
        """For each layer: whether it has a kept zone."""
        return tuple(self.parts[part].max_separators > 0 for part in self.part_of)


type BoundedSizes = StreamSizes | MixedSizes


def bounded_sizes(config: ModelConfig, attention: AttentionConfig) -> BoundedSizes:
    """The sizes that a config asks for: of one kind of layers, or of several.

    Of several where `layer_windows` differ, or are given beside `kept_layers`.

    Of several, a layer that sees kept tokens (`kept_layers`; empty: each, of a gate those above it), or each of a
    window's, holds as many entries more or less than `cache_size` as its window is wider or narrower than
    `window_size`. The others hold sinks and their windows, and nothing else.

    Raises:
      ConfigError: as `StreamSizes.create`, or several kinds of layers are to share one set of watched tokens.
    """
    windows = attention.layer_windows
    if not windows or (len(set(windows)) == 1 and not attention.kept_layers):
        return StreamSizes.create(config, attention)
    watched = attention.watch_layers or attention.kept_layers
    alike = dataclasses.replace(attention, layer_windows=(), kept_layers=(), watch_layers=watched)
    like = StreamSizes.create(config, alike)  # which says, too, what no bounded cache serves
    has_zone = like.max_separators > 0
    sees = [has_zone and x for x in sees_kept(attention, config.num_layers)]
    kinds = list(zip((not x for x in sees), windows, strict=True))
    distinct = sorted(set(kinds))
    if attention.pattern == "watched" and attention.kept_set == "model" and sum(not x for x, _ in distinct) > 1:
        raise ConfigError(
            'attention.kept_set="model" keeps one set for all layers, which layers that keep tokens in caches of '
            'several sizes cannot share; give them one window in layer_windows, or use kept_set="head"'
        )
    part_of = tuple(distinct.index(kind) for kind in kinds)
    sizes = MixedSizes((), part_of)
    parts = tuple(
        _of_layers(StreamSizes.create(config, _alone(alike, like, window, not without)), sizes.layers(i))
        for i, (without, window) in enumerate(distinct)
    )
    return dataclasses.replace(sizes, parts=parts)


def _alone(alike: AttentionConfig, like: StreamSizes, window: int, keeps: bool) -> AttentionConfig:
    """What layers of one kind would be given if all were like them."""
    size = like.cache_size + window - alike.window_size
    if like.max_separators and not keeps:
        alike = dataclasses.replace(under(alike, "sink_window"), keep_all_separators=False)
        size = alike.num_sinks + window
    return dataclasses.replace(alike, window_size=window, cache_size=size)


def _of_layers(sizes: StreamSizes, layers: tuple[int, ...]) -> StreamSizes:
    """The sizes of these layers of a model alone."""

    def pick(of: tuple) -> tuple:
        return tuple(of[i] for i in layers) if of else ()

    watch, gate = (x and dataclasses.replace(x, layers=pick(x.layers)) for x in (sizes.watch, sizes.gate))
    kinds, reach = pick(sizes.layer_ropes), pick(sizes.reach)
    return dataclasses.replace(sizes, layer_ropes=kinds, reach=reach, sees_kept=(), watch=watch, gate=gate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class MixedCache(Shown):
    """Parts of layers. Made by `empty_cache`; see `sepjax.generation.cache.protocol.Cache` for what it is asked."""

    parts: tuple[StreamingCache, ...]
    sizes: MixedSizes = dataclasses.field(metadata={"static": True})

    __no_type_check__ = True

    @property
    def main(self) -> StreamingCache:
        """The first part: where there is a kept zone, it has one."""
        return self.parts[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in self.parts)

    def averaged(self, numbers: Sequence[jax.Array]) -> jax.Array:
        """Numbers of entries, one of each part, averaged over the layers and rounded down."""
        return self._over_layers(numbers) // len(self.sizes.part_of)

    def _over_layers(self, numbers: Sequence[jax.Array]) -> jax.Array:
        first, *others = (number * len(self.sizes.layers(i)) for i, number in enumerate(numbers))
        return sum(others, first)

    def held(self) -> Int32[jax.Array, "B"]:
        """Entries of a layer that each row holds, averaged over the layers and rounded down."""
        return self.averaged([part.held() for part in self.parts])

    def held_before(self, num_tokens: int) -> Float[jax.Array, "B T"]:
        """The same of each of the next `num_tokens` tokens, not rounded."""
        total = self._over_layers([part.held_before(num_tokens) for part in self.parts])
        return total.astype(jnp.float32) / len(self.sizes.part_of)

    def room(self, most: int) -> Int32[jax.Array, "B"]:
        """See `Cache`: what the fullest part takes."""
        rooms = [part.room(most) for part in self.parts]
        return jnp.min(jnp.stack(rooms), axis=0)

    @property
    def ends_when_stuck(self) -> bool:
        """See `Cache`."""
        return self.main.ends_when_stuck

    def is_stuck(self) -> Bool[jax.Array, "B"]:
        """See `Cache`."""
        return jnp.any(jnp.stack([part.is_stuck() for part in self.parts]), axis=0)

    def make_room(self) -> "MixedCache":
        """Raises ConfigError: the settings bound it."""
        return dataclasses.replace(self, parts=(self.main.make_room(),))

    def compact(self) -> "MixedCache":
        """Compacts the parts of rows that are due."""
        return self._each(StreamingCache.compact)

    def take_up(
        self, model: Any, tokens: Tokens, counts: Int32[Array, "B"], table: SeparatorTable, attention: AttentionConfig
    ) -> tuple[Float[jax.Array, "B T D"], "MixedCache"]:
        """See `Cache`. `model` is a `Layerwise`."""
        T, g = tokens.shape[1], attention.gate_layer if attention.pattern == "gated" else -1
        offsets = self.main.seen_low[:, None] + jnp.arange(T, dtype=jnp.int32)
        flags = flag_separators(tokens, offsets, table, attention)
        in_place = [InPlace() for _ in self.parts]
        given = zip(self.parts, in_place, strict=True)
        attends = [attend_run(part, T, counts, attention.implementation, written) for part, written in given]
        inputs = [self._inputs(i) for i in range(len(self.parts))]
        x, scores = model.embed(tokens, offsets), None
        outputs: list[list[Any]] = [[] for _ in self.parts]
        for first, last in self._runs(g):
            if first == g:
                scores = needs_gate(model, attention)(x)
            part = self.sizes.part_of[first]
            x, output = model.run_layers(x, attends[part], inputs[part], first, last)
            outputs[part].append(output)
        parts = []
        for part, found, written in zip(self.parts, outputs, in_place, strict=True):
            k, v, *looks = jax.tree.map(lambda *runs: jnp.concatenate(runs), *found)
            of_gate = scores if part.sizes.gate else None
            parts.append(part.append(k, v, flags, counts, *looks, gate_scores=of_gate, in_place=written))
        return model.final_norm(x), dataclasses.replace(self, parts=tuple(parts))

    def _runs(self, gate_layer: int) -> Iterator[tuple[int, int]]:
        """First and last + 1 of neighbouring layers of one part, on one side of the gate."""
        sides = ((part, i >= gate_layer) for i, part in enumerate(self.sizes.part_of))
        last = 0
        for _, same in itertools.groupby(sides):
            first, last = last, last + len(list(same))
            yield first, last

    def _inputs(self, part: int) -> tuple[Any, ...]:
        """`pass_inputs` of a part by the model's numbers of layers: each item with an entry a layer, or None."""
        numbers = {layer: j for j, layer in enumerate(self.sizes.layers(part))}
        places = [numbers.get(i) for i in range(len(self.sizes.part_of))]
        items = pass_inputs(self.parts[part])
        return tuple(None if x is None else [None if j is None else x[j] for j in places] for x in items)

    # -- rows -----------------------------------------------------------------------------------------------------

    def row(self, i: Int32[Array, ""]) -> "MixedCache":
        """Row i as a cache of its own."""
        return self._each(lambda part: part.row(i))

    def with_row(self, i: Int32[Array, ""], row: "MixedCache") -> "MixedCache":
        """The same with row i as `row`, a cache of one row, has it."""
        return self._each(lambda part, new: part.with_row(i, new), row)

    def whole_rows(self, rows: Int32[Array, "M"]) -> "MixedCache":
        """These rows as a cache of their own; numbers of no row give any one's."""
        return self._each(lambda part: part.whole_rows(rows))

    def where_they_lie(self, rows: Int32[Array, "M"], attention: AttentionConfig) -> "MixedCache":
        """See `StreamingCache.where_they_lie`."""
        return self._each(lambda part: part.where_they_lie(rows, attention))

    @property
    def is_in_place(self) -> bool:
        """Whether some of these rows are read where they lie among others."""
        return any(part.is_in_place for part in self.parts)

    def with_whole_rows(self, rows: Int32[Array, "M"], few: "MixedCache") -> "MixedCache":
        """The same with these rows as `few` has them; numbers of no row are none."""
        return self._each(lambda part, new: part.with_whole_rows(rows, new), few)

    def reset(self, rows: Bool[Array, "B"]) -> "MixedCache":
        """The same with `rows` empty."""
        return self._each(lambda part: part.reset(rows))

    def bare(self) -> "MixedCache":
        """The bookkeeping alone, without keys and values."""
        return self._each(StreamingCache.bare)

    def with_entries_of(self, other: "MixedCache") -> "MixedCache":
        """This bookkeeping with the keys and values of another."""
        return self._each(StreamingCache.with_entries_of, other)

    @property
    def entries(self) -> tuple[Any, ...]:
        """Arrays of every layer's keys of the first part, then of values; then those of the next."""
        return tuple(x for part in self.parts for x in part.entries)

    def with_entries(self, entries: Sequence[Any]) -> "MixedCache":
        """This bookkeeping with other `entries`."""
        arrays = 2 if self.sizes.cache_dtype == "model" else 4  # of a layer
        ends = list(itertools.accumulate(arrays * len(self.sizes.layers(i)) for i in range(len(self.parts))))
        parts = zip(self.parts, [0, *ends], ends, strict=False)
        return dataclasses.replace(self, parts=tuple(part.with_entries(entries[a:b]) for part, a, b in parts))

    def _each(self, f: Callable[..., StreamingCache], *others: "MixedCache") -> "MixedCache":
        parts = zip(self.parts, *(other.parts for other in others), strict=True)
        return dataclasses.replace(self, parts=tuple(f(*same) for same in parts))


type BoundedCache = StreamingCache | MixedCache
BOUNDED = StreamingCache, MixedCache


def empty_cache(config: ModelConfig, batch_size: int, sizes: BoundedSizes, *, by_layer: bool = False) -> BoundedCache:
    """An empty bounded cache for `batch_size` rows; `by_layer`: with an array for each layer.

    Of several sizes it has them in any case, and serves a `Layerwise` alone.
    """
    if isinstance(sizes, StreamSizes):
        return StreamingCache.create(config, batch_size, sizes, by_layer=by_layer)

    def part(i: int) -> StreamingCache:
        layers = dataclasses.replace(config, num_layers=len(sizes.layers(i)), full_layers=(), no_rope_layers=())
        return StreamingCache.create(layers, batch_size, sizes.parts[i], by_layer=True)

    return MixedCache(tuple(part(i) for i in range(len(sizes.parts))), sizes)
