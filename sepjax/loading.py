"""Reading a model and its tokenizer."""

import os
from pathlib import Path

from sepjax.checkpoint import load_params
from sepjax.config import UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.model.transformer import Transformer, abstract, merge


class LoadError(UserError, ValueError):
    """A path that no model can be read from."""


def load(path: str | os.PathLike[str], *, step: int | None = None) -> tuple[Transformer, Tokenizer]:
    """Reads what `train.py` wrote.

    Args:
      path: the workdir of a run.
      step: which checkpoint; None: the newest.

    Raises:
      LoadError: the path is no workdir. Hugging Face folders and GGUF files are not supported yet.
      FileNotFoundError: there is no such path, no complete checkpoint, not that step, or no tokenizer.
      sepjax.data.errors.DataError: the tokenizer's file is damaged.
    """
    workdir = Path(path)
    if not workdir.exists():
        raise FileNotFoundError(f"no such folder: {os.fspath(path)!r}; expected the --workdir of a run of train.py")
    if not any((workdir / name).exists() for name in ("checkpoints", "run_meta.json")):
        raise LoadError(f"{os.fspath(path)!r} is {_kind(workdir)}; expected the --workdir of a run of train.py")
    config, params, _ = load_params(workdir, step)
    graph, _ = abstract(config.model, config.attention)
    return merge(graph, params), Tokenizer.load(workdir / "tokenizer")


def _kind(path: Path) -> str:
    if path.suffix == ".gguf":
        return "a GGUF file, which is not supported yet"
    if path.is_dir() and any(path.glob("*.safetensors")):
        return "a Hugging Face folder, which is not supported yet"
    return "a folder without checkpoints" if path.is_dir() else "a file"
