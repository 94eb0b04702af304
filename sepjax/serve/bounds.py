"""What settings of a server may not be, for all programs that begin one. Imports nothing that the extra `serve` has."""

from sepjax.config import ConfigError

MOST_STEPS = 64  # tokens between two looks of the host: with more, clients wait for what has long been there


def check_memory(device_memory: int | None, cache_memory: int) -> None:
    """Raises ConfigError for rows that are to stay on the device where none is kept."""
    if device_memory and not cache_memory:
        raise ConfigError(
            f"--device_memory={device_memory} keeps nothing where --cache_memory=0; leave one of them out"
        )
