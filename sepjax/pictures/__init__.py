"""Pictures of what the method does: which tokens of a text are kept, quality against KV, losses of several runs.

`sepjax picture kept|pareto|curves` makes them on a command line.
"""

from sepjax.pictures.kept import KeptText, kept_text

__all__ = ["KeptText", "kept_text"]
