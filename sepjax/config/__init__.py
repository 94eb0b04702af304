"""Every knob of a run: typed dataclasses, one `Config` with a section each, and `validate()`.

A config file (`configs/*.py`) has a `get_config()` that returns a `Config`. Flags change single fields:
`--config=configs/sep_tiny.py --config.training.steps=100` (`sepjax.command.flags`).
"""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from sepjax.config.attention import (
    BOUNDED_PATTERNS,
    CACHE_DTYPES,
    EVERYTHING,
    PATTERNS,
    AttentionConfig,
    keeps_everything,
    layer_reaches,
    layer_windows,
    layers_meant,
    sees_kept,
    under,
    validate_attention,
)
from sepjax.config.checkout import root
from sepjax.config.checks import ConfigError, UserError, first_line, nearest, number, whole_number
from sepjax.config.checks import at_least as _at_least
from sepjax.config.checks import check_type as _check_type
from sepjax.config.checks import check_types as _check_types
from sepjax.config.checks import one_of as _one_of
from sepjax.config.checks import settings_of as _settings_of
from sepjax.config.checks import type_name as _type_name
from sepjax.config.lora import LoraConfig, validate_lora
from sepjax.config.model import WEIGHT_DTYPES, ModelConfig, validate_model, with_own_window
from sepjax.config.rope import RopeConfig

__all__ = [  # of other files, for whoever reads a config
    "BOUNDED_PATTERNS",
    "CACHE_DTYPES",
    "EVERYTHING",
    "PATTERNS",
    "WEIGHT_DTYPES",
    "AttentionConfig",
    "ConfigError",
    "LoraConfig",
    "ModelConfig",
    "RopeConfig",
    "UserError",
    "first_line",
    "keeps_everything",
    "layer_reaches",
    "layer_windows",
    "nearest",
    "number",
    "sees_kept",
    "under",
    "validate_attention",
    "validate_model",
    "whole_number",
    "with_own_window",
]


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    # "embedded" | "recall" (synthetic) | a .txt, .jsonl (.gz, .zst) or .parquet file, or a folder of them | a TFDS
    # dataset | "hf://OWNER/NAME[/CONFIG][@REVISION]" or "hf://./FOLDER", read by `datasets` | a mixture of these by
    # shares of tokens, "A*0.7,B*0.3"
    name: str = "embedded"
    data_dir: str = ""  # folder for prepared datasets and indexes of JSON lines; empty: <workdir>/data
    text_key: str = "text"  # field that holds the text in a TFDS or hf:// dataset, JSON lines or Parquet
    train_on: str = "assistant"  # loss on conversations: "assistant" (its messages) | "last" (its last message) | "all"
    too_long: str = "truncate"  # for conversations longer than a row: "truncate" | "skip"
    train_split: str = "train"  # split to train on, in TFDS's syntax
    eval_split: str = "validation"  # split for evaluations during training
    tokenizer: str = ""  # SentencePiece .model or Hugging Face tokenizer.json; empty: train one on the corpus
    tokenizer_vocab_size: int = 8192  # size of the SentencePiece model trained on first run
    sequence_length: int = 256  # T, tokens per row
    batch_size: int = 8  # B, rows per optimizer step, over all devices
    loss_on: str = ""  # regular expression: the loss covers only what it (or its group 1) matches; empty: all
    num_workers: int = 0  # Grain worker processes; 0: threads of this process
    max_bad_documents: int = 0  # unreadable documents or records to skip; one more is an error


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 1e-3  # learning rate after the warm-up
    final_learning_rate: float = 1e-4  # learning rate at the last step
    warmup_steps: int = 50  # steps of linear warm-up; a shorter run ends within it
    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of their squares
    weight_decay: float = 0.1  # weight decay, on matrices only
    clip_norm: float = 1.0  # largest global norm of gradients; a gate's are clipped separately
    accumulation_steps: int = 1  # micro-batches per step; divides data.batch_size
    z_loss: float = 0.0  # weight of the loss log(Z)^2


