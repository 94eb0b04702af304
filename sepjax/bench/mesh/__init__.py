"""The mesh on the links of one host: training, context parallelism, checkpoints and generation over all local devices.

    sepjax bench mesh --json=mesh.json [--parts=training,attention,checkpoint,generation]

Every part is measured against one device of the same host, and written to the JSON file as soon as it is there.

    training     sep_small and sep_large: tokens/s, MFU and scaling on meshes `data`, `fsdp`, `tensor`, `context`; one
                 device computes the same global batch in more micro-batches. The losses of the first steps must agree.
    attention    rows of 128k, 512k, 1M tokens split over `context`: packed global keys and a halo are sent, against the
                 same kernels with all keys sent and every earlier token seen (dense context parallelism)
    checkpoint   a state of one device is saved, read into the shards of all, goes on, and comes back to one
    generation   tokens/s of a batch with weights and cache split over `tensor`
    longest      training steps of one device on single rows of 512k and 1M tokens (not measured unless asked for)
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from sepjax.bench.mesh import attention, generation, training
from sepjax.bench.mesh.attention import Settings as AttentionSettings
from sepjax.bench.mesh.generation import Settings as GenerationSettings
from sepjax.bench.mesh.training import Settings as TrainingSettings
from sepjax.files import write_text
from sepjax.measure import heading, provenance

PARTS = ("training", "attention", "checkpoint", "generation", "longest")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, part by part."""

    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
    attention: AttentionSettings = dataclasses.field(default_factory=AttentionSettings)
    generation: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)

    def parts(self) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
        """What can be measured, by name."""
        return {
            "training": lambda: training.measure(self.training),
            "attention": lambda: attention.measure(self.attention),
            "checkpoint": lambda: training.move_checkpoint(self.training),
            "generation": lambda: generation.measure(self.generation),
            "longest": lambda: training.longest(self.training),
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


def main(chosen: tuple[str, ...], settings: Settings, json_file: str | None) -> None:
    """Prints a line as each figure is there, and writes all so far to the JSON file."""
    report: dict[str, Any] = provenance()
    report |= {"settings": dataclasses.asdict(settings), "figures": []}
    print(heading(report), f"{jax.device_count()} devices", sep="\n", flush=True)
    start = time.perf_counter()
    for name in chosen:
        for figures in settings.parts()[name]():
            report["figures"].append(figures)
            print(f"{time.perf_counter() - start:6.1f} s  {line(figures)}", flush=True)
            if json_file:
                write_text(json_file, json.dumps(report, indent=2) + "\n")
