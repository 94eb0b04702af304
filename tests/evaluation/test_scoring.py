"""Continuations packed into rows, against each one alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import AttentionConfig
from sepjax.evaluation import scoring
from sepjax.evaluation.equal import kept_keys, window_of_equal_kept
from sepjax.evaluation.passes import rows_of_pass
from sepjax.evaluation.scoring import ScoringError, score_continuations
from sepjax.generation.lost import NotNumbers
from sepjax.layout import build_layout
from sepjax.model.attend import forward
from sepjax.model.transformer import merge, split
from sepjax.separators import configured_table, flag_separators

REQUESTS = [
    (list(b"A cat, a dog. And"), list(b" so")),
    (list(b"A cat, a dog. And"), list(b"x")),
    (list(b"A cat, a dog. And"), list(b"y")),
    (list(b"One; two; three! Four? Five: six."), list(b" and seven, then eight.")),
    ([5], [6]),
    (list(b"no separators here at all but words"), list(b"z")),
]
LENGTH = 80
PATTERNS = {
    "dense": AttentionConfig(pattern="dense"),
    "separator": AttentionConfig(num_sinks=2, window_size=8, implementation="reference"),
    "sink_window": AttentionConfig(pattern="sink_window", num_sinks=1, window_size=5, implementation="reference"),
    "fixed_interval": AttentionConfig(
        pattern="fixed_interval", num_sinks=1, window_size=5, interval=4, implementation="reference"
    ),
    "two windows": AttentionConfig(num_sinks=2, window_size=8, layer_windows=(30, 4)),
}


# Windows of sinks and of intervals are flags of other tokens: what is packed and cut does not know them, nor windows.
RARE = ("sink_window", "fixed_interval", "two windows")


@pytest.fixture(
    scope="module", params=[x if x not in RARE else pytest.param(x, marks=pytest.mark.soak) for x in PATTERNS]
)
def attention(request):
    return PATTERNS[request.param]


@pytest.fixture(scope="module")
def alone(byte_model, byte_tokenizer, attention):
    """(logprob, greedy, held, seen) of each request in a row of its own, from the mask and the logits themselves."""
    graph, params = split(byte_model)
    table = configured_table(byte_tokenizer, attention)

    @jax.jit
    def logits(params, tokens, flags):
        model = merge(graph, params)
        positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        return model.logits(forward(model, tokens, positions, flags, None, attention)[0])[0]

    found = []
    for context, continuation in REQUESTS:
        ids = [*context, *continuation]
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        flags = flag_separators(tokens, np.arange(LENGTH)[None], table, attention)
        scores = np.asarray(jax.nn.log_softmax(logits(params, tokens, flags)), np.float64)
        at = np.arange(len(context) - 1, len(ids) - 1)
        held = []
        for window in attention.layer_windows or (attention.window_size,):
            dense = attention.pattern == "dense"
            sinks = 0 if dense else attention.num_sinks
            window = LENGTH if dense else window
            mask = build_layout(jnp.asarray(flags), window_size=window, num_sinks=sinks).as_mask()
            held.append(int(np.sum(mask[0, len(ids) - 2])))
        greedy = bool(np.all(scores[at].argmax(-1) == continuation))
        found.append((scores[at, continuation].sum(), greedy, np.mean(held), len(ids) - 1))
    return found


def test_packed_requests_score_as_alone(byte_model, byte_tokenizer, attention, alone):
    for batch_tokens in (64, 4096)[attention.pattern == "dense" :]:
        scores = score_continuations(byte_model, byte_tokenizer, REQUESTS, attention, batch_tokens=batch_tokens)
        for score, (logprob, greedy, held, seen) in zip(scores, alone, strict=True):
            assert score.logprob == pytest.approx(logprob, abs=2e-5)
            assert (score.is_greedy, score.held, score.seen) == (greedy, pytest.approx(held), seen)


def test_the_best_continuation_is_greedy(byte_model, byte_tokenizer):
    attention = PATTERNS["separator"]
    context = list(b"A cat, a dog.")
    scores = score_continuations(byte_model, byte_tokenizer, [(context, [i]) for i in range(257)], attention)
    best = max(range(257), key=lambda i: scores[i].logprob)
    assert [i for i in range(257) if scores[i].is_greedy] == [best]
    assert sum(np.exp(s.logprob) for s in scores) == pytest.approx(1, abs=1e-5)
    assert [s.computed for s in scores] == [len(context)] + 256 * [0]  # the same input, run once


def test_long_contexts_lose_their_beginning(byte_model, byte_tokenizer):
    context = list(range(1, 101))
    (cut,) = score_continuations(byte_model, byte_tokenizer, [(context, [7, 8])], max_length=40)
    (expected,) = score_continuations(byte_model, byte_tokenizer, [(context[-39:], [7, 8])])
    assert cut.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert dataclasses.replace(cut, logprob=0.0) == dataclasses.replace(expected, logprob=0.0)
    assert cut.seen == 40


@pytest.mark.parametrize(
    ("request_", "message"),
    [(([], [1]), "empty context"), (([1], []), "empty continuation"), (([1], [1] * 50), "50 tokens exceeds the 40")],
)
def test_impossible_requests_are_named(byte_model, byte_tokenizer, request_, message):
    with pytest.raises(ScoringError, match=f"request 1.+{message}"):
        score_continuations(byte_model, byte_tokenizer, [([1], [2]), request_], max_length=40)
    assert score_continuations(byte_model, byte_tokenizer, []) == []


def test_scores_that_are_no_numbers_are_no_answers(byte_model, byte_tokenizer):
    """Of two answers NaN chooses one, and an accuracy would come of it."""
    graph, params = split(byte_model)
    damaged = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)
    with pytest.raises(NotNumbers, match=r"scoring with attention.pattern='dense': the model's scores .* not numbers"):
        score_continuations(merge(graph, damaged), byte_tokenizer, REQUESTS[:2], PATTERNS["dense"])


@pytest.mark.parametrize("pattern", ["sink_window", "fixed_interval"])
def test_kept_keys_are_those_of_the_layout_and_the_window_is_the_nearest(pattern):
    attention = AttentionConfig(pattern=pattern, num_sinks=6, interval=4)
    for length in (1, 6, 29):
        for window in (1, 7, 100):
            flags = flag_separators(
                np.zeros((1, length), np.int32), np.arange(length)[None], np.zeros(3, bool), attention
            )
            layout = build_layout(jnp.asarray(flags), window_size=window, num_sinks=6)
            counted = int(np.sum(layout.as_mask()[0, -1]))
            assert kept_keys(attention, np.array([length]), window)[0] == counted, (length, window)
    seen = [100, 300, 50]
    found = window_of_equal_kept(attention, seen, 0.5).window_size
    errors = {n: abs(np.mean(kept_keys(attention, np.array(seen), n) / seen) - 0.5) for n in range(1, 301)}
    assert errors[found] == min(errors.values())


def test_no_pass_is_larger_than_what_is_left(byte_model, byte_tokenizer, monkeypatch):
    for count in range(1, 40):
        for most in range(1, 12):
            rows = rows_of_pass(count, most)
            passes = -(-count // rows)
            assert rows <= most
            assert passes == -(-count // most)  # no more than full ones would need
            assert passes * rows - count < passes  # a row of padding a pass, at most
    shapes = []

    def step(params, tokens, positions, segments, is_separator, where):
        shapes.append(tokens.shape)
        entries = where.shape[0] * where.shape[1]
        return np.zeros(entries), np.zeros(entries, bool), np.zeros(tokens.shape)

    monkeypatch.setattr(scoring, "_make_step", lambda graph, attention: step)
    request = [5] * 1000, [6]
    for requests, expected in (
        ([request], [(1, 1024)]),  # not twice its length, and not the 8 rows that would fit
        ([([i] * 1000, [6]) for i in range(9)], [(5, 2048)]),
        ([([i] * 1000, [6]) for i in range(33)], [(9, 2048), (9, 2048)]),  # 17 rows, of which 16 would fit
    ):
        shapes.clear()
        score_continuations(byte_model, byte_tokenizer, requests, batch_tokens=32_768)
        assert shapes == expected
