"""Streams over a bounded cache: against the method's lists, across turns, to disk and back, and for a long time."""

import dataclasses
import gc
import inspect
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax import Generator, stream
from sepjax.config import AttentionConfig, ConfigError, MeshConfig
from sepjax.files import ForeignFolder, WriteError
from sepjax.generation.device_loop import COUNT_WRAP
from sepjax.generation.prompts import PromptError
from sepjax.generation.row import RepetitionGuard
from sepjax.generation.saved import StreamStateError
from sepjax.hub.safetensors_file import Planned, write_safetensors
from sepjax.measure import counted_compilations
from sepjax.model.transformer import merge, split
from sepjax.separators import configured_table
from sepjax.sharding import make_mesh, parameter_shardings
from tests.generation.cache.common import ListStream
from tests.generation.cache.test_bounded_pass import list_step
from tests.generation.tiny import ATTENTION, SHAPE, tiny_model, tiny_tokenizer
from tests.generation.tiny import LONG as PROMPT

WATCHED = AttentionConfig(pattern="watched", num_sinks=2, max_separators=5, window_size=8, cache_size=20, watch_after=2)
HOT = {"temperature": 1.5, "seed": 3, "stop_at_eos": False}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ids_of(events):
    return [i for event in events for i in event.token_ids]


def take(events, count):
    return list(itertools.islice(events, count))


def best_by_lists(model, tokenizer, ids):
    """The best token after each of `ids`, and the entries held then, by METHOD section 4 as it is written."""
    graph, params = split(model)
    table = configured_table(tokenizer, ATTENTION)
    row = ListStream(2, 3, 6, 20)
    store, best, held = np.zeros((len(ids), 2, 2, 2, 8), np.float32), [], []
    for i, token in enumerate(ids):
        seen = row.attended()
        positions = np.full(21, -1, np.int32)
        positions[: len(seen)] = list(seen.values())
        positions[-1] = len(seen)
        k, v = (jnp.moveaxis(store[np.resize([*seen, 0], 20), x], 0, 1) for x in (0, 1))
        logits, new_k, new_v = list_step(graph, params, jnp.int32(token), k, v, positions, jnp.int32(len(seen)))
        store[i, 0], store[i, 1] = new_k, new_v
        row.append(bool(table[token]))
        best.append(int(jnp.argmax(logits[: len(table)])))
        held.append(len(row.entries))
    return best, held


def test_prompts_and_text_are_what_lists_give(model, tokenizer):
    """A prompt longer than the cache, and text past many compactions."""
    events = take(stream(model, tokenizer, PROMPT, stop_at_eos=False), 60)
    prompt, drawn = tokenizer.encode(PROMPT, bos=True), ids_of(events)
    assert len(prompt) > ATTENTION.cache_size
    best, held = best_by_lists(model, tokenizer, [*prompt, *drawn])
    assert drawn == best[len(prompt) - 1 : -1]
    assert [event.cache.held for event in events] == held[len(prompt) - 1 : -1]
    assert [event.cache.seen for event in events] == list(range(len(prompt), len(prompt) + 60))
    assert "".join(event.text for event in events) == tokenizer.decode(drawn, continues=True)


def test_turns_continue_the_cache(model, tokenizer):
    """Two turns are one text: what was drawn in the first, the last token included, is seen by the second."""
    events = stream(model, tokenizer, "The cat", max_new_tokens=15, stop_at_eos=False, bounded=True)
    first = ids_of(events)
    assert (len(first), events.finish_reason) == (15, "length")
    assert list(events) == []
    events.feed("mat, and.")
    second = take(events, 9)
    whole = [*tokenizer.encode("The cat", bos=True), *first, *tokenizer.encode("mat, and.")]
    best, _ = best_by_lists(model, tokenizer, [*whole, *ids_of(second)])
    assert ids_of(second) == best[len(whole) - 1 : -1]
    assert second[0].cache.seen == len(whole)
    assert events.cache.seen == len(whole) + 8


GROWING = {"bounded": False, "max_new_tokens": 1000, "attention": dataclasses.replace(ATTENTION, cache_dtype="int8")}


