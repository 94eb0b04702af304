"""Orbax <-> Hugging Face, either way and from GGUF.

    sepjax convert --source=FOLDER --target=runs/imported          a workdir, as train.py writes them
    sepjax convert --source=runs/tiny --target=exported            a Hugging Face folder
    sepjax convert --source=runs/lora --target=adapter --adapter_only    what a run with adapters has learned alone

The direction follows the source: a workdir becomes a folder that transformers opens, anything else a workdir. A workdir
keeps the origin's config.json and tokenizer files under `hub/`, so that a model that comes in and goes out again is the
same, tensor for tensor.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from sepjax import kept
from sepjax.config import Config, DataConfig
from sepjax.data.tokenizer import Tokenizer
from sepjax.files import check_folder, replacing_folder
from sepjax.hub.adapter import origin_family, peft_base, write_adapter
from sepjax.hub.errors import HubError
from sepjax.hub.export import save_folder
from sepjax.hub.folder import TOKENIZER_FILES, is_folder
from sepjax.hub.packaged import packaged_file
from sepjax.loading import load, locate
from sepjax.model.transformer import Transformer, abstract, merge, split
from sepjax.run.checkpoint import load_adapter, load_config, load_params, save_params

_ORIGIN = "hub"  # folder of a workdir with the origin's files
_NEW = "a new folder"


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    step: int | None = None,
    adapter: Path | None = None,
    adapter_only: bool = False,
) -> str:
    """Converts a model; returns what was written, in a sentence.

    Args:
      source: a workdir, a Hugging Face folder, a GGUF file or "smollm2-135m".
      target: a folder that is not there or is empty.
      dtype: of the tensors of a Hugging Face folder; None: the origin's where that is known, else the parameters' own.
      step: which checkpoint of a workdir; None: the newest.
      adapter: a folder of PEFT's, merged into a pretrained model.
      adapter_only: whether only a run's adapters are written, as PEFT reads them; they are merged otherwise.

    A kill at any moment leaves the target as it was.

    Raises:
      HubError, ForeignFolder: the target is not empty, or as `sepjax.load` and `save_folder` raise it.
      WriteError: it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HubError(f"{str(target)!r} is there already; choose a folder that is new or empty")
    is_run = (source / "checkpoints").is_dir()
    if dtype and not is_run:
        raise HubError(f"dtype={dtype!r} is for Hugging Face folders; a workdir keeps float32 parameters")
    if step is not None and not is_run:
        raise HubError(f"step={step} chooses a checkpoint of a workdir; {str(source)!r} has none")
    if adapter is not None and is_run:
        raise HubError(
            f"adapter={str(adapter)!r} is for pretrained models; export {str(source)!r} first, and add it then"
        )
    if adapter_only and (dtype or not is_run or not load_config(source).lora.rank):
        raise HubError(
            f"adapter_only needs a run with lora.rank, and no dtype: adapters are float32; got {str(source)!r}"
        )
    check_folder(target, _NEW, _is_none)  # before a model is read, not after it
    if adapter_only:
        return _to_adapter(source, target, step)
    return _to_hugging_face(source, target, dtype, step) if is_run else _to_workdir(source, target, adapter)


def _is_none(folder: Path) -> bool:
    return False  # an empty folder needs no leave


def _to_hugging_face(source: Path, target: Path, dtype: str | None, step: int | None) -> str:
    config, params, step = load_params(source, step)
    tokenizer = Tokenizer.load(source / "tokenizer")
    model: Transformer = merge(abstract(config.model, config.attention)[0], params)
    origin = source / _ORIGIN
    with replacing_folder(target, _NEW, _is_none) as partial:
        save_folder(model, tokenizer, partial, dtype=dtype, like=origin if origin.is_dir() else None)
        _carry(source, source, partial)
    return f"step {step} of {source} as a Hugging Face folder in {target}"


def _to_adapter(source: Path, target: Path, step: int | None) -> str:
    config, learned, step = load_adapter(source, step)
    with replacing_folder(target, _NEW, _is_none) as partial:
        write_adapter(partial, config, learned, origin_family(config.model, source / _ORIGIN))
    base = config.training.init_from
    alone = f"; they belong to {base!r}, which PEFT cannot open: give it that model yourself"
    return f"the adapters of step {step} of {source} as PEFT reads them in {target}{'' if peft_base(base) else alone}"


def _to_workdir(source: Path, target: Path, adapter: Path | None) -> str:
    model, tokenizer = load(source, param_dtype="float32", adapter=adapter)
    length = min(model.config.max_positions, 2048)
    data = DataConfig(sequence_length=length, tokenizer_vocab_size=tokenizer.vocab_size, tokenizer="tokenizer")
    params = jax.tree.map(lambda x: x.astype(jnp.float32), split(model)[1])
    with replacing_folder(target, _NEW, _is_none) as partial:
        tokenizer.save(partial / "tokenizer")
        keep_origin(source, partial)
        save_params(partial, Config(model=model.config, attention=model.attention, data=data), params)
        if adapter is None:  # with it, it is another model
            _carry(source, locate(source), partial)
    kind = "Hugging Face folder" if is_folder(source) else "GGUF file"
    return f"the {kind} {packaged_file(str(source)) or source} as step 0 of a run in {target}"


def _carry(source: Path, where: Path, target: Path) -> None:
    """Takes over what is stored of what the model's bounded caches keep (`sepjax.kept`)."""
    if (file := kept.find(source, where)) is not None:
        shutil.copyfile(file, target / kept.NAME)


def keep_origin(source: Path, workdir: Path) -> None:
    """Copies what a Hugging Face folder, or a workdir that came from one, has besides its tensors into a workdir.

    A GGUF file has nothing: its chat template and special tokens are with the workdir's tokenizer.
    """
    origin = source if is_folder(source) else source / _ORIGIN
    if not origin.is_dir():
        return
    (workdir / _ORIGIN).mkdir(exist_ok=True)
    for name in ("config.json", *TOKENIZER_FILES):
        if (origin / name).is_file():
            shutil.copyfile(origin / name, workdir / _ORIGIN / name)
