"""Who may ask, how much, and how a server begins and ends."""

import dataclasses
import gc
import http.client
import importlib.util
import json
import logging
import os
import resource
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from sepjax import console, separators
from sepjax.bench.load import numbers
from sepjax.config import ConfigError
from sepjax.programs import serve
from sepjax.serve import logs, process
from sepjax.serve import running as running_module
from sepjax.serve.app import Limits
from tests.commands import Called, leaves, own_flags, refusal, unlike
from tests.generation.tiny import ROWS
from tests.serve.tiny import alone, client, running, settled, text_of, tiny_served

ROOT = Path(__file__).parents[2]
JSON = {"Content-Type": "application/json"}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served():
    return dataclasses.replace(tiny_served(max_prompt_tokens=500), alias="models/tiny")


def ask(server, path, body=None, headers=JSON, method=None, host="127.0.0.1"):
    """(status, headers, JSON) of a request, whatever it comes to."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data, {"Host": host, **headers})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), json.loads(answer.read() or "null")
    finally:
        connection.close()


def test_refusals_have_openai_s_form(served):
    with running(served, limits=Limits(max_body_bytes=7000), max_waiting=0) as server:
        for path, body, more, status, code, param in (
            ("/v1/completions", b"{", {}, 400, "invalid_json", None),
            ("/v1/completions", {"prompt": "a", "tempe": 1}, {}, 400, "unknown_field", "tempe"),
            ("/v1/completions", {"prompt": [5, 10**6]}, {}, 400, "invalid_value", "prompt"),
            ("/v1/completions", {"prompt": ""}, {}, 200, None, None),
            ("/v1/completions", {"prompt": [[]]}, {}, 400, "invalid_value", "prompt"),
            ("/v1/completions", {"prompt": "\ud800"}, {}, 400, "invalid_value", "prompt"),
            ("/v1/completions", {"prompt": "a", "\ud800": 1}, {}, 400, "unknown_field", "?"),
            ("/v1/chat/completions", {"messages": [HI[0] | {"\udfff": "a"}]}, {}, 400, "unknown_field",
             "messages[0].?"),
            ("/v1/completions", {"prompt": "a", "logit_bias": {"1" * 5000: 1}}, {}, 400, "invalid_value",
             "logit_bias." + "1" * 80),
            ("/v1/completions", {"prompt": "a", "logit_bias": {"0" * 5000 + "5": 1}}, {}, 400, "invalid_value",
             "logit_bias." + "0" * 80),
            ("/v1/completions", {"prompt": "a", "stop_token_ids": [10**6]}, {}, 400, "invalid_value", "stop_token_ids"),
            ("/v1/completions", {"prompt": "a", "model": "gpt"}, {}, 404, "model_not_found", "model"),
            ("/v1/completions", {"prompt": [5] * 501}, {}, 413, "prompt_too_long", "prompt"),
            ("/v1/completions", {"prompt": "a" * 8000}, {}, 413, "body_too_large", None),
            ("/v1/completions", {"prompt": ["a"] * 5}, {}, 400, None, "n"),
            ("/v1/completions", {"prompt": "a"}, {"Content-Type": "text/plain"}, 415, None, None),
            ("/v1/completions", None, {}, 405, None, None),
            ("/v1/nothing", None, {}, 404, None, None),
            ("/v1/models/gpt", None, {}, 404, "model_not_found", "model"),
            ("/tokenize", {"prompt": "a", "model": "gpt"}, {}, 404, "model_not_found", "model"),
            ("/tokenize", {"prompt": "a", "model": "tiny", "add_special_tokens": None}, {}, 200, None, None),
            ("/detokenize", {"tokens": [5], "model": "gpt"}, {}, 404, "model_not_found", "model"),
            ("/detokenize", {"tokens": [10**6]}, {}, 400, "invalid_value", "tokens"),
            ("/detokenize", {"tokens": []}, {}, 200, None, None),
            ("/health", None, {}, 200, None, None),
            ("/v1/completions", [1], {}, 400, "invalid_value", None),
            ("/v1/completions", {"prompt": "a", "logit_bias": {"1000000": 1}}, {}, 400, "invalid_value", "logit_bias"),
            ("/v1/completions", {"prompt": ["a", [5, 10**6]]}, {}, 400, "invalid_value", "prompt[1]"),
            ("/v1/chat/completions", {"messages": HI, "chat_template_kwargs": {"a": 1}}, {}, 400, "invalid_value",
             "chat_template_kwargs"),
            ("/v1/chat/completions", {"messages": [HI[0] | {"content": "cat " * 501}]}, {}, 413, "prompt_too_long",
             "messages"),
            ("/v1/completions", {"prompt": "a"}, {"Content-Encoding": "gzip"}, 415, None, None),
            ("/v1/models/models/tiny", None, {}, 200, None, None),
            ("/tokenize", {"prompt": "a", "model": "models/tiny"}, {}, 200, None, None),
        ):  # fmt: skip
            got, _, told = ask(server, path, body, {**JSON, **more})
            assert got == status, (path, body, told)
            if status != 200:
                assert told["error"].keys() == {"message", "type", "param", "code"}
                assert (told["error"]["code"], told["error"]["param"]) == (code, param), (path, body, told)
        assert ask(server, "/v1/models", host="evil.example")[0] == 403, "a name that leads here from elsewhere"
        assert ask(server, "/health", host="LocalHost:8000")[0] == 200
        assert ask(server, "/v1/completions")[1]["allow"] == "POST"
        chunked = iter([b"a" * 3000] * 4)  # larger than is allowed, and does not say so
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/completions", chunked, JSON, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert settled(server)


def test_a_full_queue_says_when_to_come_again(served):
    with running(served, max_waiting=1) as server:
        api = client(server)
        settings = {"max_tokens": 10**6, "stream": True, "extra_body": {"ignore_eos": True}}
        endless = [api.completions.create(model="tiny", prompt=[5], **settings) for _ in range(4)]
        for stream in endless:
            next(iter(stream))
        waiting = threading.Thread(target=lambda: api.completions.create(model="tiny", prompt=[6], max_tokens=1))
        waiting.start()
        while server.worker.num_waiting < 1:
            time.sleep(0.01)
        status, headers, told = ask(server, "/v1/completions", {"prompt": "a"})
        assert (status, told["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            api.completions.create(model="tiny", prompt="a")
        endless[0].close()  # its row is free at once
        waiting.join(timeout=20)
        assert not waiting.is_alive()
        for stream in endless:
            stream.close()
        assert settled(server)


def test_what_will_not_be_answered_is_not_read(served, monkeypatch):
    """Neither tokenized nor hashed; and choices of one prompt share what is made of it."""
    with running(served, max_waiting=0) as server:
        monkeypatch.setattr(served.tokenizer, "encode", lambda *_, **__: 1 / 0)
        assert ask(server, "/v1/completions", {"prompt": "a", "n": 5})[0] == 400
        server.worker._open += 1
        for path, body in (
            ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 4}),
        ):
            assert ask(server, path, body)[2]["error"]["code"] == "queue_full"
        server.worker._open -= 1
        monkeypatch.undo()
        jobs: list = []
        submit = server.worker.submit
        monkeypatch.setattr(server.worker, "submit", lambda found: (jobs.extend(found), submit(found)))
        assert ask(server, "/v1/completions", {"prompt": ["a", [7] * 40], "n": 2, "max_tokens": 1})[0] == 200
        assert len({id(job.ids) for job in jobs}) == len({id(job.ids) for job in jobs[::2]}) == 2
        assert jobs[2].blocks is jobs[3].blocks
        assert settled(server)


def test_a_key_is_asked_for(served):
    with running(served, api_key="sésame", cache_memory=0) as server:
        for key in ("", "Bearer", "Bearer no", "Basic sésame", "sésame"):
            for path in ("/v1/models", "/metrics"):
                status, headers, told = ask(server, path, headers={"Authorization": key.encode("utf-8")})
                assert (status, told["error"]["code"]) == (401, "invalid_api_key")
                assert headers["www-authenticate"] == "Bearer"
        assert ask(server, "/health")[0] == 200
        ask_with = {"Authorization": "Bearer sésame".encode()}
        assert ask(server, "/v1/models", headers=ask_with, host="my.server")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            client(server, "other").models.list()


def test_all_is_503_while_the_model_is_loaded_and_while_it_stops(served):
    gate = threading.Event()
    server = running_module.Running(lambda: (gate.wait(), served)[1], running_module.Options(rows=ROWS, steps=3))
    server.start()
    for path, body in (("/health", None), ("/v1/completions", {"prompt": "a"}), ("/v1/models", None)):
        status, headers, told = ask(server, path, body)
        assert (status, told["error"]["code"], headers["retry-after"]) == (503, "loading", "5")
    assert server.metrics.text() == b"", "no number before there is the model that it is of"
    gate.set()
    server.wait()
    stream = client(server).completions.create(
        model="tiny", prompt=[5, 9], max_tokens=150, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    text = next(iter(stream)).choices[0].text
    server.worker.stop(60.0)
    assert ask(server, "/v1/completions", {"prompt": "a"})[2]["error"]["code"] == "stopping"
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == text_of(alone(served, [5, 9], max_new_tokens=150, stop_at_eos=False)), "what ran came to its end"
    server.stop(0.0)
    with pytest.raises(ConnectionRefusedError):
        ask(server, "/health")


def test_what_runs_or_waits_longer_than_the_drain_is_told(served, caplog):
    settings = {"max_tokens": 10**6, "stream": True, "extra_body": {"ignore_eos": True}}
    with caplog.at_level(logging.INFO, "sepjax.serve"), running(served, drain_seconds=0.2) as server:
        api = client(server)
        streams = [api.completions.create(model="tiny", prompt=[5], **settings) for _ in range(4)]
        for stream in streams:
            next(iter(stream))
        found: list = []

        def wait():
            try:
                api.completions.create(model="tiny", prompt=[6], **settings)
            except openai.APIError as error:
                found.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while server.worker.num_waiting < 1:
            time.sleep(0.01)
        server.worker.stop(0.2)
        waiting.join()
        assert isinstance(found[0], openai.InternalServerError), "nothing had gone out: a status of its own"
        assert found[0].status_code == 503
        for stream in streams:
            with pytest.raises(openai.APIError, match="the server is stopping"):
                list(stream)
    said = [vars(record)["status"] for record in caplog.records if record.message == "not answered"]
    assert said == [503] * 5, "499 is a client that went away"
    told = server.metrics.text().decode()
    counts = numbers(told)
    assert counts["prompt_tokens_total"] == 4, "four prompts of a token were read, the fifth was not"
    assert counts["e2e_request_latency_seconds_count"] == 0
    assert "finished_reason=" not in told, "none has come to its end"


def test_a_failure_ends_the_server_and_says_why(served, caplog):
    def dense():
        return tiny_served(pattern="dense")

    with pytest.raises(ConfigError, match="cache without end"):
        running_module.Running(dense, running_module.Options()).__enter__()
    with running(served) as server:
        with pytest.raises(running_module.ServeError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            running(served, port=server.port)
        server.worker.slots.save = lambda _: 1 / 0  # while the answer is in nobody's list
        with caplog.at_level(logging.CRITICAL, "sepjax.serve"):
            status, _, told = ask(server, "/v1/completions", {"prompt": "a"})
        assert (status, told["error"]["code"]) == (503, "stopping")
        server.worker.join()
        assert isinstance(server.worker.error, ZeroDivisionError)
    with pytest.raises(running_module.ServeError, match="no room for two conversations"):
        running(served, cache_memory=1).__enter__()


def test_the_log_has_no_contents(served, caplog):
    with running(served) as server, caplog.at_level(logging.DEBUG, "sepjax.serve"):
        settings = {"max_tokens": 3, "user": "secret", "extra_body": {"ignore_eos": True}}
        client(server).completions.create(model="tiny", prompt="The cat", **settings)
    record = next(record for record in caplog.records if record.message == "answered")
    line = json.loads(logs.JsonLines().format(record))
    assert line["event"] == "answered"
    assert (line["status"], line["completion_tokens"], line["finish"]) == (200, 3, ["length"])
    assert not any(word in logs.JsonLines().format(found) for found in caplog.records for word in ("cat", "secret"))


def test_what_others_say_is_a_line_of_the_log(served, caplog, capfd, monkeypatch):
    """Of a prompt with few separators, say: stderr has a JSON object a line."""
    monkeypatch.setattr(separators, "_warned", set())
    (word,) = served.tokenizer.encode("a", bos=False)[:1]
    with caplog.at_level(logging.INFO, "sepjax.serve"), console.given_to(logs.warn), running(served) as server:
        client(server).completions.create(model="tiny", prompt=[word] * 300, max_tokens=1)
    assert "separators" not in capfd.readouterr().err
    (line,) = [logs.JsonLines().format(x) for x in caplog.records if "separators" in x.message]
    assert json.loads(line)["level"] == "warning"
    assert json.loads(line)["event"].startswith("a prompt: 0.00% of 300 tokens are separators")


def test_no_setting_is_lost_on_its_way(monkeypatch, capfd):
    seen: list = []

    class Spy:
        def __init__(self, load, options):
            seen.append(options)
            self.run = load

    def load(*arguments, **named):
        seen.extend([arguments, named])
        raise Called

    monkeypatch.setattr("sepjax.serve.running.Running", Spy)
    monkeypatch.setattr("sepjax.serve.process.prepare", lambda: None)
    monkeypatch.setattr("sepjax.serve.logs.begin", lambda level: seen.append(level))
    monkeypatch.setattr("sepjax.loading.load", load)
    own = [flag for flag in own_flags(serve.Settings) if flag.name not in ("workdir", "download", "pattern", "arm")]
    values = {flag.name: unlike(flag, i) for i, flag in enumerate(own)}
    values |= {"dtype": "bfloat16", "step": None, "max_body_bytes": 4321, "steps": 47}
    values |= {"tensor": 2, "cache_memory": 3, "device_memory": 7, "state_size": 5, "template_variables": '{"a": 1}'}
    values |= {"http_processes": 33}
    with pytest.raises(Called):
        serve.main(serve.Settings(**values))
    reached = leaves([dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x for x in seen])
    assert seen[-1]["mesh"].shape["tensor"] == 2
    assert (seen[1].cache_memory, seen[1].device_memory, seen[1].state_bytes) == (3 << 20, 7 << 20, 5 << 20)
    later = {
        "cache_memory",
        "device_memory",
        "state_size",
        "name",
        "max_prompt_tokens",
        "sampling_defaults",
        "template_variables",
        "window_size",
        "num_sinks",
        "max_separators",
        "cache_size",
        "cache_dtype",
        "step",
        "tensor",
    }
    assert not [name for name, value in values.items() if value not in reached and name not in later]
    with pytest.raises(ConfigError, match="--tensor=99 needs as many devices on this machine, and there are 8"):
        serve.main(serve.Settings(model="m", tensor=99))
    monkeypatch.setenv("SEPJAX_API_KEY", "from the environment")
    assert serve.Settings(model="m", host="0.0.0.0").key == "from the environment"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "sepjax serve needs starlette, uvicorn, prometheus_client: pip install" in refusal(
        capfd, "serve", "--model=m"
    )


def test_a_process_that_serves_may_open_many_files_and_its_threads_take_short_turns():
    before, interval = resource.getrlimit(resource.RLIMIT_NOFILE), sys.getswitchinterval()
    garbage = gc.get_threshold()
    low = min(256, before[1]) if before[1] != resource.RLIM_INFINITY else 256
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(low, len(os.listdir("/proc/self/fd")) + 64), before[1]))
        gc.set_threshold(700, 10, 10)
        process.prepare()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1]
        assert soft == (1 << 16 if hard == resource.RLIM_INFINITY else min(1 << 16, hard))
        assert sys.getswitchinterval() == pytest.approx(1e-4)
        assert gc.get_threshold()[0] > 700
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        sys.setswitchinterval(interval)
        gc.set_threshold(*garbage)
