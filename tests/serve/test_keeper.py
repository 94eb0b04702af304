"""What the keeper leaves on the device, and what it moves to the host's memory and to disk."""

import random
import threading
import time
import types
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from sepjax.clocks import Clocks
from sepjax.generation.packed import Form, PackedState
from sepjax.generation.saved_row import SavedRow
from sepjax.generation.slot_pool import Pool, PooledState
from sepjax.generation.slots import SlotRequest
from sepjax.serve.conversations import Conversations
from sepjax.serve.jobs import Inbox, Job
from sepjax.serve.keeper import Keeper
from sepjax.serve.metrics import Metrics
from sepjax.serve.state import StateFolder
from sepjax.serve.worker import Worker
from tests.generation.test_packed import empty_state
from tests.generation.tiny import ATTENTION, ROWS, tiny_tokenizer
from tests.serve.tiny import client, random_request, running, tiny_served, wanted_of

AHEAD = 2  # rows


class Disk(StateFolder):
    """Takes rows and says how they came."""

    def __init__(self):
        self.budget, self.written = 1 << 30, []

    def entries(self):
        return []

    def write(self, key, ids, last, names, row, row_bytes):
        self.written.append((ids.tolist(), row.standing.is_on_host))
        return row_bytes

    def remove(self, key):
        pass


@pytest.mark.parametrize("has_disk", [False, True])
def test_the_newest_rows_stay_on_the_device_and_no_more_than_have_room(has_disk):
    state = empty_state(ATTENTION, "float32")
    form, disk, done = Form(state), Disk(), []
    packed = jax.jit(form.pack)(state)
    folder: Any = disk if has_disk else None
    conversations = Conversations(tiny_tokenizer(), 100 * form.nbytes, folder)
    keeper = Keeper(conversations, Clocks(), 3 * form.nbytes + 1)

    def put_into(keeper: Keeper, number: int):
        row = SavedRow(PackedState(form, packed), (), False, {"seen": 2})
        entry = conversations.add(np.array([number, 5], np.int32), (), 9, row)
        while keeper._tasks.qsize() > 12:  # else it would be forgotten
            time.sleep(0.001)
        assert keeper.put(entry, lambda: done.append(number)) is not has_disk
        return entry

    def put(number: int):
        return put_into(keeper, number)

    entries = [put(number) for number in range(40)]  # more than may be on their way
    for _ in range(20):  # the same text again and again: each takes the place of the one before
        last = put(40)
    assert [x.row is not None for x in keeper._staying] == [True] * 3
    keeper.close()

    def is_on_host(entry):
        return entry.row is not None and entry.row.standing.is_on_host

    # Those that left while they were on disk already are not copied a second time.
    left = [entry.row is None and entry.disk_bytes > 0 for entry in entries]
    assert [x or is_on_host(entry) for x, entry in zip(left, entries, strict=True)] == [True] * 38 + [False] * 2
    assert sum(left) == (38 if has_disk else 0)
    assert not is_on_host(last)
    assert done == ([*range(40), *[40] * 20] if has_disk else [])
    done.clear()
    if has_disk:
        assert disk.written[:40] == [([number, 5], True) for number in range(40)]
    else:
        assert disk.written == []
    four = Keeper(conversations, Clocks(), 4 * form.nbytes)
    used, oldest, other, passed = (put_into(four, number) for number in range(50, 54))
    four.used(used)
    four.passed(passed)
    more = [put_into(four, number) for number in range(60, 62)]
    four.close()
    assert list(four._staying) == [other, used, *more]
    assert is_on_host(oldest) or oldest.disk_bytes
    assert passed.row is None, "nobody copies what its conversation has gone on from"
    none = Keeper(conversations, Clocks())
    none.put(last)
    none.close()
    assert is_on_host(last)
    broken, before = Future(), conversations.nbytes
    broken.set_exception(RuntimeError("the device is lost"))
    row = SavedRow(PackedState(form, broken), (), False, {"seen": 2})
    ids = np.array([99, 5], np.int32)
    none = Keeper(conversations, Clocks())
    none.put(conversations.add(ids, (), 9, row))
    none.close()
    assert conversations.plan(np.array([99, 5, 7], np.int32), ()).entry is None, "nobody goes on from what is not there"
    assert conversations.nbytes == before


