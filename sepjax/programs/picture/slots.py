"""draws how many entries bounded caches hold along a text, beside dense attention

sepjax picture slots --model=smollm2-135m --text=mine.txt --arms="separator s=64 w=256 c=800; sink_window n=796 c=800"
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.programs.common import Loading, one_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Loading):
    """Which text, through which caches."""

    text: str  # a UTF-8 text file
    # patterns and sizes as in --arms of sepjax evaluate stream; default: the model's own for bounded caches
    arms: str = ""
    max_tokens: Annotated[int, AtLeast(1)] = 4096  # maximum tokens of the text
    output: str = "slots.png"  # a .png, .svg or .pdf file


def main(settings: Settings) -> None:
    """Writes the figure, and says what each holds at most and at the end."""
    from sepjax.evaluation.arms import check_words, fixed_arms
    from sepjax.loading import load
    from sepjax.pictures import draw_slots, slots_held
    from sepjax.pictures.figures import check_output

    check_output(Path(settings.output))
    if settings.arms:
        check_words(settings.arms)
    text = one_text("text", settings.text)
    model, tokenizer = load(settings.path, **settings.loading)
    own = model.kept or model.attention
    arms = {own.pattern: own}
    if settings.arms:
        given = fixed_arms(settings.arms, model.attention, model.config.num_layers, cached=True)
        arms = {arm.name: arm.attention for arm in given}
    held = slots_held(model, tokenizer, text, arms, max_tokens=settings.max_tokens)
    draw_slots(
        Path(settings.output), held, f"{settings.path.name} reads {Path(settings.text).name}: entries of the cache"
    )
    for name, (seen, entries) in held.items():
        print(f"{name}: at most {max(entries):,} entries, {entries[-1]:,} of {seen[-1]:,} tokens at the end")
    print(f"written to {settings.output}")
