"""One text by every way to a token: batches, streams, slots, and scores of text that is there, against the METHOD in
plain NumPy (`method.py`).
"""

import dataclasses

import numpy as np
import pytest

from sepjax import Generator, SlotRequest
from sepjax.config import AttentionConfig, ModelConfig
from sepjax.config.attention import validate_attention
from sepjax.evaluation import streaming
from sepjax.evaluation.documents import Document
from sepjax.generation.readers import BoundedReader
from sepjax.generation.slots import Slots
from sepjax.model.transformer import split
from tests.generation.method import Cache, Mask, log_probabilities
from tests.generation.tiny import ATTENTION, SHAPE, tiny_model, tiny_tokenizer

V = 300  # the tokenizer's
SEPARATORS = tuple(np.random.default_rng(0).choice(np.arange(3, V), 60, replace=False).tolist())
IDS = dataclasses.replace(ATTENTION, separators="ids", separator_ids=SEPARATORS)
OF_ALL_KINDS = dataclasses.replace(IDS, layer_windows=(9, 5), kept_layers=(1,), layer_reach=(0, 13))
BOUNDED = {  # as far from one another as can be
    "layers of all kinds": (SHAPE, OF_ALL_KINDS),
    "a model's own window, no sinks, a window of one": (
        dataclasses.replace(SHAPE, sliding_window=7, full_layers=(0,), no_rope_layers=(0,), num_kv_heads=1),
        dataclasses.replace(IDS, num_sinks=0, window_size=1, cache_size=5),
    ),
    "positions of the text, every third token": (
        SHAPE,
        dataclasses.replace(IDS, pattern="fixed_interval", interval=3, stream_positions="absolute", cache_size=0),
    ),
    "StreamingLLM": (SHAPE, dataclasses.replace(IDS, pattern="sink_window", window_size=7, cache_size=9)),
}
SOAK = pytest.mark.soak  # 20 seconds each; what bounded caches hold and see: the first test, cache/test_bounded.py


def lengths(attention: AttentionConfig):
    """Prompts around every size that there is."""
    a, w = attention.num_sinks, attention.window_size
    c = attention.cache_size or 2 * (a + attention.max_separators + w)
    return [1, a or 2, w + 1, c, c + 1, c + 2, 63, 64, 65, 2 * c + 1]


class Doors:
    """The ways into one model under one pattern."""

    def __init__(self, shape: ModelConfig, attention: AttentionConfig, seed=0):
        validate_attention(attention, shape.num_layers)
        self.shape, self.attention, self.rng = shape, attention, np.random.default_rng(seed)
        self.model = tiny_model(shape, attention)
        self.params = split(self.model)[1]

    def prompt(self):
        size = int(self.rng.choice(lengths(self.attention)))
        return self.rng.integers(3, V, size).tolist()

    def expected(self, ids, kind):
        """Log-probabilities among the tokenizer's ids, of each token but the first; how far each is from the best."""
        found = log_probabilities(self.shape, self.params, ids[:-1], kind(self.shape, self.attention, ids))[:, :V]
        found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
        own = found[np.arange(len(ids) - 1), ids[1:]]
        return own, found.max(axis=1) - own

    def agree(self, ids, start, logprobs, kind):
        """Tokens from `start` on were drawn as the best ones, with these log-probabilities."""
        own, behind = self.expected(ids, kind)
        np.testing.assert_allclose(logprobs, own[start - 1 :], atol=2e-3)
        assert behind[start - 1 :].max() < 2e-3

    def scores(self, prompts, chunk, monkeypatch):
        """The losses of texts streamed through the cache."""
        found, score = [], streaming._score
        monkeypatch.setattr(streaming, "_score", lambda *args: found.append(score(*args)) or found[-1])
        documents = [Document(np.array(ids[:-1], np.int32), np.array(ids[1:], np.int32)) for ids in prompts]
        streaming.score_streams(self.model, tiny_tokenizer(), documents, [self.attention], rows=2, chunk=chunk)
        monkeypatch.undo()
        return found[-1][1]

    def scored_alike(self, chunk, monkeypatch):
        prompts = [[*self.prompt(), 5] for _ in range(6)]
        expected = []
        for ids in prompts:
            found = log_probabilities(self.shape, self.params, ids[:-1], Cache(self.shape, self.attention, ids))
            expected.append(-found[np.arange(len(ids) - 1), ids[1:]])
        np.testing.assert_allclose(self.scores(prompts, chunk, monkeypatch), np.concatenate(expected), atol=2e-3)


def test_scores_through_a_cache_are_those_of_the_method(monkeypatch):
    Doors(SHAPE, OF_ALL_KINDS).scored_alike(5, monkeypatch)


@SOAK
@pytest.mark.parametrize("case", BOUNDED)
def test_every_way_through_a_bounded_cache_gives_what_the_method_does(case, monkeypatch):
    doors = Doors(*BOUNDED[case])
    doors.scored_alike(0, monkeypatch)
    engine = Generator(doors.model, tiny_tokenizer(), doors.attention)
    settings = {"max_new_tokens": 12, "stop_at_eos": False, "logprobs": True}
    prompts = [doors.prompt() for _ in range(4)]
    for ids, answer in zip(prompts, engine.generate(prompts, bounded=True, **settings), strict=True):
        doors.agree([*ids, *answer.token_ids], len(ids), answer.logprobs, Cache)
    events, whole = engine.stream(bounded=True, **settings), []
    for ids in prompts:  # turns
        events.feed(ids)
        drawn = list(events)
        whole += [*ids, *(event.token_ids[0] for event in drawn)]
        doors.agree(whole, len(whole) - 12, [event.logprob for event in drawn], Cache)
    slots = Slots(engine.prepared, BoundedReader(engine.prepared), 3, steps=3, together=2, pool=1, ahead=1)
    numbers = {slots.submit(SlotRequest(ids, **settings)): ids for ids in prompts}
    told = {number: [] for number in numbers}
    while not slots.is_idle:
        for number, event in slots.step():
            told[number].append(event)
    for number, ids in numbers.items():
        tokens = [token for event in told[number] for token in event.token_ids]
        doors.agree([*ids, *tokens], len(ids), [event.logprob for event in told[number]], Cache)


@SOAK
@pytest.mark.parametrize(
    "attention",
    [OF_ALL_KINDS, dataclasses.replace(IDS, pattern="dense"), dataclasses.replace(IDS, pattern="sink_window")],
    ids=["layers of all kinds", "dense", "sink_window"],
)
def test_every_way_through_a_growing_cache_gives_what_the_method_does(attention):
    doors = Doors(dataclasses.replace(SHAPE, sliding_window=11, full_layers=(0,), no_rope_layers=(0,)), attention)
    engine = Generator(doors.model, tiny_tokenizer(), attention)
    settings = {"max_new_tokens": 60, "stop_at_eos": False, "logprobs": True, "bounded": False}
    prompts = [doors.prompt() for _ in range(4)]
    for ids, answer in zip(prompts, engine.generate(prompts, **settings), strict=True):
        doors.agree([*ids, *answer.token_ids], len(ids), answer.logprobs, Mask)
    events, whole = engine.stream(**settings), []
    for ids in prompts[:2]:
        events.feed(ids)
        drawn = list(events)
        whole += [*ids, *(event.token_ids[0] for event in drawn)]
        doors.agree(whole, len(whole) - 60, [event.logprob for event in drawn], Mask)
