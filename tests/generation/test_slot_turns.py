"""Rows ahead: as many as there are slots take part in a step, whoever else is being read, and no step is one's loss."""

import heapq
from typing import Any

import jax
import numpy as np
import pytest

from sepjax import Sampling, SlotRequest
from sepjax.generation.readers import BoundedReader
from sepjax.generation.slot_turns import ReadShape, best_shape, shapes_of
from sepjax.generation.slots import Slots
from sepjax.serve.bounds import ahead_of
from tests.generation.test_slots import flat, random_request, run, standing
from tests.generation.tiny import ROWS, tiny_engine

AHEAD, STEPS = 2, 3


@pytest.fixture(scope="module")
def slots():
    """Of the same programs as those of test_slots.py."""
    of = tiny_engine().prepared
    return Slots(of, BoundedReader(of), ROWS - AHEAD, steps=STEPS, together=3, pool=3, ahead=AHEAD)


@pytest.fixture
def launches(slots, monkeypatch):
    """Rows by steps of each launch: which of them drew."""
    found, launch = [], slots._device.launch

    def launched(*args: Any):
        reads, record = launch(*args)
        if record is not None:
            found.append(np.asarray(record.result().numbers)[:, 0] >= 0)
        return reads, record

    monkeypatch.setattr(slots._device, "launch", launched)
    return found


def test_a_row_begins_where_another_comes_to_its_length_and_no_step_has_more(slots, launches):
    """Requests of known lengths: as few steps as if each had been handed over at once, but for the first and last."""
    lengths = [2, 7, 5, 9, 4, 3, 8, 6, 5, 7, 2, 9]
    for i, length in enumerate(lengths):
        slots.submit(SlotRequest([5 + i, 6], max_new_tokens=length, stop_at_eos=False, seed=i))
    assert slots.num_free == ROWS
    events: dict[int, list] = {}
    while not slots.is_idle:
        for number, event in slots.step():
            events.setdefault(number, []).append(event)
    assert [len(its) for _, its in sorted(events.items())] == lengths
    assert [its[-1].finish_reason for its in events.values()] == ["length"] * len(lengths)
    drew = np.concatenate(launches).sum(axis=1)
    assert drew.max() == ROWS - AHEAD
    turns = [0] * (ROWS - AHEAD)
    for length in lengths:
        heapq.heapreplace(turns, turns[0] + length - 1)  # its first token is drawn behind its prompt
    assert np.count_nonzero(drew) <= max(turns) + STEPS
    middle = [rows[1:][~rows[:-1] & rows[1:]] for launch in launches for rows in launch.T]
    assert sum(map(len, middle)) >= 3, "some begin within a launch"


def test_each_request_gets_what_it_would_get_alone_with_rows_ahead(slots, launches):
    rng = np.random.default_rng(1)
    requests = [random_request(rng) for _ in range(24)]
    cancel = {i: int(rng.integers(1, 12)) for i in rng.choice(24, 4, replace=False).tolist()}
    together = run(slots, requests, cancel=cancel)
    assert max(rows.sum(axis=1).max() for rows in launches) == ROWS - AHEAD
    alone = [run(slots, [request])[0] for request in requests]
    for i, (got, expected) in enumerate(zip(together, alone, strict=True)):
        assert got == expected[: min(cancel.get(i, 99), len(expected))], i
    assert (slots.num_free, slots.num_waiting) == (ROWS, 0)


def test_rows_that_wait_for_their_turn_are_saved_where_they_stand(slots):
    """Kept rows, of ends that the device knows and of others, handed over within a launch; and one that has no turn."""
    engine, rng = tiny_engine(), np.random.default_rng(4)
    wanted: list[dict[str, Any]] = [
        {"max_new_tokens": 2 + i, "sampling": Sampling.create(1.3, logit_bias=bias), "seed": i, "stop": stop}
        for i, (bias, stop) in enumerate([({}, ()), ({}, ()), ({104: 100.0}, "c"), *[({}, ())] * 5])
    ]
    prompts = [rng.integers(3, 300, size).tolist() for size in (3, 30, 9, 4, 2, 11, 5, 6)]
    numbers = [
        slots.submit(SlotRequest(prompt, stop_at_eos=False, keep=True, **each))
        for prompt, each in zip(prompts, wanted, strict=True)
    ]
    events: dict[int, list] = {number: [] for number in numbers}
    while not slots.is_idle:
        for part in slots.parts(joined=True):
            for number, event in part:
                events[number].append(event)
    for prompt, each, number in zip(prompts, wanted, numbers, strict=True):
        stream = engine.stream(prompt, bounded=True, stop_at_eos=False, **each)
        assert flat(events[number]) == flat(list(stream)), number
        assert standing(slots.save(number)) == standing(stream.saved())
    endless = [slots.submit(SlotRequest([7 + i, 8], stop_at_eos=False, seed=i)) for i in range(ROWS)]
    seen: dict[int, int] = dict.fromkeys(endless, 0)
    for _ in range(4):
        for number, _ in slots.step():
            seen[number] += 1
    assert sorted(seen.values())[:AHEAD] == [1] * AHEAD, "the others have drawn what comes behind their prompts"
    waits = min(endless, key=lambda number: seen[number])
    assert slots.can_save(waits)
    assert slots.save(waits).seen == 2
    for number in endless:
        slots.cancel(number)
    while not slots.is_idle:
        slots.step()


def test_programs_that_read_suit_the_device_and_what_is_left(monkeypatch):
    """Many prompts are packed, whole runs at a time; of few slots nothing is, and none is ahead."""
    shapes, at_once = shapes_of("gpu", 304, 480)
    assert (shapes, at_once) == (((4, 128, 512), (4, 480, 1920), (38, 128, 3040)), 2)
    assert shapes_of("gpu", 8, 480)[0] == ((4, 128, 512), (8, 128, 1024), (4, 480, 1920))
    assert shapes_of("gpu", 64, 480)[0][-1] == (32, 128, 2560)
    assert shapes_of("cpu", 304, 480)[0] == ((1, 64, 64), (1, 192, 192), (1, 480, 480))
    assert [best_shape(shapes, left).rows for left in ([128] * 4, [100] * 5, [481, 9])] == [4, 38, 4]
    assert best_shape(shapes, [300, 9]).length == 480
    assert ReadShape(4, 8, 20).runs([9, 3, 8, 2]) == [8, 3, 8], "the last would go beyond"
    assert ReadShape(2, 8, 20).runs([2, 3, 1]) == [2, 3]
    assert ahead_of(256, 1000) == 0, "a processor takes longer for them"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [ahead_of(*x) for x in ((256, 1000), (256, 40), (256, 0), (128, 1000), (64, 1000))] == [48, 20, 0, 24, 0]
