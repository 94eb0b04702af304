"""Tokens a second of generation alone, for the shape of a config with random weights.

    python -m sepjax.bench.generation --config=configs/sep_small.py [--batch_sizes=1,32 --max_new_tokens=256]

The tokenizer is trained on the spot on the language reference of Python itself. Each case runs twice; the second run,
which compiles nothing, is timed from prompt to last token. The last line is JSON.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from sepjax.command.flags import run_main
from sepjax.config import Config
from sepjax.data.tokenizer import train_sentencepiece
from sepjax.generation.api import generate, stream
from sepjax.model.transformer import create

PROMPT = "The function returns a value."


def measure(config: Config, batch_sizes: Sequence[int], max_new_tokens: int) -> dict[str, float]:
    """Tokens per second of `generate` at each batch size, and of `stream`."""
    from pydoc_data.topics import topics

    tokenizer = train_sentencepiece(list(topics.values()), min(4096, config.model.vocab_size))
    model = create(config.model, config.attention, jax.random.key(0))
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_at_eos": False}
    speeds = {}
    for rows in batch_sizes:
        seconds = _second_run(lambda rows=rows: generate(model, tokenizer, [PROMPT] * rows, **settings))
        speeds[f"generate, batch {rows}"] = rows * max_new_tokens / seconds
    seconds = _second_run(lambda: list(stream(model, tokenizer, PROMPT, **settings)))
    return speeds | {"stream, batch 1": max_new_tokens / seconds}


def _second_run(run: Callable[[], Any]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    ROWS = flags.DEFINE_list("batch_sizes", ["1", "32"], "prompts at a time")
    TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "tokens of each answer", lower_bound=1)

    def main(config: Config) -> None:
        """Prints a line a case, then JSON."""
        device = jax.devices()[0].device_kind
        speeds = measure(config, [int(rows) for rows in ROWS.value], TOKENS.value)
        for name, speed in speeds.items():
            print(f"{name:<24}{speed:>12,.1f} tokens/s")
        print(json.dumps({"device": device, "jax": jax.__version__, "tokens_per_second": speeds}))

    run_main(main, with_config=True)
