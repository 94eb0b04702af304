"""What a run begins with: random parameters, or those of another run or a pretrained model (post-training)."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sepjax.config import Config, ConfigError, ModelConfig, from_json, validate, validate_attention
from sepjax.config.lora import check_adapters
from sepjax.console import say
from sepjax.data.sources import has_records
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.convert import keep_origin
from sepjax.hub.errors import HubError
from sepjax.hub.training_form import TrainingForm, training_form
from sepjax.loading import load, load_shape, locate, model_shape, shape_alone
from sepjax.model.transformer import Params, split
from sepjax.run.workdir import has_begun
from sepjax.training.step import TrainState, create_state

_OURS = ("dtype", "scan_layers", "remat")  # how a model is computed, which its files do not say


def adopt_shape(config: Config, workdir: Path, *, download: bool = False) -> Config:
    """The config with the model section of `training.init_from`; without one, `config` itself.

    A model section that is left at its defaults becomes the source's; what it sets must be the same there, but for
    dtype, scan_layers and remat. A run that has begun has the shape in its config.json, and needs its source no longer.

    Args:
      config: the experiment.
      workdir: of the run.
      download: whether a hub id may be fetched.

    Raises:
      ConfigError: the model section sets something that is otherwise in the source, there is a data.tokenizer, or
        adapters or settings by layer do not fit the source's layers.
      OSError, UserError: as `sepjax.load`.
    """
    source, begun = config.training.init_from, workdir / "config.json"
    if not source:
        return config
    _refuse_tokenizer(config)
    is_begun = begun.exists() and has_begun(workdir)
    there = from_json(begun.read_bytes()).model if is_begun else model_shape(source, download=download)
    return _with_shape(config, there)


def planned(config: Config) -> Config:
    """The config as `adopt_shape` makes it of a source that need not have its weights here, for `sepjax plan`.

    Of a Hugging Face folder config.json is enough. A model section that says a shape stands alone where the source is
    not here.

    Raises:
      ConfigError, OSError, UserError: as `adopt_shape`; the source is not here, and the model section says no shape.
    """
    source = config.training.init_from
    if not source:
        return config
    _refuse_tokenizer(config)
    try:
        locate(source)
    except (HubError, FileNotFoundError) as error:
        if _computed_alike(ModelConfig(), config.model) != config.model:
            return _with_shape(config, config.model)
        raise ConfigError(
            f"training.init_from={source!r} is not here, and the model section says no shape; its config.json is "
            "enough for a plan, in a folder or in the hub's local cache"
        ) from error
    return _with_shape(config, shape_alone(source))


def _refuse_tokenizer(config: Config) -> None:
    if config.data.tokenizer:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} with training.init_from={config.training.init_from!r}: a model "
            "goes with its own tokenizer; leave it empty"
        )


def _with_shape(config: Config, there: ModelConfig) -> Config:
    """The config with a source's shape, computed as the model section says; ConfigError where they do not fit."""
    source = config.training.init_from
    shape = _computed_alike(there, config.model)
    default = ModelConfig()
    wrong = [
        f"model.{name}={given!r}, but {getattr(shape, name)!r} there"
        for name, given in vars(config.model).items()
        if given not in (getattr(default, name), getattr(shape, name))
    ]
    if wrong:
        raise ConfigError(
            f"training.init_from={source!r} has another shape than the model section: {'; '.join(wrong)}; leave the "
            "section at its defaults, for they stand for the source's shape"
        )
    check_adapters(config.lora, shape)
    validate_attention(config.attention, shape.num_layers)
    return validate(dataclasses.replace(config, model=shape))


def given_tokenizer(config: Config, *, download: bool = False) -> Callable[[], Tokenizer] | None:
    """Reads the tokenizer of `training.init_from`; None without one."""
    source = config.training.init_from
    return (lambda: load_shape(source, download=download)[1]) if source else None


def conversation_form(config: Config, tokenizer: Tokenizer) -> TrainingForm | None:
    """How conversations of `data.name` are written; None for other data, or without a chat template.

    Raises HubError where the template cannot be read.
    """
    return training_form(config.data, tokenizer) if has_records(config.data.name) else None


def pretrained_state(
    config: Config, workdir: Path, mesh: Mesh, target: TrainState, *, download: bool = False
) -> TrainState:
    """The state before step 1 with the parameters of `training.init_from`, in their shards.

    Of a Hugging Face folder the config and tokenizer files are kept in the workdir, for `sepjax convert`.

    Args:
      config: as `adopt_shape` gave it.
      workdir: of the run.
      mesh: where the parameters go.
      target: the state's shapes and shardings.
      download: whether a hub id may be fetched.

    Raises:
      ConfigError: the source has another shape by now.
      OSError, UserError: as `sepjax.load`.
    """
    source = locate(config.training.init_from, download=download)
    is_base = bool(config.lora.rank)  # it is held in model.dtype: widened first, it would need twice the memory
    dtype = config.model.dtype if source.suffix == ".gguf" else None  # which such a file's matrices are read in
    model, _ = load(source, dtype=dtype, param_dtype=None if is_base else "float32", mesh=mesh)
    if (found := _computed_alike(model.config, config.model)) != config.model:
        raise ConfigError(
            f"training.init_from={config.training.init_from!r} has another shape than when this run began: {found}, "
            f"expected {config.model}; bring the source back, or start a new workdir"
        )
    if jax.process_index() == 0:
        keep_origin(source, workdir)
    params = split(model)[1]
    del model  # or it would hold what is given up below
    if (pattern := config.attention.pattern) != "gated" and params.pop("gate", None) is not None:
        say(f"{workdir}: the gate of {source} is left out, attention.pattern={pattern!r} has no use for it")
    begin, shardings = functools.partial(create_state, config), jax.tree.map(lambda x: x.sharding, target)
    if not is_base:
        return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(params)
    learned = {name: params.pop(name) for name in ("gate",) if name in params}
    state = jax.jit(begin, out_shardings=dataclasses.replace(shardings, frozen={}))(learned)
    return dataclasses.replace(state, frozen=_held_as(params, target.frozen))


def _held_as(params: Params, target: Params) -> Params:
    """The arrays in the types and places of `target`, those that have them as they are; `params` is used up.

    One after the other: the base of adapters may fill half of a device, so there is no room for a second one.
    """
    found = {}
    for name, like in target.items():
        x = params.pop(name)
        if isinstance(like, dict):
            found[name] = _held_as(x, like)
        elif x.dtype == like.dtype and x.sharding.is_equivalent_to(like.sharding, x.ndim):
            found[name] = x
        else:
            convert = jax.jit(functools.partial(jnp.asarray, dtype=like.dtype), out_shardings=like.sharding)
            found[name] = jax.block_until_ready(convert(x))
    return found


def _computed_alike(shape: ModelConfig, like: ModelConfig) -> ModelConfig:
    return dataclasses.replace(shape, **{name: getattr(like, name) for name in _OURS})