@pytest.mark.parametrize(
    ("at", "other"),
    [(0, {}), (17, {}), *(pytest.param(17, x, marks=pytest.mark.soak) for x in (GROWING, {"attention": WATCHED}))],
)
def test_a_saved_stream_goes_on_as_if_nothing_had_happened(model, tokenizer, tmp_path, at, other):
    settings = HOT | {"stop": "zzz", "max_repeats": 50} | other
    expected = take(stream(model, tokenizer, "é The cat", **settings), 60)
    events = stream(model, tokenizer, "é The cat", **settings)
    before = take(events, at)
    events.save(tmp_path / "saved")
    take(events, 5)
    resumed = stream(model, tokenizer, resume=tmp_path / "saved", **settings | {"seed": 99})
    assert [*before, *take(resumed, 60 - at)] == expected  # text, tokens, slots, bytes
    events.save(tmp_path / "saved")  # over the old one
    assert take(stream(model, tokenizer, resume=tmp_path / "saved", **settings), 1) == [expected[at + 5]]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_stream_of_other_settings_is_not_resumed(model, tokenizer, tmp_path):
    events = stream(model, tokenizer, "The cat")
    next(events)
    events.save(tmp_path / "saved")
    other = dataclasses.replace(ATTENTION, window_size=7)
    with pytest.raises(StreamStateError, match=r"sizes\.window_size=6, expected 7"):
        stream(model, tokenizer, resume=tmp_path / "saved", attention=other)
    other = dataclasses.replace(ATTENTION, pattern="fixed_interval")  # of the same sizes
    with pytest.raises(StreamStateError, match=r"sizes\.pattern='separator', expected 'fixed_interval'"):
        stream(model, tokenizer, resume=tmp_path / "saved", attention=other)
    other = dataclasses.replace(ATTENTION, separators="paper")
    with pytest.raises(StreamStateError, match=r"sizes\.separators='punctuation', expected 'paper'"):
        stream(model, tokenizer, resume=tmp_path / "saved", attention=other)
    with pytest.raises(FileNotFoundError, match=r"nothing' has no saved stream: there is no stream\.json in it"):
        stream(model, tokenizer, resume=tmp_path / "nothing")
    narrow = dataclasses.replace(ATTENTION, cache_dtype="int8")
    with pytest.raises(StreamStateError, match=r"sizes\.cache_dtype='model', expected 'int8'"):
        stream(model, tokenizer, resume=tmp_path / "saved", attention=narrow)
    for settings in ({"bounded": True}, {"bounded": False, "max_new_tokens": 3}):
        other, row = (
            stream(model, tokenizer, **settings),
            stream(model, tokenizer, attention=narrow, **settings).saved(),
        )
        with pytest.raises(StreamStateError, match="has a cache of cache_dtype='int8', expected 'model'"):
            other.resume(row)
    stream(model, tokenizer, attention=narrow).save(tmp_path / "narrow")
    file = tmp_path / "narrow" / "stream.json"
    words = json.loads(file.read_text())
    del words["sizes"]["turned_by_slot"]  # older versions had codes of keys that were not rotated
    file.write_text(json.dumps(words))
    with pytest.raises(StreamStateError, match=r"sizes\.turned_by_slot=False, expected True"):
        stream(model, tokenizer, resume=tmp_path / "narrow", attention=narrow)
    file = tmp_path / "saved" / "stream.json"
    words = json.loads(file.read_text())
    for settings in (words["sizes"]["cache_dtype"], words["sizes"]["separator_ids"], words["model"]["rope"]["factor"]):
        assert settings in ("model", [], 1.0)
    del words["sizes"]["cache_dtype"], words["sizes"]["separator_ids"]  # older versions had not all that there is
    del words["model"]["rope"]["factor"], words["model"]["sliding_rope"], words["model"]["final_softcap"]
    file.write_text(json.dumps(words))
    expected = take(events, 3)
    assert take(stream(model, tokenizer, resume=tmp_path / "saved"), 3) == expected
    with pytest.raises(StreamStateError, match=r"sizes\.cache_dtype='model', expected 'int8'"):
        stream(model, tokenizer, resume=tmp_path / "saved", attention=narrow)
    del words["model"]["num_layers"]  # which is not at its default
    file.write_text(json.dumps(words))
    with pytest.raises(StreamStateError, match=rf"model\.num_layers=4, expected {model.config.num_layers}"):
        stream(model, tokenizer, resume=tmp_path / "saved")


