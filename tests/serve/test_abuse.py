"""Whatever clients do, the server goes on, answers the others as ever, and keeps nothing of it."""

import gc
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest

from sepjax.serve.app import Limits
from tests.serve.tiny import client, random_request, running, settled, tiny_served, wanted_of

TURNS = int(os.environ.get("SEPJAX_TEST_TURNS", "10000"))  # of one conversation
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    1e308,
    10**30,
    "",
    "a" * 5000,
    [],
    [[]],
    {},
    {"a": []},
    "\x00",
    "\ud83d",
    [1] * 3000,
]


@pytest.fixture(scope="module")
def served():
    return tiny_served(max_prompt_tokens=5000)


def http(body, path="/v1/completions", *, method="POST", length=None, headers=""):
    size = len(body) if length is None else length
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n"
    )
    return f"{head}{headers}\r\n".encode("latin-1", "replace") + body


def thing(rng):
    """Bytes that somebody might send."""
    names = ["prompt", "messages", "temperature", "n", "stop", "seed", "logit_bias", "stream", "max_tokens", "logprobs",
             "stream_options", "top_p", "stop_token_ids", "best_of", "tools", "model", "user"]  # fmt: skip
    fields = {name: rng.choice(VALUES) for name in rng.sample(names, rng.randrange(6))} | {
        "max_tokens": rng.randrange(9)
    }
    path = rng.choice(
        ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models/x", "/", "/%ff"]
    )
    body = json.dumps(fields).encode()
    cut = body[: rng.randrange(len(body))]
    return rng.choice([
        lambda: http(body, path),
        lambda: http(cut, path),
        lambda: http(cut, path, length=len(body) + 9),  # and never the rest
        lambda: http(rng.randbytes(rng.randrange(1, 3000)), path),
        lambda: http(b"[" * 50_000, path),
        lambda: http(b"x" * 300_000, path),  # larger than is allowed
        lambda: http(b"", path, length=10**15),
        lambda: http(body, path, method=rng.choice(["GET", "DELETE", "PUT", "BREW", "HEAD"])),
        lambda: http(body, path, headers=f"X-Long: {'y' * 200_000}\r\n"),
        lambda: http(body, path, headers="Transfer-Encoding: chunked\r\n"),
        lambda: http(body, path)[: rng.randrange(1, 200)],
        lambda: rng.randbytes(rng.randrange(1, 2000)),
        lambda: http(body, path) * 3,  # one behind the other
    ])()  # fmt: skip


def abuse(server, rng):
    """One connection that is up to no good."""
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=2) as connection:
            connection.settimeout(rng.choice([0.01, 0.1, 0.5]))
            if rng.random() < 0.3:  # a stream that nobody reads to its end
                body = {"prompt": [5, 6], "max_tokens": 10**6, "stream": True, "ignore_eos": True}
                connection.sendall(http(json.dumps(body).encode()))
            else:
                data = thing(rng)
                at = rng.randrange(len(data) + 1)
                connection.sendall(data[:at])
                time.sleep(rng.choice([0, 0, 0.05]))
                connection.sendall(data[at:])
            connection.recv(rng.choice([1, 65536]))
    except OSError:  # it has hung up, or takes its time
        pass


def fuzz(server, served, seconds, *, seed=0):
    """Abuse by 12 clients, for so long and 40 times at least, while 2 others ask what can be answered, and are."""
    until = time.monotonic() + seconds
    errors: list[BaseException] = []
    counts = [0, 0]

    def run(number):
        rng = random.Random(seed + number)
        try:
            while time.monotonic() < until or counts[0] < 40 or counts[1] < 4:
                if number < 12:
                    abuse(server, rng)
                    counts[0] += 1
                    continue
                asked = random_request(rng)
                got = api.completions.create(model="tiny", **asked)
                assert got.choices[0].text == wanted_of(served, asked)
                counts[1] += 1
        except BaseException as error:
            errors.append(error)
            counts[:] = 1000, 1000  # nobody waits for what will not come

    # On a busy machine all of this is slow.
    with client(server).with_options(timeout=600) as api, ThreadPoolExecutor(14) as pool:
        list(pool.map(run, range(14)))
    assert errors == []
    return counts


