"""Hugging Face folders: config.json, safetensors in one file or several, the tokenizer's files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from jax.sharding import Mesh

from sepjax.config import ModelConfig
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.assemble import assemble, check_sizes
from sepjax.hub.errors import HubError
from sepjax.hub.families import family_of, read_attention, read_model_config
from sepjax.hub.fields import Fields, check_file
from sepjax.hub.gate_file import read_gate
from sepjax.hub.safetensors_file import SafetensorsFile
from sepjax.hub.tables import Family, Shape
from sepjax.model.transformer import Transformer, abstract, merge

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_HEADS = {"lm_head.weight", "embed_out.weight"}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def is_folder(path: Path) -> bool:
    """Whether this is a model's folder: it has config.json and weights, in whatever form."""
    kinds = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.h5", "*.msgpack")
    return (path / "config.json").is_file() and any(True for kind in kinds for _ in path.glob(kind))


def load_folder(
    path: Path, *, dtype: str, weight_dtype: str = "model", param_dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[Transformer, Tokenizer]:
    """Reads a model and its tokenizer.

    Args:
      path: the folder.
      dtype: of activations and matmuls.
      weight_dtype: as `ModelConfig` has it.
      param_dtype: of the parameters; None: the file's own.
      mesh: where the parameters go; None: the first device.

    Raises:
      HubError: an architecture, tensor, key or tokenizer that does not fit, damaged files; names them.
      FileNotFoundError: there is no tokenizer.
      sepjax.data.errors.DataError: the tokenizer's file is damaged.
    """
    fields = Fields.read(path / "config.json")
    family = family_of(fields)
    weights = Weights(path, family)
    config, tokenizer = _shape(path, fields, family, weights, dtype)
    config = dataclasses.replace(config, weight_dtype=weight_dtype)
    attention = read_attention(fields, config.num_layers)
    params = assemble(weights, family, config, param_dtype=param_dtype, mesh=mesh)
    graph, _ = abstract(config, attention)
    return merge(graph, params | read_gate(path, config, attention, mesh)), tokenizer


def folder_shape(path: Path, *, dtype: str) -> tuple[ModelConfig, Tokenizer]:
    """The settings and the tokenizer of a folder, without its tensors; raises as `load_folder` does."""
    fields = Fields.read(path / "config.json")
    family = family_of(fields)
    return _shape(path, fields, family, Weights(path, family), dtype)


def config_shape(path: Path, *, dtype: str) -> ModelConfig:
    """The settings that a config.json says, read alone; raises HubError for what `load_folder` refuses in it."""
    fields = Fields.read(path)
    return read_model_config(fields, family_of(fields), dtype)


def _shape(path: Path, fields: Fields, family: Family, weights: "Weights", dtype: str) -> tuple[ModelConfig, Tokenizer]:
    config = read_model_config(fields, family, dtype)
    check_sizes(weights, config)
    if config.tie_embeddings and not _is_tied(weights, family, config):
        config = dataclasses.replace(config, tie_embeddings=False)
    for name in filter(lambda name: (path / name).exists(), TOKENIZER_FILES):
        check_file(path / name)
    tokenizer = Tokenizer.load(path).within(config.vocab_size)
    check_tokenizer(path, tokenizer, config.vocab_size)
    return config, tokenizer


def check_tokenizer(path: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises HubError for a tokenizer with ids that the model has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise HubError(
            f"{str(path)!r}: the tokenizer has {tokenizer.vocab_size} tokens, but config.json has vocab_size="
            f"{vocab_size}; they do not belong together"
        )


def _is_tied(weights: "Weights", family: Family, config: ModelConfig) -> bool:
    """Whether the files' head, if they have one, is the embedding: a config that says so may be wrong.

    transformers takes the head of the file then, too.
    """
    names = {ours: row.theirs for row in family.table(config) for ours in row.ours}
    head, embedding = names["head/embedding"], names["embedding/embedding"]
    shapes = weights.shapes()
    if head not in shapes or shapes[head] != shapes.get(embedding):
        return True  # of other shapes: `assemble` says what is wrong
    pairs = zip(*(np.array_split(weights.view(name), 64) for name in (head, embedding)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


class Weights:
    """The tensors of a folder, by the family's full names."""

    def __init__(self, path: Path, family: Family):
        """Opens the files and checks the index against them."""
        self.path = path
        files = _files(path)
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        bare = not any(name.startswith(family.prefix) for file in files for name in file.entries)
        for file in files:
            for name in file.entries:
                # Files of the bare model leave out the prefix that its tensors have inside the one with a head.
                full = f"{family.prefix}{name}" if bare and name not in _HEADS else name
                if full in self._where:
                    raise HubError(
                        f"tensor {name!r} is in {str(self._where[full][0].path)!r} and in {str(file.path)!r}"
                    )
                self._where[full] = file, name

    def shapes(self) -> Mapping[str, Shape]:
        """See `Source`."""
        return {full: file.entries[name].shape for full, (file, name) in self._where.items()}

    def dtype(self, name: str) -> np.dtype:
        """See `Source`."""
        file, theirs = self._where[name]
        return file.entries[theirs].dtype

    def view(self, name: str) -> np.ndarray:
        """See `Source`."""
        file, theirs = self._where[name]
        return file.view(theirs)


def _files(path: Path) -> list[SafetensorsFile]:
    for name in _ADAPTERS:
        if (path / name).exists():
            raise HubError(
                f"{str(path / name)!r} is an adapter beside the weights, which would not be applied: move its "
                "files into a folder of their own, and name that (adapter=... of sepjax.load, --adapter of "
                "sepjax convert), or remove them"
            )
    if (path / INDEX).exists():
        files = _indexed(path)
        if (path / SINGLE).exists() and [file.path.name for file in files] != [SINGLE]:
            raise HubError(
                f"{str(path)!r} has {SINGLE} and an index of other files, {INDEX}; remove the one that is not meant"
            )
        return files
    if (path / SINGLE).exists():
        return [SafetensorsFile(path / SINGLE)]
    raise HubError(
        f"{str(path)!r} has neither {SINGLE} nor {INDEX}; other weight files are not read, since they may run code: "
        "convert them with transformers (save_pretrained) first"
    )


def _indexed(path: Path) -> list[SafetensorsFile]:
    index = Fields.read(path / INDEX)
    places = index.values.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise HubError(f"{str(path / INDEX)!r}: weight_map is {str(places)[:60]}, expected tensor names with files")
    for tensor, name in places.items():
        plain = isinstance(name, str) and name and "\\" not in name and "\0" not in name
        if not plain or PurePosixPath(name).name != name or name in (".", ".."):
            raise HubError(
                f"{str(path / INDEX)!r}: tensor {tensor!r} is in {str(name)[:80]!r}, expected a file of the same folder"
            )
        if not (path / name).is_file():
            raise HubError(f"{str(path)!r} lacks the file {name!r}, in which {INDEX} has tensor {tensor!r}")
    files = {name: SafetensorsFile(path / name) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in files[name].entries:
            raise HubError(f"{str(path / name)!r} lacks tensor {tensor!r}, which {INDEX} has there")
    return list(files.values())