def test_a_save_replaces_a_stream_and_nothing_else(model, tokenizer, tmp_path):
    events = stream(model, tokenizer, "The cat", **HOT)
    first = take(events, 3)
    for foreign in ("stream.json", "thesis.tex"):
        folder = tmp_path / foreign.replace(".", "_")
        folder.mkdir()
        (folder / foreign).write_text("{}")
        with pytest.raises(ForeignFolder, match=f"holds {foreign}, which is not a saved stream"):
            events.save(folder)
        assert (folder / foreign).read_text() == "{}"
    with pytest.raises(WriteError, match="cannot write '/proc/x/y'"):
        events.save("/proc/x/y")
    # A kill between the two renames of a second save: the stream is beside its place.
    events.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / ".saved.old")
    (tmp_path / ".saved.partial").mkdir()
    (tmp_path / ".saved.partial" / "state.safetensors").write_text("half")
    expected = take(events, 4)
    resumed = stream(model, tokenizer, resume=tmp_path / "saved", **HOT)
    assert take(resumed, 4) == expected
    resumed.save(tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"stream_json", "thesis_tex", "saved"}
    assert ids_of(first)


@pytest.mark.parametrize("damage", ["bit", "short", "missing", "other"])
def test_damaged_arrays_of_a_stream_are_named(model, tokenizer, tmp_path, damage):
    events = stream(model, tokenizer, "The cat")
    next(events)
    events.save(tmp_path / "saved")
    path = tmp_path / "saved" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    {
        "bit": lambda: path.write_bytes(content),
        "short": lambda: path.write_bytes(content[:-1]),
        "missing": path.unlink,
        "other": lambda: write_safetensors(path, {"0": Planned(np.dtype(np.int32), (1,), lambda: np.zeros(1))}),
    }[damage]()
    with pytest.raises(StreamStateError, match=r"state\.safetensors' .*; use another copy"):
        stream(model, tokenizer, resume=tmp_path / "saved")


@pytest.mark.parametrize("content", [b"\x80{}", b"{}", b"[]", b"[" * 10**5])
def test_a_damaged_description_of_a_stream_is_named(model, tokenizer, tmp_path, content):
    events = stream(model, tokenizer, "The cat")
    next(events)
    events.save(tmp_path / "saved")
    (tmp_path / "saved" / "stream.json").write_bytes(content)
    with pytest.raises(StreamStateError, match=r"stream\.json' is not what a stream saves"):
        stream(model, tokenizer, resume=tmp_path / "saved")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text", {}), ("text.held", 3), ("text.decoder", []), ("text.decoder.bytes", [-1]), ("guard.recent", ["a"]),
        ("guard.matched", None), ("room", [-1, 2]), ("pending", [10**6]), ("seen", True), ("finish_reason", 1),
        ("text.decoder.bytes", [256]), ("guard.matched", [1]), ("room", [1]),
        ("text.passed", "1"),
    ],
)  # fmt: skip
def test_a_damaged_word_of_a_stream_is_named(model, tokenizer, tmp_path, path, value):
    stream(model, tokenizer).save(tmp_path / "saved")
    file = tmp_path / "saved" / "stream.json"
    words = inner = json.loads(file.read_text())
    *names, last = path.split(".")
    for name in names:
        inner = inner[name]
    inner[last] = value
    file.write_text(json.dumps(words))
    with pytest.raises(StreamStateError, match="use another copy"):
        stream(model, tokenizer, resume=tmp_path / "saved")


def placed_on(mesh, model):
    graph, params = split(model)
    return merge(graph, jax.device_put(params, parameter_shardings(params, mesh)))


