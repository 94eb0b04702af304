"""Sampling against its definition written out token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sepjax.attention.target import Target
from sepjax.config import ConfigError
from sepjax.generation import penalties
from sepjax.generation import sampling as module
from sepjax.generation.sampling import Sampling, filter_logits, sample

V = 8
LOGITS = st.lists(st.integers(-12, 12).map(lambda x: x / 4), min_size=V, max_size=V)  # with ties
filtered = jax.jit(filter_logits)
drawn = jax.jit(sample)
best, best_one_by_one = (jax.jit(find, static_argnums=1) for find in (module.best_of, module.one_by_one))
after_reading, after_drawing = map(jax.jit, (penalties.after_reading, penalties.after_drawing))


@jax.jit
def changed(logits, uses, sampling, early):
    """`early`: rows that may not draw token 1 yet."""
    scores = penalties.without(penalties.biased(logits, sampling), jnp.array([[1, -1], [1, 2]]), early)
    return penalties.penalised(scores, uses, sampling)


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def kept(logits, top_k, top_p, min_p):
    """Which tokens stay, token by token; None where rounding alone would decide."""
    ids = set(range(V))
    if top_k:
        ids = {i for i in ids if sum(logits[j] > logits[i] for j in ids) < top_k}
    weight = {i: np.exp(logits[i] - max(logits)) for i in ids}
    better = {i: sum(weight[j] for j in ids if logits[j] > logits[i]) / sum(weight.values()) for i in ids}
    if any(abs(p - top_p) < 1e-5 for p in better.values()):
        return None
    ratios = [np.exp(x - max(logits)) for x in logits]
    if any(abs(r - min_p) < 1e-5 * min_p for r in ratios):
        return None
    return {i for i in ids if (better[i] < top_p or top_p == 1) and ratios[i] >= min_p}


@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.25, 1.0, 2.0]),
    top_k=st.integers(0, V + 2),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.4, 0.999]),
)
def test_what_is_left_is_what_the_definition_leaves(logits, temperature, top_k, top_p, min_p):
    expected = kept([x / temperature for x in logits], top_k, top_p, min_p)
    assume(expected is not None)
    got = np.asarray(filtered(jnp.array([logits]), Sampling.create(temperature, top_k, top_p, min_p)))[0]
    assert set(np.flatnonzero(got > -np.inf).tolist()) == expected
    assert int(np.argmax(logits)) in expected
    scores = (np.array(logits) - max(logits)) / temperature
    np.testing.assert_array_equal(got[list(expected)], scores[list(expected)].astype(np.float32))


@given(logits=LOGITS, number=st.sampled_from([1, 3, V]))
def test_the_best_are_those_of_a_sort_and_of_equal_ones_the_first(logits, number):
    order = np.argsort(-np.array(logits), kind="stable")[:number]
    for find in (best, best_one_by_one):
        ids, values = find(jnp.array([logits]), number)
        assert ids[0].tolist() == order.tolist()
        assert values[0].tolist() == [logits[i] for i in order]


@given(logits=LOGITS, seed=st.integers(0, 99), top_k=st.integers(0, 3))
def test_temperature_zero_takes_the_best_and_top_one_one_of_the_best(logits, seed, top_k):
    row = jnp.array([logits])
    assert drawn(row, keys(1, seed), Sampling.create(0.0, top_k, 0.5, 0.5)).tolist() == [int(np.argmax(logits))]
    assert logits[int(drawn(row, keys(1, seed), Sampling.create(3.0, 1))[0])] == max(logits)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-3])
def test_tiny_temperatures_take_the_best(temperature):
    logits = jnp.array([[0.0, 5.0, 4.0]])
    assert drawn(logits, keys(1), Sampling.create(temperature)).tolist() == [1]


def test_draws_have_the_probabilities_of_the_scores():
    draws, logits = 20_000, np.array([0.0, 1.0, 2.0, -1.0])
    tokens = drawn(jnp.tile(jnp.array(logits), (draws, 1)), keys(draws), Sampling.create(0.7, 0, 1.0, 0.05))
    weights = np.exp(logits / 0.7)
    weights[weights < 0.05 * weights.max()] = 0
    expected = weights / weights.sum()
    spread = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(np.bincount(tokens, minlength=4) / draws - expected) <= 5 * spread)


@given(rows=st.lists(LOGITS, min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_row_draws_what_it_would_draw_alone(rows, seed):
    sampling = Sampling.create(1.5, 5, 0.9, 0.01)
    together = drawn(jnp.array(rows), keys(3, seed), sampling)
    alone = [drawn(jnp.array([row]), keys(3, seed)[i : i + 1], sampling)[0] for i, row in enumerate(rows)]
    assert together.tolist() == alone


def test_a_search_in_more_than_halves_finds_the_same(monkeypatch):
    """As few rows are searched on an accelerator."""
    logits = 3 * jax.random.normal(jax.random.key(0), (2, V)).at[1].set(0.5)
    settings = [Sampling.create(1.5, k, p) for k in (0, 1, 5, V, 2 * V) for p in (1e-9, 0.3, 0.9, 1.0)]
    halves = [filtered(logits, x) for x in settings]
    monkeypatch.setattr(module, "target", lambda: Target("gpu", "any"))
    in_parts = jax.jit(lambda *given: filter_logits(*given))
    for x, expected in zip(settings, halves, strict=True):
        np.testing.assert_array_equal(in_parts(logits, x), expected)


def test_top_p_keeps_at_least_the_best_and_top_p_one_keeps_the_tail():
    logits = jnp.array([[0.0] + [-80.0] * (V - 1)])  # the tail is beyond float32's rounding of the sum
    left = {p: int((filtered(logits, Sampling.create(1.0, V, p)) > -jnp.inf).sum()) for p in (1e-9, 1.0)}
    assert left == {1e-9: 1, 1.0: V}


def test_other_settings_are_the_same_program():
    program = jax.jit(lambda *args: sample(*args))
    for sampling in (Sampling.create(), Sampling.create(1.0, 2, 0.3, 0.4), Sampling.create(0.5, top_p=0.9)):
        program(jnp.zeros((2, V)), keys(2), sampling)
    assert program._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value} must be"):
        Sampling.create(**{name: value})


def test_a_bias_out_of_range_is_named():
    for given_bias, message in (
        ({3: 101.0}, "logit_bias of token 3 is 101.0"),
        ({-1: 1.0}, "a token id of logit_bias=-1 must be 0 or more"),
        (dict.fromkeys(range(301), 1.0), "logit_bias has 301 tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sampling.create(logit_bias=given_bias)
    with pytest.raises(ConfigError, match="logit_bias has 8, which is outside the vocabulary of 8"):
        Sampling.create(logit_bias={8: 1.0}).check(V)
    two = Sampling.of_rows([Sampling.create()] * 2, 2)
    assert two.check(V, 2) is two
    for rows, expected in ((0, "one"), (3, "3, or one way for all")):
        with pytest.raises(ConfigError, match=f"sampling is of 2 rows, expected {expected}"):
            two.check(V, rows)


def penalised(logits, read, generated, settings):
    """Bias, then the penalties, token by token, from their definitions: transformers', OpenAI's."""
    out = []
    for token, score in enumerate(logits):
        x = np.float32(score) + np.float32(settings["logit_bias"].get(token, 0))
        if token in read or token in generated:
            by = np.float32(settings["repetition_penalty"])
            x = x * by if x < 0 else x / by
        times = generated.count(token)
        x -= times * np.float32(settings["frequency_penalty"])
        out.append(x - (times > 0) * np.float32(settings["presence_penalty"]))
    return np.array(out, np.float32)


TOKENS = st.lists(st.integers(0, V - 1), max_size=6)


@given(
    logits=LOGITS,
    turns=st.lists(st.tuples(st.lists(st.integers(0, V - 1), min_size=1, max_size=6), TOKENS), min_size=1, max_size=3),
    settings=st.fixed_dictionaries(
        {
            "presence_penalty": st.sampled_from([0.0, -1.5, 0.5]),
            "frequency_penalty": st.sampled_from([0.0, 0.25, -2.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.25, 0.5]),
            "logit_bias": st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, 0.5, 7.0]), max_size=3),
        }
    ),
)
def test_penalties_and_bias_are_those_of_their_definitions(logits, turns, settings):
    """Over turns: what was generated in earlier ones was read. A row beside it that wants nothing keeps its scores."""
    uses, read = penalties.no_uses(2, V), []
    for prompt, generated in turns:
        padded = np.full((2, 6), V - 1, np.int32)
        padded[:, : len(prompt)] = prompt
        uses = after_reading(uses, jnp.asarray(padded), jnp.full(2, len(prompt)))
        for token in generated:
            uses = after_drawing(uses, jnp.full(2, token), jnp.array([True, True]))
        uses = after_drawing(uses, jnp.full(2, V - 1), jnp.array([False, False]))  # no row's
        read += prompt + generated
    sampling = Sampling.of_rows([Sampling.create(**settings), Sampling.create()], 2)
    both = jnp.tile(jnp.array(logits, jnp.float32), (2, 1))
    for early in (False, True):
        got = changed(both, uses, sampling, jnp.array([early, False]))
        expected = penalised(logits, read, turns[-1][1], settings)
        expected[1] = -np.inf if early else expected[1]
        np.testing.assert_allclose(got[0], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got[1], both[1])


def test_uses_are_counted_up_to_their_end():
    uses = jnp.full((1, V), 2**15 - 2, jnp.uint16)
    for _ in range(3):
        uses = after_drawing(uses, jnp.array([3]), jnp.array([True]))
    assert uses[0, 3] == 2**15 - 1, "never taken for a token that was read"


def test_rows_that_have_ended_cost_no_search(monkeypatch):
    """Their wishes stay in a slot that is free: only those of rows that go on are looked at."""
    searches, least_of_top = [], module._least_of_top

    def counted(*args):
        jax.debug.callback(lambda: searches.append(1))
        return least_of_top(*args)

    monkeypatch.setattr(module, "_least_of_top", counted)
    logits, own_keys = jnp.asarray(np.random.default_rng(0).normal(size=(2, V)), jnp.float32), keys(2)
    sampling = Sampling.of_rows([Sampling.create(1.0), Sampling.create(1.0, top_k=2)], 2)
    draw = jax.jit(lambda *args: sample(*args))
    rows = {}
    for active in ([True, True], [True, False]):
        rows[active[1]] = draw(logits, own_keys, sampling, np.array(active))
        jax.effects_barrier()
    assert searches == [1]
    assert rows[True][0] == rows[False][0]
