"""A server of the tests' tiny model, in a thread of this process, and clients of it."""

from typing import Any

import openai

from sepjax import Generator
from sepjax.server.running import Options, Running
from sepjax.server.served import Served
from tests.generation.tiny import tiny_model, tiny_tokenizer


def tiny_served(**settings: Any) -> Served:
    return Served.create("tiny", Generator(tiny_model(), tiny_tokenizer()), None, **settings)


def running(served: Served, **options: Any) -> Running:
    return Running(lambda: served, Options(**options))


def client(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)