def measured(server):
    """(open files, threads, tasks of the HTTP side, MiB of memory)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks = len(server._server.server_state.tasks)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), tasks, pages * os.sysconf("SC_PAGE_SIZE") >> 20


def at_rest(server, files):
    """`measured` once the HTTP side has seen that its clients are gone, which takes it a while on a busy machine.

    Who is gone is known by the end of its connection: nobody waits for a body (60 seconds) that nobody sends. Idle
    connections are closed after some seconds.
    """
    assert settled(server)
    until = time.monotonic() + 50
    while (found := measured(server))[2] or found[0] > files:
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    return found


def check_nothing_stays(served, seconds):
    options = {"limits": Limits(max_body_bytes=200_000), "max_waiting": 400, "cache_memory": 8 * served.row_bytes}
    with running(served, **options) as server:
        fuzz(server, served, min(2.0, seconds), seed=100)
        before = at_rest(server, files=10**9)
        counts = fuzz(server, served, seconds)
        after = at_rest(server, files=before[0] + 8)
        assert after[0] <= before[0] + 8, (before, after)
        assert after[1] <= before[1] + 8, (before, after)
        assert (before[2], after[2]) == (0, 0), (before, after)
        assert after[3] <= before[3] * 1.1 + 64, (before, after)
        assert server.worker.error is None
        assert server.worker.conversations.nbytes <= options["cache_memory"]
        print(f"{counts[0]} abuses, {counts[1]} answers; before {before}, after {after}")


def test_a_second_of_anything(served):
    """Two halves: before the first nobody has measured."""
    check_nothing_stays(served, 0.5)


@pytest.mark.soak
def test_ten_minutes_of_anything(served):
    check_nothing_stays(served, 600.0)


@pytest.mark.soak
def test_1000_requests_at_64_at_once_are_each_what_they_are_alone(served):
    rng = random.Random(1)
    asked = [random_request(rng) for _ in range(1000)]
    with running(served) as server:
        began = time.monotonic()
        # On a busy machine all of this is slow.
        with client(server).with_options(timeout=600) as api, ThreadPoolExecutor(64) as pool:
            got = list(pool.map(lambda one: api.completions.create(model="tiny", **one).choices[0].text, asked))
        print(f"1000 requests in {time.monotonic() - began:.0f} s")
        assert settled(server)
    for text, one in zip(got, asked, strict=True):
        assert text == wanted_of(served, one)


@pytest.mark.soak
def test_10000_turns_of_one_conversation_in_constant_memory(served):
    """Each sends all that was said before, as clients of this protocol do; what is read is what is new."""
    budget = 8 * served.row_bytes + 2 * 4 * 3 * TURNS  # rows, and the ids of the text before this turn and after it
    with running(tiny_served(), cache_memory=budget) as server:
        # By hand: OpenAI's client looks at each id for longer than all that the server does.
        connection = HTTPConnection(server.url.removeprefix("http://"), timeout=120)
        ids, sizes, begin = [5], [], time.process_time()
        for turn in range(1, TURNS + 1):
            asked = json.dumps({"prompt": ids, "max_tokens": 2, "temperature": 0, "ignore_eos": True})
            connection.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
            got = json.loads(connection.getresponse().read())
            assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == max(0, len(ids) - 2)
            ids = [*server.worker.conversations.get(got["id"]).token_ids, 7]
            if turn % (TURNS // 20) == 0:
                sizes.append(measured(server)[3])
                print(turn, len(ids), sizes[-1], f"{time.process_time() - begin:.0f}", flush=True)
                assert server.worker.conversations.nbytes <= budget
        connection.close()
        assert sizes[-1] <= sizes[1] + 64, sizes
