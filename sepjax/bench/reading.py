"""Prefill over bounded caches: passes over chunks of tokens, and books streamed through them for scoring.

    sepjax bench reading --config=configs/llama3_8b.py [--budget=4/64/256/800 --shapes=32x128,1x480]

For the shape of a config, with random weights and full caches, rows at different distances from their next compaction.
A pass takes every row up to its next one at most, compacts those that are due, and gives the scores of what follows.
With `--slots=256` the rows are some of so many, as those whose prompts are read beside others that generate.
`--stream_tokens=1000000` streams so many tokens of random books besides (`sepjax evaluate --task=streaming`). The last
line is JSON.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.bench.steps import OfCaches, full_cache, random_params
from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast
from sepjax.config import AttentionConfig, Config, ConfigError
from sepjax.data.tokenizer import train_sentencepiece
from sepjax.evaluation.documents import Document
from sepjax.evaluation.streaming import score_streams
from sepjax.generation.cache.bounded import StreamingCache
from sepjax.generation.cache.sizes import StreamSizes
from sepjax.generation.device_loop import consume
from sepjax.measure import heading, provenance, time_calls
from sepjax.model.transformer import abstract, merge
from sepjax.model.unrolled import by_layer

_SEPARATORS = 0.12  # of the tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OfCaches):
    """What is measured."""

    shapes: tuple[str, ...] = ("32x128", "4x480", "1x480")  # rows x tokens of a pass
    # rows in all, of which a pass reads some; 0: as many as it reads
    slots: Annotated[int, AtLeast(0)] = 0
    # tokens of books to stream as well; 0: none
    stream_tokens: Annotated[int, AtLeast(0)] = 0
    books: Annotated[int, AtLeast(1)] = 20  # number of those books
    seconds: Annotated[float, AtLeast(0)] = 1.0  # time for each figure


@dataclasses.dataclass(frozen=True)
class ReadSpeed:
    """Passes of one cache and shape, or a stream."""

    name: str
    shape: str  # "stream": of all books
    milliseconds: float  # a pass
    tokens: float  # that a pass takes up, all rows together
    tokens_per_second: float


def measure(
    config: Config, caches: dict[str, AttentionConfig], shapes: Sequence[str], slots: int, seconds: float
) -> Iterator[ReadSpeed]:
    """Yields a figure for each cache and shape "rows x tokens".

    Raises:
      ConfigError: a shape of another form, or of more rows than slots.
    """
    sizes = [_shape(text, slots) for text in shapes]
    graph, weights = abstract(config.model, config.attention)
    params = random_params(jax.eval_shape(lambda x: by_layer(x, config.model), weights))
    for name, attention in caches.items():
        for rows, tokens in sizes:
            read = jax.jit(functools.partial(_read, graph, attention), donate_argnums=1)
            yield _speed(config, functools.partial(read, params), name, attention, rows, tokens, slots, seconds)


def _shape(text: str, slots: int) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--shapes takes rows and tokens like 32x128, got {text!r}")
    rows, tokens = map(int, parts)
    if slots and rows > slots:
        raise ConfigError(f"--shapes={text} reads {rows} rows, but --slots={slots}; leave it out, or give more")
    return rows, tokens


def _read(graph, attention, params, cache, which, tokens, table):
    """`consume` for some rows of a cache, as slots do it; which: None: for all."""
    few = cache if which is None else cache.where_they_lie(which, attention)
    left = jnp.full(len(tokens), tokens.shape[1])
    logits = jnp.zeros((len(tokens), len(table)), jnp.float32)
    scan = not few.is_in_place
    few, logits, counts = consume(graph, attention, params, few, logits, tokens, left, table, scan=scan)
    return few if which is None else cache.with_whole_rows(which, few), logits, counts


def _speed(
    config: Config, read: Callable, name: str, attention: AttentionConfig, rows: int, tokens: int, slots: int,
    seconds: float,
) -> ReadSpeed:  # fmt: skip
    cache: StreamingCache = full_cache(config, StreamSizes.create(config.model, attention), slots or rows)
    vocab = config.model.vocab_size
    table = jax.random.uniform(jax.random.key(1), (vocab,)) < _SEPARATORS
    ids = jax.random.randint(jax.random.key(3), (rows, tokens), 0, vocab)
    which = jnp.arange(rows, dtype=jnp.int32) * (slots // rows) if slots else None
    taken, calls = jnp.zeros((), jnp.int32), 0

    def run() -> jax.Array:
        nonlocal cache, taken, calls
        cache, logits, counts = read(cache, which, ids, table)
        taken, calls = taken + jnp.sum(counts), calls + 1
        return logits

    milliseconds = time_calls(run, repeats=3, seconds=seconds).milliseconds
    mean = float(taken) / calls
    return ReadSpeed(name, f"{rows}x{tokens}", milliseconds, mean, mean / milliseconds * 1e3)


def stream(config: Config, caches: dict[str, AttentionConfig], tokens: int, books: int) -> Iterator[ReadSpeed]:
    """Yields a figure for each cache: of so many random tokens, scored as documents."""
    from pydoc_data.topics import topics

    tokenizer = train_sentencepiece(list(topics.values()), min(4096, config.model.vocab_size))
    graph, weights = abstract(config.model, config.attention)
    model = merge(graph, random_params(weights))
    drawn = np.random.default_rng(0).integers(3, tokenizer.vocab_size, (books, max(2, tokens // books + 1)), np.int32)
    documents = [Document(x[:-1], x[1:]) for x in drawn]
    for name, attention in caches.items():
        (score,) = score_streams(model, tokenizer, documents, [attention])
        most = float(score.rows * score.chunk)  # that a pass takes up
        yield ReadSpeed(name, "stream", score.seconds / score.tokens * most * 1e3, most, score.tokens_per_second)


def main(settings: Settings) -> None:
    """Prints a line a figure, then JSON."""
    source, s = provenance(), settings
    print(heading(source))
    caches = s.caches()
    print(f"{'cache':<38}{'pass':>10}{'ms/pass':>10}{'tokens':>10}{'tokens/s':>12}")
    figures = []
    found = []
    for kind, config in s.configs().items():
        named = {name + kind: attention for name, attention in caches.items()}
        found.append(measure(config, named, s.shapes, s.slots, s.seconds))
        found += [stream(config, named, s.stream_tokens, s.books)] if s.stream_tokens else []
    for x in (x for figures_of in found for x in figures_of):
        print(
            f"{x.name:<38}{x.shape:>10}{x.milliseconds:>10.3f}{x.tokens:>10.0f}{x.tokens_per_second:>12,.0f}",
            flush=True,
        )
        figures.append(dataclasses.asdict(x))
    print(json.dumps(source | {"device": jax.devices()[0].device_kind, "figures": figures}))


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