@pytest.mark.soak  # meshes: sharding/test_generation.py
def test_turns_on_a_mesh_are_answered_alike(model, tokenizer, tmp_path):
    """Each with one token: what reads on a mesh is compiled, what makes step after step not; that is below."""
    settings, said = {"stop_at_eos": False, "bounded": True}, [PROMPT, "mat", "One; two.", "Où est-il?", "The cat"]

    def answers(events, turns):
        for turn in turns:
            events.feed(turn)
            yield from next(events).token_ids

    expected = [*answers(stream(model, tokenizer, **settings), said)]
    mesh = make_mesh(MeshConfig(1, 2, 2, 1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        events = stream(placed_on(mesh, model), tokenizer, **settings)
        assert [*answers(events, said[:4])] == expected[:4]
        events.save(tmp_path / "saved")
    resumed = stream(model, tokenizer, resume=tmp_path / "saved", **settings)
    assert [*answers(resumed, said[4:])] == expected[4:]
    assert len({*expected}) > 2


@pytest.mark.soak  # twice the programs of the test above
def test_a_stream_on_a_mesh_says_the_same(model, tokenizer, tmp_path):
    """Weights over `fsdp` and `tensor`, the cache's key heads over `tensor`; saved there, it goes on on one device."""
    settings = {"stop_at_eos": False, "bounded": True}
    expected = ids_of(take(stream(model, tokenizer, "The cat", **settings), 40))
    mesh = make_mesh(MeshConfig(1, 2, 2, 1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        events = stream(placed_on(mesh, model), tokenizer, "The cat", **settings)
        assert ids_of(take(events, 2)) == expected[:2]
        with counted_compilations() as compiled:
            assert ids_of(take(events, 28)) == expected[2:30]
        assert compiled == [], "what a program gives lies as what it was given"
        keys = events._state.cache.k[0]
        assert keys.sharding.shard_shape(keys.shape)[1] == SHAPE.num_kv_heads // 2
        events.save(tmp_path / "saved")
    resumed = stream(model, tokenizer, resume=tmp_path / "saved", **settings)
    assert ids_of(take(resumed, 10)) == expected[30:]


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_nothing_is_compiled_and_nothing_grows_after_the_first_tokens(model, tokenizer):
    events = stream(model, tokenizer, PROMPT, **HOT)
    take(events, 50)
    events._settle()
    before = live_bytes()
    with counted_compilations() as compiled:
        for _ in range(4):
            take(events, 50)
            events._settle()
            assert live_bytes() == before
        events.feed(PROMPT)
        take(events, 3)
        events._settle()
    assert compiled == []
    assert live_bytes() == before


def test_draws_go_on_when_their_counter_starts_again(model, tokenizer):
    events = stream(model, tokenizer, "The cat", **HOT)
    next(events)
    events._state = dataclasses.replace(events._state, count=events._state.count + COUNT_WRAP - 3)
    key = np.array(jax.random.key_data(events._state.key))
    drawn = take(events, 10)
    events._settle()
    assert len(drawn) == 10
    assert 0 <= int(events._state.count[0]) < 10
    assert (jax.random.key_data(events._state.key) != key).any()


def test_absolute_positions_end_with_a_word_before_they_overflow(model, tokenizer):
    attention = dataclasses.replace(ATTENTION, stream_positions="absolute")
    events = stream(model, tokenizer, attention=attention, stop_at_eos=False)
    events._has_drawn, events._row.seen = True, 2**31 - 1  # as after so many tokens, the last of which was drawn
    for goes_on in (lambda: next(events), lambda: events.feed([5])):
        with pytest.raises(ConfigError, match=r'use "slot" for streams without end'):
            goes_on()
    events._row.seen -= 1
    assert events._reader.check(events._row.seen, [[5]], None) is None


def test_a_cache_that_keeps_every_separator_says_when_it_is_full(model, tokenizer):
    attention = dataclasses.replace(ATTENTION, keep_all_separators=True)
    events = stream(model, tokenizer, "a" * 5 + "." * 12, attention=attention, stop_at_eos=False)

    def many_turns():
        for _ in range(500):
            next(events)
            events.feed(tokenizer.encode(". , ; "))

    with pytest.raises(ConfigError, match=r"no room for another separator.*cache_size=20 holds 12"):
        many_turns()


def test_repetition_is_noticed_and_rows_of_dashes_are_not():
    def first(tokens, most):
        guard = RepetitionGuard(most)
        return next((i for i, token in enumerate(tokens) if guard.feed(token)), None)

    random = np.random.default_rng(0).integers(0, 50, 400).tolist()
    guard, other = RepetitionGuard(3), RepetitionGuard(3)
    for i in range(40):
        guard.feed(i)
        other.feed(99)
    other.restore(guard.state())
    assert other.state() == guard.state()
    assert first(random, 3) is None
    assert first([1, 2, 3] * 100, 0) is None
    assert first([7] * 30, 2) is None  # fewer than LEAST repeated
    assert first([*random, *[1, 2, 3] * 100], 20) == 400 + 3 * 21 - 1
    assert first([*random, *list(range(100, 164)) * 9], 4) == 400 + 64 * 5 - 1
    assert first([*random, *list(range(100, 165)) * 9], 4) is None  # longer than LONGEST


def test_repetition_ends_a_turn_and_the_next_begins_afresh(model, tokenizer):
    events = stream(model, tokenizer, "The cat", stop_at_eos=False, max_repeats=3)  # greedy: ends in a circle
    drawn = take(events, 3000)
    assert drawn[-1].finish_reason == events.finish_reason == "repetition"
    events.feed("mat")
    assert next(events).finish_reason is None


def test_mistakes_are_named_at_once(model, tokenizer):
    with pytest.raises(ConfigError, match=r"cache_size=2000000000 asks for a cache of .* GiB of memory"):
        stream(model, tokenizer, "a", attention=dataclasses.replace(ATTENTION, cache_size=2 * 10**9))
    with pytest.raises(ConfigError, match=r"attention.cache_size=999999999999 is out of range"):
        stream(model, tokenizer, "a", attention=dataclasses.replace(ATTENTION, cache_size=999999999999))
    with pytest.raises(ConfigError, match="max_repeats=-1"):
        stream(model, tokenizer, "a", max_repeats=-1)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        stream(model, tokenizer, "a", max_new_tokens=0, bounded=True)
    with pytest.raises(PromptError, match="no tokens"):
        stream(model, tokenizer, [])
    assert list(stream(model, tokenizer)) == []
    assert stream(model, tokenizer, "a").cache.kv_kept == 1
    dense = AttentionConfig(pattern="dense")
    with pytest.raises(ConfigError, match=r"asks for a cache of [\d,]+ entries"):
        stream(model, tokenizer, "a", max_new_tokens=2**30, attention=dense)  # from this call, before any event
    with pytest.raises(ConfigError, match="generate needs max_new_tokens"):
        inspect.unwrap(Generator.generate)(Generator(model, tokenizer), "a", max_new_tokens=None)  # pyright: ignore


def test_texts_of_hardly_any_separators_are_named(model, tokenizer, capsys):
    letters = tokenizer.encode("a" * 300)
    assert len(letters) >= 200
    stream(model, tokenizer, letters)
    stream(model, tokenizer, letters, max_new_tokens=1)
    stream(model, tokenizer, letters, max_new_tokens=1, attention=AttentionConfig(pattern="sink_window"))
    stream(model, tokenizer, PROMPT * 20)
    named = [line.partition(": 0.00%")[0] for line in capsys.readouterr().err.splitlines()]
    assert named == ["warning: the text fed"]


@pytest.mark.soak
def test_ten_million_tokens(model, tokenizer):
    """Prompts of 100,000 tokens, a hundred times: live bytes do not grow, and the last are answered as by a new stream.

    What came before is forgotten but for sinks and separators; after a text without separators nothing else is left.
    """
    random = np.random.default_rng(0)
    plain = [i for i, text in enumerate(tokenizer.token_texts()) if text and text.isalpha()]
    attention = dataclasses.replace(ATTENTION, pattern="sink_window", window_size=18)
    events = stream(model, tokenizer, [1, 5], attention=attention, stop_at_eos=False)
    sizes = []
    for _ in range(100):
        text = random.choice(plain, 100_000).tolist()
        events.feed(text)
        drawn = take(events, 20)
        sizes.append(live_bytes())
    assert events.cache.seen > 10_000_000
    assert len(set(sizes[1:])) == 1
    fresh = stream(model, tokenizer, [1, 5, *text[-5000:]], attention=attention, stop_at_eos=False)
    assert ids_of(take(fresh, 20)) == ids_of(drawn)
