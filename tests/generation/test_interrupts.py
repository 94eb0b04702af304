"""Ctrl-C, and other exceptions from elsewhere, in the middle of streams and slots that go on after it; and copies."""

import copy
import pickle
import signal
import threading

import pytest

from sepjax import Sampling, SlotRequest
from sepjax.generation import ahead
from sepjax.generation.ahead import Ahead
from sepjax.generation.saved import StreamStateError
from sepjax.generation.slot_request import SlotError
from sepjax.generation.slots import Slots
from sepjax.generation.stream import Stream
from sepjax.promotion import as_usual
from tests.generation.tiny import LONG, ROWS, tiny_engine


@pytest.fixture(autouse=True)
def python_handles_signals():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressing(monkeypatch, kind, method, calls):
    """Has a Ctrl-C come within those of the calls of a method, of the thread that Python interrupts."""
    original, made = getattr(kind, method), iter(range(10**6))

    def pressed(*args, **kwargs):
        if threading.current_thread() is threading.main_thread() and next(made) in calls:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, method, pressed)


def stubborn(step):
    """What a step gives when it is called until it is not interrupted, and how often it was."""
    for presses in range(10):
        try:
            return step(), presses
        except KeyboardInterrupt:
            continue
    raise AssertionError("interrupted for ever")


def test_a_stream_loses_nothing_to_ctrl_c(monkeypatch, tmp_path):
    events = tiny_engine().stream(LONG * 2, stop_at_eos=False)
    expected = [next(events) for _ in range(6)]
    pressing(monkeypatch, Stream, "_note", {0, 2})
    pressing(monkeypatch, Stream, "_event_of", {0, 3})
    events = tiny_engine().stream(LONG * 2, stop_at_eos=False)
    found = [stubborn(lambda: next(events)) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        next(events)
    events.save(tmp_path / "saved")  # with the text of the event that nobody has
    found += [stubborn(lambda: next(events)) for _ in range(3)]
    assert [event for event, _ in found] == expected
    assert [presses for _, presses in found] == [3, 0, 0, 0, 0, 0]
    after = tiny_engine().stream(resume=tmp_path / "saved", stop_at_eos=False)
    event = next(after)
    assert event.token_ids == expected[4].token_ids
    assert event.text == expected[3].text + expected[4].text


def test_a_stream_that_is_fed_ahead_of_its_device_loses_nothing(monkeypatch):
    """Steps that nobody has asked for yet are taken back."""
    monkeypatch.setattr(ahead, "_SECONDS", 1e9)

    def turns(stop):
        events = tiny_engine().stream("One", stop_at_eos=False, seed=2, sampling=Sampling.create(1.0))
        found = [next(events) for _ in range(5)]
        assert len(events._ahead)
        with monkeypatch.context() as patch:
            if stop:
                pressing(patch, Ahead, "_clear", {0})
                with pytest.raises(KeyboardInterrupt):
                    events.feed(" two")
            events.feed(" two")
        return found + [next(events) for _ in range(3)]

    assert turns(True) == turns(False)


def test_nothing_is_lost_where_promotion_is_put_back(monkeypatch):
    """Which is done after every step."""
    events = tiny_engine().stream("One", stop_at_eos=False)
    expected = [next(events) for _ in range(3)]
    events = tiny_engine().stream("One", stop_at_eos=False)
    pressing(monkeypatch, as_usual, "__exit__", {0, 2})
    found = [stubborn(lambda: next(events)) for _ in range(3)]
    assert [event for event, _ in found] == expected
    assert [presses for _, presses in found] == [1, 0, 1]


def test_a_stream_that_was_broken_says_so(monkeypatch):
    events = tiny_engine().stream("One", stop_at_eos=False)
    before = [next(events), events.saved()][1]
    expected = next(events)
    events.resume(before)
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "_event_of", lambda *_: 1 / 0)  # as of a timeout's signal
        with pytest.raises(ZeroDivisionError):
            next(events)
    for use in (lambda: next(events), events.saved, lambda: events.feed("a"), lambda: copy.copy(events)):
        with pytest.raises(StreamStateError, match="a step of this stream has not ended"):
            use()
    events.resume(before)
    assert next(events) == expected


def test_copies_of_a_stream_go_on_by_themselves():
    events = tiny_engine().stream("One", stop_at_eos=False)
    next(events)
    copies = [copy.copy(events), copy.deepcopy(events)]
    expected = [next(events) for _ in range(3)]
    assert [[next(each) for _ in range(3)] for each in copies] == [expected] * 2
    with pytest.raises(TypeError, match="use its save"):
        pickle.dumps(events)


def test_slots_lose_nothing_to_ctrl_c(monkeypatch):
    slots = tiny_engine().slots(ROWS)

    def texts(once_submitted=lambda: None):
        numbers = [slots.submit(SlotRequest(x, max_new_tokens=5, stop_at_eos=False)) for x in ("One", LONG)]
        once_submitted()
        ids, presses = {}, 0
        while not slots.is_idle:
            events, pressed = stubborn(slots.step)
            presses += pressed
            for number, event in events:
                ids[number] = (*ids.get(number, ()), *event.token_ids)
        return [ids[number] for number in numbers], presses

    expected, _ = texts()
    with monkeypatch.context() as patch:
        assert texts(lambda: pressing(patch, as_usual, "__exit__", {0, 2})) == (expected, 2)
    pressing(monkeypatch, Slots, "_events_of_steps", {0, 3})
    assert texts() == (expected, 2)
    monkeypatch.setattr(Slots, "_ask", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slots.step()
    with pytest.raises(SlotError, match="a step of these slots has not ended"):
        slots.step()
