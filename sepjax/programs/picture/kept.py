"""shows which tokens of a text a bounded cache keeps, in the terminal or as one HTML page with a slider over time

    sepjax picture kept --model=smollm2-135m --text=mine.txt --arm="watched a=4 s=100 w=120 c=256" --output=kept.html

Sinks are underlined, kept tokens coloured (stronger if more layers and heads keep them), evicted tokens faint.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.config import ConfigError
from sepjax.programs.common import Loading, check_arm, one_arm, one_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Loading):
    """Which text, through which cache."""

    text: str  # a UTF-8 text file
    # pattern and sizes as in --arms of sepjax evaluate (a=, s=, w=, c=, ...), or @FILE; default: the
    # model's own for bounded caches
    arm: str = ""
    max_tokens: Annotated[int, AtLeast(1)] = 4096  # maximum tokens of the text
    output: str = ""  # .html file to write; default: the state after the last token, in the terminal

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output and Path(self.output).suffix != ".html":
            raise ConfigError(f"--output={self.output} is to end in .html; leave it out for the terminal")
        check_arm(self.arm)


def main(settings: Settings) -> None:
    """Prints the text, or writes the page."""
    from sepjax.console import say
    from sepjax.files import check_file, write_text
    from sepjax.loading import load
    from sepjax.pictures import kept_text

    if settings.output:
        check_file(settings.output)
    text = one_text("text", settings.text)
    model, tokenizer = load(settings.path, **settings.loading)
    attention = one_arm(settings.arm, model.attention, model.config.num_layers) if settings.arm else None
    picture = kept_text(model, tokenizer, text, attention, max_tokens=settings.max_tokens)
    if not settings.output:
        print(picture.terminal())
        return
    write_text(settings.output, picture.html())
    say(f"{picture.caption(picture.frames[-1])}", error=False)
    print(f"written to {settings.output}")
