"""A server of the tests' tiny model, in a thread of this process, and clients of it."""

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

import openai

from sepjax import Sampling
from sepjax.generation.row import StreamEvent
from sepjax.serve.running import Options, Running
from sepjax.serve.served import Served
from tests.generation.tiny import ROWS, tiny_engine


def tiny_served(*, max_prompt_tokens: int = 0, **attention: Any) -> Served:
    return Served.create("tiny", tiny_engine(**attention), None, max_prompt_tokens=max_prompt_tokens)


def running(served: Served, **options: Any) -> Running:
    return Running(lambda: served, Options(**{"rows": ROWS, "steps": 3, **options}))


def client(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def alone(served: Served, ids: Sequence[int], temperature: float = 0.0, **settings: Any) -> list[StreamEvent]:
    """What the engine gives to one prompt, with nobody else there."""
    names = [field.name for field in dataclasses.fields(Sampling)] + ["logit_bias"]
    draws = {name: settings.pop(name) for name in names if name in settings}
    sampling = Sampling.create(temperature, **draws)
    return list(served.engine.stream(list(ids), bounded=True, sampling=sampling, **settings))


def text_of(events: Sequence[StreamEvent]) -> str:
    return "".join(event.text for event in events)


def settled(server: Running) -> bool:
    """Whether nothing is left of what was asked: waits for it a little."""
    worker, until = server.worker, time.monotonic() + 20
    while time.monotonic() < until:
        if worker._open == 0 and worker.slots.is_idle and worker.slots.num_free == ROWS:
            return not (worker._running or worker._aside or len(worker._queue) or worker.slots._kept)
        time.sleep(0.02)
    return False


def random_request(rng: random.Random) -> dict[str, Any]:
    prompt = [rng.randrange(3, 300) for _ in range(rng.randrange(1, 50))]
    draws = {"temperature": rng.choice([0.0, 1.2]), "seed": rng.randrange(5)}
    return {"prompt": prompt, "max_tokens": rng.randrange(1, 20), **draws}


def wanted_of(served: Served, asked: dict[str, Any]) -> str:
    """The text that a request of `random_request` gets from the engine alone."""
    settings = {"seed": asked["seed"], "max_new_tokens": asked["max_tokens"]}
    return text_of(alone(served, asked["prompt"], asked["temperature"], **settings))
