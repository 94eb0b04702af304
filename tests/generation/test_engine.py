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
from sepjax.config import ConfigError
from sepjax.generation import device_loop, prepared, readers
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.engine import engine_of
from sepjax.generation.saved import StreamStateError
from sepjax.measure import counted_compilations
from sepjax.model.transformer import merge, split
from tests.generation.tiny import ATTENTION, GATED, LONG, ROWS, SHAPE, tiny_engine, tiny_model, tiny_tokenizer

CATS = ["The cat"] * ROWS
MORE = "mat, and looked. Four, five."  # all of it, before and after, is no longer than 64 tokens: one program reads it
NEW = {"max_new_tokens": 8, "stop_at_eos": False}
OTHER = dataclasses.replace(ATTENTION, window_size=2, num_sinks=0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def layouts(monkeypatch):
    """Grows by one whenever weights are laid out."""
    made, by_layer = [], prepared.by_layer

    def spy(*args, **settings):
        made.append(1)
        return by_layer(*args, **settings)

    monkeypatch.setattr(prepared, "by_layer", spy)
    return made


def weight_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_weights_are_laid_out_once_a_model_whoever_asks(tokenizer, layouts):
    model = tiny_model()
    first = sepjax.generate(model, tokenizer, CATS, **NEW)
    held = weight_bytes()
    assert sepjax.generate(model, tokenizer, CATS, **NEW) == first
    assert weight_bytes() == held
    events = list(sepjax.stream(model, tokenizer, "The cat", **NEW))
    assert tuple(i for event in events for i in event.token_ids) == first[0].token_ids
    assert engine_of(model, tokenizer, OTHER) is not engine_of(model, tokenizer)
    assert Generator(model, tokenizer).generate(CATS, **NEW) == first
    assert layouts == [1]


def test_a_model_with_other_parameters_is_another(tokenizer, layouts):
    """That another attention is, too, is in tests/test_generate.py."""
    model = tiny_model()
    before = sepjax.generate(model, tokenizer, CATS, **NEW)
    model.embedding.embedding.set_value(model.embedding.embedding[...][::-1])
    after = sepjax.generate(model, tokenizer, CATS, **NEW)
    assert after != before
    graph, params = split(model)
    assert sepjax.generate(merge(graph, params), tokenizer, CATS, **NEW) == after
    assert layouts == [1, 1, 1]


def test_one_copy_of_the_weights_remains_when_the_model_goes(tokenizer):
    before = weight_bytes()
    model = tiny_model()
    weights = weight_bytes() - before
    engine = Generator(model, tokenizer)
    gone = weakref.ref(model)
    expected = engine.generate(CATS, **NEW)
    del model
    assert weight_bytes() - before < 1.1 * weights  # and the table of separators, and end tokens
    assert gone() is None
    assert engine.generate(CATS, **NEW) == expected
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
    # Traced anew for a number that nothing reads here: the programs themselves are those of the other tests.
    model, stacks = tiny_model(dataclasses.replace(SHAPE, remat="full")), set()

    def note(code, _):
        if "/sepjax/" not in code.co_filename:
            return sys.monitoring.DISABLE  # which costs nothing from then on
        files, frame = {}, sys._getframe(1)  # in the order of the frames
        while frame is not None:
            files[frame.f_code.co_filename.rpartition("/sepjax/")[2]] = frame.f_code.co_filename
            frame = frame.f_back
        stacks.add(tuple(name for name, path in files.items() if "/sepjax/" in path))

    tool, start = sys.monitoring.PROFILER_ID, sys.monitoring.events.PY_START
    sys.monitoring.use_tool_id(tool, "ten files")
    try:
        sys.monitoring.register_callback(tool, start, note)
        sys.monitoring.set_events(tool, start)
        sepjax.generate(model, tokenizer, CATS, **NEW)
    finally:
        sys.monitoring.set_events(tool, 0)
        sys.monitoring.free_tool_id(tool)
    ways = [way[::-1] for way in stacks if way[-1] == "generation/api.py"]
    assert any("attention/op.py" in way for way in ways), "no prompt was compiled"
    assert any("generation/sampling.py" in way for way in ways)
    before = [tuple(itertools.takewhile(lambda name: not name.startswith("attention/"), way)) for way in ways]
    to_attention = [(*some, "attention") for some, way in zip(before, ways, strict=True) if some != way]
    assert max(map(len, before + to_attention)) <= 10


def take(events, count):
    return list(itertools.islice(events, count))


PENALISED = Sampling.create(1.1, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2)
KINDS = {
    "growing": (ATTENTION, False),
    "growing, windows that widen": (dataclasses.replace(ATTENTION, window_size=100, cache_size=0), False),
    "growing, gated": (GATED, False),
    "bounded": (ATTENTION, True),  # test_stream.py has it saved and fed
    "bounded, gated": (GATED, True),
}


# Of programs that other tests have, too. A bounded cache is saved in test_stream.py; a gate's runs are in test_gated.py
# and test_growing_pass.py, and whatever its arrays are they are saved alike.
RARE = ("growing, windows that widen", "growing, gated", "bounded", "bounded, gated")


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
    events.feed(MORE)
    second = list(events)
    # The limit counts from where it goes on.
    resumed = engine.stream(seed=77, resume=tmp_path / "saved", **settings | {"max_new_tokens": 7})
    assert [*first[:5], *resumed] == first
    resumed.resume(resumed.saved())  # ended by its number of tokens, which is no end of the text
    assert [event.finish_reason for event in resumed] == [None] * 6 + ["length"]
    resumed = engine.stream(seed=77, resume=tmp_path / "saved", **settings | {"max_new_tokens": 3})
    halves = [event.token_ids for event in resumed]
    resumed.resume(resumed.saved())
    halves += [event.token_ids for event in [*resumed, *resumed]]
    assert halves == [event.token_ids for event in first[5:11]]
    resumed = engine.stream(seed=77, resume=tmp_path / "saved", **settings)
    assert [event.token_ids for event in take(resumed, 7)] == [event.token_ids for event in first[5:]]
    assert len(list(resumed)) == 5
    resumed = engine.stream(seed=77, resume=tmp_path / "saved", **settings)
    take(resumed, 7)
    resumed.feed(MORE)
    assert list(resumed) == second
    ids = [[i for event in turn for i in event.token_ids] for turn in (first, second)]
    assert len(ids[1]) == 12
    assert second[-1].cache.seen == resumed.cache.seen
    if bounded:
        assert max(event.cache.held for event in second) <= StreamSizes.create(SHAPE, attention).cache_size
        assert second[-1].cache.held < second[-1].cache.seen
        return
    # What is drawn after all of it is what the whole text at once gives.
    text = [*tokenizer.encode("The cat", bos=True), *ids[0], *tokenizer.encode(MORE)]
    settings |= {"sampling": None, "max_new_tokens": 3}
    greedy = engine.stream(text[:20], **settings)
    drawn = next(greedy).token_ids
    greedy.feed(text[20:])  # after a token that was drawn
    turn = list(greedy)
    whole = list(engine.stream([*text[:20], *drawn, *text[20:]], **settings))
    assert [event.token_ids for event in turn] == [event.token_ids for event in whole]
    assert (turn[-1].cache.held, turn[-1].cache.seen) == (whole[-1].cache.held, whole[-1].cache.seen)


def test_a_saved_stream_is_resumed_over_its_own_kind_of_cache(tmp_path):
    engine = tiny_engine()
    events = engine.stream("The cat", **NEW)
    next(events)
    events.save(tmp_path / "saved")
    with pytest.raises(StreamStateError, match=r"sizes\.\w+='?\w+'?, expected"):
        engine.stream(bounded=True, resume=tmp_path / "saved")
    other = tiny_engine(window_size=7)
    with pytest.raises(StreamStateError, match=r"sizes\.window_size=6, expected 7"):
        other.stream(bounded=False, resume=tmp_path / "saved", **NEW)


def test_bounded_batches_read_prompts_of_any_length_in_constant_memory():
    """Each row with sampling of its own."""
    engine, settings = tiny_engine(), {"bounded": True, "max_new_tokens": 30, "stop_at_eos": False}
    prompts, sampling = [LONG * 9, *CATS[1:]], [Sampling.create()] * 2 + [Sampling.create(2.0)] * 2
    seeds = [0, 0, 4, 5]
    answers = engine.generate(prompts, sampling=sampling, seed=seeds, **settings)
    for prompt, how, seed, answer in zip(prompts, sampling, seeds, answers, strict=True):
        events = list(engine.stream(prompt, sampling=how, seed=seed, **settings))
        assert tuple(i for event in events for i in event.token_ids) == answer.token_ids
        assert answer.cache.held <= ATTENTION.cache_size + 1
        assert answer.cache.bytes == answers[0].cache.bytes
    assert len({answer.token_ids for answer in answers}) == ROWS
    with counted_compilations() as compiled:
        same = engine.generate(prompts, sampling=sampling[0], **settings)
    assert same[0].token_ids == answers[0].token_ids
    assert compiled == [], "that all rows draw alike is not another program"


def test_nothing_ends_a_row_of_a_batch_before_as_many_tokens_as_it_must_have():
    """As of a stream, of which test_slots.py has what that means."""
    engine, prompts = tiny_engine(), ["The cat", LONG, "Où est-il? It ran away! One; two", "mat"]
    free = engine.generate(prompts, bounded=True, max_new_tokens=40, stop_at_eos=False)
    ends = sorted({token for answer in free for token in answer.token_ids[:4]})
    settings = {"bounded": True, "max_new_tokens": 40, "min_new_tokens": 6, "stop_token_ids": ends}
    answers = engine.generate(prompts, **settings)
    for prompt, answer in zip(prompts, answers, strict=True):
        events = list(engine.stream(prompt, **settings))
        assert answer.token_ids == tuple(i for event in events for i in event.token_ids)
        assert answer.finish_reason == events[-1].finish_reason
        assert len(answer.token_ids) >= 6
    assert "stop" in {answer.finish_reason for answer in answers}
    with pytest.raises(ConfigError, match="min_new_tokens=3 must be at most max_new_tokens=2"):
        engine.generate([[5]], min_new_tokens=3, max_new_tokens=2)


@pytest.mark.soak  # the command in tests/programs/test_generate.py needs no asking either
def test_watched_batches_are_bounded(tokenizer):
    watched = dataclasses.replace(ATTENTION, pattern="watched", watch_after=2)
    (answer,) = Generator(tiny_model(), tokenizer, watched).generate(LONG, **NEW)  # which needs no asking
    assert answer.cache.held < answer.cache.seen


def test_log_probabilities_are_there_where_they_are_asked_for(tokenizer):
    """And rows have sampling of their own: each says what a stream of its own says."""
    engine, hot, cold = tiny_engine(), Sampling.create(2.0), Sampling.create()
    each = [hot, cold, hot, cold]
    both = engine.generate(CATS, sampling=each, seed=[4, 4, 5, 5], logprobs=True, bounded=True, **NEW)
    for answer, sampling, seed in zip(both, each, (4, 4, 5, 5), strict=True):
        alone = list(engine.stream("The cat", sampling=sampling, seed=seed, logprobs=True, bounded=True, **NEW))
        assert answer.token_ids == tuple(i for event in alone for i in event.token_ids)
        np.testing.assert_allclose(answer.logprobs, [event.logprob for event in alone], atol=1e-4)
    assert len({answer.token_ids for answer in both}) == 3
    all_hot = engine.generate(CATS, sampling=hot, seed=[4, 5, 4, 5], logprobs=True, **NEW)
    assert all(x < 0 for answer in all_hot for x in answer.logprobs)
    assert [answer.token_ids for answer in all_hot[:2]] == [answer.token_ids for answer in all_hot[2:]]
    assert engine.generate(CATS, **NEW)[0].logprobs is None
    # The best token's is the most probable of all: no less than 1 / V each, whatever the temperature was.
    assert all(x >= -np.log(tokenizer.vocab_size) for x in both[1].logprobs)
    with pytest.raises(ConfigError, match="got 2 for 1 prompts"):
        engine.generate("The cat", sampling=[hot, cold], **NEW)


@pytest.mark.parametrize("bounded", [False, True], ids=["growing", "bounded"])
def test_what_an_answer_needs_is_compiled_before_it_and_nothing_after(tokenizer, bounded, monkeypatch):
    """Side by side, in the very form in which it is called: else the call compiles it once more."""
    model, compile_all, compiled_by_then = tiny_model(), device_loop.compile_all, []
    sepjax.generate(model, tokenizer, CATS, **NEW, bounded=bounded)
    monkeypatch.setattr(device_loop, "_ready", set())
    with counted_compilations() as compiled:

        def noted(programs):
            compile_all(programs)
            assert "steps" in programs
            compiled_by_then.append(len(compiled))

        monkeypatch.setattr(device_loop, "compile_all", noted)
        # As many steps as nobody else asks for, so the program is a new one.
        sepjax.generate(model, tokenizer, CATS, max_new_tokens=300, bounded=bounded)
    assert compiled_by_then == [len(compiled)]
    monkeypatch.setattr(device_loop, "_ready", set())
    sepjax.generate(model, tokenizer, CATS, max_new_tokens=1, bounded=bounded)
    assert len(compiled_by_then) == 1, "an answer of one token needs no steps"


def test_passes_of_a_batch_have_one_width_where_each_is_a_program(monkeypatch):
    widths = lambda rows, longest, lefts: [readers._width(rows, longest, left, 480) for left in lefts]  # noqa: E731
    assert widths(64, 512, (512, 32)) == [480, 64], "a CPU computes no padding that it need not"
    monkeypatch.setattr(readers, "_counts_padding", lambda: False)
    assert widths(64, 512, (512, 256)) == [256, 256]
    assert widths(64, 100, (100,)) == [128]
    assert widths(64, 1400, (1400, 50)) == [480, 480]
    assert widths(1, 30, (30,)) == widths(1, 2000, (7,)) == [480], "turns of any length"
