"""Settings that several programs share."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sepjax.command.flags import one_of_two
from sepjax.command.settings import OneOf, Settings
from sepjax.config import WEIGHT_DTYPES, ConfigError

if TYPE_CHECKING:
    from sepjax.config import AttentionConfig

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading(Settings):
    """Which model."""

    workdir: str | None = None  # folder of a training run
    model: str | None = None  # a pretrained model: smollm2-135m, a Hugging Face folder, a GGUF file, an id on the hub
    download: bool = False  # with --model=OWNER/NAME: download it from the Hugging Face hub
    # with --model: dtype of activations and matmuls; default: bfloat16, on a CPU float32
    dtype: Annotated[str, OneOf(DTYPES)] | None = None
    # dtype of matrices: the model's, or int8 in half the bytes of bfloat16, for inference; default: the model's
    weight_dtype: Annotated[str, OneOf(WEIGHT_DTYPES)] | None = None
    step: int | None = None  # checkpoint of --workdir to use; default: the newest

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of_two("workdir", self.workdir, "model", self.model)
        if self.download and self.workdir:
            raise ConfigError("--download does nothing for a run, which is a folder here; it is for --model=OWNER/NAME")

    @property
    def path(self) -> Path:
        """Where the model is."""
        return Path(self.workdir or self.model or "")

    @property
    def loading(self) -> dict[str, Any]:
        """The settings of `sepjax.load`."""
        found = {"step": self.step, "dtype": self.dtype, "download": self.download}
        return found if self.weight_dtype is None else found | {"weight_dtype": self.weight_dtype}


def check_arm(text: str) -> None:
    """Raises ConfigError for an --arm that is wrong whatever the model is: large ones take minutes to load."""
    if not text:
        return
    from sepjax.evaluation.arms import check_words

    _check_one(text, check_words(text))


def one_arm(text: str, base: "AttentionConfig", num_layers: int, *, cached: bool = True) -> "AttentionConfig":
    """The settings that `--arm` names (`sepjax.evaluation.arms`), of one arm.

    Raises ConfigError: it cannot be read, or names another model, or more arms than one.
    """
    from sepjax.evaluation.arms import fixed_arms

    arms = fixed_arms(text, base, num_layers, cached=cached)
    _check_one(text, len(arms))
    return arms[0].attention


def _check_one(text: str, number: int) -> None:
    if number != 1:
        raise ConfigError(f"--arm={text!r} names {number} arms; give one")


def one_text(flag: str, path: str) -> str:
    """The text of a file; raises ConfigError for a folder of several, and what `read_texts` raises."""
    from sepjax.evaluation.documents import read_texts

    (text, *others) = read_texts(Path(path))
    if others:
        raise ConfigError(f"--{flag}={path} has {len(others) + 1} texts; give one file")
    return text


def refuse_window(pattern: str | None, names: list[str]) -> None:
    """Raises `ConfigError` for sizes of a window where everything is seen."""
    if names and pattern == "dense":
        raise ConfigError(
            f"--{names[0]} does nothing for the dense pattern, which sees everything; leave one of them out"
        )


def refuse_separators(pattern: str | None, most: int | None) -> None:
    """Raises `ConfigError` for a number of separators where none is kept."""
    if most is not None and pattern == "sink_window":
        raise ConfigError(
            "--max_separators does nothing for the sink_window pattern, which keeps none; leave it out (how much is "
            "held, --cache_size says)"
        )