def test_a_row_that_cannot_be_asked_for_ends_neither_the_keeper_nor_others(monkeypatch):
    state = empty_state(ATTENTION, "float32")
    form = Form(state)
    packed, own, broken = jax.jit(form.pack)(state), SavedRow.copying, [True]

    def copying(row: SavedRow):
        if broken.pop() if broken else False:
            raise RuntimeError("no memory for a copy")
        return own(row)

    monkeypatch.setattr(SavedRow, "copying", copying)
    conversations = Conversations(tiny_tokenizer(), 100 * form.nbytes)
    keeper = Keeper(conversations, Clocks())
    entries = []
    for number in range(2):
        row = SavedRow(PackedState(form, packed), (), False, {"seen": 2})
        entries.append(conversations.add(np.array([number, 5], np.int32), (), 9, row))
        keeper.put(entries[-1])
    keeper.close()
    assert all(entry.row is not None and entry.row.standing.is_on_host for entry in entries)


def test_nobody_waits_for_rows_that_leave_the_device():
    """Where they come faster than they can be copied, the oldest are forgotten."""
    state = empty_state(ATTENTION, "float32")
    form, copied = Form(state), Future()
    pool, fetch = Pool(100), lambda place: copied
    conversations = Conversations(tiny_tokenizer(), 100 * form.nbytes, on_device=8 * form.nbytes)
    keeper = Keeper(conversations, Clocks(), 8 * form.nbytes)
    entries: list[Any] = []
    for number in range(60):  # of which the keeper has one at hand, and 16 wait for it
        place = pool.take()
        assert place is not None
        row = SavedRow(PooledState(form, pool, place, fetch), (), False, {"seen": 2})
        entries.append(conversations.add(np.array([number, 5], np.int32), (), 9, row))
        assert keeper.put(entries[-1])
        while number == 8 and keeper._tasks.qsize():  # it has begun with the first that left
            time.sleep(0.001)
        del row
    copied.set_result(jax.jit(form.pack)(state))
    keeper.close()
    kept = [entry.row is not None for entry in entries]
    assert kept == [True] * 17 + [False] * 35 + [True] * 8
    assert all(entry.row.standing.is_on_host for entry in entries[:17])
    assert (len(conversations), pool.num_free) == (25, 92)


def test_rows_that_are_saved_to_disk_hold_up_what_begins_not_what_runs():
    """With places in the pool nobody waits for the keeper, which says that it is behind, and asks for many at once."""
    state = empty_state(ATTENTION, "float32")
    form, asked, saved, disk = Form(state), [], [], Disk()
    pool, copied = Pool(60), Future()

    def fetch(place):
        asked.append(place)
        return copied

    conversations = Conversations(tiny_tokenizer(), 100 * form.nbytes, disk, on_device=60 * form.nbytes)
    keeper = Keeper(conversations, Clocks(), 60 * form.nbytes)

    def put(number: int):
        place = pool.take()
        assert place is not None
        row = SavedRow(PooledState(form, pool, place, fetch), (), False, {"seen": 2})
        entry = conversations.add(np.array([number, 5], np.int32), (), 9, row)
        assert not keeper.put(entry, lambda: saved.append(number))

    with ThreadPoolExecutor(1) as thread:
        assert not keeper.is_behind
        try:
            thread.submit(lambda: [put(number) for number in range(40)]).result(timeout=60)
            assert keeper.is_behind
            assert saved == []
        finally:
            copied.set_result(jax.jit(form.pack)(state))
    while len(saved) < 40:
        time.sleep(0.001)
    assert not keeper.is_behind
    keeper.close()
    assert saved == [*range(40)]
    assert [ids for ids, on_host in disk.written if on_host] == [[number, 5] for number in range(40)]
    assert len(asked) == 40, "each is copied once"


