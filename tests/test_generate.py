"""generate and stream against the forward pass without a cache; batches, seeds, stops, growth."""

import copy
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import sepjax
from sepjax import Generator, Sampling, generate, loading, stream
from sepjax.config import AttentionConfig, Config, ConfigError
from sepjax.data.errors import DataError
from sepjax.data.special_tokens import SpecialTokens
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import SentencePieceModel
from sepjax.generation import limits
from sepjax.generation import prompts as encoded
from sepjax.generation.prompts import PromptError, encode_prompts, pad_prompts, row_keys
from sepjax.generation.row import Row, check_stop
from sepjax.generation.step import prefill
from sepjax.hub.gguf_file import GGUFError
from sepjax.loading import LoadError
from sepjax.measure import counted_compilations
from sepjax.model.attend import forward
from sepjax.model.transformer import Transformer, merge, split
from sepjax.run.checkpoint import save_params
from sepjax.separators import configured_table, flag_separators
from tests.commands import command
from tests.generation.tiny import ATTENTION, GATED, SHAPE, TEXTS, tiny_model, tiny_tokenizer

PROMPTS = ["The cat", "", "Où est-il? It ran away! One; two", "mat, and. looked"]
EVERYTHING_KEPT = AttentionConfig(pattern="fixed_interval", interval=1, window_size=6)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="module")
def answers(model, tokenizer):
    """What the prompts are answered with, greedily."""
    return generate(model, tokenizer, PROMPTS, max_new_tokens=40, stop_at_eos=False)


@functools.partial(jax.jit, static_argnums=(0, 3))
def best_next(graph, params, tokens, attention, table):
    """The best token after each of [1, 128] tokens, from one masked forward pass without any cache."""
    model, positions = merge(graph, params), jnp.arange(128, dtype=jnp.int32)[None]
    is_separator = flag_separators(tokens, positions, table, attention)
    hidden, _ = forward(model, tokens, positions, is_separator, None, attention)
    return jnp.argmax(model.logits(hidden[0])[:, : len(table)], axis=-1)


def check_greedy(model, tokenizer, prompt, answer, attention):
    """Every token of the answer is the best after those before it."""
    start = tokenizer.encode(prompt, bos=True)
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(start) + len(answer.token_ids)] = [*start, *answer.token_ids]
    best = best_next(*split(model), tokens, attention, jnp.asarray(configured_table(tokenizer, attention)))
    assert answer.token_ids == tuple(best[len(start) - 1 :][: len(answer.token_ids)].tolist())


def test_a_ragged_batch_is_what_whole_forward_passes_give(model, tokenizer, answers):
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        check_greedy(model, tokenizer, prompt, answer, ATTENTION)
        assert len(answer.token_ids) == 40
        assert answer.text == tokenizer.decode(answer.token_ids, continues=bool(prompt))
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens == len(tokenizer.encode(prompt, bos=True))
    assert len({answer.token_ids for answer in answers}) == len(PROMPTS)  # it does depend on the prompt


@pytest.mark.soak  # steps against whole passes: cache/test_growing_pass.py; a whole text at once: test_engine.py
def test_a_gated_model_generates_what_whole_forward_passes_give(tokenizer):
    """That a gate's cache may grow is in generation/cache/test_growing.py, streams without end in test_engine.py."""
    model = tiny_model(SHAPE, GATED)
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=60, stop_at_eos=False)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        check_greedy(model, tokenizer, prompt, answer, GATED)
        assert answer.cache.held < answer.cache.seen


def test_each_row_is_what_it_would_be_alone_and_what_stream_gives(model, tokenizer, answers):
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        events = list(stream(model, tokenizer, prompt, max_new_tokens=40, stop_at_eos=False))
        assert tuple(i for event in events for i in event.token_ids) == answer.token_ids
        assert "".join(event.text for event in events) == answer.text
        assert [event.finish_reason for event in events] == [None] * 39 + ["length"]
        assert (events[-1].cache.held, events[-1].cache.seen) == (answer.cache.held, answer.cache.seen)
    reversed_batch = generate(model, tokenizer, PROMPTS[::-1], max_new_tokens=40, stop_at_eos=False)
    assert [a.token_ids for a in reversed_batch[::-1]] == [a.token_ids for a in answers]


