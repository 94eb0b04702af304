"""What settings of a server may be, for all programs that begin one. Imports nothing that the extra `serve` has."""

import os

from sepjax.config import ConfigError

MOST_STEPS = 64  # tokens between two looks of the host: with more, clients wait for what has long been there
MOST_HTTP = 64  # processes that answer HTTP: each has a tokenizer of its own
_HTTP = 4  # beside an accelerator
_AHEAD = 3 / 16  # rows read beside those that generate: as many as end in a launch of 16 steps, and half of them more
_LEAST_AHEAD = 128  # of fewer slots few end in a launch
_STEPS = 16  # on an accelerator: more tokens/s than 32 at 256 rows (docs/serving_measurements.md)


def check_memory(device_memory: int | None, cache_memory: int) -> None:
    """Raises ConfigError for rows that are to stay on the device where none is kept."""
    if device_memory and not cache_memory:
        raise ConfigError(
            f"--device_memory={device_memory} keeps nothing where --cache_memory=0; leave one of them out"
        )


def steps_of(steps: int | None) -> int:
    """Tokens between two looks; None: as suits the device.

    Looks at an accelerator cost more than they tell; on a processor a step takes longer than a look.
    """
    import jax  # seconds, which --help need not wait

    return steps or (1 if jax.default_backend() == "cpu" else _STEPS)


def ahead_of(rows: int, pool: int) -> int:
    """Rows beside so many slots whose prompts are read meanwhile, of a pool of so many.

    A processor takes longer for them, an accelerator hardly.
    """
    import jax

    few = jax.default_backend() == "cpu" or rows < _LEAST_AHEAD
    return 0 if few else min(int(rows * _AHEAD), pool // 2)


def http_processes_of(number: int | None) -> int:
    """Processes that answer HTTP; None: as suits the device and the machine.

    An accelerator waits for Python, so nothing else is to run where that asks for its work. On a processor a step takes
    longer than all that, and each of them would load libraries for seconds.
    """
    import jax

    if number is not None:
        return number
    return 0 if jax.default_backend() == "cpu" else max(1, min(_HTTP, (os.cpu_count() or 1) // 4))
