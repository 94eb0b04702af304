"""Requests that come and go: each gets what it would get alone; nothing is compiled, nothing grows, nobody waits."""

import dataclasses
import gc
import inspect
import itertools
import sys
import threading
import weakref
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import pytest

from sepjax import Generator, Sampling, SlotRequest
from sepjax.config import ConfigError
from sepjax.generation.prompts import PromptError
from sepjax.generation.readers import BoundedReader
from sepjax.generation.saved import StreamStateError
from sepjax.generation.slot_arrival import arrival
from sepjax.generation.slot_pool import Pool
from sepjax.generation.slot_request import Flight
from sepjax.generation.slot_turns import ReadShape, Turns
from sepjax.generation.slots import SlotError, Slots
from sepjax.measure import counted_compilations
from sepjax.model.transformer import merge, split
from tests.generation.cache.common import ListStream
from tests.generation.tiny import ATTENTION, LONG, ROWS, tiny_engine, tiny_model, tiny_tokenizer, uncounted


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def all_slots(engine):
    """That make up to three tokens in a launch; as on an accelerator, programs read several prompts, and rows stay."""
    return Slots(engine.prepared, BoundedReader(engine.prepared), ROWS, steps=3, together=3, pool=3)


@pytest.fixture
def slots(all_slots):
    """Made once, empty at each test's begin."""
    yield all_slots
    for number in list(all_slots._known):
        all_slots.cancel(number)
    while not all_slots.is_idle:
        all_slots.step()


def run(slots: Slots, requests, *, every=1, cancel=None) -> list[list]:
    """The events of every request; a new one is submitted every so many steps. `cancel`: after how many events."""
    events: dict[int, list] = {}
    numbers, waiting, steps = [], list(requests), itertools.count()
    while waiting or not slots.is_idle:
        if waiting and next(steps) % every == 0:
            numbers.append(slots.submit(waiting.pop(0)))
            events[numbers[-1]] = []
        for number, event in slots.step():
            most = cancel and cancel.get(numbers.index(number))
            if most and len(events[number]) == most:
                continue  # it came with the last one that was wanted
            events[number].append(event)
            if len(events[number]) == most:
                slots.cancel(number)
    return [events[number] for number in numbers]


def random_request(rng: np.random.Generator) -> SlotRequest:
    """Prompts of 1 to 60 tokens, a third of them longer than the cache; every way to draw and to end."""
    sampling = {
        0: Sampling.create(),
        1: Sampling.create(1.5),
        2: Sampling.create(1.2, top_k=5, min_p=0.02),
        3: Sampling.create(0.9, top_p=0.8),
        4: Sampling.create(presence_penalty=1.5, repetition_penalty=1.3),
        5: Sampling.create(1.1, frequency_penalty=0.7, logit_bias={int(i): 5.0 for i in rng.integers(3, 300, 9)}),
    }[int(rng.integers(6))]
    most, ends = int(rng.integers(1, 25)), rng.integers(3, 300, int(rng.integers(20))).tolist()
    return SlotRequest(
        rng.integers(3, 300, int(rng.integers(1, 61))).tolist(),
        max_new_tokens=most,
        min_new_tokens=int(rng.integers(most + 1)) if len(ends) < 15 else 0,
        sampling=sampling,
        seed=int(rng.integers(5)),
        stop=[["."], ["e", "at"], []][int(rng.integers(3))],
        stop_token_ids=ends,
        stop_at_eos=bool(rng.integers(2)),
        max_repeats=int(rng.integers(2)) * 3,
        logprobs=bool(rng.integers(2)),
        top_logprobs=int(rng.integers(3)) * 2,
    )


