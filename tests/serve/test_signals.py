"""SIGTERM: what runs comes to its end, all is saved, and the next server goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import openai
import pytest

from sepjax.serve import running as running_module
from tests.generation.tiny import ROWS
from tests.serve.test_operations import ask
from tests.serve.tiny import alone, client, running, text_of, tiny_served

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served():
    return tiny_served()


ENDLESS = {"max_tokens": 300, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}


def check_goes_on(served, state, text):
    """What was said until SIGTERM is all of it, and another server has kept it."""
    events = alone(served, [5, 9], max_new_tokens=300, stop_at_eos=False)
    assert text == text_of(events)
    ids = [5, 9, *(token for event in events for token in event.token_ids), 11]
    with running(served, state=state) as server:
        got = client(server).completions.create(model="tiny", prompt=ids, max_tokens=9, temperature=0)
        assert got.usage.prompt_tokens_details.cached_tokens == len(ids) - 2
        assert got.choices[0].text == text_of(alone(served, ids, max_new_tokens=9))


def test_sigterm_drains_and_saves_and_the_next_server_goes_on(served, tmp_path):
    state, sent = str(tmp_path / "state"), threading.Event()
    server = running_module.Running(
        lambda: served, running_module.Options(rows=ROWS, steps=3, state=state, drain_seconds=60.0)
    )

    def end():
        if not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def talk():
        try:
            while ask(server, "/health")[0] != 200:
                time.sleep(0.01)
            stream = client(server).completions.create(model="tiny", prompt=[5, 9], **ENDLESS)
            text = next(iter(stream)).choices[0].text
            end()
            return text + "".join(chunk.choices[0].text for chunk in stream)
        finally:
            end()  # or the server would wait for ever

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # should it end by itself
    try:
        with ThreadPoolExecutor(1) as pool:
            said = pool.submit(talk)
            server.run()
            text = said.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    check_goes_on(served, state, text)


PROGRAM = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from sepjax.serve import logs
from sepjax.serve.running import Options, Running
from tests.serve.tiny import tiny_served
logs.begin("info")
Running(tiny_served, Options(rows=4, state=sys.argv[1], drain_seconds=60.0)).run()
"""


@pytest.mark.soak  # another process, which begins for ten seconds
def test_sigterm_drains_saves_and_ends_and_the_next_server_goes_on(served, tmp_path):
    state = str(tmp_path / "state")
    command = [sys.executable, "-c", PROGRAM, state, str(jax.device_count())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # It finds the programs that were compiled here, and writes none: it may be killed.
    environment |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000000"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(json.loads(line))
            if lines[-1]["event"] == "ready":
                break
        url = next(line["url"] for line in lines if line["event"] == "listening")
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = api.completions.create(model="tiny", prompt=[5, 9], **ENDLESS)
        text = next(iter(stream)).choices[0].text
        process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
    finally:
        process.kill()
        process.stderr.close()
    check_goes_on(served, state, text)