@dataclasses.dataclass(unsafe_hash=True)
class TrainingConfig:
    """Length of the run and the rhythm of its reports."""

    steps: int = 1000  # optimizer steps of the run
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 200  # steps between evaluations
    eval_batches: int = 8  # maximum batches per evaluation
    checkpoint_every: int = 200  # steps between checkpoints
    keep_checkpoints: int = 3  # newest checkpoints to keep
    max_skipped_steps: int = 0  # steps in a row that may be skipped (not finite, or a spike) before the run ends
    spike_factor: float = 0.0  # a step whose loss exceeds the running mean by this factor is skipped; 0: off
    seed: int = 0  # seed of the parameters and of the order of the data
    init_from: str = ""  # model to start from, anything sepjax.load reads; empty: random parameters
    # scale of the Gumbel noise on a gate's scores at the first step; falls to 0 at the last step
    gate_noise: float = 1.0


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left."""

    data: int = -1  # devices that split the rows of a batch
    fsdp: int = 1  # devices that split rows, parameters and optimizer state
    tensor: int = 1  # devices that split heads and the width of the MLP
    context: int = 1  # devices that split the tokens of a row


@dataclasses.dataclass(unsafe_hash=True)
class Config:
    """One runnable experiment."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)


def validate(config: Config) -> Config:
    """Returns `config` unchanged, or raises `ConfigError` naming the first setting that cannot work."""
    _check_types(config, "")
    validate_model(config.model)
    if config.model.weight_dtype != "model":
        raise ConfigError(
            f'model.weight_dtype={config.model.weight_dtype!r} is for inference, a run trains with "model"; '
            'load what it has learned with weight_dtype="int8"'
        )
    layers = config.model.num_layers
    if config.training.init_from and layers == ModelConfig().num_layers:  # it may stand for another: see `adopt_shape`
        layers = layers_meant(config.attention, layers)
    validate_attention(config.attention, layers)
    validate_lora(config.lora, config.training.init_from)
    _validate_training(config)
    layer_windows(config.attention, layers, config.data.sequence_length)  # what no row can have
    return config


def _validate_training(config: Config) -> None:
    data, optimizer = config.data, config.optimizer
    for section, names in (
        ("data", ("tokenizer_vocab_size", "sequence_length", "batch_size")),
        ("optimizer", ("accumulation_steps",)),
        ("training", ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints")),
    ):
        for name in names:
            _at_least(f"{section}.{name}", getattr(getattr(config, section), name), 1)
    for name in ("warmup_steps", "learning_rate", "final_learning_rate", "weight_decay", "z_loss"):
        _at_least(f"optimizer.{name}", getattr(optimizer, name), 0)
    for name in ("b1", "b2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise ConfigError(f"optimizer.{name}={getattr(optimizer, name)} must be 0 or more and below 1")
    if not optimizer.clip_norm > 0:
        raise ConfigError(f"optimizer.clip_norm={optimizer.clip_norm} must be above 0; a large one never clips")
    _one_of("data.train_on", data.train_on, ("assistant", "last", "all"))
    _one_of("data.too_long", data.too_long, ("truncate", "skip"))
    _at_least("data.num_workers", data.num_workers, 0)
    _at_least("data.max_bad_documents", data.max_bad_documents, 0)
    try:
        re.compile(data.loss_on, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"data.loss_on={data.loss_on!r} is not a regular expression: {error}") from error
    for name in ("max_skipped_steps", "spike_factor", "gate_noise"):
        _at_least(f"training.{name}", getattr(config.training, name), 0)
    if 0 < config.training.spike_factor <= 1:
        raise ConfigError(
            f"training.spike_factor={config.training.spike_factor} would fail ordinary steps; set it above 1, for "
            "example to 2, or to 0"
        )
    if not data.tokenizer and not config.training.init_from and data.tokenizer_vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer_vocab_size={data.tokenizer_vocab_size} exceeds model.vocab_size={config.model.vocab_size}"
            "; the embedding needs a row a token: raise model.vocab_size or lower data.tokenizer_vocab_size"
        )
    if data.batch_size % optimizer.accumulation_steps:
        raise ConfigError(
            f"data.batch_size={data.batch_size} is not a multiple of optimizer.accumulation_steps="
            f"{optimizer.accumulation_steps}; every micro-batch has the same number of rows"
        )
    if config.model.position_embedding == "learned" and data.sequence_length > config.model.max_positions:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} exceeds model.max_positions={config.model.max_positions}, "
            "the rows of the learned position table; shorten the sequences or raise max_positions"
        )
    axes = dataclasses.asdict(config.mesh)
    if sum(size == -1 for size in axes.values()) > 1 or any(size < 1 and size != -1 for size in axes.values()):
        raise ConfigError(f"mesh={axes}: every axis needs a size of 1 or more, and at most one may be -1 (the rest)")


