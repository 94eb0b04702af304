"""SepLLM in JAX: separator-sparse attention, KV-cache compression and endless streaming generation."""

import sys

TYPE_CHECKING = False  # as type checkers know it; `typing` itself takes a while, and a program first sees to Ctrl-C
if TYPE_CHECKING:
    from typing import Any

    from sepjax.generation.api import generate, stream
    from sepjax.generation.engine import Generator
    from sepjax.generation.sampling import Sampling
    from sepjax.generation.slots import SlotRequest
    from sepjax.loading import load

__all__ = ["Generator", "Sampling", "SlotRequest", "__version__", "generate", "load", "stream"]

__version__ = "0.1.0"

_HOMES = {
    "Generator": "sepjax.generation.engine",
    "Sampling": "sepjax.generation.sampling",
    "SlotRequest": "sepjax.generation.slots",
    "generate": "sepjax.generation.api",
    "load": "sepjax.loading",
    "stream": "sepjax.generation.api",
}


def _is_program(arguments: list[str]) -> bool:
    """Whether Python imports this on its way to `python -m sepjax...`: the name is "-m" until the module is found."""
    words = iter(arguments)
    return sys.argv[:1] == ["-m"] and "-m" in words and next(words, "").split(".")[0] == "sepjax"


if _is_program(sys.orig_argv):  # before all else is imported, which takes seconds
    from sepjax import interrupt

    interrupt.end_in_one_line()


def __getattr__(name: str) -> "Any":
    """Imports what is asked for: `import sepjax` alone brings neither JAX nor a model."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'sepjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
