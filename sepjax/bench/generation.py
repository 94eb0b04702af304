"""Tokens per second of generation, for the shape of a config with random weights.

    sepjax bench generation --config=configs/sep_small.py [--batch_sizes=1,32 --max_new_tokens=256]

The tokenizer is trained on the spot on the language reference of Python itself. Each case runs twice; the second run,
which compiles nothing, is timed from prompt to last token. "after the first" are the tokens of a stream behind its
first quarter, by which it knows how many steps to make at a time. The last line is JSON.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import jax

from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast
from sepjax.command.settings import Settings as _Settings
from sepjax.config import Config
from sepjax.data.tokenizer import train_sentencepiece
from sepjax.generation.api import generate, stream
from sepjax.model.transformer import create

PROMPT = "The function returns a value."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is measured."""

    config: Config  # a config file; its shape is used
    batch_sizes: Annotated[tuple[int, ...], AtLeast(1)] = (1, 32)  # prompts at a time
    max_new_tokens: Annotated[int, AtLeast(1)] = 256  # tokens of each answer


def measure(config: Config, batch_sizes: Sequence[int], max_new_tokens: int) -> dict[str, float]:
    """Tokens per second of `generate` at each batch size, and of `stream` over caches that can be had."""
    from pydoc_data.topics import topics

    tokenizer = train_sentencepiece(list(topics.values()), min(4096, config.model.vocab_size))
    model = create(config.model, config.attention, jax.random.key(0))
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_at_eos": False}
    speeds = {}
    for rows in batch_sizes:
        seconds = _second_run(lambda rows=rows: generate(model, tokenizer, [PROMPT] * rows, **settings))
        speeds[f"generate, batch {rows}"] = rows * max_new_tokens / seconds
    for name, bounded in (("stream", False), ("stream, bounded", True))[: 2 if config.attention.cache_size else 1]:
        times = _second_times(lambda bounded=bounded: stream(model, tokenizer, PROMPT, bounded=bounded, **settings))
        first = len(times) // 4
        speeds[name] = max_new_tokens / times[-1]
        if first:
            speeds[f"{name}, after the first"] = (len(times) - first) / (times[-1] - times[first - 1])
    return speeds


def _second_times(run: Callable[[], Iterable[Any]]) -> list[float]:
    """Seconds from the beginning to each event, the second time."""
    list(run())
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in run()]


def _second_run(run: Callable[[], Any]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(settings: Settings) -> None:
    """Prints a line a case, then JSON."""
    device = jax.devices()[0].device_kind
    speeds = measure(settings.config, settings.batch_sizes, settings.max_new_tokens)
    for name, speed in speeds.items():
        print(f"{name:<32}{speed:>12,.1f} tokens/s")
    print(json.dumps({"device": device, "jax": jax.__version__, "tokens_per_second": speeds}))


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