def test_draws_depend_on_a_rows_own_seed_only(model, tokenizer):
    settings = {"max_new_tokens": 40, "temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.001}
    seeds = [5, 6, 5, 7]
    together = generate(model, tokenizer, PROMPTS, seed=seeds, **settings)
    for prompt, seed, answer in zip(PROMPTS, seeds, together, strict=True):
        events = list(stream(model, tokenizer, prompt, seed=seed, **settings))
        assert tuple(i for event in events for i in event.token_ids) == answer.token_ids
        assert "".join(event.text for event in events) == answer.text
        assert events[-1].finish_reason == answer.finish_reason
    same_prompt = generate(model, tokenizer, PROMPTS[:1] * 4, seed=5, **settings)
    assert same_prompt[0] == dataclasses.replace(together[0], cache=same_prompt[0].cache)
    assert len({answer.token_ids for answer in same_prompt}) == 4  # one seed gives every row draws of its own
    assert generate(model, tokenizer, PROMPTS[:1] * 4, seed=6, **settings)[0] != same_prompt[0]


def test_prompts_in_groups_are_answered_as_in_one_batch(model, tokenizer):
    """By keys of their places in the whole list, and each its own way; a last group of two is filled up to four."""
    prompts = [*PROMPTS, "One; two", "a"]
    sampling = [Sampling.create(1.3, presence_penalty=x / 4) for x in range(len(prompts))]
    engine, settings, told = Generator(model, tokenizer), {"max_new_tokens": 40, "stop_at_eos": False}, []
    settings |= {"logprobs": True}
    grouped = engine.generate(prompts, sampling=sampling, seed=5, batch_size=4, answered=told.append, **settings)
    first = engine.generate(PROMPTS, sampling=sampling[:4], seed=5, **settings)
    last = engine.generate(prompts[2:], sampling=sampling[2:], seed=row_keys(5, len(prompts))[2:], **settings)
    for answer, alone in zip(grouped, [*first, *last[2:]], strict=True):
        assert dataclasses.replace(answer, cache=alone.cache, logprobs=alone.logprobs) == alone
        np.testing.assert_allclose(answer.logprobs, alone.logprobs, atol=1e-4)
    assert {i: answer for new in told for i, answer in new.items()} == dict(enumerate(grouped))
    lengths = [[grouped[i].prompt_tokens for i in new] for new in told]
    assert lengths == [sorted(new, reverse=True) for new in lengths]
    assert (len(lengths[0]), min(lengths[0]) >= max(lengths[1])) == (4, True)


@pytest.mark.parametrize("size", [1, 5, 8, 32])
def test_groups_are_of_one_size_and_as_small_as_their_number_allows(size):
    for total in (1, size, size + 1, 3 * size - 1, 101):
        groups = encoded.grouped([[0] * (i % 7 + 1) for i in range(total)], size)
        assert {i for group in groups for i in group} == set(range(total))
        assert len(groups) == -(-total // size)
        (rows,) = {len(group) for group in groups}
        assert rows <= min(size, -(-total // len(groups)) + 7)


def test_a_batch_beyond_all_memory_is_told_of_batch_size(model, tokenizer, monkeypatch):
    monkeypatch.setattr(limits, "_memory", lambda: 10_000)
    for bounded in (False, True):
        with pytest.raises(
            ConfigError, match=r"make it smaller, or answer fewer than 4 prompts at a time \(batch_size"
        ):
            generate(model, tokenizer, PROMPTS, bounded=bounded)
    with pytest.raises(ConfigError, match=r"make it smaller$"):
        generate(model, tokenizer, PROMPTS, batch_size=1)


@pytest.mark.soak  # ragged batches and growing caches below and in generation/cache
def test_caches_grow_without_a_trace(model, tokenizer):
    """Every token kept for ever by growing the global region is dense attention."""
    prompts = [PROMPTS[2], ""]
    kept = generate(model, tokenizer, prompts, max_new_tokens=95, stop_at_eos=False, attention=EVERYTHING_KEPT)
    for prompt, answer in zip(prompts, kept, strict=True):
        assert answer.cache.held == answer.cache.seen == answer.prompt_tokens + 94
        assert answer.cache.bytes == cache_bytes(6 + 128)  # it did grow, from 64
        assert len(answer.token_ids) == 95
        check_greedy(model, tokenizer, prompt, answer, AttentionConfig(pattern="dense"))


def cache_bytes(slots: int) -> int:
    """Of one row: k and v of L, K, H in float32, position and is_global; length and num_global."""
    return slots * (2 * 2 * 2 * 8 * 4 + 4 + 1) + 4 + 4


def test_the_cache_holds_what_the_method_says(model, tokenizer, answers):
    table = configured_table(tokenizer, ATTENTION)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = [*tokenizer.encode(prompt, bos=True), *answer.token_ids[:-1]]
        kept = sum(i >= len(ids) - 6 or i < 2 or bool(table[token]) for i, token in enumerate(ids))
        assert (answer.cache.held, answer.cache.seen) == (kept, len(ids))
        assert answer.kv_kept == kept / len(ids) < 1
        assert answer.cache.bytes == cache_bytes(6 + 64)


@pytest.mark.soak  # what stays is in cache/test_growing.py; that a cache grows at all is above
def test_an_endless_stream_of_sinks_and_window_never_grows(model, tokenizer):
    attention = dataclasses.replace(ATTENTION, pattern="sink_window")
    events = stream(model, tokenizer, "The", stop_at_eos=False, attention=attention, bounded=False)
    last = next(itertools.islice(events, 299, None))
    assert (last.cache.held, last.finish_reason) == (2 + 6, None)
    assert last.cache.seen == len(tokenizer.encode("The", bos=True)) + 299


def test_a_stream_over_the_growing_cache_ends_with_the_positions_that_int32_has(model, tokenizer, monkeypatch):
    prompt = tokenizer.encode("The", bos=True)
    assert np.iinfo(np.int32).max == Row.LAST_POSITION
    monkeypatch.setattr(Row, "LAST_POSITION", len(prompt) + 5)
    *events, last = stream(model, tokenizer, "The", stop_at_eos=False, bounded=False)
    assert (len(events), {event.finish_reason for event in events}, last.finish_reason) == (4, {None}, "length")


def test_stop_strings_end_a_row_across_tokens_and_leave_the_others_alone(model, tokenizer, answers):
    text = answers[0].text
    middle = next(i for i in range(8, len(text)) if text.index(text[i : i + 6]) == i)
    stop = text[middle : middle + 6]
    settings = {"max_new_tokens": 40, "stop_at_eos": False}
    stopped = generate(model, tokenizer, PROMPTS, stop=[stop, "never in it"], **settings)
    assert (stopped[0].text, stopped[0].finish_reason) == (text[:middle], "stop")
    assert stopped[0].token_ids == answers[0].token_ids[: len(stopped[0].token_ids)]
    assert stop in tokenizer.decode(stopped[0].token_ids, continues=True)
    assert stop not in tokenizer.decode(stopped[0].token_ids[:-1], continues=True)
    events = list(stream(model, tokenizer, PROMPTS[0], stop=stop, **settings))
    assert "".join(event.text for event in events) == text[:middle]
    assert tuple(i for event in events for i in event.token_ids) == stopped[0].token_ids
    assert (events[-1].finish_reason, events[-1].cache.seen) == ("stop", stopped[0].cache.seen)
    for before, after in zip(answers[1:], stopped[1:], strict=True):
        if stop not in before.text:
            assert before == after


def test_the_end_token_ends_a_row(model, tokenizer, answers):
    ends_early = copy.copy(tokenizer)
    drawn = answers[0].token_ids
    at = next(i for i in range(3, 40) if drawn.index(drawn[i]) == i)
    ends_early.eos_id = drawn[at]
    for answer, whole in zip(generate(model, ends_early, PROMPTS, max_new_tokens=40), answers, strict=True):
        size = whole.token_ids.index(drawn[at]) + 1 if drawn[at] in whole.token_ids else 40
        assert answer.token_ids == whole.token_ids[:size]
        assert answer.finish_reason == ("eos" if drawn[at] in whole.token_ids else "length")
    events = list(stream(model, ends_early, PROMPTS[0], max_new_tokens=40))
    assert (len(events), events[-1].finish_reason) == (at + 1, "eos")


def test_every_end_token_of_the_model_and_the_users_ends_a_row(model, tokenizer, answers):
    """The model's are of its files and give "eos"; the user's give "stop", are no part of the text, compile nothing."""
    drawn = answers[0].token_ids
    at, later = [i for i in range(3, 40) if drawn.index(drawn[i]) == i and tokenizer.token_bytes(drawn[i])][:2]
    special = SpecialTokens(end_ids={"generation_config.json": (drawn[later], drawn[at])})
    proto = tokenizer._model.files()["tokenizer.model"]
    with_ends = Tokenizer(SentencePieceModel(proto, special))
    assert set(with_ends.end_ids) == {tokenizer.eos_id, drawn[at], drawn[later]}
    settings = {"max_new_tokens": 40, "stop_at_eos": True}
    ended = generate(model, with_ends, PROMPTS, **settings)[0]
    assert (ended.token_ids, ended.finish_reason) == (drawn[: at + 1], "eos")
    with counted_compilations() as compiled:
        stopped = generate(model, tokenizer, PROMPTS, stop_token_ids=[drawn[at]], **settings)[0]
        longer = generate(model, with_ends, PROMPTS, stop_at_eos=False, max_new_tokens=40)[0]
    assert compiled == []
    assert (stopped.token_ids, stopped.finish_reason) == (drawn[: at + 1], "stop")
    assert stopped.text == tokenizer.decode(drawn[:at], continues=True)
    assert len(longer.token_ids) == 40
    for bounded in (False, True):
        events = list(stream(model, tokenizer, PROMPTS[0], stop_token_ids=[drawn[at]], bounded=bounded, **settings))
        ids = [i for event in events for i in event.token_ids]
        assert (events[-1].finish_reason, ids.index(drawn[at])) == ("stop", len(ids) - 1)
        assert "".join(event.text for event in events) == tokenizer.decode(ids[:-1], continues=True)


def test_sampling_defaults_are_the_models_where_they_are_asked_for(model, tokenizer):
    proto = tokenizer._model.files()["tokenizer.model"]

    def answer(sampling, **settings):
        theirs = Tokenizer(SentencePieceModel(proto, SpecialTokens(sampling=sampling)))
        return generate(model, theirs, PROMPTS, max_new_tokens=20, seed=3, **settings)[0].token_ids

    hot = {"do_sample": True, "temperature": 3.0, "top_p": 0.9}
    asked = answer(hot, sampling_defaults=True)
    assert asked == answer({}, temperature=3.0, top_p=0.9, top_k=50)  # 50 is transformers' own default
    assert answer(hot) == answer({}) != asked
    assert answer(hot, sampling_defaults=True, temperature=0.0) == answer({})  # what is given counts more
    assert answer({"do_sample": False, "temperature": 3.0}, sampling_defaults=True) == answer({})
    penalised = answer({"repetition_penalty": 1.5}, sampling_defaults=True)  # of the best token, too
    assert penalised == answer({}, repetition_penalty=1.5) != answer({})
    assert answer({}, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0) == answer({})  # all tokens, as they are anyway
    with pytest.raises(ConfigError, match="top_k=5 does nothing"):  # their file says that the best token is taken
        answer({"do_sample": False}, sampling_defaults=True, top_k=5)
    for sampling, message in (
        ({}, "no generation_config.json"),
        ({"do_sample": True, "top_p": "high"}, r"top_p='high', expected float"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1.0 must be"),
        ({"repetition_penalty": "much"}, r"repetition_penalty='much', expected float"),
    ):
        with pytest.raises(ConfigError, match=message):
            answer(sampling, sampling_defaults=True)


def test_text_comes_in_whole_characters(model, tokenizer):
    for seed in range(5):  # hot draws spell many bytes that are part of a character, or of none
        events = list(stream(model, tokenizer, "é", max_new_tokens=40, temperature=5.0, seed=seed, stop_at_eos=False))
        ids = [i for event in events for i in event.token_ids]
        whole = tokenizer.decode(ids, continues=True)
        assert "".join(event.text for event in events) == whole
        assert any(event.text == "" for event in events)
        for n in range(len(events)):
            assert whole.startswith("".join(event.text for event in events[:n]))


def test_no_token_beyond_the_tokenizer_is_drawn(model, tokenizer):
    assert tokenizer.vocab_size < model.config.vocab_size
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=64, temperature=50.0, stop_at_eos=False)
    assert max(max(answer.token_ids) for answer in answers) < tokenizer.vocab_size


def test_other_lengths_and_settings_compile_nothing(model, tokenizer, answers):
    generate(model, tokenizer, PROMPTS, max_new_tokens=40, stop="x")
    with counted_compilations() as compiled:
        generate(model, tokenizer, PROMPTS[::-1], max_new_tokens=64, temperature=0.7, top_k=3, top_p=0.5, min_p=0.1)
        generate(model, tokenizer, ["a", "b, c", [1, 2, 3], "d" * 50], max_new_tokens=3, seed=[1, 2, 3, 4])
        generate(model, tokenizer, PROMPTS, max_new_tokens=30, stop=["y", "zz"], stop_at_eos=False)
    assert compiled == []
    with counted_compilations() as compiled:
        jax.jit(lambda x: x + len(PROMPTS))(jnp.ones(3))
    assert compiled  # the counter counts


@pytest.mark.soak  # one that keeps every token, above, is another one, too
def test_the_pattern_can_be_another_than_in_training(model, tokenizer, answers):
    dense = AttentionConfig(pattern="dense")
    got = generate(model, tokenizer, PROMPTS, max_new_tokens=40, stop_at_eos=False, attention=dense)
    for prompt, answer in zip(PROMPTS, got, strict=True):
        check_greedy(model, tokenizer, prompt, answer, dense)
    assert [a.token_ids for a in got] != [a.token_ids for a in answers]


@pytest.fixture
def unchecked(monkeypatch):
    """Types of arguments are not checked by the tests' own hook: as users call it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        ({"temperature": -1.0}, "temperature=-1.0 must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be"),
        ({"top_k": 3}, "top_k=3 does nothing where the best token is always taken; set temperature"),
        ({"min_p": 0.1, "temperature": 0.0}, "min_p=0.1 does nothing"),
        ({"logit_bias": [(3, 1.0)]}, r"logit_bias=\[\(3, 1\.0\)\] has the wrong type, expected a mapping"),
        ({"seed": [1, 2]}, "got 2 seeds for 1 prompts"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"seed": jax.random.key(0)}, r"seed has typed keys of shape \(\), expected one a prompt: \(1,\)"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"stop": ["a", ""]}, "stop string is empty"),
        ({"stop_token_ids": [3, 10**6]}, "stop_token_ids has 1000000, which is outside the vocabulary"),
        ({"attention": AttentionConfig(window_size=0)}, "attention.window_size=0"),
        ({"attention": "dense"}, "attention='dense' has the wrong type, expected AttentionConfig"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 has the wrong type, expected a whole number"),
        ({"max_new_tokens": 2**40}, "max_new_tokens=1099511627776 must be at most 2147483647"),
        ({"max_new_tokens": True}, "max_new_tokens=True has the wrong type"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens=9 must be at most max_new_tokens=3"),
        ({"max_repeats": "1"}, "max_repeats='1' has the wrong type"),
        ({"temperature": "hot"}, "temperature='hot' has the wrong type, expected a number"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k=1.5 has the wrong type, expected a whole number"),
        ({"temperature": 1.0, "top_k": 2**31}, "top_k=2147483648 must be at most"),
        ({"temperature": 1.0, "seed": "a"}, "seed='a' has the wrong type"),
        ({"temperature": 1.0, "seed": [0.5]}, "seed=0.5 has the wrong type"),
        ({"temperature": 1.0, "seed": None}, "seed=None has the wrong type"),
        ({"logit_bias": {"5": 1.0}}, "a token id of logit_bias='5' has the wrong type"),
        ({"logit_bias": {5: "a"}}, "logit_bias of token 5='a' has the wrong type"),
        ({"stop_token_ids": [5.5]}, "an id of stop_token_ids=5.5 has the wrong type"),
    ],
)
def test_settings_that_cannot_work_are_named(model, tokenizer, unchecked, settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, tokenizer, "a", **settings)


def test_things_of_another_type_are_named(model, tokenizer, unchecked):
    for arguments, message in (
        (("smollm2-135m", tokenizer), "model='smollm2-135m' has the wrong type, expected Transformer"),
        ((tokenizer, model), "expected Transformer"),
        ((model, None), "tokenizer=None has the wrong type, expected Tokenizer"),
    ):
        for call in (generate, stream):
            with pytest.raises(ConfigError, match=message):
                call(*arguments, "a", max_new_tokens=1)
    engine: Any = Generator(model, tokenizer)
    hot = Sampling.create(1.0)
    for sampling in ({"temperature": 1.0}, [hot, 1.0]):
        with pytest.raises(ConfigError, match=r"sampling=.* has the wrong type, expected Sampling"):
            engine.generate(["a", "b"], sampling=sampling)
    with pytest.raises(ConfigError, match="got 1 for 2 prompts"):
        engine.generate(["a", "b"], sampling=[hot])
    with pytest.raises(ConfigError, match=r"sampling=.* has the wrong type, expected Sampling"):
        engine.stream("a", sampling=[hot])


def test_a_dense_stream_without_end_is_refused_at_once(model, tokenizer):
    with pytest.raises(ConfigError, match="cache without end"):
        stream(model, tokenizer, "a", attention=AttentionConfig(pattern="dense"))


def test_learned_positions_have_an_end(tokenizer):
    """That decoding is right up to the last one is in tests/generation/cache/test_growing_pass.py."""
    learned = tiny_model(dataclasses.replace(SHAPE, position_embedding="learned", max_positions=20))
    prompt = tokenizer.encode("The cat", bos=True)
    most = 20 - len(prompt) + 1
    assert stream(learned, tokenizer, prompt, max_new_tokens=most).finish_reason is None
    with pytest.raises(ConfigError, match=f"20 learned positions .* max_new_tokens to {most} or less"):
        generate(learned, tokenizer, [prompt], max_new_tokens=most + 1)
    with pytest.raises(ConfigError, match="without end would pass the 20 learned positions"):
        stream(learned, tokenizer, prompt)


def test_padding_beyond_the_last_learned_position_touches_nothing(tokenizer):
    """Prompts are padded to 64 tokens, and there are 20 positions."""
    shape = dataclasses.replace(SHAPE, position_embedding="learned", max_positions=20, num_layers=1)
    graph, params = split(tiny_model(shape))
    tokens, lengths = pad_prompts([list(range(3, 3 + n)) for n in (20, 2)])
    table, attention = configured_table(tokenizer, ATTENTION), ATTENTION

    @jax.jit
    def scores(params):
        found, _ = prefill(graph, params, tokens, lengths, table, attention, window_size=64, capacity=0)
        few, positions = tokens[:, :20], np.broadcast_to(np.arange(20, dtype=np.int32), (2, 20))
        model = merge(graph, params)
        hidden, _ = forward(model, few, positions, flag_separators(few, positions, table, attention), None, attention)
        return found, model.logits(hidden[np.arange(2), lengths - 1])

    np.testing.assert_allclose(*scores(params), atol=1e-5)


def test_prompts_that_are_none_are_refused(model, tokenizer):
    no_start = copy.copy(tokenizer)
    no_start.bos_id = None
    for prompts, message in (
        (["a", []], "prompt 1 has no tokens"),
        ([], "empty list"),
        ([[0, 300_000]], r"outside the vocabulary of \d+ tokens: \[300000\]"),
        ([[-1]], r"\[-1\]"),
    ):
        with pytest.raises(PromptError, match=message):
            generate(model, tokenizer, prompts, max_new_tokens=1)
    with pytest.raises(PromptError, match="no BOS token"):
        generate(model, no_start, "", max_new_tokens=1)
    with pytest.raises(DataError, match="surrogate"):
        generate(model, tokenizer, "\ud800", max_new_tokens=1)
    for prompts, message in (
        (3, "got int"),
        ([1, 2], r"\[\[1, 2, 3\]\]"),
        (np.array([1, 2]), r"\[\[1, 2, 3\]\]"),
        (np.array(1), "got ndarray"),
        ([None], "got NoneType"),
        ([b"a"], "bytes"),
        ([[1], [2, 1.5]], r"prompt 1 has 1\.5 among its token ids, a float; they are whole numbers"),
    ):
        with pytest.raises(TypeError, match=message):
            encode_prompts(tokenizer, prompts)
    for prompts in (jnp.array([[1, 2]]), [jnp.array([1, 2])], np.array([[1, 2]]), [[jnp.int32(1), np.int64(2)]]):
        assert encode_prompts(tokenizer, prompts) == [[1, 2]]
    for stop in (["a", 1], 5, None, b"a"):
        with pytest.raises(TypeError, match="stop must be"):
            check_stop(stop)


def test_a_tokenizer_too_large_for_the_model_is_refused(tokenizer):
    small = tiny_model(dataclasses.replace(SHAPE, vocab_size=tokenizer.vocab_size - 1))
    with pytest.raises(ConfigError, match=f"{tokenizer.vocab_size} tokens but the model only"):
        generate(small, tokenizer, "a", max_new_tokens=1)


@pytest.fixture(scope="module")
def workdir(model, tokenizer, tmp_path_factory) -> Path:
    """A run before its first step."""
    folder = tmp_path_factory.mktemp("run")
    save_params(folder, Config(model=SHAPE, attention=ATTENTION), split(model)[1])
    tokenizer.save(folder / "tokenizer")
    return folder


def test_a_run_is_loaded(workdir, model, tokenizer):
    loaded, its_tokenizer = sepjax.load(workdir)
    assert (loaded.config, loaded.attention) == (SHAPE, ATTENTION)
    assert its_tokenizer.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    jax.tree.map(np.testing.assert_array_equal, split(loaded)[1], split(model)[1])
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = sepjax.lode


def test_the_command_generates_from_a_run(workdir, model, tokenizer, capfd, monkeypatch):
    load = loading.load

    def load_as_here(*args, **settings):
        """Numbers that no device is told to have, as all others here: the same programs."""
        found, its_tokenizer = load(*args, **settings)
        graph, params = split(found)
        return merge(graph, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)), its_tokenizer

    monkeypatch.setattr(loading, "load", load_as_here)
    flags = ("--prompt=The cat", "--max_new_tokens=20", "--temperature=1", "--seed=1")
    ended = command(capfd, "generate", f"--workdir={workdir}", *flags)
    assert ended.code == 0, ended.err
    events = list(stream(model, tokenizer, "The cat", max_new_tokens=20, temperature=1.0, seed=1))
    assert ended.out == "".join(event.text for event in events) + "\n"
    assert len(ended.out) > 5
    assert f"cache holds {events[-1].cache.held} of {events[-1].cache.seen} tokens" in ended.err


def test_other_paths_say_what_they_are(workdir, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "model.gguf").touch()
    for path, kind, message in (
        (tmp_path / "nothing", FileNotFoundError, "no such folder"),
        (tmp_path / "hub", LoadError, "a folder without checkpoints or config"),
        (tmp_path / "bare", LoadError, r"a folder with config\.json and without weights"),
        (tmp_path / "model.gguf", GGUFError, "is empty; download it again"),
        (tmp_path, LoadError, "folder without checkpoints"),
    ):
        with pytest.raises(kind, match=message):
            sepjax.load(path)
    with pytest.raises(FileNotFoundError, match="step 7"):
        sepjax.load(workdir, step=7)
