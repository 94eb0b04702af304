"""HTTP in processes of its own: what goes between, and that clients see no difference."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import threading
import time
from typing import Any

import numpy as np
import pytest

from sepjax import Sampling, SlotRequest
from sepjax.clocks import Clocks
from sepjax.generation.row import CacheUse, StreamEvent
from sepjax.serve import fronts as fronts_module
from sepjax.serve import running as running_module
from sepjax.serve import wire
from sepjax.serve.conversations import chain
from sepjax.serve.errors import ApiError
from sepjax.serve.front import DistantWorker
from sepjax.serve.fronts import DistantInbox, FrontError, Fronts
from sepjax.serve.jobs import Begun, Failed, Inbox, Job, Paused, Share
from sepjax.serve.served import Served
from tests.generation.tiny import ROWS
from tests.serve.test_operations import ask
from tests.serve.tiny import alone, client, random_request, settled, text_of, tiny_served, wanted_of


def received(data):
    size, rest = wire.HEAD.unpack(data[: wire.HEAD.size])
    body = data[wire.HEAD.size :]
    assert len(body) == size + rest
    return json.loads(body[:size]), body[size:]


def test_items_arrive_as_they_were_sent():
    use = CacheUse(3, 9, 80, 1)
    for item in (
        Begun(0), Paused(),
        StreamEvent("é\ufffd\n", (5, 6), None, use), StreamEvent("", (), "full", CacheUse(1, 2, 3)),
        StreamEvent("a", (7,), "stop", use, -0.5, ((7, -0.5), (8, float("-inf")))),
    ):  # fmt: skip
        told, rest = received(wire.frame(wire.told_item(2, item)))
        assert (wire.item_of(told), rest) == ((2, item), b"")
    error = ApiError(429, "full", param="n", code="queue_full", retry_after=7)
    choice, failed = wire.item_of(json.loads(json.dumps(wire.told_item(1, Failed(error)))))
    assert choice == 1
    assert vars(failed.error) == vars(error)


def test_jobs_arrive_as_they_were_sent():
    """Every setting of a request, whatever it is; ids and hashes are shared by the choices of a prompt."""
    loop = asyncio_loop()
    settings = {
        "max_new_tokens": 9, "stop": ["a", "\n"], "stop_token_ids": [4], "stop_at_eos": False, "logprobs": True,
        "top_logprobs": 3, "min_new_tokens": 2, "keep": True, "undrawn": True,
    }  # fmt: skip
    sampling = Sampling.create(
        0.7, 5, 0.95, 0.01, presence_penalty=0.3, frequency_penalty=-0.1, repetition_penalty=1.1,
        logit_bias={5: 100.0, 9: -3.5},
    )  # fmt: skip
    prompts, jobs = [np.arange(3, 80, dtype=np.int32), np.arange(7, 12, dtype=np.int32)], []
    for i in range(4):
        ids, inbox = prompts[i // 2], Inbox(loop)
        asked = SlotRequest(None, sampling=sampling, seed=2**32 - 1 - i, **settings)
        jobs.append(Job(inbox, i, ids, asked, "me", 12.5, f"id:{i}", chain(ids), share=Share(2)))
    inbox = Inbox(loop)
    got = wire.jobs_of(*received(wire.told_jobs(3, jobs)), inbox)
    assert inbox.choices == len(got) == 4
    for job, sent in zip(got, jobs, strict=True):
        assert job.inbox is inbox
        for name in ("choice", "client", "came", "name", "blocks"):
            assert getattr(job, name) == getattr(sent, name)
        assert np.array_equal(job.ids, sent.ids)
        for name, value in vars(sent.request).items():
            other = getattr(job.request, name)
            if name != "sampling":
                assert other == (list(value) if isinstance(value, tuple) else value), name
        for name, value in vars(sampling).items():
            other = getattr(job.request.sampling, name)
            assert other.dtype == value.dtype, name
            assert np.array_equal(other, value), name
    assert got[0].share is got[1].share
    assert got[0].share.to_begin == 2
    assert got[2].share is got[3].share is not got[0].share


class FakeProcess:
    """One that was started with its end of a socket pair, which the test has."""

    pid = 1

    def __init__(self, command, pass_fds, **_: Any):
        self.end = socket.socket(fileno=os.dup(pass_fds[0]))
        self.killed = threading.Event()

    def kill(self):
        self.end.close()
        self.killed.set()

    def wait(self, seconds=None):
        if not self.killed.is_set():
            raise subprocess.TimeoutExpired("front", seconds)
        return -9


class FakeWorker:
    """Notes what it is asked for; looking for a conversation waits for `found`."""

    def __init__(self):
        self.clocks, self.conversations, self.has_disk = Clocks(), self, True
        self.found, self.did, self.failed = threading.Event(), [], threading.Event()

    def warm(self, ids, blocks):
        assert self.found.wait(30)
        raise OSError("the disk is gone")

    def submit(self, jobs):
        self.did.append("submit")

    def cancel(self, inbox):
        self.did.append("cancel")

    def find_view(self, name, asked):
        raise KeyError(name)

    def fail(self, error):
        self.failed.set()


@contextlib.contextmanager
def lost_in_the_end(monkeypatch):
    """A worker, a link to one process, and the end and file of that process, which is lost after the block."""
    monkeypatch.setattr(fronts_module.subprocess, "Popen", FakeProcess)
    worker: Any = FakeWorker()
    with socket.socket() as listening:
        fronts = Fronts(worker, listening, 1, {})
        fronts.start()
        (link,) = fronts._links
        process: Any = link.process
        with process.end as end, end.makefile("rb") as file:
            assert take(file) == {"begin": {}}
            yield worker, link, end, file
        assert process.killed.wait(30)
        assert worker.failed.wait(30), "a server without one of its processes must not go on"
        fronts.close()


def test_nothing_that_goes_wrong_here_leaves_a_request_unanswered_or_a_row_taken(monkeypatch):
    with lost_in_the_end(monkeypatch) as (worker, link, end, file):
        asked = SlotRequest(None, sampling=Sampling.create())
        ids = np.arange(3, 80, dtype=np.int32)
        held = DistantInbox(link, 5)
        end.sendall(wire.told_jobs(5, [Job(held, 0, ids, asked, "me", 0.0, "id", chain(ids))]))
        end.sendall(wire.frame({"cancel": 5}))  # the client is gone while its conversation is looked for
        end.sendall(wire.frame({"call": 6, "name": "view", "arguments": ["x", {}]}))
        assert take(file)["error"][0] == 500
        worker.found.set()
        while worker.did[-2:] != ["submit", "cancel"]:
            time.sleep(0.001)
        end.sendall(b"abc")  # and it breaks off within a frame


def test_a_process_that_cannot_be_told_an_item_ends(monkeypatch):
    """And with it the server: its clients would wait for ever."""
    with lost_in_the_end(monkeypatch) as (_, link, end, file):
        unknown: Any = StreamEvent("a", (np.int64(7),), None, CacheUse(1, 2, 3))  # what JSON does not have
        link.call_soon_threadsafe(None, [(DistantInbox(link, 5), [(0, unknown)])])
        end.settimeout(30)
        assert not file.read(1), "nothing comes any more"


def test_a_server_whose_processes_cannot_be_begun_says_so(monkeypatch):
    begun = []

    def begin(*arguments, **settings):
        if begun:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        begun.append(FakeProcess(*arguments, **settings))
        return begun[0]

    monkeypatch.setattr(fronts_module.subprocess, "Popen", begin)
    monkeypatch.setattr(fronts_module, "_PATIENCE", 0.1)
    options = running_module.Options(port=0, rows=2, http_processes=2)
    server = running_module.Running(tiny_served, options)
    with server._socket, pytest.raises(BlockingIOError, match="unavailable"):
        server.run()
    assert begun[0].killed.is_set(), "that which was begun ends"


def test_a_question_after_the_end_is_refused():
    """What nobody answers any more would hold up the end of its process."""
    ours, theirs = socket.socketpair()

    async def ask() -> None:
        worker = DistantWorker(ours)
        theirs.sendall(wire.frame({"begin": {}}))
        await worker.begun()
        theirs.close()
        await worker.read()
        with pytest.raises(ApiError, match="stopping"):
            await asyncio.wait_for(worker.metrics(), 10)
        writer: Any = worker._writer
        writer.close()
        await writer.wait_closed()

    asyncio.run(ask())


def test_a_server_ends_where_one_of_its_processes_does_not_begin(monkeypatch):
    """The whole program too, which nobody waits for."""
    monkeypatch.setattr(fronts_module.subprocess, "Popen", FakeProcess)
    monkeypatch.setattr(fronts_module, "_STARTS", 0.2)
    options = running_module.Options(port=0, rows=ROWS, steps=3, http_processes=1)  # whose programs are there
    with pytest.raises(FrontError, match=r"has not begun within 0\.2 seconds"):
        running_module.Running(tiny_served, options).run()


def test_a_server_that_loses_a_process_does_not_wait_for_what_it_begins(monkeypatch):
    """Reading and compiling a large model take minutes, and nobody would be answered then."""
    monkeypatch.setattr(fronts_module.subprocess, "Popen", FakeProcess)
    monkeypatch.setattr(running_module, "_PATIENCE", 0.1)
    waited = []
    monkeypatch.setattr(running_module.interrupt, "need_not_wait_for", waited.append)
    begun, ends = threading.Event(), threading.Event()

    def load():
        begun.set()
        assert ends.wait(60)
        raise running_module.ServeError("never")

    server: Any = running_module.Running(load, running_module.Options(port=0, rows=ROWS, http_processes=1))

    def lose():
        assert begun.wait(30)
        server._fronts._links[0].process.kill()

    thread = threading.Thread(target=lose)
    thread.start()
    with server._socket, pytest.raises(FrontError, match=r"has ended \(-9\); the server ends with it"):
        server.run()
    assert not waited[0]()
    ends.set()
    thread.join()
    assert server.worker.join(30.0)


def take(file):
    size, rest = wire.HEAD.unpack(file.read(wire.HEAD.size))
    return json.loads(file.read(size + rest)[:size])


def asyncio_loop():
    class Nobody:
        def call_soon_threadsafe(self, callback, *args):
            raise AssertionError

    return Nobody()


@pytest.fixture(scope="module")
def served():
    return tiny_served(max_prompt_tokens=500)


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.soak)])  # of one process: always
def test_clients_see_no_difference(served, slow):
    """From 503 while the model is loaded, over answers, refusals and clients that go away, to 503 when it stops."""
    gate = threading.Event()
    options = running_module.Options(rows=ROWS, steps=3, max_waiting=4, http_processes=2)
    server = running_module.Running(lambda: (gate.wait(), served)[1], options)
    server.start()
    status, headers, told = ask(server, "/v1/models")
    assert (status, told["error"]["code"], headers["retry-after"]) == (503, "loading", "5")
    gate.set()
    server.wait()
    api, rng = client(server), random.Random(0)
    for asked in [random_request(rng) for _ in range(6)]:
        answer = api.completions.create(model="tiny", **asked)
        assert answer.choices[0].text == wanted_of(served, asked)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "The cat"}], "max_tokens": 6, "seed": 3}
    whole = api.chat.completions.create(**chat, n=2, logprobs=True, top_logprobs=2)
    texts = ["", ""]
    for chunk in api.chat.completions.create(**chat, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(whole.choices[1].logprobs.content[0].top_logprobs) == 2
    fronts: Any = server._fronts
    assert fronts._folder is None, "of a server that is killed no file is left behind"
    view = ask(server, f"/v1/cache/{answer.id}")[2]
    assert view["object"] == "cache.view"
    for path, body, status, code in (
        ("/v1/completions", {"prompt": "a", "tempe": 1}, 400, "unknown_field"),
        ("/v1/completions", {"prompt": ["a"] * 9}, 400, None),  # more choices than may wait
        ("/v1/cache/none", None, 404, "cache_not_kept"),
        ("/tokenize", {"prompt": "The cat"}, 200, None),
    ):
        got, _, told = ask(server, path, body)
        assert (got, told.get("error", {}).get("code")) == (status, code)
    assert b"sepjax:launch_tokens_total" in server.metrics.text()
    endless = {"model": "tiny", "prompt": [5], "max_tokens": 10**6, "stream": True}
    stream = api.completions.create(**endless, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    if slow:
        slow_client(server)
    assert settled(server), "a client that goes away frees its row"
    stream = api.completions.create(model="tiny", prompt=[5, 9], max_tokens=150, temperature=0, stream=True,
                                    extra_body={"ignore_eos": True})  # fmt: skip
    text = next(iter(stream)).choices[0].text
    server.worker.stop(60.0)
    until = time.monotonic() + 20
    while ask(server, "/health")[0] == 200 and time.monotonic() < until:
        time.sleep(0.01)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == text_of(alone(served, [5, 9], max_new_tokens=150, stop_at_eos=False)), "what ran came to its end"
    server.stop(0.0)
    assert server.worker.error is None
    with pytest.raises(ConnectionRefusedError):
        ask(server, "/health")


def slow_client(server):
    """Its row is put aside, in the other process, until it has read what there was."""
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or all would find room on its way
        slow.connect(("127.0.0.1", server.port))
        asked = {"prompt": [5, 9], "max_tokens": 10**6, "stream": True, "ignore_eos": True}
        asked["logprobs"] = 20  # two kilobytes a token
        body = json.dumps(asked).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until = time.monotonic() + 240  # of a busy machine
        while not server.worker._aside and time.monotonic() < until:
            time.sleep(0.02)
        assert server.worker._aside, "it reads nothing, and its row is not kept busy"
        while server.worker._aside and time.monotonic() < until:
            assert slow.recv(1 << 16)
        assert not server.worker._aside, "it has caught up"


def test_a_process_that_is_lost_ends_the_server_and_one_that_is_told_to_ends_itself(monkeypatch, tmp_path):
    """Whatever the working folder holds: a script there may have the name of a module."""
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fronts_module, "_PATIENCE", 120.0)  # on a busy machine it has not begun after 15 seconds

    class Worker:
        error = None

        def fail(self, error):
            self.error = error

    with socket.create_server(("127.0.0.1", 0)) as listening:
        worker, how = Worker(), {"limits": {}, "api_key": "", "connections": 4, "log_level": None}
        lost, fronts = Fronts(worker, listening, 1, how), Fronts(worker, listening, 1, how)
        lost.start()
        fronts.start()
        (link,) = lost._links
        link.process.kill()
        lost.wait()
        lost.close()
        assert isinstance(worker.error, FrontError)
        worker.error = None
        fronts.close()
        assert fronts._links[0].process.returncode == 0
        assert worker.error is None


def test_a_model_is_told_whole(served):
    told = json.loads(json.dumps(served.told()))
    other = Served.of_told(told, served.tokenizer, served.template)
    for name in ("name", "form", "turn_ends", "max_prompt_tokens", "fingerprint", "control_names"):
        assert getattr(other, name) == getattr(served, name), name
    use = CacheUse(held=17, seen=90, bytes=1, kept=3)
    assert (other.zones(use), other.cache_size) == (served.zones(use), served.cache_size)