def to_json(config: Any) -> str:
    """A config (or any section of one) as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes) -> Config:
    """The inverse of `to_json`; raises `ConfigError` for text that is no JSON, unknown fields and wrong types."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # bytes that are no text are a ValueError too
        raise ConfigError(f"a saved config must be JSON, got {text[:40]!r}...: {error}") from error
    return _from_dict(Config, values, "")


def from_json_section(cls: Any, values: Any, path: str = "") -> Any:
    """One section of a config from parsed JSON; `path` stands before names in errors. Raises as `from_json` does."""
    return _from_dict(cls, values, path)


def _from_dict(cls: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"saved config: {path.rstrip('.') or 'the whole'} is {values!r}, expected a JSON object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kwargs = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"unknown setting {path + name!r}{nearest(name, fields)}; another version saved it")
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            kwargs[name] = _from_dict(kind, value, f"{path}{name}.")
            continue
        kwargs[name] = tuple(value) if isinstance(value, list) else value
        _check_type(path + name, kwargs[name], kind)
    return cls(**kwargs)


def field_types(cls: Any = Config, prefix: str = "") -> dict[str, str]:
    """Dotted name -> type of every single setting: {"model.vocab_size": "int", ...}."""
    types = {}
    for field in _settings_of(cls):
        name = prefix + field.name
        types |= field_types(field.type, f"{name}.") if dataclasses.is_dataclass(field.type) else {name: field.type}
    return {name: _type_name(kind) for name, kind in types.items()}


def load_config(path: str | Path) -> Config:
    """Runs a config file, or one of sepjax's own by its name ("sep_tiny"), and returns what its `get_config()` returns.

    A config that changes another one loads it from its own folder, whatever the working directory:
    `load_config(Path(__file__).with_name("sep_small.py"))`.

    Raises:
      ConfigError: there is no such file, it has no `get_config`, or that returns no `Config`.
    """
    path = _config_file(Path(path))
    spec = importlib.util.spec_from_file_location(f"sepjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{str(path)!r} is not a config file: expected a Python file, *.py, with a get_config()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{str(path)!r} has no get_config(); define one that returns a sepjax.config.Config")
    config = module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() of {str(path)!r} returned a {type(config).__name__}, expected a Config")
    return config


def _config_file(path: Path) -> Path:
    """The file itself, or of a bare name that is no file here, the config of that name that comes with sepjax."""
    ours = {file.stem: file for file in (root() / "configs").glob("*.py")}
    if path.is_file():
        return path
    if path.name == str(path) and path.name.removesuffix(".py") in ours:
        return ours[path.name.removesuffix(".py")]
    here = [file.name for file in path.parent.glob("*.py")]
    hint = nearest(path.name, here) or nearest(path.name.removesuffix(".py"), ours)
    raise ConfigError(f"no config file {str(path)!r}{hint or f'; sepjax has {", ".join(sorted(ours))}'}")
