"""Tokens per second of the input pipeline alone.

    sepjax bench data --config=configs/sep_small.py --data_dir=/tmp/data [--config.data.num_workers=2]

Prepares what is missing first (corpus, tokenizer), then times batches as train.py would draw them, after the first one.
The last line is JSON.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np

from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast
from sepjax.command.settings import Settings as _Settings
from sepjax.config import Config
from sepjax.data.pipeline import prepare_tokenizer, training_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is measured."""

    config: Config  # a config file; its data section is used
    data_dir: str  # folder of prepared datasets and the tokenizer
    seconds: Annotated[float, AtLeast(0)] = 10.0  # how long to read batches


def measure(config: Config, data_dir: str, seconds: float) -> dict[str, float]:
    """Draws batches for about `seconds`; returns rates, with CPU time of this process where it does all the work."""
    from sepjax.begin import adopt_shape, conversation_form, given_tokenizer  # here, for readers import this file too

    config = adopt_shape(config, Path(data_dir))
    given = given_tokenizer(config)
    tokenizer = given() if given else prepare_tokenizer(config, data_dir, f"{data_dir}/tokenizer")
    form = conversation_form(config, tokenizer)
    batches = training_batches(config, tokenizer, data_dir, seed=config.training.seed, form=form)
    began = time.perf_counter()
    next(batches)
    first = time.perf_counter() - began
    tokens, began, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        tokens += np.count_nonzero(next(batches).segment_ids)  # no padding
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    batches.close()
    rates = {"tokens_per_second": tokens / wall, "seconds": wall, "seconds_to_first_batch": first}
    return rates if config.data.num_workers else rates | {"tokens_per_cpu_second": tokens / cpu}


def main(settings: Settings) -> None:
    """Prints the rates: one line to read, one of JSON."""
    rates = measure(settings.config, settings.data_dir, settings.seconds)
    data = settings.config.data
    print(
        f"{rates['tokens_per_second']:,.0f} tokens/s, {data.name}, batches of {data.batch_size} x "
        f"{data.sequence_length}, {data.num_workers} workers; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(json.dumps(rates))


if __name__ == "__main__":  # Grain's worker processes import this file again
    run_settings(Settings, main, str(__doc__))
