"""Tokens per second of slots, as a server uses them, against the bare decode loop with as many rows.

    sepjax bench slots --config=configs/llama3_8b.py [--budget=4/64/256/800 --rows=8,64 --cache_dtype=int8]

For the shape of a config, with random weights and full caches. The bare loop makes 32 steps in a call and reads none of
what they draw. Slots look at every token of every row: "plain" requests take the best token, "asking" ones draw with
top_p, a penalty, a stop text and log-probabilities. The host's time is that of its thread, while the device may work.
The tokenizer is trained on the spot, and both draw from its vocabulary. The last line is JSON.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import jax
import numpy as np

from sepjax.bench.steps import caches_of, in_types, loop_speed, random_params
from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast, OneOf
from sepjax.command.settings import Settings as _Settings
from sepjax.config import CACHE_DTYPES, AttentionConfig, Config
from sepjax.data.tokenizer import Tokenizer, train_sentencepiece
from sepjax.generation.engine import Generator
from sepjax.generation.sampling import Sampling
from sepjax.generation.slots import SlotRequest, Slots
from sepjax.measure import heading, provenance
from sepjax.model.transformer import abstract, merge

KINDS = {
    "plain": SlotRequest(None, stop_at_eos=False),
    "asking": SlotRequest(
        None,
        stop_at_eos=False,
        sampling=Sampling.create(0.8, top_p=0.95, frequency_penalty=0.3),
        stop=["\n\nUser:", "###"],
        logprobs=True,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is measured."""

    config: Config  # a config file; its shape is used
    budget: str = "4/64/256/800"  # sizes of the bounded cache: sinks/separators/window/cache
    # dtype of cached keys and values: the model's, or int8 in about half the bytes; default: the config's
    cache_dtype: Annotated[str, OneOf(CACHE_DTYPES)] | None = None
    rows: Annotated[tuple[int, ...], AtLeast(1)] = (8,)  # numbers of slots
    seconds: Annotated[float, AtLeast(0)] = 3.0  # time for each figure


@dataclasses.dataclass(frozen=True)
class SlotSpeed:
    """Steps of slots, all rows generating."""

    kind: str  # of the requests
    rows: int
    milliseconds: float  # a step
    host_milliseconds: float  # a step, of the thread that steps: looking at tokens, texts, asking for the next
    tokens_per_second: float
    loop_milliseconds: float  # a step of the bare loop
    share_of_loop: float  # tokens a second over the bare loop's


def measure(
    config: Config, attention: AttentionConfig, tokenizer: Tokenizer, rows: Sequence[int], seconds: float
) -> Iterator[SlotSpeed]:
    """Yields a figure for each number of rows and kind of request."""
    graph, shapes = abstract(config.model, attention)
    engine = Generator(merge(graph, random_params(shapes)), tokenizer, attention)
    for number in rows:
        loop = loop_speed(config, engine.prepared.params, attention, number, seconds, tokenizer.vocab_size)
        slots = engine.slots(number)
        for kind, request in KINDS.items():
            yield _speed(slots, kind, request, tokenizer, loop.milliseconds, seconds)


def _speed(
    slots: Slots, kind: str, request: SlotRequest, tokenizer: Tokenizer, loop: float, seconds: float
) -> SlotSpeed:
    rows, numbers = slots.num_free, []
    _fill(slots, request, tokenizer, numbers)
    events, steps, begin, own = 0, 0, time.perf_counter(), time.thread_time()
    while steps < 8 or time.perf_counter() - begin < seconds:
        events += len(slots.step())
        steps += 1
    passed, own = time.perf_counter() - begin, time.thread_time() - own
    for number in numbers:
        slots.cancel(number)
    while not slots.is_idle:
        slots.step()
    return SlotSpeed(
        kind=kind,
        rows=rows,
        milliseconds=passed / steps * 1e3,
        host_milliseconds=own / steps * 1e3,
        tokens_per_second=events / passed,
        loop_milliseconds=loop,
        share_of_loop=events / passed / (rows / loop * 1e3),
    )


def _fill(slots: Slots, request: SlotRequest, tokenizer: Tokenizer, numbers: list[int]) -> None:
    """Gives every row a request and reads its prompt: as much as a cache holds and more, no two rows in step."""
    random = np.random.default_rng(0)
    rows = slots.num_free
    for i in range(rows):
        prompt = random.integers(3, tokenizer.vocab_size, slots.cache_size + i * 37 % slots.cache_size).tolist()
        numbers.append(slots.submit(dataclasses.replace(request, prompt=prompt, seed=i)))
    heard: set[int] = set()
    while len(heard) < rows:
        heard.update(number for number, _ in slots.step())


def main(settings: Settings) -> None:
    """Prints a line a figure, then JSON."""
    from pydoc_data.topics import topics

    source, model = provenance(), settings.config.model
    print(heading(source))
    caches = caches_of(settings.config.attention, model.num_layers, settings.budget, 0)
    (attention,) = in_types(caches, (settings.cache_dtype,) if settings.cache_dtype else ()).values()
    print(f"{'requests':<10}{'rows':>6}{'ms/step':>10}{'host ms':>10}{'tokens/s':>12}{'loop ms':>10}{'share':>8}")
    tokenizer = train_sentencepiece(list(topics.values()), min(4096, model.vocab_size))
    figures = []
    for x in measure(settings.config, attention, tokenizer, settings.rows, settings.seconds):
        times = f"{x.milliseconds:>10.3f}{x.host_milliseconds:>10.3f}{x.tokens_per_second:>12,.0f}"
        print(f"{x.kind:<10}{x.rows:>6}{times}{x.loop_milliseconds:>10.3f}{x.share_of_loop:>8.1%}", flush=True)
        figures.append(dataclasses.asdict(x))
    print(json.dumps(source | {"device": jax.devices()[0].device_kind, "figures": figures}))


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
