"""Generators: everything is prepared once a model and held once; caches of both kinds do the same things."""

import dataclasses
import gc
import inspect
import itertools
import sys
import weakref

import jax
import numpy as np
import pytest

import sepjax
from sepjax import Generator, Sampling
from sepjax.config import AttentionConfig, ConfigError
from sepjax.generation import prepared
from sepjax.generation.saved import StreamStateError
from sepjax.model.transformer import merge, split
from tests.generation.tiny import ATTENTION, LONG, SHAPE, tiny_model, tiny_tokenizer

NEW = {"max_new_tokens": 8, "stop_at_eos": False}
OTHER = dataclasses.replace(ATTENTION, window_size=2, num_sinks=0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def layouts(monkeypatch):
    """Grows by one whenever weights are laid out."""
    made, by_layer = [], prepared.by_layer

    def spy(*args):
        made.append(1)
        return by_layer(*args)

    monkeypatch.setattr(prepared, "by_layer", spy)
    return made


def weight_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_weights_are_laid_out_once_a_model_whoever_asks(tokenizer, layouts):
    model = tiny_model()
    first = sepjax.generate(model, tokenizer, "The cat", **NEW)
    held = weight_bytes()
    assert sepjax.generate(model, tokenizer, "The cat", **NEW) == first
    assert weight_bytes() == held
    events = list(sepjax.stream(model, tokenizer, "The cat", **NEW))
    assert tuple(i for event in events for i in event.token_ids) == first[0].token_ids
    sepjax.generate(model, tokenizer, LONG, attention=OTHER, **NEW)
    Generator(model, tokenizer).generate("The cat", **NEW)
    assert layouts == [1]


def test_a_model_with_other_parameters_or_attention_is_another(tokenizer, layouts):
    model = tiny_model()
    before = sepjax.generate(model, tokenizer, "The cat", **NEW)
    assert sepjax.generate(model, tokenizer, LONG, attention=OTHER, **NEW) != sepjax.generate(
        model, tokenizer, LONG, **NEW
    )
    model.embedding.embedding.set_value(model.embedding.embedding[...][::-1])
    after = sepjax.generate(model, tokenizer, "The cat", **NEW)
    assert after != before
    graph, params = split(model)
    assert sepjax.generate(merge(graph, params), tokenizer, "The cat", **NEW) == after
    assert layouts == [1, 1, 1]


def test_one_copy_of_the_weights_remains_when_the_model_goes(tokenizer):
    before = weight_bytes()
    model = tiny_model()
    weights = weight_bytes() - before
    engine = Generator(model, tokenizer)
    gone = weakref.ref(model)
    expected = engine.generate("The cat", **NEW)
    del model
    assert weight_bytes() - before < 1.1 * weights  # and the table of separators, and end tokens
    assert gone() is None
    assert engine.generate("The cat", **NEW) == expected
    del engine
    assert weight_bytes() - before < 0.1 * weights


def test_the_functions_of_the_package_are_functions():
    for function, first in ((sepjax.generate, "model"), (sepjax.stream, "model"), (sepjax.load, "path")):
        assert inspect.isfunction(function)
        assert next(iter(inspect.signature(function).parameters)) == first
        assert len(inspect.getdoc(function) or "") > 500
    # What the one-call functions take beside how to draw and the pattern, a Generator's methods take, too.
    own = {"model", "tokenizer", "sampling_defaults", "attention", *inspect.signature(Sampling.create).parameters}
    for function, method in ((sepjax.generate, Generator.generate), (sepjax.stream, Generator.stream)):
        theirs = inspect.signature(method).parameters.keys() - {"self", "sampling"}
        assert inspect.signature(function).parameters.keys() - own == theirs


def test_a_prompt_reaches_attention_and_its_token_the_caller_through_ten_files(tokenizer):
    """The files that are open at once, so to speak, wherever one stops on the way; attention itself is another room."""
    model, stacks = tiny_model(dataclasses.replace(SHAPE, num_layers=1)), set()

    def note(frame, event, _):
        if event == "call" and "/sepjax/" in frame.f_code.co_filename:
            files = {}  # in the order of the frames
            while frame is not None:
                files[frame.f_code.co_filename.rpartition("/sepjax/")[2]] = frame.f_code.co_filename
                frame = frame.f_back
            stacks.add(tuple(name for name, path in files.items() if "/sepjax/" in path))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        sepjax.generate(model, tokenizer, "The cat", max_new_tokens=3, stop_at_eos=False)
    finally:
        sys.setprofile(before)
    ways = [way[::-1] for way in stacks if way[-1] == "generation/api.py"]
    to_attention = [way[: way.index("attention/op.py") + 1] for way in ways if "attention/op.py" in way]
    assert to_attention, "no prompt was compiled"
    assert any("generation/sampling.py" in way for way in ways)
    outside = [way for way in ways if "attention/op.py" not in way]
    assert max(map(len, to_attention + outside)) <= 10


def take(events, count):
    return list(itertools.islice(events, count))


PENALISED = Sampling.create(1.1, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2)
KINDS = {
    "growing": (ATTENTION, False),
    "growing, windows that widen": (dataclasses.replace(ATTENTION, window_size=100, cache_size=0), False),
    "growing, gated": (
        AttentionConfig("gated", num_sinks=2, window_size=6, gate_layer=1, gate_stretch=6, gate_keep=2),
        False,
    ),
    "bounded": (ATTENTION, True),
}


RARE = ("growing", "growing, windows that widen")  # as the gated one, which makes the same programs; with -m soak


@pytest.mark.parametrize("kind", [x if x not in RARE else pytest.param(x, marks=pytest.mark.soak) for x in KINDS])
def test_streams_over_either_cache_are_fed_saved_and_resumed(tokenizer, tmp_path, kind):
    """Fed in turns, a growing cache gives what it gives for the whole text at once; saved, any goes on."""
    attention, bounded = KINDS[kind]
    engine = Generator(tiny_model(SHAPE, attention), tokenizer)
    settings = {"max_new_tokens": 12, "stop_at_eos": False, "bounded": bounded, "sampling": PENALISED}
    events = engine.stream("The cat", seed=2, **settings)
    first = take(events, 5)
    events.save(tmp_path / "saved")
    first += list(events)
    events.feed(LONG)
    second = list(events)
    # The limit counts from where it goes on.
    resumed = engine.stream(seed=77, resume=tmp_path / "saved", **settings | {"max_new_tokens": 7})
    assert [*first[:5], *resumed] == first
    resumed = engine.stream(seed=77, resume=tmp_path / "saved", **settings)
    assert [event.token_ids for event in take(resumed, 7)] == [event.token_ids for event in first[5:]]
    assert len(list(resumed)) == 5
    resumed = engine.stream(seed=77, resume=tmp_path / "saved", **settings)
    take(resumed, 7)
    resumed.feed(LONG)
    assert list(resumed) == second
    ids = [[i for event in turn for i in event.token_ids] for turn in (first, second)]
    assert len(ids[1]) == 12
    assert second[-1].cache.seen == resumed.cache.seen
    if bounded:
        return
    # What is drawn after all of it is what the whole text at once gives.
    text = [*tokenizer.encode("The cat", bos=True), *ids[0], *tokenizer.encode(LONG)]
    settings |= {"sampling": None, "max_new_tokens": 3}
    greedy = engine.stream(text[:20], **settings)
    drawn = next(greedy).token_ids
    greedy.feed(text[20:])  # after a token that was drawn
    turn = list(greedy)
    (whole,) = engine.generate([[*text[:20], *drawn, *text[20:]]], max_new_tokens=3, stop_at_eos=False)
    assert tuple(i for event in turn for i in event.token_ids) == whole.token_ids
    assert (turn[-1].cache.held, turn[-1].cache.seen) == (whole.cache.held, whole.cache.seen)


def test_a_saved_stream_is_resumed_over_its_own_kind_of_cache(tokenizer, tmp_path):
    engine = Generator(tiny_model(), tokenizer)
    events = engine.stream("The cat", **NEW)
    next(events)
    events.save(tmp_path / "saved")
    with pytest.raises(StreamStateError, match=r"sizes\.\w+='?\w+'?, expected"):
        engine.stream(bounded=True, resume=tmp_path / "saved")
    other = Generator(tiny_model(), tokenizer, dataclasses.replace(ATTENTION, window_size=7))
    with pytest.raises(StreamStateError, match=r"sizes\.window_size=6, expected 7"):
        other.stream(bounded=False, resume=tmp_path / "saved", **NEW)


def test_bounded_batches_read_prompts_of_any_length_in_constant_memory(tokenizer):
    engine = Generator(tiny_model(), tokenizer)
    prompts = [LONG * 9, "The cat"]
    answers = engine.generate(prompts, bounded=True, max_new_tokens=30, stop_at_eos=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        events = list(engine.stream(prompt, bounded=True, max_new_tokens=30, stop_at_eos=False))
        assert tuple(i for event in events for i in event.token_ids) == answer.token_ids
        assert answer.cache.held <= ATTENTION.cache_size + 1
        assert answer.cache.bytes == answers[0].cache.bytes


@pytest.mark.soak  # the command in tests/programs/test_generate.py needs no asking either
def test_watched_batches_are_bounded(tokenizer):
    watched = dataclasses.replace(ATTENTION, pattern="watched", watch_after=2)
    (answer,) = Generator(tiny_model(), tokenizer, watched).generate(LONG, **NEW)  # which needs no asking
    assert answer.cache.held < answer.cache.seen


def test_rows_have_sampling_of_their_own_and_log_probabilities_where_asked_for(tokenizer):
    engine = Generator(tiny_model(), tokenizer)
    hot, cold = Sampling.create(2.0), Sampling.create()
    both = engine.generate(["The cat"] * 2, sampling=[hot, cold], seed=[4, 4], logprobs=True, **NEW)
    for answer, sampling in zip(both, (hot, cold), strict=True):
        (alone,) = engine.generate("The cat", sampling=sampling, seed=[4], logprobs=True, **NEW)
        assert answer.token_ids == alone.token_ids
        np.testing.assert_allclose(answer.logprobs, alone.logprobs, atol=1e-4)
    assert both[0].token_ids != both[1].token_ids
    assert engine.generate("The cat", **NEW)[0].logprobs is None
    assert all(x < 0 for x in both[0].logprobs)
    # The best token's is the most probable of all: no less than 1 / V each, whatever the temperature was.
    assert all(x >= -np.log(tokenizer.vocab_size) for x in both[1].logprobs)
    with pytest.raises(ConfigError, match="got 2 for 1 prompts"):
        engine.generate("The cat", sampling=[hot, cold], **NEW)