@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.soak)])
def test_each_request_gets_what_it_would_get_alone(slots, count):
    """Whoever its neighbours are, whenever they come and go: the same tokens, texts, log-probabilities, cache."""
    rng = np.random.default_rng(0)
    requests = [random_request(rng) for _ in range(count)]
    cancel = {i: int(rng.integers(1, 12)) for i in rng.choice(count, count // 5, replace=False).tolist()}
    before = slots.cache_bytes
    with counted_compilations() as compiled:
        together = run(slots, requests, cancel=cancel)
        alone = [run(slots, [request])[0] for request in requests]
    assert compiled == []
    assert slots.cache_bytes == before
    for i, (got, expected) in enumerate(zip(together, alone, strict=True)):
        assert got == expected[: min(cancel.get(i, 99), len(expected))], i
    reasons = {events[-1].finish_reason for events in alone}
    assert reasons >= {"stop", "length"}
    assert None in {events[-1].finish_reason for events in together}, "some were cancelled in the middle"
    assert (slots.num_free, slots.num_waiting) == (ROWS, 0)
    assert repr(slots) == f"Slots({ROWS} rows, {ROWS} free, 0 requests wait)"


@pytest.mark.soak  # rows alone: test_each_request_gets_what...; a batch and a stream: test_generate.py
def test_a_row_gives_what_a_stream_and_a_bounded_batch_give(engine, slots):
    prompts = ["The cat", LONG, "Où est-il? It ran away! One; two", "mat"]  # a batch of as many rows as elsewhere
    settings = {"max_new_tokens": 40, "stop_at_eos": False, "top_logprobs": 3}
    sampling = [
        Sampling.create(),
        Sampling.create(1.3, top_k=50, frequency_penalty=1.5, repetition_penalty=1.2),
        Sampling.create(0.8, logit_bias={77: 100.0}),
        Sampling.create(1.0),
    ]
    rows = run(
        slots,
        [
            SlotRequest(prompt, sampling=how, seed=5 + i, **settings)
            for i, (prompt, how) in enumerate(zip(prompts, sampling, strict=True))
        ],
    )
    batch = engine.generate(prompts, bounded=True, sampling=sampling, seed=[5, 6, 7, 8], **settings)
    for i, (row, answer) in enumerate(zip(rows, batch, strict=True)):
        stream = list(engine.stream(prompts[i], bounded=True, sampling=sampling[i], seed=5 + i, **settings))
        for events in (row, stream):
            assert tuple(token for event in events for token in event.token_ids) == answer.token_ids
            assert "".join(event.text for event in events) == answer.text
            assert [event.logprob for event in events] == pytest.approx(answer.logprobs, abs=1e-4)
            for event, top in zip(events, answer.top_logprobs, strict=True):
                assert [token for token, _ in event.top_logprobs] == [token for token, _ in top]
                assert [x for _, x in event.top_logprobs] == pytest.approx([x for _, x in top], abs=1e-4)
                assert dict(event.top_logprobs).get(event.token_ids[0], event.logprob) == event.logprob
            assert (events[-1].cache.held, events[-1].cache.seen) == (answer.cache.held, answer.cache.seen)
            assert events[-1].finish_reason == answer.finish_reason == "length"
    assert len({answer.token_ids for answer in batch}) == ROWS
    told = [  # without the types' checks: 1 is as good as true
        slots._device.arrivals.of_host(
            inspect.unwrap(arrival)(engine.prepared, None, (), -1, 0, x, x, None, is_reading=True)
        ).tolist()
        for x in (True, 1, False)
    ]
    assert told[0] == told[1] != told[2]
    assert [top[0][0] for top in batch[0].top_logprobs] == list(batch[0].token_ids), "the best token is drawn"
    assert set(batch[2].token_ids) == {77}
    assert max(batch[2].logprobs) < -1, "by the model's own scores, without the bias"
    plain = engine.stream(prompts[1], bounded=True, max_new_tokens=40, seed=6, sampling=Sampling.create(1.3, top_k=50))
    drawn = [i for event in plain for i in event.token_ids]
    repeats = [40 - len(set(tokens)) for tokens in (batch[1].token_ids, drawn)]
    assert repeats[0] < repeats[1]


def test_nothing_ends_a_row_before_as_many_tokens_as_it_must_have(engine, slots):
    """As if its ends had been impossible until then, and it had begun there; of batches: test_engine.py."""
    prompts, early = ["The cat", LONG, "Où est-il? It ran away! One; two", "mat"], 6
    ids = [engine.tokenizer.encode(prompt, bos=True) for prompt in prompts]

    def tokens(events):
        return tuple(token for event in events for token in event.token_ids)

    free = [tokens(engine.stream(p, bounded=True, max_new_tokens=40, stop_at_eos=False)) for p in ids]
    ends = sorted({token for row in free for token in row[:4]})
    settings = {"max_new_tokens": 40, "min_new_tokens": early, "stop_token_ids": ends}
    never = Sampling.create(logit_bias=dict.fromkeys([*ends, *engine.tokenizer.end_ids], -100.0))
    rows = run(slots, [SlotRequest(p, **settings) for p in ids])
    for prompt, row in zip(ids, rows, strict=True):
        first = tokens(engine.stream(prompt, bounded=True, sampling=never, max_new_tokens=early))
        then = engine.stream([*prompt, *first], bounded=True, max_new_tokens=40 - early, stop_token_ids=ends)
        expected = first + tokens(then)
        stream = engine.stream(prompt, bounded=True, **settings)
        assert tokens(row) == tokens(stream) == expected
        assert row[-1].finish_reason == then.finish_reason
        stream.feed("One")  # a new turn has to have as many
        assert len(tokens(stream)) > early or stream.finish_reason == "length"
    assert "stop" in {row[-1].finish_reason for row in rows}
    text = engine.tokenizer.decode(list(free[1]), continues=True)
    shown = len(engine.tokenizer.decode(list(free[1][:early]), continues=True))
    letter = next(x for x in text[:shown] if x in text[shown:])
    (row,) = run(slots, [SlotRequest(ids[1], min_new_tokens=early, max_new_tokens=40, stop=letter, stop_at_eos=False)])
    assert "".join(event.text for event in row) == text[: text.index(letter, shown)]
    with pytest.raises(ConfigError, match="goes with up to 16 end tokens in slots, got"):
        slots.submit(SlotRequest([5], min_new_tokens=1, stop_token_ids=range(20)))


def test_a_continued_conversation_has_the_penalties_of_its_whole_text_and_tells_what_is_held(engine, slots):
    settings: dict[str, Any] = {"max_new_tokens": 12, "stop_at_eos": False}
    settings["sampling"] = Sampling.create(presence_penalty=2.0, repetition_penalty=1.5)
    first = slots.submit(SlotRequest(LONG, keep=True, **settings))
    ids = [*engine.tokenizer.encode(LONG, bos=True)]
    table, events = engine.prepared.table, []
    limits = [getattr(ATTENTION, x) for x in ("num_sinks", "max_separators", "window_size", "cache_size")]
    held = ListStream(*limits)
    for token in ids:
        held.append(bool(table[token]))
    with pytest.raises(SlotError, match=f"request {first} has no row"):
        slots.view(first)
    while first in slots._known:
        slots.can_save(first)  # the next launch makes one token of it
        new = [event for _, event in slots.step()]
        for event in new:
            events.append(event)
            if len(events) > 1:
                held.append(bool(table[ids[-1]]))
            ids += event.token_ids
        for event in new[-1:]:
            view = slots.view(first)
            assert (view.seen, view.held) == (event.cache.seen, event.cache.held)
            assert view.positions().tolist() == sorted(held.attended())
            assert (view.kept, view.nbytes) == (held.kept, event.cache.bytes)
    turn = engine.tokenizer.encode("mat, and.")
    (whole,) = run(slots, [SlotRequest([*ids, *turn], **settings)])
    (continued,) = run(slots, [SlotRequest("mat, and.", resume=slots.save(first), **settings)])
    assert [event.token_ids for event in continued] == [event.token_ids for event in whole]
    (other,) = run(slots, [SlotRequest([*ids, *turn], **settings | {"sampling": Sampling.create()})])
    assert [event.token_ids for event in other] != [event.token_ids for event in whole]


def test_nobody_waits_longer_than_for_one_run_and_free_rows_are_taken_at_once(slots):
    first, *others = (slots.submit(SlotRequest("The cat", stop_at_eos=False)) for _ in range(ROWS - 1))
    while len({number for number, _ in slots.step()}) < ROWS - 1:
        pass
    long = slots.submit(SlotRequest([5] * 300, max_new_tokens=30))  # many runs, through a cache of 20
    other = slots.submit(SlotRequest("mat", max_new_tokens=3))
    heard: dict[int, int] = {}
    for _ in range(100):
        now = [number for number, _ in slots.step()]
        assert all(now.count(x) == 3 for x in (first, *others)), "three tokens each, whatever else is read"
        for number in now:
            heard[number] = heard.get(number, 0) + 1
        if heard.get(long) and heard.get(other) is None:
            assert slots.num_waiting == 1, "there was no row"
            slots.cancel(first)
            soon = [number for _ in range(2) for number, _ in slots.step()]  # one was on its way already
            assert other in soon, "the row was free at once, and the prompt is short"
            break
    else:
        pytest.fail("the long prompt was never read")
    slots.cancel(first)  # nothing is left of it
    for x in others:
        slots.cancel(x)
    assert {number for number, _ in slots.step()} <= {long, other}


def test_prompts_that_are_read_take_turns(slots):
    """Two long ones, that could have every run between them, and a short one after them."""
    for _ in range(2):
        slots.submit(SlotRequest([5] * 2000, max_new_tokens=1))
    short = slots.submit(SlotRequest("mat", max_new_tokens=1))
    assert short in [number for _ in range(4) for number, _ in slots.step()]


def test_a_prompt_s_next_run_is_asked_for_before_the_last_was_looked_at(slots):
    """It is for a row that has taken up all of that; of one that had to compact on the way it is forgotten."""
    turns, prompt = Turns((ReadShape(2, 8, 16),), 1, 100), [*range(3, 23)]
    slot = slots._known[slots.submit(SlotRequest(prompt))]
    slot.row.seen = 95

    def ask(before):
        (read,), runs = turns.next([slot, None], before)
        flight = Flight((slot, None), 0, np.zeros(2, np.int32), tuple(runs), Future(), None)
        part = read.tokens[0, : read.left[0]].tolist()
        return flight, (int(read.after[0]), part, bool(read.is_last[0]))

    first, found = ask(None)
    assert found == (-1, prompt[:8], False)
    second, found = ask(first)
    assert found == ((95 + 8) % 100, prompt[8:16], False)
    slot.pending, slot.row.seen = prompt[3:], 95 + 3  # the first stopped there
    assert ask(second.without(slot))[1] == (-1, prompt[3:11], False)
    slot.pending, slot.row.seen = prompt[8:], 95 + 8
    third, found = ask(second)
    assert found == ((95 + 16) % 100, prompt[16:], True)
    slot.pending, slot.row.seen = prompt[16:], 95 + 16
    assert turns.next([slot, None], third) == ([], [])


def standing(row):
    """What of a saved row are whole numbers, and where what it holds stands in the text."""
    state: Any = jax.device_get(dataclasses.replace(row.state, key=jax.random.key_data(row.state.key)))
    numbers = [x.tolist() for x in jax.tree.leaves(dataclasses.replace(state, done=None)) if x.dtype.kind in "iu"]
    view = row.view()
    return numbers, [view.positions(layer).tolist() for layer in range(2)], row.pending, row.has_drawn, row.row


# One step a launch is soak: three find more, and tests/serve has three, too.
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_a_row_that_the_host_ends_at_its_first_token_is_saved_there(engine, slots, steps):
    """By then the device was asked for more. Only such a row goes singly: the others make whole launches."""
    slots = slots if steps == 3 else engine.slots(2)
    beside = slots.submit(SlotRequest("mat", stop_at_eos=False))
    always: dict[str, Any] = {"stop_at_eos": False, "sampling": Sampling.create(1.3, logit_bias={104: 100.0})}  # "c"
    always["max_new_tokens"] = 9
    ends: list[dict[str, Any]] = [{"stop": ["c"]}, {"stop": ["cc"]}, {"stop_token_ids": [*range(3, 19), 104]}]
    for prompt, end in itertools.product(["The cat", LONG], ends):
        number = slots.submit(SlotRequest(prompt, keep=True, **end, **always))
        while number not in slots._kept:
            slots.step()
        alone = engine.stream(prompt, bounded=True, **end, **always)
        assert [event.finish_reason for event in alone][-1] == "stop"
        assert standing(slots.save(number)) == standing(alone.saved())
    singly = slots.submit(SlotRequest("The cat", stop=["never said"], stop_at_eos=False, keep=True))
    counts = [[n for n, _ in slots.step()] for _ in range(9)][3:]
    assert [(found.count(beside), found.count(singly)) for found in counts] == [(steps, 1)] * 6
    slots.cancel(singly)
    other = slots.submit(SlotRequest("The cat", max_new_tokens=2 * steps + 1, stop_at_eos=False))
    settled = False
    while other in slots._known:  # its last events are settled when another row is looked at
        if not any(n == other for n, _ in slots.step()):
            continue
        slots.view(beside)
        if any(n == other for n, _ in slots._settled) and other not in slots._known:
            settled = True
            slots.cancel(other)
            assert other not in [n for n, _ in slots.step()]
    assert settled is (steps > 1)
    slots.cancel(beside)


def flat(events):
    """Texts and tokens, whether they came one by one or at once."""
    last = uncounted(events)[-1]
    return "".join(e.text for e in events), [i for e in events for i in e.token_ids], *last[2:4]


def test_rows_whose_end_is_known_give_way_before_it_and_tokens_may_come_at_once(engine, slots):
    """Twelve at four rows, of every length; of those that are kept not all have room in the pool."""
    rng = np.random.default_rng(4)
    settings: dict[str, Any] = {"stop_at_eos": False, "keep": True}
    wanted = [
        {"max_new_tokens": 1 + i, "sampling": Sampling.create(1.3, logit_bias=bias), "seed": i, "stop": stop}
        for i, (bias, stop) in enumerate([({}, ()), ({}, ()), ({104: 100.0}, "c"), *[({}, ())] * 9])
    ]
    prompts = [rng.integers(3, 300, size).tolist() for size in (3, 30, 9, 4, 70, 2, 11, 5, 6, 8, 3, 7)]
    known = {}
    for prompt, each in zip(prompts, wanted, strict=True):
        number = slots.submit(SlotRequest(prompt, **settings, **each))
        known[number] = slots._known[number]
    events: dict[int, list] = {number: [] for number in known}
    parts = []
    while not slots.is_idle:
        parts.append(slots.num_ending)
        for part in slots.parts(joined=True):
            for number, event in part:
                events[number].append(event)
    assert sum(slot.has_left for slot in known.values()) >= 2
    assert max(parts) > 0
    assert max(len(event.token_ids) for its in events.values() for event in its) == 3
    for prompt, each, (number, its) in zip(prompts, wanted, events.items(), strict=True):
        stream = engine.stream(prompt, bounded=True, stop_at_eos=False, **each)
        assert flat(its) == flat(list(stream)), number
        assert standing(slots.save(number)) == standing(stream.saved())
    assert slots._device.pool.num_free == 3, "nobody has what was saved any more"


@pytest.mark.parametrize("pattern", ["separator", pytest.param("watched", marks=pytest.mark.soak)])
def test_conversations_continue_their_cache(engine, slots, pattern, tmp_path):
    """A row that was kept goes on in another row, as a stream that was fed does; so does one saved in the middle."""
    if pattern == "watched":
        engine = tiny_engine(pattern=pattern, watch_after=2)
        slots = engine.slots(ROWS)
    sampling = Sampling.create(1.4, frequency_penalty=1.0, repetition_penalty=1.2)
    settings = {"max_new_tokens": 15, "stop_at_eos": False, "sampling": sampling}
    stream = engine.stream(LONG, bounded=True, seed=3, **settings)
    expected = [list(stream)]
    stream.feed("mat, and.")
    expected.append(list(stream))

    number = slots.submit(SlotRequest(LONG, seed=3, keep=True, **settings))
    got = [event for _, event in itertools.chain.from_iterable(slots.step() for _ in range(40))]
    assert uncounted(got) == expected[0]
    kept = slots.save(number)
    with pytest.raises(SlotError, match=f"request {number} has no row"):
        slots.save(number)
    slots.submit(SlotRequest("The cat", stop_at_eos=False))  # has the first row now
    second = slots.submit(SlotRequest("mat, and.", resume=kept, **settings))
    events = []
    while len(events) < 6:
        events += [event for n, event in slots.step() if n == second]
    middle = slots.save(second)
    events += [event for n, event in slots._settled if n == second]  # of the launch that was looked at before
    slots.cancel(second)
    again = slots.submit(SlotRequest(None, resume=middle, **settings | {"max_new_tokens": 15 - len(events)}))
    while not events[-1].finish_reason:
        events += [event for n, event in slots.step() if n == again]
    assert uncounted(events) == expected[1]

    # Ends that the host finds: by then the device has made a step more, which is taken back. Compactions are all about.
    ends = {"stop": ["e", "at"], "max_new_tokens": 60, "stop_at_eos": False, "sampling": sampling}
    ended = {i: slots.submit(SlotRequest(LONG, seed=i, keep=True, **ends)) for i in range(6)}
    while not set(ended.values()) <= slots._kept.keys():
        slots.step()
    reasons: list[str | None] = []
    for i, number in ended.items():
        alone = engine.stream(LONG, bounded=True, seed=i, **ends)
        reasons.append(list(alone)[-1].finish_reason)
        row = slots.save(number)
        assert standing(row) == standing(alone.saved())
        if i < 2:
            alone.feed("mat, and.")
            later = slots.submit(SlotRequest("mat, and.", resume=row, **ends))
            assert uncounted([event for _ in range(70) for n, event in slots.step() if n == later]) == list(alone)

    assert reasons.count("stop") > 3

    # A stream takes over a row, and a row a stream; and the disk lies between them if need be.
    other = engine.stream(bounded=True, seed=99, **settings)
    other.resume(kept)  # ended by its number of tokens, which is counted anew
    longer = slots.submit(SlotRequest(None, resume=kept, **settings))
    found = [event for _ in range(30) for n, event in slots.step() if n == longer]
    assert uncounted(found) == list(other)
    assert len(found) == 15
    other.resume(kept)
    other.feed("mat, and.")
    assert list(other) == expected[1]
    stream.save(tmp_path / "kept")
    saved = engine.stream(bounded=True, resume=tmp_path / "kept", **settings).saved()
    stream.feed("sat")
    third = slots.submit(SlotRequest("sat", resume=saved, **settings))
    found = [event for _ in range(30) for n, event in slots.step() if n == third]
    assert uncounted(found) == list(stream)


def test_a_row_can_be_saved_at_any_moment(slots):
    """While its prompt is read, when its first token was just drawn, between two tokens: what follows is the same."""
    sampling = Sampling.create(1.4, presence_penalty=1.0)
    settings: dict[str, Any] = {"sampling": sampling, "stop_at_eos": False, "top_logprobs": 2}
    (expected,) = run(slots, [SlotRequest(LONG, seed=4, max_new_tokens=14, **settings)])
    slots.submit(SlotRequest("The cat", seed=1, stop_at_eos=False))  # somebody else is generating
    stages = set()
    for moment in (2, 3, 7, 12, 13, 14, 17, 21):
        number = slots.submit(SlotRequest(LONG, seed=4, max_new_tokens=15, **settings))
        singly, events = moment % 2, []  # else whole launches are looked at before it is saved
        for _ in range(moment):
            if singly:
                slots.can_save(number)
            events += [event for n, event in slots.step() if n == number]
        if not singly and len(events) > 8:
            slots.cancel(number)
            continue
        saved = slots.save(number)
        settled = [event for n, event in slots._settled if n == number]  # just drawn: comes next
        slots.cancel(number)
        left = 14 - len(events) - len(settled)
        rest = run_beside(slots, SlotRequest(None, resume=saved, max_new_tokens=left, **settings))
        assert [(e.token_ids, e.text, e.top_logprobs) for e in events + settled + rest] == [
            (e.token_ids, e.text, e.top_logprobs) for e in expected
        ]
        stages.add((bool(saved.pending), bool(settled), len(events) > 2))
    assert stages >= {(True, False, False), (False, True, False), (False, False, True)}
    slots.cancel(min(slots._known))


def run_beside(slots, request):
    """The events of one request, while others go on."""
    number, events = slots.submit(request), []
    while number in slots._known:
        events += [event for n, event in slots.step() if n == number]
    return events


def set_token(slots, token):
    device = slots._device
    state = dataclasses.replace(device.rows.state, token=device.rows.state.token.at[0].set(token))
    device.rows = dataclasses.replace(device.rows, state=state)


@pytest.mark.soak  # nine programs of its own; that such a cache is full is in test_stream.py
def test_a_cache_that_keeps_every_separator_ends_its_own_row_only():
    engine = tiny_engine(keep_all_separators=True)
    dots = engine.tokenizer.encode("." * 40)
    slots = engine.slots(ROWS, steps=3)  # as in serve/test_conversations.py, whose programs these are
    full, other = run(
        slots,
        [SlotRequest(dots, stop_at_eos=False), SlotRequest("The cat", max_new_tokens=30, stop_at_eos=False)],
    )
    assert full[-1].finish_reason == "full"
    assert full[-1].token_ids == (), "the prompt does not fit: nothing is drawn after a part of it"
    assert (len(other), other[-1].finish_reason) == (30, "length")

    # Full in the middle of an answer: what was held back comes out, and neither row nor stream goes on.
    few = [*engine.tokenizer.encode("a" * 5 + "." * 12), 3 + 0xC3]  # half a character, and one that begins a stop text
    number = slots.submit(SlotRequest(few, stop_at_eos=False, keep=True))
    stream = engine.stream(few, bounded=True, stop_at_eos=False)
    events: list = []
    while not slots.is_idle:
        events += [event for _, event in slots.step()]
        if not slots.is_idle and events:  # the drawn token is taken for a separator
            slots._device.ask(set_token, slots, dots[-1]).result()
    assert events[-1].finish_reason == "full"
    kept = slots.save(number)
    assert kept.row["finish_reason"] == "full"
    next(stream)
    while not stream._is_stuck:
        stream._settle()
        stream._state = dataclasses.replace(stream._state, token=stream._state.token.at[0].set(dots[-1]))
        next(stream)
    for row in (kept, stream.saved()):
        with pytest.raises(ConfigError, match="has a full cache"):
            slots.submit(SlotRequest(None, resume=row))
    (last,) = run(slots, [SlotRequest("The cat", max_new_tokens=9, stop_at_eos=False)])
    assert len(last) == 9, "nobody is held up"

    with pytest.raises(ConfigError, match="no room for another separator"):
        engine.generate([dots], bounded=True, max_new_tokens=1)


def test_what_was_cancelled_is_not_kept_and_a_resumed_row_is_not_held_twice(engine, slots):
    source = engine.stream("The cat", bounded=True)
    next(source)
    saved = source.saved()
    gone = weakref.ref(saved)
    kept = [slots.submit(SlotRequest("The cat", stop_at_eos=False, keep=True)) for _ in range(2)]
    slots.submit(SlotRequest(None, resume=saved, max_new_tokens=3, stop_at_eos=False))
    del saved
    while len(slots.step()) < 2:
        pass
    gc.collect()
    assert gone() is None
    take = slots._device.programs.take

    def cancelled_meanwhile(*args):  # by another thread, between the end of a row and its copy
        other = threading.Thread(target=slots.cancel, args=(kept[1],))
        other.start()
        copied = take(*args)
        others.append(other)
        return copied

    others: list[threading.Thread] = []
    slots.cancel(kept[0])
    slots._device.programs = dataclasses.replace(slots._device.programs, take=cancelled_meanwhile)
    try:
        slot = slots._known[kept[1]]
        slots._free(slots._slots.index(slot), slot)
        slots._device.ask(lambda: None).result()
    finally:
        slots._device.programs = dataclasses.replace(slots._device.programs, take=take)
    others[0].join()
    while not slots.is_idle:
        slots.step()
    assert slots._kept == {}


@pytest.mark.soak  # programs of their own; that nothing is compiled for any request is above
def test_nothing_is_compiled_for_weights_that_were_put_on_a_device(tmp_path):
    """As those of `sepjax.load` are: fresh state and results lie in the same place."""
    graph, params = split(tiny_model())
    engine = Generator(merge(graph, jax.device_put(params, jax.devices()[0])), tiny_tokenizer())
    slots = engine.slots(2)
    stream = engine.stream(LONG, bounded=True, stop_at_eos=False, max_new_tokens=2)
    list(stream)
    stream.save(tmp_path / "kept")
    saved = engine.stream(bounded=True, resume=tmp_path / "kept").saved()
    stream.feed("a")
    list(stream)
    wanted: dict[str, Any] = {"max_new_tokens": 2, "stop_at_eos": False}
    run(slots, [SlotRequest("warm", keep=True, **wanted)])
    with counted_compilations() as compiled:
        run(
            slots,
            [SlotRequest(LONG, **wanted), SlotRequest("sat", **wanted), SlotRequest("sat", resume=saved, **wanted)],
        )
        stream.feed(LONG)
        list(stream)
        list(engine.stream(LONG, bounded=True, stop_at_eos=False, max_new_tokens=2))
    assert compiled == []


def test_what_a_launch_has_left_out_says_nothing(slots):
    """A row of three tokens, the first after its prompt: the launch of three steps ends after the second."""
    slots.submit(SlotRequest([5, 6], max_new_tokens=3, stop_at_eos=False))
    found = []
    while not slots.is_idle:
        for part in slots.parts(joined=True):
            found += [len(event.token_ids) for _, event in part]
    assert found == [1, 2]


@pytest.mark.parametrize("name", ["exchange", "place"])
def test_a_row_that_could_not_begin_is_nobody_s_answer(engine, slots, name):
    """Its device's thread is told by nobody to wait for it: it would go on in what its row held before."""
    row = engine.stream([5, 6, 7], bounded=True).saved() if name == "place" else None
    other = Slots(engine.prepared, BoundedReader(engine.prepared), ROWS, steps=3, together=3, pool=3)
    broken = dataclasses.replace(other._device.programs, **{name: lambda *_: 1 / 0})
    other.submit(SlotRequest([5, 6], max_new_tokens=9))
    other.step()
    other._device.programs = broken
    other.submit(SlotRequest([8, 9], max_new_tokens=2, resume=row))
    with pytest.raises(ZeroDivisionError):
        [other.step() for _ in range(9)]
    with pytest.raises(ZeroDivisionError):
        other._device.look(0, back=False)


def test_a_place_is_given_back_whatever_it_interrupts():
    """A garbage collection may do so anywhere: while the same thread takes one."""
    pool, inside = Pool(2), []

    def trace(frame, event, _):
        if frame.f_code is Pool.take.__code__ and event == "line":
            inside.append(frame.f_lineno)
            pool.give(9)
        return trace

    def take():
        sys.settrace(trace)
        pool.take()
        sys.settrace(None)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert inside
    assert pool.num_free == 1 + len(inside)


def test_mistakes_are_named_to_whom_they_belong(engine, slots):
    for request, kind, message in (
        (SlotRequest(None), ConfigError, "needs a prompt"),
        (SlotRequest([]), PromptError, "no tokens"),
        (SlotRequest("a", max_new_tokens=0), ConfigError, "max_new_tokens=0"),
        (SlotRequest("a", stop=""), ConfigError, "stop string is empty"),
        (SlotRequest("a", stop_token_ids=[10**6]), ConfigError, "outside the vocabulary"),
        (SlotRequest("a", seed=-1), ConfigError, "seed=-1"),
        (SlotRequest("a", top_logprobs=21), ConfigError, "top_logprobs=21"),
        (SlotRequest("a", sampling=Sampling.create(logit_bias={300: 1.0})), ConfigError, "logit_bias has 300"),
    ):
        with pytest.raises(kind, match=message):
            slots.submit(request)
    assert slots.is_idle
    with pytest.raises(SlotError, match="request 12345 has no row"):
        slots.save(12345)
    slots.cancel(12345)
    growing = engine.stream("The cat", max_new_tokens=3)
    larger = tiny_engine(cache_size=30).stream("The cat")
    for row, message in ((growing.saved(), "has a growing cache"), (larger.saved(), "cache_size=30, expected 20")):
        with pytest.raises(StreamStateError, match=message):
            slots.submit(SlotRequest("a", resume=row))
        with pytest.raises(StreamStateError, match=message):
            engine.stream(bounded=True).resume(row)
    with pytest.raises(StreamStateError, match="has a bounded cache, expected a growing one"):
        growing.resume(larger.saved())
    assert slots.is_idle
    with pytest.raises(ConfigError, match="rows=0 must be 1 or more"):
        engine.slots(0)
    with pytest.raises(ConfigError, match="cache without end"):
        tiny_engine(pattern="dense").slots(1)
