"""How input gets into a cache: prompts whole into a growing one, runs of tokens into either.

Which cache a text has is decided once, by the reader; everything else asks only for what `Cache` has.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Int32
from sepjax.config import AttentionConfig, ConfigError, layer_windows
from sepjax.config.versions import completed
from sepjax.generation.cache.growing import SeparatorCache
from sepjax.generation.cache.mixed import BOUNDED, BoundedCache, bounded_sizes, empty_cache
from sepjax.generation.cache.sizes import bucket
from sepjax.generation.device_loop import DecodeState, Request, Steps, begin, make_consume, mark_read, shapes_of, start
from sepjax.generation.limits import check_cache
from sepjax.generation.packed import Form
from sepjax.generation.prepared import Prepared
from sepjax.generation.prompts import cache_sizes, check_length, count_global, pad_prompts
from sepjax.sharding import shapes_placed_like

_RUN = 256  # tokens of a pass into a growing cache
# What of an attention config a growing cache does not depend on.
_NOT_SEEN = (
    "implementation", "capacity", "document_mask", "cache_size", "max_separators", "stream_positions",
    "keep_all_separators", "watch_layers", "kept_set", "watch_after", "watch_half_life", "separators_first",
)  # fmt: skip
# What decides which tokens a bounded cache keeps, beside its sizes, by the pattern that reads it.
_SEPARATORS = ("separators", "separator_ids")
_KEPT_BY = {"separator": _SEPARATORS, "watched": _SEPARATORS, "fixed_interval": ("interval",)}

# A key, and programs by their names, each with what it is given; and where rows stand when they have run.
type ToCompile = tuple[Hashable, Callable[[], tuple[dict[str, tuple[Any, ...]], DecodeState]]]

# Is told where rows stand, and how many tokens each has just read.
type Noted = Callable[[DecodeState, Int32[np.ndarray, "B"]], None]


@runtime_checkable
class Reader(Protocol):
    """A way into one kind of cache."""

    cache_type: Any  # of cache: a class, or several as isinstance has them
    cache_size: int | None  # the most entries that a row may hold; None: no bound
    ends_with_positions: bool  # texts end with the positions that int32 has

    @property
    def attention(self) -> AttentionConfig:
        """The pattern."""
        ...

    @property
    def form(self) -> Form | None:
        """How rows of its caches are packed; None: they are not."""
        ...

    def empty(self, keys: jax.Array, room: Sequence[int] = ()) -> DecodeState:
        """The state before anything was read, a row a key; `room`: as large as the cache that `room_of` tells of."""
        ...

    def room_of(self, cache: Any) -> list[int]:
        """What else than the settings the sizes of this cache depend on."""
        ...

    def settings(self) -> dict[str, Any]:
        """What decides which entries there are, for whoever goes on with a saved cache: plain JSON."""
        ...

    def completed(self, settings: dict[str, Any]) -> dict[str, Any]:
        """`settings` that an older version saved, with those that it did not have."""
        ...

    def check(self, seen: int, rows: Sequence[Sequence[int]], new: int | None, cache: Any = None) -> None:
        """Raises ConfigError where `read` could not be: no positions or no memory for all that.

        Args:
          seen: tokens that rows have seen.
          rows: what is to be read.
          new: tokens that may follow; None: without end.
          cache: where the rows stand, if `seen`.
        """
        ...

    def widened(self, cache: Any, seen: int, new: int | None) -> Any:
        """The cache, ready for a text of `seen` tokens to get `new` more than were planned when it began."""
        ...

    def with_room(self, state: DecodeState, rows: Sequence[Sequence[int]], seen: int, new: int | None) -> DecodeState:
        """The state that `read` takes: its cache has room for these rows and what may follow."""
        ...

    def to_compile(
        self, state: DecodeState, rows: Sequence[Sequence[int]], request: Request, seen: int, new: int | None
    ) -> ToCompile:
        """What `read` of the same compiles."""
        ...

    def read(
        self, state: DecodeState, rows: Sequence[Sequence[int]], request: Request, seen: int, new: int | None,
        noted: Noted | None = None,
    ) -> tuple[DecodeState, Steps]:  # fmt: skip
        """Reads the next tokens of every row and draws the token after them.

        Args:
          state: from `with_room`; used up.
          rows: token ids, one at least a row.
          request: what is wanted of the rows.
          seen: the most tokens that a row has seen so far; 0: nothing was read.
          new: tokens that may follow; None: without end.
          noted: called after each part of what is read but the last, from where `read` may go on: an exception that it
            raises loses nothing.
        """
        ...


class _OfOne:
    """What ways into both kinds of cache have."""

    def __init__(self, prepared: Prepared):
        self._of = prepared

    @property
    def attention(self) -> AttentionConfig:
        """See `Reader`."""
        return self._of.attention


class GrowingReader(_OfOne):
    """Prompts are prefilled, with the layout and attention of training; what comes later is read in runs."""

    cache_type = SeparatorCache
    cache_size: int | None = None
    ends_with_positions = True
    form: Form | None = None

    def empty(self, keys: jax.Array, room: Sequence[int] = ()) -> DecodeState:
        """See `Reader`."""
        window_size, capacity = room or (64, 0)
        stretch, keep = 0, 0
        if self._of.attention.pattern == "gated":
            stretch, keep = self._of.attention.gate_stretch, self._of.attention.gate_keep
        cache = SeparatorCache.create(
            self._of.config, len(keys), window_size=window_size, capacity=capacity, stretch=stretch, keep=keep,
            cache_dtype=self._of.attention.cache_dtype,
        )  # fmt: skip
        return self._of.placed(DecodeState.create(cache, keys, len(self._of.table)))

    def room_of(self, cache: SeparatorCache) -> list[int]:
        """See `Reader`."""
        return [cache.window_size, cache.capacity]

    def settings(self) -> dict[str, Any]:
        """See `Reader`."""
        known = dataclasses.asdict(self._of.attention)
        return {"cache": "growing"} | {name: x for name, x in known.items() if name not in _NOT_SEEN}

    def completed(self, settings: dict[str, Any]) -> dict[str, Any]:
        """See `Reader`."""
        found = completed(settings, self._of.attention)
        return {name: x for name, x in found.items() if name in settings or name not in _NOT_SEEN}

    def check(self, seen: int, rows: Sequence[Sequence[int]], new: int | None, cache: Any = None) -> None:
        """See `Reader`."""
        of, longest = self._of, seen + max(map(len, rows))
        check_length(of.config, longest, new, of.attention)
        if seen:
            wanted, (leaving, window_size) = "text", self._room(rows, seen, new)
            slots = cache.capacity + leaving + max(window_size, cache.window_size)
        else:
            wanted = "prompt"
            slots = sum(cache_sizes(rows, new, of.table, of.attention, of.config.num_layers).values())
        what = f"{longest} tokens of {wanted} with max_new_tokens={new}"
        check_cache(of.config, len(rows), slots, of.attention.cache_dtype, what)

    def widened(self, cache: SeparatorCache, seen: int, new: int | None) -> SeparatorCache:
        """See `Reader`."""
        _, window_size = self._room([[]], seen, new)
        return cache if window_size <= cache.window_size else cache.reserve(0, window_size)

    def _room(self, rows: Sequence[Sequence[int]], seen: int, new: int | None) -> tuple[int, int]:
        """Global tokens that may leave the window while `rows` are read, and the window of the whole text."""
        of = self._of
        total = bucket(seen + max(map(len, rows)) + (new or 0))
        windows = layer_windows(of.attention, of.config.num_layers, total)
        window_size = max(windows) if new is None else min(max(windows), total)
        if window_size >= total:
            return 0, window_size
        # One more for an interval or a stretch that began before.
        leaving = max(count_global(ids, of.table, of.attention) for ids in rows) + max(1, of.attention.gate_keep)
        return leaving, window_size

    def with_room(self, state: DecodeState, rows: Sequence[Sequence[int]], seen: int, new: int | None) -> DecodeState:
        """See `Reader`. Of an empty one `read` makes a cache that fits."""
        cache: Any = state.cache
        return dataclasses.replace(state, cache=cache.reserve(*self._room(rows, seen, new))) if seen else state

    def to_compile(
        self, state: DecodeState, rows: Sequence[Sequence[int]], request: Request, seen: int, new: int | None
    ) -> ToCompile:
        """See `Reader`."""
        of = self._of
        if seen:
            return _to_read(of, state, rows, request, _RUN)
        sizes = cache_sizes(rows, new, of.table, of.attention, of.config.num_layers)
        inputs = of.params, *pad_prompts(rows), state.key, request
        reading = _Start(of.graph, of.attention, tuple(sizes.items()))

        def programs() -> tuple[dict[str, tuple[Any, ...]], DecodeState]:
            after = start.eval_shape(of.graph, *inputs, of.attention, **sizes)[0]
            return {"prompts": (reading, *inputs)}, shapes_placed_like(of.params, after)

        return (reading, shapes_of(inputs[1:])), programs

    def read(
        self, state: DecodeState, rows: Sequence[Sequence[int]], request: Request, seen: int, new: int | None,
        noted: Noted | None = None,
    ) -> tuple[DecodeState, Steps]:  # fmt: skip
        """See `Reader`."""
        of = self._of
        if not seen:
            sizes = cache_sizes(rows, new, of.table, of.attention, of.config.num_layers)
            tokens, lengths = pad_prompts(rows)
            return start(of.graph, of.params, tokens, lengths, state.key, request, of.attention, **sizes)
        return begin(*_read_runs(of, state, rows, request, _RUN, noted), request)


class BoundedReader(_OfOne):
    """Everything is read in runs, each up to the next compaction: memory does not depend on the length."""

    cache_type = BOUNDED
    cache_size: int | None
    ends_with_positions = False

    def __init__(self, prepared: Prepared):
        """Raises ConfigError where a bounded cache cannot serve the pattern (`bounded_sizes`)."""
        super().__init__(prepared)
        self.sizes = bounded_sizes(prepared.config, prepared.attention)
        self.cache_size = self.sizes.cache_size
        self._form: Form | None = None

    @property
    def form(self) -> Form:
        """See `Reader`."""
        if self._form is None:  # it takes some milliseconds
            self._form = Form(jax.eval_shape(lambda: self.empty(jax.random.split(jax.random.key(0), 1))))
        return self._form

    def empty(self, keys: jax.Array, room: Sequence[int] = ()) -> DecodeState:
        """See `Reader`."""
        of = self._of
        check_cache(of.config, len(keys), self.sizes.slots, self.sizes.cache_dtype, f"cache_size={self.cache_size}")
        cache = empty_cache(self._of.config, len(keys), self.sizes, by_layer=True)
        return self._of.placed(DecodeState.create(cache, keys, len(self._of.table)))

    def room_of(self, cache: BoundedCache) -> list[int]:
        """See `Reader`."""
        return []

    def settings(self) -> dict[str, Any]:
        """See `Reader`."""
        of = self._of.attention
        kept_by = {name: getattr(of, name) for name in _KEPT_BY.get(of.pattern, ())}
        told = {"pattern": of.pattern, "cache_dtype": of.cache_dtype}  # of caches of several sizes beside their parts
        return dataclasses.asdict(self.sizes) | told | kept_by

    def completed(self, settings: dict[str, Any]) -> dict[str, Any]:
        """See `Reader`."""
        others = self.settings().keys() - {field.name for field in dataclasses.fields(self.sizes)}
        absent = {name: x for name, x in completed({}, self._of.attention).items() if name in others}
        return absent | completed(settings, self.sizes)

    def check(self, seen: int, rows: Sequence[Sequence[int]], new: int | None, cache: Any = None) -> None:
        """See `Reader`. Slot numbers have no end; positions in the text are int32."""
        if self.sizes.absolute and seen + max(map(len, rows)) >= 2**31:
            raise ConfigError(
                'attention.stream_positions="absolute" counts tokens of the text up to 2^31, which this stream reaches '
                'now; use "slot" for streams without end'
            )

    def widened(self, cache: BoundedCache, seen: int, new: int | None) -> BoundedCache:
        """See `Reader`."""
        return cache

    def with_room(self, state: DecodeState, rows: Sequence[Sequence[int]], seen: int, new: int | None) -> DecodeState:
        """See `Reader`."""
        return state

    def to_compile(
        self, state: DecodeState, rows: Sequence[Sequence[int]], request: Request, seen: int, new: int | None
    ) -> ToCompile:
        """See `Reader`."""
        return _to_read(self._of, state, rows, request, self.sizes.chunk)

    def read(
        self, state: DecodeState, rows: Sequence[Sequence[int]], request: Request, seen: int, new: int | None,
        noted: Noted | None = None,
    ) -> tuple[DecodeState, Steps]:  # fmt: skip
        """See `Reader`. Raises ConfigError where the cache of `keep_all_separators` is full before all is read."""
        return begin(*_read_runs(self._of, state, rows, request, self.sizes.chunk, noted), request)


@dataclasses.dataclass(frozen=True)
class _Start:
    """`start` for prompts of a model and a pattern, into a cache of these sizes."""

    graph: Any
    attention: AttentionConfig
    sizes: tuple[tuple[str, int], ...]

    def lower(self, params: Any, tokens: Any, lengths: Any, keys: Any, request: Request) -> jax.stages.Lowered:
        given = self.graph, params, tokens, lengths, keys, request, self.attention
        return start.lower(*given, **dict(self.sizes))


def _read_runs(
    of: Prepared, state: DecodeState, rows: Sequence[Sequence[int]], request: Request, most: int, noted: Noted | None
) -> tuple[DecodeState, jax.Array]:
    """The state after the tokens of every row, read up to `most` at a time, and the scores of what follows them."""
    consume = make_consume(of.graph, of.attention)
    cache, uses = state.cache, state.uses
    logits = of.placed(jnp.zeros((len(rows), of.config.vocab_size), jnp.float32))
    at, lengths = np.zeros(len(rows), np.int32), np.array([len(ids) for ids in rows], np.int32)
    longest = int(lengths.max())
    while (left := lengths - at).any():
        tokens = np.zeros((len(rows), _width(len(rows), longest, int(left.max()), most)), np.int32)
        left = np.minimum(left, tokens.shape[1])
        for b, ids in enumerate(rows):
            tokens[b, : left[b]] = ids[at[b] : at[b] + left[b]]
        cache, logits, taken = consume(of.params, cache, logits, tokens, left, request.table)
        uses = mark_read(uses, tokens, taken)
        at += np.asarray(taken)
        if noted is not None and (at < lengths).any():
            noted(dataclasses.replace(state, cache=cache, uses=uses), np.asarray(taken))
        if cache.ends_when_stuck and (np.asarray(cache.is_stuck()) & (at < lengths)).any():
            cache.make_room()
    return dataclasses.replace(state, cache=cache, uses=uses), logits


def _to_read(of: Prepared, state: DecodeState, rows: Sequence[Sequence[int]], request: Request, most: int) -> ToCompile:
    """What `_read_runs` compiles, and `begin`."""
    B, longest = len(rows), max(map(len, rows))
    width = _width(B, longest, longest, most)
    consume = make_consume(of.graph, of.attention)

    def programs() -> tuple[dict[str, tuple[Any, ...]], DecodeState]:
        none, tokens = np.zeros(B, np.int32), np.zeros((B, width), np.int32)
        scores = jax.ShapeDtypeStruct((B, of.config.vocab_size), jnp.float32)
        logits = shapes_placed_like(of.params, scores)
        return {
            "read": (consume, of.params, state.cache, logits, tokens, none, request.table),
            "begin": (begin, state, logits, request),
            "mark": (mark_read, state.uses, tokens, state.token),
        }, state

    return (consume, width, shapes_of((state, request))), programs


def _width(rows: int, longest: int, left: int, most: int) -> int:
    """Tokens of a row in a pass: of all passes that read rows of up to `longest` tokens, `left` of which are left.

    A CPU computes no more than it must. On an accelerator each width is a program to be compiled, which takes far
    longer than what it would save: all passes of a batch have one width, and all turns of a text that goes on.
    """
    if _counts_padding():
        return min(most, bucket(left))
    return most if rows == 1 else min(most, bucket(-(-longest // -(-longest // most))))


def _counts_padding() -> bool:
    return jax.default_backend() == "cpu"
