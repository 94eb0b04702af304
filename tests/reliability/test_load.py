"""Generation under load equals one request at a time: promise 9."""

import concurrent.futures
import dataclasses
import itertools

import numpy as np
import pytest

from sepjax import generate, stream
from sepjax.data.tokenizer import Tokenizer
from sepjax.model.transformer import Transformer
from tests.generation.tiny import ATTENTION, ROWS, tiny_model, tiny_tokenizer
from tests.reliability.common import SENTENCES

TEXT = "".join(SENTENCES) + "naïve café, 東京 🙂 "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One request."""

    prompt: str
    seed: int


def requests(count: int, rng: np.random.Generator) -> list[Wanted]:
    """Prompts of 1 to 60 characters cut anywhere, beside characters of several bytes too."""
    starts, lengths = rng.integers(0, len(TEXT), count), rng.integers(1, 60, count)
    texts = [(TEXT * 2)[a : a + n] for a, n in zip(starts, lengths, strict=True)]
    return [Wanted(text, int(seed)) for text, seed in zip(texts, rng.integers(0, 2**32, count), strict=True)]


def in_a_batch(model, tokenizer, wanted: list[Wanted], **settings):
    return generate(model, tokenizer, [w.prompt for w in wanted], seed=[w.seed for w in wanted], **settings)


def alone(model, tokenizer, wanted: Wanted, **settings):
    return generate(model, tokenizer, wanted.prompt, seed=[wanted.seed], **settings)[0]


def batches_equal_single_requests(model, tokenizer, count: int, rng: np.random.Generator, *, check_every: int) -> None:
    """Hot draws of random lengths with random stop strings; every `check_every`-th answer is compared."""
    stopped = seen = 0
    for number in range(count // ROWS):
        wanted = requests(ROWS, rng)
        settings = {
            "max_new_tokens": int(rng.integers(1, 33)),
            "temperature": float(rng.choice([0.0, 0.9, 2.0])),
            "stop": ["e", "at", "é", "\U0001f642"][: int(rng.integers(1, 5))],
        }
        answers = in_a_batch(model, tokenizer, wanted, **settings)
        for answer in answers:
            assert 1 <= len(answer.token_ids) <= settings["max_new_tokens"]
            assert not any(stop in answer.text for stop in settings["stop"])
            assert (answer.finish_reason == "length") <= (len(answer.token_ids) == settings["max_new_tokens"])
            assert answer.text == answer.text.encode().decode()  # whole characters
            stopped += answer.finish_reason == "stop"
        for i in range(number % check_every, ROWS, check_every):
            one = alone(model, tokenizer, wanted[i], **settings)
            assert (one.text, one.token_ids, one.finish_reason) == (
                answers[i].text,
                answers[i].token_ids,
                answers[i].finish_reason,
            )
            seen += 1
    assert stopped
    assert seen >= count // check_every // 2


@pytest.mark.soak  # rows and their draws alone and in batches are in tests/test_generate.py
def test_a_few_batches_equal_single_requests(model, tokenizer):
    batches_equal_single_requests(model, tokenizer, 2 * ROWS, np.random.default_rng(0), check_every=4)


@pytest.mark.soak
def test_a_thousand_requests_equal_single_requests(model, tokenizer):
    batches_equal_single_requests(model, tokenizer, 1000, np.random.default_rng(1), check_every=1)


def test_streams_side_by_side_and_cancelled_ones_disturb_nobody(model, tokenizer):
    """Four threads over one model; every other stream is dropped in the middle, some before their first token."""
    wanted = requests(12, np.random.default_rng(2))
    settings = {"max_new_tokens": 24, "temperature": 1.0, "stop_at_eos": False, "bounded": False}

    def text(number: int, *, cancel: bool) -> str:
        events = stream(model, tokenizer, wanted[number].prompt, seed=wanted[number].seed, **settings)
        taken = itertools.islice(events, number % 7) if cancel else events
        joined = "".join(event.text for event in taken)
        if cancel:
            events.close()
        return joined

    expected = [text(number, cancel=False) for number in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [(n, c, pool.submit(text, n, cancel=c)) for n in range(12) for c in (True, False)]
        for number, cancelled, job in jobs:
            if cancelled:
                assert expected[number].startswith(job.result())
            else:
                assert job.result() == expected[number]


@pytest.mark.soak  # over bounded caches; as those above, and slots in generation/test_slots.py
def test_endless_streams_side_by_side_keep_their_own_caches(model, tokenizer):
    """Token by token in turns, past many compactions; dropping one in the middle changes none of the others."""
    prompts = [w.prompt for w in requests(3, np.random.default_rng(3))]
    settings = {"max_new_tokens": 60, "temperature": 1.0, "stop_at_eos": False, "bounded": True}
    alone = ["".join(e.text for e in stream(model, tokenizer, p, seed=i, **settings)) for i, p in enumerate(prompts)]
    streams = {i: stream(model, tokenizer, p, seed=i, **settings) for i, p in enumerate(prompts)}
    texts = dict.fromkeys(streams, "")
    for turn in range(60):
        if turn == 17:
            del streams[1]
        for i, events in streams.items():
            event = next(events)
            texts[i] += event.text
            assert event.cache.held <= ATTENTION.cache_size
    assert (texts[0], texts[2]) == (alone[0], alone[2])
    assert alone[1].startswith(texts[1])
