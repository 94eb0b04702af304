"""draws the attention mask of a text, beside dense attention's and StreamingLLM's

sepjax picture mask --model=smollm2-135m --text=mine.txt --arm="separator n=8 a=2" --output=mask.svg
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from sepjax.command.settings import AtLeast, AtMost
from sepjax.programs.common import Loading, check_arm, one_arm, one_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Loading):
    """Which text, under which pattern."""

    text: str  # a UTF-8 text file
    # pattern and sizes as in --arms of sepjax evaluate windows (a=, n=, ...), or @FILE; default: the model's own
    arm: str = ""
    layer: Annotated[int, AtLeast(0)] = 0  # layer to draw, if layers differ
    max_tokens: Annotated[int, AtLeast(1), AtMost(512)] = 48  # maximum tokens of the text; up to 64 are labelled
    output: str = "mask.png"  # a .png, .svg or .pdf file

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arm(self.arm)


def main(settings: Settings) -> None:
    """Writes the figure, and says what share of the pairs each pattern sees."""
    from sepjax.loading import load
    from sepjax.pictures import draw_mask
    from sepjax.pictures.figures import check_output

    check_output(Path(settings.output))
    text = one_text("text", settings.text)
    model, tokenizer = load(settings.path, **settings.loading)
    attention, layers = model.attention, model.config.num_layers
    if settings.arm:
        attention = one_arm(settings.arm, attention, layers, cached=False)
    title = f"{settings.path.name}, {Path(settings.text).name}"
    shown = {"title": title, "max_tokens": settings.max_tokens, "num_layers": layers, "layer": settings.layer}
    for seen in draw_mask(Path(settings.output), tokenizer, text, attention, **shown):
        print(f"{seen.name}: {seen.share:.1%} of the pairs")
    print(f"written to {settings.output}")
