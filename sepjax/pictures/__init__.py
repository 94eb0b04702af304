"""Pictures of what the method does, each a function here and a job of `sepjax picture`.

kept_text, with .terminal() and .html()    which tokens of a text a cache keeps
draw_mask                                  who sees whom, beside dense attention and StreamingLLM
slots_held, draw_slots                     entries held against tokens seen
draw_kinds                                 far attention received by kinds of tokens (sepjax.keeping.kinds)
read_points, draw_pareto                   quality against keys kept, from results of sepjax evaluate compare
read_curves, draw_curves                   metrics of several runs
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepjax.pictures.figures import draw_curves as draw_curves
    from sepjax.pictures.figures import draw_pareto as draw_pareto
    from sepjax.pictures.figures import read_curves as read_curves
    from sepjax.pictures.figures import read_points as read_points
    from sepjax.pictures.kept import KeptText as KeptText
    from sepjax.pictures.kept import kept_text as kept_text
    from sepjax.pictures.kinds import draw_kinds as draw_kinds
    from sepjax.pictures.mask import draw_mask as draw_mask
    from sepjax.pictures.slots import draw_slots as draw_slots
    from sepjax.pictures.slots import slots_held as slots_held

_HOME = {
    "figures": ("draw_curves", "draw_pareto", "read_curves", "read_points"),
    "kept": ("KeptText", "kept_text"),
    "kinds": ("draw_kinds",),
    "mask": ("draw_mask",),
    "slots": ("draw_slots", "slots_held"),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: figures of results and runs need neither JAX nor a model."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module 'sepjax.pictures' has no attribute {name!r}")