def test_rows_of_the_device_are_beside_those_of_the_host_not_among_them():
    """Where the device has room for more than the host, what leaves it does not fill the host with as much."""
    state = empty_state(ATTENTION, "float32")
    form, fetched = Form(state), []
    packed, pool = jax.jit(form.pack)(state), Pool(10)

    def fetch(place):
        fetched.append(place)
        future = Future()
        future.set_result(packed)
        return future

    conversations = Conversations(tiny_tokenizer(), 2 * form.nbytes + 999, on_device=6 * form.nbytes)
    keeper, entries = Keeper(conversations, Clocks(), 5 * form.nbytes), []
    for number in range(12):
        place = pool.take()
        assert place is not None
        row = SavedRow(PooledState(form, pool, place, fetch), (), False, {"seen": 2})
        entries.append(conversations.add(np.array([number, 5], np.int32), (), 9, row))
        del row
        keeper.put(entries[-1])
        while pool.num_free < 5:  # until the keeper has moved it
            time.sleep(0.001)
    keeper.close()
    assert [entry.row is not None for entry in entries] == [False] * 5 + [True] * 7
    assert [entry.row.standing.is_on_host for entry in entries[5:]] == [True] * 2 + [False] * 5
    assert (len(fetched), pool.num_free) == (7, 5), "each is copied once, and leaves its place"
    ids = sum(entry.ids.nbytes for entry in entries[5:])
    assert (conversations.nbytes, conversations.device_nbytes) == (2 * form.nbytes + ids, 5 * form.nbytes)
    for entry in entries[5:]:
        conversations.lost(entry)
    assert (conversations.nbytes, conversations.device_nbytes, len(conversations)) == (0, 0, 0)


def test_a_row_that_is_being_saved_when_the_server_stops_is_saved_and_told_of(tmp_path, monkeypatch):
    """Even where no time is left to finish: the answer is made, only its row is on its way. Others wait to begin.

    Half of the rows are ahead, as beside an accelerator: what many clients get is what each would get alone.
    """
    write, begun, goes_on = StateFolder.write, threading.Event(), threading.Event()
    goes_on.set()
    monkeypatch.setattr("sepjax.serve.worker.ahead_of", lambda *_: AHEAD)

    def slow(self, *args):
        begun.set()
        assert goes_on.wait(60)
        return write(self, *args)

    monkeypatch.setattr(StateFolder, "write", slow)
    monkeypatch.setattr("sepjax.serve.keeper._MOST", 1)
    served = tiny_served()
    memory = (8 + AHEAD) * served.row_bytes
    options = {"state": str(tmp_path), "drain_seconds": 0.0, "device_memory": memory, "rows": ROWS - AHEAD}
    with running(served, **options) as server, ThreadPoolExecutor(8) as pool, client(server) as api:
        keeper = server.worker._keeper
        rng = random.Random(3)
        requests = [random_request(rng) for _ in range(12)]
        got = pool.map(lambda asked: api.completions.create(model="tiny", **asked).choices[0].text, requests)
        assert list(got) == [wanted_of(served, asked) for asked in requests]
        begun.clear()
        goes_on.clear()

        def ask(prompt):
            settings: Any = {"model": "tiny", "max_tokens": 5, "extra_body": {"ignore_eos": True}}
            return pool.submit(lambda: api.completions.create(prompt=prompt, **settings))

        answers = [ask([5, 6, 7])]
        assert begun.wait(60)
        answers.append(ask([5, 6, 8]))
        while not keeper.is_behind:  # until it has ended, and its row waits for the disk
            time.sleep(0.01)
        answers.append(ask([5, 6, 9]))
        while not len(server.worker._queue):
            time.sleep(0.01)
        time.sleep(0.2)
        assert (len(server.worker._queue), server.worker.slots.num_free) == (1, ROWS), "it does not begin"
        goes_on.set()
        assert [answer.result().usage.completion_tokens for answer in answers] == [5] * 3
        begun.clear()
        goes_on.clear()
        last = ask([5, 6, 10])
        assert begun.wait(60)
        stopped = pool.submit(server.stop, 0.0)
        while not keeper._tasks.qsize():  # until the slots have ended, and the keeper is to
            time.sleep(0.01)
        goes_on.set()
        stopped.result()
        assert last.result().usage.completion_tokens == 5
    folder = StateFolder(tmp_path, served, 1 << 30)
    ends = [entry.ids for entry in folder.entries() if entry.ids[:2].tolist() == [5, 6]]
    assert [len(ids) for ids in ends] == [3 + 5 - 1] * 4
    folder.close()


def test_who_waits_for_the_keeper_waits_for_nobody_else():
    """Not all of its tasks tell the worker that they are done."""
    worker = Worker(lambda: None, lambda _: None, rows=1, max_waiting=1, metrics=Metrics())  # pyright: ignore[reportArgumentType]
    loop: Any = types.SimpleNamespace(call_soon_threadsafe=print)
    worker._queue.put(Job(Inbox(loop), 0, np.array([5], np.int32), SlotRequest(None), "", 0.0))
    looks = threading.Thread(target=lambda: worker._take_orders(wait=True), daemon=True)
    looks.start()
    looks.join(30.0)
    assert not looks.is_alive()
