"""The load on a server: what clients see is what the server did."""

import asyncio
import json
import subprocess

import pytest

from sepjax import children
from sepjax.bench import load, serve
from sepjax.config import ConfigError
from tests.serve.tiny import running, settled, tiny_served


@pytest.fixture(scope="module")
def server():
    with running(tiny_served(), max_waiting=40) as made:
        yield made


def plan(server, **changes):
    return load.Plan(
        **{"url": server.url, "seconds": 2.0, "rate": 0.0, "users": 5, "prompt_median": 8.0, "answer_median": 6.0,
           "turns": 3.0, "pause": 0.05, "prompt_sigma": 0.3} | changes
    )  # fmt: skip


@pytest.mark.soak  # seconds of load; a program's figures are below
def test_a_load_is_answered_and_measured(server):
    run = load.Load(plan(server))
    found = asyncio.run(run.run())
    assert found["errors"] == 0
    assert found["requests"] > 3
    assert settled(server)
    counts = load.numbers(server.metrics.text().decode())
    made = counts["generation_tokens_total"]
    assert sum(turn.tokens for turn in run.turns) == made
    drawn = counts["launch_tokens_total"]
    assert made == drawn + len(run.turns), "in steps, and one of each answer behind its prompt"
    launches = found["launches"]
    assert 0 < launches["rows_generating"] <= 4
    assert 1 <= launches["steps"] <= 3
    assert 0 < launches["rows_to_be_read"] <= 4
    times = launches["milliseconds_before_steps"] + launches["milliseconds_steps"]
    assert 0 < times * launches["per_second"] <= 1100, "of the time between two looks at them"
    assert all(0 < turn.first - turn.sent <= turn.last - turn.sent for turn in run.turns)
    assert 0 < found["first_token_p50"] <= found["first_token_p99"]
    assert found["cache_bytes"] == server.worker.slots.cache_bytes
    assert found["cached_share"] > 0.2, "turns go on from their cache"
    rate = load.run(plan(server, rate=20.0, users=0, seconds=1.0))
    assert rate["errors"] == 0
    assert 5 <= rate["conversations"] <= 45, "20 a second by Poisson's law: 20, give or take 4"
    crowd = load.Load(plan(server, users=80, seconds=0.5))
    asyncio.run(crowd.run())
    assert any((turn.error or "").startswith("LoadError: 429") for turn in crowd.turns), "44 may run or wait"
    assert settled(server)


def test_a_server_without_metrics_is_told_of(monkeypatch):
    async def refuse(self, path, body=None):
        raise load.LoadError(f"404: no {path}")

    async def looked():
        monkeypatch.setattr(load.Server, "whole", refuse)
        run = load.Load(load.Plan("http://127.0.0.1:1", 1.0, 1.0))
        task = asyncio.create_task(run._look())
        await asyncio.sleep(0.01)
        assert not task.done(), "it looks again"
        task.cancel()
        return run.summary()

    found = asyncio.run(looked())
    assert (found["metrics_error"], found["running"]) == ("LoadError: 404: no /metrics", 0.0)


def test_no_other_process_sees_the_key(monkeypatch):
    seen: list = []

    def run(command, *, input, **_):
        seen.append(command)
        plan = load.Plan(**json.loads(input))
        return subprocess.CompletedProcess(command, 0, json.dumps({"key": plan.api_key}), "")

    monkeypatch.setattr(subprocess, "run", run)
    assert serve._in_a_process(load.Plan("http://x", 1.0, 1.0, api_key="secret")) == {"key": "secret"}
    assert "secret" not in str(seen)
    assert seen == [[*children.python("-m"), "sepjax.bench.load"]]


def test_tokens_count_where_they_came():
    turn = load.Turn(sent=0.0, first=2.0, last=4.0, tokens=21)
    assert load._within(turn, 0.0, 10.0) == 21
    assert load._within(turn, 3.0, 10.0) == pytest.approx(10.5)
    assert load._within(turn, 5.0, 10.0) == 0
    assert turn.per_token == pytest.approx(0.1)
    turn.begun = 11  # with the first text
    assert turn.per_token == pytest.approx(0.2)


def test_loads_are_read_and_ordered():
    assert serve.in_order(("50%", "2.5", "full", "50%")) == ["full", "50%", "2.5"]
    assert serve.in_order(("2", "1")) == ["2", "1"]
    assert [serve.share_of(name) for name in ("full", "80%", "3")] == [(0.0, False), (0.8, True), (3.0, False)]
    for wrong in ({"loads": ("fast",)}, {"loads": ("0",)}, {"url": None}, {"model": "x"}, {"prompt_sigma": 9.0},
                  {"dense_context": 5}, {"cache_dtype": "int8"}, {"steps": 3}, {"device_memory": 5},
                  {"http_processes": 1}, {"url": None, "config": "x", "http_processes": 65},
                  {"url": None, "config": "x", "steps": 65},
                  {"url": None, "config": "x", "device_memory": 5, "cache_memory": 0}):  # fmt: skip
        with pytest.raises(ConfigError):
            serve.Settings(**{"url": "http://127.0.0.1:1"} | wrong)


def test_the_program_prints_a_line_a_load_and_json(server, capfd, monkeypatch):
    """In this process, the load too: another one would only take longer to begin."""
    monkeypatch.setattr(serve, "_in_a_process", load.run)
    serve.main(serve.Settings(
        url=server.url, slots=4, loads=("50%",), seconds=1.0, prompt_median=6.0, answer_median=4.0, turns=2.0,
        pause=0.1,
    ))  # fmt: skip
    lines = capfd.readouterr().out.splitlines()
    said = json.loads(lines[-1])
    assert [figure["load"] for figure in said["figures"]] == ["full", "50%"]
    full, half = said["figures"]
    assert half["rate"] == pytest.approx(0.5 * full["turns_per_second"] / 2.0)
    assert len([line for line in lines if " launches a second: " not in line]) == 5
    assert serve._launches(None) == ""
    assert "device" not in said, "of a server elsewhere"
    assert (full["memory"], full["metrics_error"]) == (None, None)
    assert " - " in serve._row(full | {"metrics_error": "LoadError: 404: no"})
    assert serve._row(full | {"metrics_error": "LoadError: 404: no"}).endswith("  /metrics: LoadError: 404: no")
