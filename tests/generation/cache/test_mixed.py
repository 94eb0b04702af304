"""Layers that hold different numbers of entries, against a plain list for every layer: token by token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax import Generator, Sampling, SlotRequest
from sepjax.config import EVERYTHING, AttentionConfig, ConfigError, validate_attention
from sepjax.generation.cache.ahead import after_compaction
from sepjax.generation.cache.mixed import MixedCache, bounded_sizes, empty_cache
from sepjax.generation.cache.protocol import Cache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.cache.view import of_row
from sepjax.generation.readers import BoundedReader
from sepjax.generation.saved import StreamStateError
from sepjax.generation.saved_row import SavedRow
from sepjax.generation.slots import Slots
from sepjax.measure import counted_compilations
from sepjax.model.unrolled import by_layer, runner
from tests.generation.cache.common import ListStream
from tests.generation.cache.test_bounded_pass import LLAMA, T, V, model_of
from tests.generation.cache.test_gated import GatedLists
from tests.generation.cache.test_gated import list_step as gated_step
from tests.generation.cache.test_watched import WATCHED, WatchedLists, list_step
from tests.generation.tiny import LONG, tiny_model, tiny_tokenizer, uncounted

DEEP = dataclasses.replace(LLAMA, num_layers=4)
# A window of 9 alone in the first layer, one of 3 in the last; those between keep what they watch, or a gate chose.
SIZES = {"layer_windows": (9, 6, 6, 3), "kept_layers": (1, 2)}
CASES = {
    "watched": dataclasses.replace(WATCHED, **SIZES),
    "watched in one layer of two": dataclasses.replace(WATCHED, **SIZES, watch_layers=(2,)),
    "a gate": AttentionConfig(
        "gated", num_sinks=2, max_separators=4, window_size=6, cache_size=16, gate_layer=1, gate_stretch=5,
        gate_keep=2, watch_half_life=256, **SIZES,
    ),
    "separators, in all layers": AttentionConfig(
        num_sinks=2, max_separators=3, window_size=4, cache_size=14, layer_windows=(4, 7, 4, 7)
    ),
}  # fmt: skip


class Layers:
    """What every layer of one row holds."""

    def __init__(self, attention):
        self.attention, self.sees = attention, [i in (attention.kept_layers or range(4)) for i in range(4)]
        kept = [i for i, sees in enumerate(self.sees) if sees]
        alone = dataclasses.replace(attention, layer_windows=(), kept_layers=())
        self.lists, self.watched = {}, None
        for i, (window, sees) in enumerate(zip(attention.layer_windows, self.sees, strict=True)):
            a, s, size = 2, attention.max_separators, attention.cache_size + window - attention.window_size
            self.lists[i] = ListStream(a, s, window, size) if sees else ListStream(a, 0, window, a + window)
        if attention.pattern == "watched":
            watching = tuple(kept.index(i) for i in attention.watch_layers or kept)
            config = dataclasses.replace(DEEP, num_layers=len(kept))
            self.shared = WatchedLists(config, dataclasses.replace(alone, watch_layers=watching))
        elif attention.pattern == "gated":
            self.shared = GatedLists(alone)
        self.kept = kept if attention.pattern in ("watched", "gated") else []

    def entries(self, layer, head):
        if layer not in self.kept:
            return [token for token, _ in self.lists[layer].entries]
        if self.attention.pattern == "gated":
            return list(self.shared.attended())
        return self.shared.entries((self.kept.index(layer), head))

    def append(self, flags, looks, score):
        if self.attention.pattern == "watched":
            self.shared.look(looks[self.kept])
            self.shared.append(flags)
        elif self.kept:
            self.shared.append(score)
        for i, stream in self.lists.items():
            if i not in self.kept:
                stream.append(bool(flags[stream.seen]))

    def held(self):
        return sum(len(self.entries(layer, 0)) for layer in range(4)) // 4


def list_logits(attention, tokens, flags):
    """The scores after every token of one row, [T, V], and what its layers hold in the end."""
    graph, params = model_of(DEEP, attention if attention.pattern == "gated" else None)
    row, K = Layers(attention), DEEP.num_kv_heads
    store = np.zeros((2, 4, K, len(tokens), DEEP.head_dim), np.float32)
    out = []
    for i, token in enumerate(tokens):
        numbers, positions = np.zeros((4, K, 24), int), np.full((4, K, 24), -1, np.int32)
        for layer, head in np.ndindex(4, K):
            entries = row.entries(layer, head)
            numbers[layer, head, : len(entries)] = entries
            positions[layer, head, : len(entries)] = range(len(entries))
        own = jnp.array([len(row.entries(layer, 0)) for layer in range(4)], jnp.int32)
        k, v = (np.take_along_axis(x, numbers[..., None], axis=2) for x in store)
        score, looks, token = 0.0, None, jnp.int32(token)
        if attention.pattern == "gated":  # all heads hold the same
            k, v = (np.swapaxes(x, 1, 2) for x in (k, v))
            logits, k, v, score = gated_step(graph, params, token, k, v, positions[:, 0], own, attention.gate_layer)
        else:
            logits, k, v, looks = list_step(graph, params, token, k, v, positions, own)
        store[:, :, :, i] = k, v
        row.append(flags, None if looks is None else np.asarray(looks), float(score))
        out.append(np.asarray(logits))
    return np.stack(out), row


@functools.partial(jax.jit, static_argnums=(0, 5, 7))
def one_pass(graph, params, cache, tokens, counts, attention, table, scan):
    model = runner(graph, params, scan=scan)
    hidden, cache = cache.take_up(model, tokens, counts, table, attention)
    return model.logits(hidden), cache.compact(), after_compaction(cache)


# A program of seconds for each case and length. With -m soak: watched tokens where every layer that keeps looks, as
# below and in test_watched.py, and separators, of which test_bounded.py has every size.
# A gate's cache of one size is in test_gated.py.
RUNS = {"watched in one layer of two": ((5, True),), "a gate": ((1, False),)}
OFTEN = "watched in one layer of two"


@pytest.mark.parametrize("case", [x if x == OFTEN else pytest.param(x, marks=pytest.mark.soak) for x in CASES])
def test_runs_give_what_lists_give_token_by_token(case):
    attention, random = validate_attention(CASES[case], 4), np.random.default_rng(31)
    lengths = np.array([T, 47])
    tokens = random.integers(0, V, (2, T), dtype=np.int32)
    table = random.random(V) < 0.25
    expected = [list_logits(attention, tokens[b, :n], table[tokens[b]]) for b, n in enumerate(lengths)]
    graph, params = model_of(DEEP, attention if attention.pattern == "gated" else None)
    params = by_layer(params, DEEP)
    for run, scan in RUNS.get(case, ((1, False), (5, True))):
        cache, at = empty_cache(DEEP, 2, bounded_sizes(DEEP, attention)), np.zeros(2, int)
        assert isinstance(cache, Cache)
        out = np.zeros((2, T, V), np.float32)
        while (at < lengths).any():
            counts = np.minimum(np.asarray(cache.room(run)), lengths - at).astype(np.int32)
            part = np.stack([np.resize(np.append(tokens[b, at[b] :][:run], [V - 1] * run), run) for b in range(2)])
            logits, cache, (held, stuck, _) = one_pass(
                graph, params, cache, part.astype(np.int32), counts, attention, jnp.asarray(table), scan
            )
            np.testing.assert_array_equal(held, cache.held())
            assert not stuck.any()
            for b in range(2):
                out[b, at[b] :][: counts[b]] = logits[b, : counts[b]]
            at += counts
        for b, (rows, layers) in enumerate(expected):
            roundings = ((5 * 4 + 1) * DEEP.mlp_dim) ** 0.5  # as in test_bounded_pass.py
            bound = (roundings + 2 * T) * np.finfo(np.float32).eps * np.abs(rows).max()
            assert np.abs(out[b, : len(rows)] - rows).max() <= bound
            assert int(cache.held()[b]) == layers.held()
            seen = int(lengths[b])
            main = cache.sizes.layers(0)[0]
            union = {token for head in range(2) for token in layers.entries(main, head)}
            assert of_row(cache, seen, 0, b).positions(0).tolist() == sorted(union)


def test_layers_hold_what_their_windows_ask_for():
    sizes = bounded_sizes(DEEP, CASES["watched"])
    assert sizes.part_of == (2, 0, 0, 1)
    assert [(x.max_separators, x.window_size, x.cache_size) for x in sizes.parts] == [(4, 6, 16), (0, 3, 5), (0, 9, 11)]
    assert sizes.sees_kept == (False, True, True, False)
    long = dataclasses.replace(CASES["watched"], layer_windows=(190, 6, 6, 190))
    cache = jax.eval_shape(lambda: empty_cache(DEEP, 3, bounded_sizes(DEEP, long)))
    assert [part.k[0].shape for part in cache.parts] == [(3, 2, 64, 8), (3, 2, 256, 8)]
    assert isinstance(cache, MixedCache)
    assert cache.sizes.slots == (2 * 64 + 2 * 256) // 4
    assert (cache.sizes.cache_size, cache.sizes.largest) == ((2 * 192 + 2 * 16) // 4, 192)
    windows = AttentionConfig("sink_window", num_sinks=2, window_size=6, cache_size=16, layer_windows=(6, 9, 6, 9))
    assert [(x.window_size, x.cache_size) for x in bounded_sizes(DEEP, windows).parts] == [(6, 16), (9, 19)]
    ends = AttentionConfig(
        num_sinks=2,
        max_separators=0,
        window_size=6,
        cache_size=16,
        layer_windows=(6, 9, 6, 9),
        keep_all_separators=True,
    )
    assert [(x.max_separators, x.cache_size) for x in bounded_sizes(DEEP, ends).parts] == [(8, 16), (8, 19)]
    equal = dataclasses.replace(CASES["watched"], layer_windows=(6, 6, 6, 6))
    assert [(x.max_separators, x.window_size, x.cache_size) for x in bounded_sizes(DEEP, equal).parts] == [
        (4, 6, 16),
        (0, 6, 8),
    ]
    gate = dataclasses.replace(CASES["a gate"], layer_windows=(6, 6, 6, 6), kept_layers=(2,))
    assert [x.max_separators > 0 for x in bounded_sizes(DEEP, gate).parts] == [True, False]  # as for watched tokens
    for changes in ({"layer_windows": ()}, {"layer_windows": (6, 6, 6, 6)}):
        assert isinstance(bounded_sizes(DEEP, dataclasses.replace(equal, kept_layers=(), **changes)), StreamSizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_windows": ()}, "needs layer_windows"),
        ({"layer_windows": (9, 6, 6, EVERYTHING)}, "keeps every token"),
        ({"pattern": "dense", "kept_layers": ()}, "keeps every token"),
        (
            {"pattern": "gated", "max_separators": 0, "gate_stretch": 5, "gate_layer": 1},
            "no room for what a gate keeps",
        ),
        ({"kept_set": "model", "kept_layers": (), "layer_windows": (9, 6, 6, 4)}, "keeps one set for all layers"),
        ({"watch_layers": (0,)}, "is none of kept_layers"),
        ({"watch_after": 6}, "below the window of layers that keep, 6"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    attention = dataclasses.replace(CASES["watched"], **changes)
    with pytest.raises(ConfigError, match=message):
        bounded_sizes(DEEP, validate_attention(attention, 4))


def events_of(slots, number):
    found = []
    while number in slots._known:
        found += [event for n, event in slots.step() if n == number]
    return found


@pytest.mark.soak  # nine programs of 30 s; rows of any cache are packed in test_packed.py, and slots are test_slots.py
def test_rows_of_slots_give_what_streams_give_and_go_on_where_they_were_saved(tmp_path):
    """Three tokens in a launch, two prompts in a program; saved in the middle, from and to a folder and a stream.

    With codes and scales, which is as many kinds of arrays as a row can have. Two layers, of two sizes: it is nine
    programs, in which layers are written out one by one.
    """
    attention = dataclasses.replace(
        CASES["watched"], watch_after=3, cache_dtype="int8", layer_windows=(9, 6), kept_layers=(1,)
    )
    engine = Generator(tiny_model(attention=attention), tiny_tokenizer())
    settings: dict[str, Any] = {"stop_at_eos": False, "sampling": Sampling.create(1.3, frequency_penalty=1.0)}
    prompts = [LONG, "The cat", LONG[9:]]
    streams = [engine.stream(x, bounded=True, seed=i, max_new_tokens=24, **settings) for i, x in enumerate(prompts)]
    expected = [list(stream) for stream in streams]
    slots = Slots(engine.prepared, BoundedReader(engine.prepared), 2, steps=3, together=2)
    wanted = {
        slots.submit(SlotRequest(x, seed=i, max_new_tokens=24, keep=True, **settings)): i for i, x in enumerate(prompts)
    }
    found: list[list] = [[] for _ in prompts]
    with counted_compilations() as compiled:
        while not slots.is_idle:
            for number, event in slots.step():
                found[wanted[number]].append(event)
    assert [uncounted(events) for events in found] == expected
    assert compiled == []
    shape, sizes = engine.prepared.config, bounded_sizes(engine.prepared.config, attention)
    assert slots.cache_bytes == empty_cache(shape, 2, sizes).nbytes == 2 * expected[0][0].cache.bytes
    assert {x.dtype.name for x in slots._device.rows.state.cache.entries} == {"int8", "bfloat16"}
    kept = {number: slots.save(number) for number in wanted}
    for number, i in wanted.items():  # what events count is what the row holds, averaged over its layers
        use, views = found[i][-1].cache, kept[number].views()
        layers = [len(sizes.layers(j)) for j in range(len(views))]
        counts = [sum(n * x for n, x in zip(layers, numbers, strict=True)) // shape.num_layers
                  for numbers in ([view.held for view in views], [view.kept for view in views])]  # fmt: skip
        assert [use.held, use.kept] == counts
        assert use.kept
        assert views[0].sinks == min(use.seen, sizes.num_sinks)
    ended = kept[min(wanted)]
    stream = engine.stream(bounded=True, max_new_tokens=24, **settings)
    stream.resume(ended)
    for text in (stream, streams[0]):
        text.feed("mat, and.")
    later = list(streams[0])
    assert list(stream) == later
    assert (
        uncounted(events_of(slots, slots.submit(SlotRequest("mat, and.", resume=ended, max_new_tokens=24, **settings))))
        == later
    )

    for singly in (True, False):  # a step that is taken back; a whole launch that comes first
        other = slots.submit(SlotRequest("The cat", stop_at_eos=False))
        number, events = slots.submit(SlotRequest(LONG, max_new_tokens=24, **settings)), []
        while len(events) < 8:
            can_save = singly and slots.can_save(number)  # the next launch makes one token
            new = [event for n, event in slots.step() if n == number]
            assert len(new) <= (1 if can_save else 3 + 1), "what it could be saved before was one token at most"
            events += new
        assert slots.can_save(number) is singly
        saved = slots.save(number)
        events += [event for n, event in slots._settled if n == number]
        slots.cancel(number)
        slots.cancel(other)
        assert len(events) < 24
        saved.write(tmp_path / f"row{singly}", BoundedReader(engine.prepared), engine.prepared.config)
        read = SavedRow.read(tmp_path / f"row{singly}", BoundedReader(engine.prepared), engine.prepared.config)
        for row in (saved, saved.on_host(), read):
            request = SlotRequest(None, resume=row, max_new_tokens=24 - len(events), **settings)
            assert uncounted(events + events_of(slots, slots.submit(request))) == expected[0]

    stream = engine.stream(LONG, bounded=True, max_new_tokens=24, **settings)
    events = [next(stream) for _ in range(9)]
    stream.save(tmp_path / "stream")
    resumed = engine.stream(bounded=True, resume=tmp_path / "stream", max_new_tokens=15, **settings)
    assert events + list(resumed) == expected[0]
    alike = dataclasses.replace(attention, layer_windows=(), kept_layers=())
    plain = BoundedReader(Generator(tiny_model(), engine.tokenizer, alike).prepared)
    with pytest.raises(StreamStateError, match="layers of several sizes, expected layers of one size"):
        ended.check(plain)
