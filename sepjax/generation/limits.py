"""What a model and a device can bear: sizes that cannot work are errors, sizes that a model never saw are warnings."""

import os
from pathlib import Path

import jax

from sepjax.config import AttentionConfig, ConfigError, ModelConfig, with_own_window
from sepjax.console import say
from sepjax.generation.cache.mixed import bounded_sizes
from sepjax.generation.cache.stored import vector_bytes
from sepjax.sharding import on_one_device, ways


class CacheTooLarge(ConfigError):
    """A cache that the memory cannot hold; the message ends with what to make smaller."""


def check_cache(config: ModelConfig, rows: int, slots: int, cache_dtype: str, wanted: str) -> None:
    """Raises CacheTooLarge for a cache that a device's memory cannot hold; `wanted` names the settings behind it.

    Without a mesh one device holds all of it, however many there are; a mesh splits rows and heads where they divide.
    Asked for all the same, a GPU answers with a page of XLA's, and a CPU begins to fill its memory and is killed.
    """
    parts = [(rows, "batch"), (config.num_kv_heads, "heads")]
    rows, heads = (n // ways(axis) if n % ways(axis) == 0 else n for n, axis in parts)
    needed = 2 * config.num_layers * rows * heads * slots * vector_bytes(config, cache_dtype)
    if needed > (there := _memory()):
        raise CacheTooLarge(
            f"{wanted} asks for a cache of {slots:,} entries, {needed / 2**30:,.1f} GiB of keys and values on a "
            f"device, and it has {there / 2**30:,.1f} GiB of memory; make it smaller"
        )


def _memory() -> int:
    """Bytes of a device, of the smallest; those of CPUs share the machine's."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if limits := [s["bytes_limit"] for s in stats if "bytes_limit" in s]:
        return min(limits)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 if on_one_device() else len(stats))


def warn_of_length(
    config: ModelConfig, attention: AttentionConfig, prompt: int, new: int | None, trained: int, *, bounded: bool
) -> None:
    """A line on stderr where a text goes to positions that the model was never trained at.

    Args:
      config: of the model.
      attention: of this generation.
      prompt: tokens of the longest prompt.
      new: tokens that may follow; None: without end.
      trained: tokens of the longest text that the model was trained on.
      bounded: whether the text runs over a bounded cache.
    """
    # Learned positions end with an error; in a bounded cache positions are slots, whatever the length of the text.
    if config.position_embedding == "learned" or (bounded and attention.stream_positions == "slot"):
        return
    if new is not None and prompt + new <= trained:
        return
    what = f"{prompt} tokens of prompt" + ("" if prompt > trained else f" and {new or 'endless'} more")
    say(f"warning: {what} go beyond the {trained} that the model was trained on; expect worse text from there on")


def warn_of_cache(config: ModelConfig, attention: AttentionConfig, trained: int) -> None:
    """A line on stderr where a bounded cache holds more than the model was trained to see.

    Args:
      config: of the model.
      attention: of this generation; over a bounded cache.
      trained: tokens of the longest text that the model was trained on.

    Raises:
      ConfigError: there is no such cache.
    """
    slots = bounded_sizes(config, with_own_window(attention, config)).largest
    if slots > trained:
        say(
            f"warning: a cache of {slots} entries is larger than the {trained} tokens that the model was trained on; "
            f"expect worse text once it holds more; set cache_size to {trained} or less"
        )


def trained_length(source: Path, config: ModelConfig) -> int:
    """Tokens of the longest text that a model was trained on: a run's rows, or what its files say."""
    if (source / "checkpoints").is_dir() and (source / "config.json").is_file():  # a converted model has none
        from sepjax.run.checkpoint import load_config  # brings Orbax, which a pretrained model need not wait for

        run = load_config(source)
        if not run.training.init_from:
            return run.data.sequence_length
    return config.max_positions
