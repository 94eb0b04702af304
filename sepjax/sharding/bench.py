"""The mesh on the links of one host: training, context parallelism, checkpoints and generation over all local devices.

    python -m sepjax.sharding.bench --json=mesh.json [--parts=training,attention,checkpoint,generation]

Every part is measured against one device of the same host, and written to the JSON file as soon as it is there.

    training     sep_small and sep_large: tokens/s, MFU and scaling on meshes `data`, `fsdp`, `tensor`, `context`; one
                 device computes the same global batch in more micro-batches. The losses of the first steps must agree.
    attention    rows of 128k, 512k, 1M tokens split over `context`: packed global keys and a halo are sent, against the
                 same kernels with all keys sent and every earlier token seen (dense context parallelism)
    checkpoint   a state of one device is saved, read into the shards of all, goes on, and comes back to one
    longest      training steps of one device on single rows of 512k and 1M tokens (not measured unless asked for)
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags

from sepjax.config import ConfigError, nearest
from sepjax.flags import run_main, whole_numbers
from sepjax.provenance import heading, provenance
from sepjax.sharding import bench_attention, bench_training

PARTS = ("training", "attention", "checkpoint", "longest")


def parts(
    training: bench_training.Settings, attention: bench_attention.Settings
) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """What can be measured, by name."""
    return {
        "training": lambda: bench_training.measure(training),
        "attention": lambda: bench_attention.measure(attention),
        "checkpoint": lambda: bench_training.move_checkpoint(training),
        "longest": lambda: bench_training.longest(training),
    }


def line(figures: dict[str, Any]) -> str:
    """The figures that matter, in words."""
    name = " ".join(str(figures[x]) for x in ("part", "config", "pattern", "mesh", "devices", "length") if x in figures)
    words = []
    if "tokens_per_second" in figures:
        words.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    if "milliseconds" in figures:
        words.append(f"{figures['milliseconds']:.1f} ms")
    words += [
        f"{x} {figures[x]['milliseconds']:.2f} ms"
        for x in ("forward", "forward+backward", "sending_keys")
        if x in figures
    ]
    words += [f"{x} {figures[x]:.3f}" for x in ("mfu", "efficiency") if x in figures]
    if "memory_bytes" in figures:
        words.append(f"{figures['memory_bytes'] / 2**30:.1f} GiB")
    if "bytes_received" in figures:
        words.append(f"{figures['bytes_received'] / 2**20:.1f} MiB received")
    if "largest_loss_difference" in figures:
        agree = "agree" if figures["losses_agree"] else "DIFFER"
        words.append(f"losses {agree} ({figures['largest_loss_difference']:.2g})")
    if "moves" in figures:
        words += [f"save {x['save']:.1f} s, restore {x['restore']:.1f} s" for x in figures["moves"]]
    return f"{name}: {', '.join(words)}"


def main(chosen: tuple[str, ...], training: Any, attention: Any, json_file: str | None) -> None:
    """Prints a line as each figure is there, and writes all so far to the JSON file."""
    report: dict[str, Any] = provenance()
    report["settings"] = {"training": dataclasses.asdict(training), "attention": dataclasses.asdict(attention)}
    report["figures"] = []
    print(heading(report), f"{jax.device_count()} devices", sep="\n", flush=True)
    start = time.perf_counter()
    for name in chosen:
        for figures in parts(training, attention)[name]():
            report["figures"].append(figures)
            print(f"{time.perf_counter() - start:6.1f} s  {line(figures)}", flush=True)
            if json_file:
                Path(json_file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    DEFAULT, LONG = bench_training.Settings(), bench_attention.Settings()
    CHOSEN = flags.DEFINE_list("parts", list(PARTS[:-1]), f"of {', '.join(PARTS)}")
    CONFIGS = flags.DEFINE_list("configs", list(DEFAULT.configs), "files in configs/, without .py")
    AXES = flags.DEFINE_list("axes", list(DEFAULT.axes), "meshes, each of one axis over all devices")
    LENGTH = flags.DEFINE_integer("length", DEFAULT.length, "tokens of a row in training", lower_bound=1)
    LONG_LENGTH = flags.DEFINE_integer("long_length", DEFAULT.long_length, "the same on `context`", lower_bound=1)
    TOKENS = flags.DEFINE_integer("tokens", DEFAULT.tokens, "of a device's micro-batch", lower_bound=1)
    LENGTHS = flags.DEFINE_list("lengths", list(map(str, LONG.lengths)), "tokens of a row of attention alone")
    LONGEST = flags.DEFINE_list("longest", list(map(str, DEFAULT.longest)), "tokens of a row in the part longest")
    SECONDS = flags.DEFINE_float("seconds", DEFAULT.seconds, "for the timed loops of a figure", lower_bound=0)
    JSON = flags.DEFINE_string("json", None, "file for all figures and settings")

    def _main() -> None:
        for name, value, known in (("parts", CHOSEN.value, PARTS), ("axes", AXES.value, bench_training.AXES)):
            for entry in value:
                if entry not in known:
                    raise ConfigError(f"--{name}={entry} is none of {', '.join(known)}{nearest(entry, known)}")
        training = dataclasses.replace(
            DEFAULT, configs=tuple(CONFIGS.value), axes=tuple(AXES.value), length=LENGTH.value,
            long_length=LONG_LENGTH.value, longest=whole_numbers("longest", LONGEST.value),
            tokens=TOKENS.value, seconds=SECONDS.value,
        )  # fmt: skip
        lengths = whole_numbers("lengths", LENGTHS.value)
        main(tuple(CHOSEN.value), training, dataclasses.replace(LONG, lengths=lengths), JSON.value)

    run_main(_main)
