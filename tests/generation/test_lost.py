"""A model whose scores are no numbers: every way to a token says so, under a user's strict settings of JAX too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax import Generator, Sampling, SlotRequest
from sepjax.generation.lost import NotNumbers, is_lost
from sepjax.generation.readers import BoundedReader
from sepjax.generation.sampling import sample
from sepjax.generation.slots import Slots
from sepjax.model.transformer import merge, split
from tests.generation.tiny import ROWS, tiny_engine, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def engine():
    """One whose numbers are lost after the last token of "The cat"."""
    graph, params = split(tiny_model())
    table = np.array(params["embedding"]["embedding"])
    table[tiny_tokenizer().encode("The cat")[-1]] = np.nan
    params["embedding"]["embedding"] = jnp.asarray(table)
    return Generator(merge(graph, params), tiny_tokenizer(), tiny_engine().attention)


@pytest.fixture
def strict():
    """Settings of JAX that a user may have: what this package does is as usual (`sepjax.promotion`)."""
    usual = {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    for name, value in zip(usual, ("strict", "raise"), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in usual.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("strict")
def test_answers_and_streams_raise(engine):
    for sampling in (Sampling.create(), Sampling.create(1.0, top_k=3)):
        with pytest.raises(NotNumbers, match=r"after \d+ tokens the model's scores .* not numbers"):
            engine.generate(["The cat", "One"], max_new_tokens=4, sampling=sampling)
    stream = engine.stream("The cat", bounded=True)
    with pytest.raises(NotNumbers, match="not numbers"):
        next(stream)
    assert stream.finish_reason == "error"
    with pytest.raises(NotNumbers, match=r"after \d+ tokens"):
        next(stream)  # a loop that goes on after the error would take what there is for the whole text
    stream.feed("One")


@pytest.mark.usefixtures("strict")
def test_a_request_of_slots_ends_and_its_row_is_free(engine):
    slots = Slots(engine.prepared, BoundedReader(engine.prepared), ROWS, steps=3, together=3, pool=3)
    number = slots.submit(SlotRequest("The cat", max_new_tokens=4))
    events = []
    while not slots.is_idle:
        events += slots.step()
    assert [(n, event.token_ids, event.finish_reason) for n, event in events] == [(number, (), "error")]
    assert slots.num_free == ROWS


def test_one_score_that_is_no_number_is_found_however_it_is_drawn():
    logits = np.zeros((5, 7), np.float32)
    logits[0, 4], logits[1, 2], logits[2] = np.nan, np.inf, -np.inf
    keys = jax.random.split(jax.random.key(0), 5)
    for temperature in (0.0, 1.0):
        drawn = sample(logits, keys, Sampling.create(temperature))
        assert is_lost(logits, drawn).tolist() == [True, True, True, False, False]
