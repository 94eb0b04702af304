"""What matplotlib draws on; imported where something is drawn, for few need it."""

from typing import Any

from sepjax.config import UserError


class PictureError(UserError, ImportError):
    """There is nothing to draw with."""


def blank(width: float, height: float, what: str) -> Any:
    """An empty matplotlib figure of so many inches, apart from any window or notebook.

    Raises:
      PictureError: matplotlib is not installed; it names `what` was to be drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PictureError(f'{what} is drawn by matplotlib, which is missing: pip install "sepjax[plot]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """A text of the user's as it is: a dollar in it begins no mathematics."""
    return text.replace("$", r"\$")
