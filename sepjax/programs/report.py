"""makes one self-contained HTML page about a run: config, curves, evaluations, samples, environment

    sepjax report --workdir=runs/tiny [--samples=4 --kept=mine.txt]
    sepjax report --workdirs=runs/tiny,runs/dense --output=both.html       side by side

No model is loaded unless --samples or --kept need it.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sepjax.command.settings import AtLeast, Repeated
from sepjax.command.settings import Settings as _Settings
from sepjax.config import ConfigError
from sepjax.programs.common import check_arm

if TYPE_CHECKING:
    from sepjax.pictures.kept import KeptText


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """Of which runs, with what besides."""

    workdir: str = ""  # folder of a training run
    workdirs: tuple[str, ...] = ()  # several runs, side by side
    output: str = ""  # HTML file to write; default: report.html in --workdir, or for --workdirs in the current folder
    samples: Annotated[int, AtLeast(0)] = 0  # texts to generate with the newest checkpoint; 0: show existing ones
    # prompts for --samples; default: beginnings of the evaluation split
    prompt: Annotated[tuple[str, ...], Repeated()] = ()
    max_new_tokens: Annotated[int, AtLeast(1)] = 100  # maximum tokens of each sample
    apply_chat_template: bool = False  # put each --prompt into the model's chat template, as a user message
    kept: str = ""  # a UTF-8 text file: show which of its tokens the cache keeps
    # for --kept: pattern and sizes as in --arms of sepjax evaluate, or @FILE; default: the model's own for bounded
    # caches
    arm: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.workdir) == bool(self.workdirs):
            given = "got both" if self.workdir else "got neither"
            raise ConfigError(f"give --workdir or --workdirs, one of them: {given}")
        if not self.samples and (self.prompt or self.max_new_tokens != 100):
            flag = "prompt" if self.prompt else "max_new_tokens"
            raise ConfigError(f"--{flag} does nothing without --samples; add --samples=4, or leave it out")
        if self.apply_chat_template and not self.prompt:
            raise ConfigError("--apply_chat_template does nothing without --prompt; add one, or leave it out")
        if self.arm and not self.kept:
            raise ConfigError("--arm does nothing without --kept; add --kept=FILE, or leave it out")
        check_arm(self.arm)

    @property
    def paths(self) -> list[Path]:
        """The folders."""
        return [Path(path) for path in (self.workdirs or (self.workdir,))]

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return Path(self.output) if self.output else (Path(self.workdir) if self.workdir else Path()) / "report.html"


def main(settings: Settings) -> None:
    """Writes the page."""
    from sepjax.files import check_file, write_text
    from sepjax.report.page import page
    from sepjax.report.record import read_records

    read_records(settings.paths)  # says what is wrong with a folder before anything is computed
    check_file(settings.page)
    if settings.kept:
        from sepjax.programs.common import one_text

        one_text("kept", settings.kept)
    if settings.samples:
        from sepjax.report.samples import write_samples

        for path in settings.paths:
            asked = settings.samples, settings.prompt, settings.max_new_tokens
            file = write_samples(path, *asked, apply_chat_template=settings.apply_chat_template)
            print(f"samples: {file}")
    records = read_records(settings.paths)
    kept = {record.name: _kept(record.workdir, settings) for record in records} if settings.kept else {}
    write_text(settings.page, page(records, kept))
    print(f"written to {settings.page}")


def _kept(workdir: Path, settings: Settings) -> "KeptText":
    from sepjax.loading import load
    from sepjax.pictures import kept_text
    from sepjax.programs.common import one_arm, one_text

    text = one_text("kept", settings.kept)
    model, tokenizer = load(workdir)
    attention = one_arm(settings.arm, model.attention, model.config.num_layers) if settings.arm else None
    return kept_text(model, tokenizer, text, attention)
