"""GGUF files: weights, shape and tokenizer in one file, as llama.cpp writes them.

Quantised weights are read as float32, a tensor at a time. Some architectures store the rows of Q and K for interleaved
rotary embedding (pairs 2i, 2i+1); ours is half-split (pairs i, i + H/2), so they are put back in order. Needs the
package `gguf`.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sepjax.config import ModelConfig, validate_attention
from sepjax.data.special_tokens import SpecialTokens
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.assemble import assemble, check_sizes
from sepjax.hub.families import ATTENTION
from sepjax.hub.folder import check_tokenizer
from sepjax.hub.gguf_config import architecture, model_config
from sepjax.hub.gguf_families import ARCHITECTURES, family
from sepjax.hub.gguf_header import Field, GGUFError, Header
from sepjax.hub.gguf_tokenizer import field_of, special_tokens, tokenizer_of
from sepjax.hub.tables import Shape
from sepjax.model.transformer import Transformer, abstract, merge

_PIECE = 1 << 16  # numbers dequantised at a time: what a piece needs besides stays in the cache of a core


def load_gguf(
    path: Path, *, dtype: str, weight_dtype: str = "model", param_dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[Transformer, Tokenizer]:
    """Reads a model and its tokenizer.

    Args:
      path: the file.
      dtype: of activations and matmuls.
      weight_dtype: as `ModelConfig` has it.
      param_dtype: of the parameters; None: `dtype` of matrices, in which they are used, and float32 of all else.
      mesh: where the parameters go; None: the first device.

    Raises:
      GGUFError: the package `gguf` is missing, or the file is damaged or of another architecture or vocabulary.
      HubError: a tensor is missing, unknown or of another shape.
    """
    header = _open(path)
    config, tokenizer = _shape(path, header, dtype)
    config = dataclasses.replace(config, weight_dtype=weight_dtype)
    graph, _ = abstract(config, validate_attention(ATTENTION, config.num_layers))
    types = {"param_dtype": param_dtype, "matrix_dtype": dtype}
    params = assemble(_Tensors(header, config), family(architecture(header)), config, **types, mesh=mesh)
    return merge(graph, params), tokenizer


def gguf_shape(path: Path, *, dtype: str) -> tuple[ModelConfig, Tokenizer]:
    """The settings and the tokenizer of a file, without its tensors; raises as `load_gguf` does."""
    return _shape(path, _open(path), dtype)


def gguf_config(path: Path, *, dtype: str) -> ModelConfig:
    """The settings of a file alone, without its tokenizer; raises as `load_gguf` does."""
    return _config(_open(path), dtype)


def _config(header: Header, dtype: str) -> ModelConfig:
    config = model_config(header, dtype)
    check_sizes(_Tensors(header, config), config)
    return config


def _shape(path: Path, header: Header, dtype: str) -> tuple[ModelConfig, Tokenizer]:
    config = _config(header, dtype)
    tokenizer = tokenizer_of(path, header.fields)
    check_tokenizer(path, tokenizer, config.vocab_size)
    return config, tokenizer


def read_fields(path: Path) -> Mapping[str, Field]:
    """The file's metadata; each value's `contents()` is a Python object. Raises GGUFError as `load_gguf` does."""
    return _open(path).fields


def read_special_tokens(path: Path) -> SpecialTokens:
    """The special tokens and the chat template of a file; raises as `load_gguf` does."""
    fields = _open(path).fields
    return special_tokens(path, fields, field_of(path, fields, "tokenizer.ggml.tokens"))


def _open(path: Path) -> Header:
    if importlib.util.find_spec("gguf") is None:
        raise GGUFError("reading a GGUF file needs the package gguf: pip install gguf")
    return Header(path)


class _Tensors:
    """The tensors of a file as float32 (`sepjax.hub.assemble.Source`)."""

    def __init__(self, header: Header, config: ModelConfig):
        self.path, self._header, self._config = header.path, header, config
        self._architecture = ARCHITECTURES[architecture(header)]

    def shapes(self) -> Mapping[str, Shape]:
        """See `Source`."""
        return {name: tensor.shape for name, tensor in self._header.tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        """See `Source`."""
        return np.dtype(np.float32)

    def view(self, name: str) -> np.ndarray:
        """See `Source`; the rows of Q and K in our order, the weights of norms as ours."""
        import gguf

        tensor, nbytes = self._header.tensors[name], self._header.nbytes(name)
        kind = gguf.GGMLQuantizationType(tensor.kind)
        number = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(
            kind, np.uint8
        )
        stored = np.frombuffer(self._header.data, number, nbytes // np.dtype(number).itemsize, tensor.start)
        rows = stored.reshape(math.prod(tensor.shape[:-1]), -1)
        out = np.empty((len(rows), tensor.shape[-1]), np.float32)
        try:
            step, read = max(_PIECE // tensor.shape[-1], 1), _dequantiser(kind)
            for i in range(0, len(rows), step):
                out[i : i + step] = read(rows[i : i + step])
        except NotImplementedError as error:
            raise GGUFError(
                f"{str(self.path)!r}: tensor {name!r} holds numbers of the type {kind.name}: {error}"
            ) from error
        if self._architecture.adds_one and name.endswith("norm.weight"):
            out -= 1
        if self._architecture.interleaved and re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", name):
            out = _half_split(out, self._config)
        return out.reshape(tensor.shape)


def _dequantiser(kind: Any) -> Callable[[np.ndarray], np.ndarray]:
    """From the stored bytes of some rows to float32; the package's own loop over 16 rows at a time takes three times as
    long. Raises NotImplementedError for a kind that the package cannot read."""
    import gguf

    quantised = getattr(gguf.quants, kind.name, None)
    if quantised is None:
        return lambda rows: gguf.dequantize(rows, kind)
    quantised.init_grid()
    return quantised.dequantize_rows


def _half_split(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows [N * H, D] whose rotated pairs are (2i, 2i + 1), in our order: (i, i + H/2)."""
    pairs = rows.reshape(-1, config.head_dim // 2, 2, rows.shape[-1])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)
