"""Steps of streams that are made before they are asked for: nobody can tell, wherever a stream is stopped."""

import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax import Generator, Sampling
from sepjax.generation import ahead
from tests.generation.tiny import LONG, tiny_model, tiny_tokenizer

HOT = Sampling.create(temperature=1.5, repetition_penalty=1.2)
WAYS = {
    "bounded": {"bounded": True, "stop_at_eos": False, "seed": 3, "sampling": HOT},
    "bounded, greedy": {"bounded": True, "stop_at_eos": False, "top_logprobs": 2},
    "growing": {"stop_at_eos": False, "seed": 4, "sampling": HOT, "logprobs": True, "min_new_tokens": 5},
}


@pytest.fixture(scope="module")
def engine():
    return Generator(tiny_model(), tiny_tokenizer())


def one_by_one(monkeypatch):
    monkeypatch.setattr(ahead, "_SECONDS", 0.0)


def many_at_once(monkeypatch):
    monkeypatch.setattr(ahead, "_SECONDS", 1e9)


def arrays(saved):
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
            for x in jax.tree.leaves(saved.state)]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_is_drawn_and_where_a_stream_stands_does_not_depend_on_it(engine, monkeypatch, way):
    one_by_one(monkeypatch)
    stream = engine.stream(LONG[:60], max_new_tokens=90, **WAYS[way])
    expected = list(stream)
    many_at_once(monkeypatch)
    ahead_of_it = engine.stream(LONG[:60], max_new_tokens=90, **WAYS[way])
    sizes = set()
    for i, event in enumerate(expected):
        assert next(ahead_of_it) == event
        assert (ahead_of_it.last_token, ahead_of_it.cache) == (event.token_ids[0], event.cache)
        sizes.add(len(ahead_of_it._ahead))
        if i in (20, 41):  # in the middle of what was made: looked at, and gone on with
            assert len(ahead_of_it._ahead)
            assert len(copy.deepcopy(ahead_of_it)._ahead) == 0
    assert max(sizes) > 4
    for mine, theirs in zip(arrays(ahead_of_it.saved()), arrays(stream.saved()), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_saved_and_fed_in_the_middle(engine, monkeypatch, tmp_path):
    def walk():
        stream = engine.stream("The cat", bounded=True, sampling=HOT, seed=1, stop_at_eos=False)
        found = list(itertools.islice(stream, 25))
        stream.save(tmp_path / "saved")
        resumed = engine.stream(resume=tmp_path / "saved", bounded=True, sampling=HOT, stop_at_eos=False)
        stream.feed(" and the dog")
        return found + list(itertools.islice(stream, 12)), list(itertools.islice(resumed, 12)), repr(stream.view())

    one_by_one(monkeypatch)
    expected = walk()
    many_at_once(monkeypatch)
    found = walk()
    assert found[:2] == expected[:2]
    assert found[2] == expected[2]


def test_a_stop_string_within_what_was_made_ends_there(engine, monkeypatch):
    """And the turn after it begins there."""
    many_at_once(monkeypatch)
    way = {"bounded": True, "sampling": HOT, "seed": 1, "stop_at_eos": False}
    text = "".join(event.text for event in itertools.islice(engine.stream("The cat", **way), 40))
    stop = text[22:25]
    stream = engine.stream("The cat", stop=stop, **way)
    assert "".join(event.text for event in stream) == text[: text.index(stop)]
    stream.feed("!")
    after = [event.token_ids for event in itertools.islice(stream, 6)]
    one_by_one(monkeypatch)
    stream = engine.stream("The cat", stop=stop, **way)
    list(stream)
    stream.feed("!")
    assert [event.token_ids for event in itertools.islice(stream, 6)] == after


def test_what_is_too_large_to_be_copied_is_made_one_by_one(engine, monkeypatch):
    many_at_once(monkeypatch)
    monkeypatch.setattr(ahead, "_MOST_BYTES", 0)
    stream = engine.stream("The cat", bounded=True, stop_at_eos=False)
    for _ in range(6):
        next(stream)
        assert len(stream._ahead) == 0
