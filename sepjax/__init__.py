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


def _program(arguments: list[str]) -> str:
    """The module that Python is about to run, python -m MODULE, if it is one of ours: sys.argv is ["-m"] until then."""
    words = iter(arguments)
    module = next(words, "") if sys.argv[:1] == ["-m"] and "-m" in words else ""
    return module if module.split(".")[0] == "sepjax" else ""


if _program(sys.orig_argv):  # before all else is imported, which takes seconds
    from sepjax import interrupt
    from sepjax.command import moved

    interrupt.end_in_one_line()
    moved.refuse(_program(sys.orig_argv))


def __getattr__(name: str) -> "Any":
    """Imports what is asked for: `import sepjax` alone brings neither JAX nor a model."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'sepjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
