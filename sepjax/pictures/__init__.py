"""Pictures of what the method does: which tokens of a text are kept, quality against KV, losses of several runs.

`sepjax picture kept|pareto|curves` makes them on a command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepjax.pictures.kept import KeptText as KeptText
    from sepjax.pictures.kept import kept_text as kept_text

__all__ = ["KeptText", "kept_text"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: figures of results and runs need neither JAX nor a model."""
    if name not in __all__:
        raise AttributeError(f"module 'sepjax.pictures' has no attribute {name!r}")
    from sepjax.pictures import kept

    return getattr(kept, name)
