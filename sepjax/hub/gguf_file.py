"""GGUF files of the llama architecture: weights, shape and tokenizer in one file, as llama.cpp writes them.

Quantised weights are read as float32. The rows of Q and K are stored for interleaved rotary embedding (pairs 2i, 2i+1);
ours is half-split (pairs i, i + H/2), so they are put back in order. Needs the package `gguf`.
"""

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Never

import numpy as np
from jax.sharding import Mesh

from sepjax.config import ModelConfig, validate_attention
from sepjax.data.special_tokens import SpecialTokens
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.hub.assemble import assemble, check_sizes
from sepjax.hub.families import ATTENTION
from sepjax.hub.folder import check_tokenizer
from sepjax.hub.gguf_config import FACTORS, model_config
from sepjax.hub.gguf_header import Field, GGUFError, Header
from sepjax.hub.tables import LINEAR, LINEAR_OUT, SAME, Family, Shape, make_rows
from sepjax.model.transformer import Transformer, abstract, merge

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
_ROWS = 1024  # of a matrix, dequantised at a time: what a piece needs besides stays small
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokens; 5: unused, 6: a byte
_TOKEN_TYPES = set(range(1, 7))
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
# Names of special tokens (those that chat templates may use: "..._token") by the GGUF's for their ids.
_SPECIAL_IDS = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding",
    "eot": "eot", "eom": "eom",
}  # fmt: skip
_PRE_TOKENIZERS = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [_DIGITS, _BYTE_LEVEL],
    "llama-bpe": [_LLAMA3, _BYTE_LEVEL | {"use_regex": False}],
}


def chat_files(path: Path) -> dict[str, str]:
    """The chat template of a file as the files of a Hugging Face folder, with the tokens that it may name.

    Nothing where it has none. Raises GGUFError as `load_gguf` does.
    """
    fields = read_fields(path)
    template = fields.get("tokenizer.chat_template")
    if template is None:
        return {}
    if not isinstance(template.value, str):
        raise GGUFError(f"{str(path)!r}: tokenizer.chat_template must be a text")
    tokens = _field(path, fields, "tokenizer.ggml.tokens")
    ids = {f"{name}_token": fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    named = {name: tokens[i.value] for name, i in ids.items() if i is not None}
    return {"chat_template.jinja": template.value, "tokenizer_config.json": json.dumps(named, indent=2) + "\n"}


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
    header = _open(path)
    config, tokenizer = _shape(path, header, dtype)
    graph, _ = abstract(config, validate_attention(ATTENTION, config.num_layers))
    params = assemble(_Tensors(header, config), _FAMILY, config, param_dtype=param_dtype, mesh=mesh)
    return merge(graph, params), tokenizer


def gguf_shape(path: Path, *, dtype: str) -> tuple[ModelConfig, Tokenizer]:
    """The settings and the tokenizer of a file, without its tensors; raises as `load_gguf` does."""
    return _shape(path, _open(path), dtype)


def _shape(path: Path, header: Header, dtype: str) -> tuple[ModelConfig, Tokenizer]:
    config = model_config(header, dtype)
    check_sizes(_Tensors(header, config), config)
    tokenizer = _tokenizer(path, header.fields)
    check_tokenizer(path, tokenizer, config.vocab_size)
    return config, tokenizer


def read_fields(path: Path) -> Mapping[str, Field]:
    """The file's metadata; each value's `contents()` is a Python object. Raises GGUFError as `load_gguf` does."""
    return _open(path).fields


def read_special_tokens(path: Path) -> SpecialTokens:
    """The special tokens and the chat template of a file; raises as `load_gguf` does."""
    fields = _open(path).fields
    pre = _field(path, fields, "tokenizer.ggml.pre", "gpt-2")
    return _special_tokens(path, fields, _field(path, fields, "tokenizer.ggml.tokens"), pre)


def _open(path: Path) -> Header:
    if importlib.util.find_spec("gguf") is None:
        raise GGUFError("reading a GGUF file needs the package gguf: pip install gguf")
    return Header(path)


def _field(path: Path, fields: Mapping[str, Field], name: str, default: Any = None) -> Any:
    if name in fields:
        return fields[name].contents()
    if default is None:
        raise GGUFError(f"{str(path)!r} lacks the field {name!r}; it is damaged or of another kind")
    return default


class _Tensors:
    """The tensors of a file as float32 (`sepjax.hub.assemble.Source`)."""

    def __init__(self, header: Header, config: ModelConfig):
        self.path, self._header, self._config = header.path, header, config

    def shapes(self) -> Mapping[str, Shape]:
        """See `Source`."""
        return {name: tensor.shape for name, tensor in self._header.tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        """See `Source`."""
        return np.dtype(np.float32)

    def view(self, name: str) -> np.ndarray:
        """See `Source`; the rows of Q and K in our order."""
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
            for i in range(0, len(rows), _ROWS):
                out[i : i + _ROWS] = gguf.dequantize(rows[i : i + _ROWS], kind)
        except NotImplementedError as error:
            raise GGUFError(
                f"{str(self.path)!r}: tensor {name!r} holds numbers of the type {kind.name}: {error}"
            ) from error
        if re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", name):
            out = _half_split(out, self._config)
        return out.reshape(tensor.shape)


def _half_split(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows [N * H, D] whose rotated pairs are (2i, 2i + 1), in our order: (i, i + H/2)."""
    pairs = rows.reshape(-1, config.head_dim // 2, 2, rows.shape[-1])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)


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
    ignored=re.compile(re.escape(FACTORS)),
)


def _tokenizer(path: Path, fields: Mapping[str, Field]) -> Tokenizer:
    """Byte-level BPE, put together as a Hugging Face tokenizer.json."""
    model = _field(path, fields, "tokenizer.ggml.model")
    pre = _field(path, fields, "tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise GGUFError(
            f"{str(path)!r} has a tokenizer of the kind {model!r} / {pre!r}; supported are byte-level BPE ('gpt2') "
            f"with the splitting of {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens = _field(path, fields, "tokenizer.ggml.tokens")
    file = {
        "version": "1.0",
        "added_tokens": _added_tokens(path, fields, tokens),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(path, fields),
            "ignore_merges": pre == "llama-bpe",  # a word that is a token is that token, whatever its merges
        },
    }
    special = _special_tokens(path, fields, tokens, pre)
    if special.adds_bos:
        bos = special.names["bos_token"]
        file["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
        }
    try:
        return Tokenizer(HuggingFaceModel(json.dumps(file), dataclasses.replace(special, adds_bos=None)))
    except Exception as error:  # the library raises bare ones
        raise GGUFError(f"{str(path)!r}: the vocabulary or its merges are damaged: {error}") from error


def _added_tokens(path: Path, fields: Mapping[str, Field], tokens: list[str]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before it is split: control tokens, and those that a model's makers defined.

    The latter are plain text, which is also written.
    """
    kinds = _field(path, fields, "tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not {*kinds} <= _TOKEN_TYPES:
        raise GGUFError(
            f"{str(path)!r}: tokenizer.ggml.token_type must be {len(tokens)} numbers, one a token, from 1 to 6"
        )
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": tokens[i], "special": kind != _USER_DEFINED} | plain
        for i, kind in enumerate(kinds)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and tokens[i]
    ]


def _merges(path: Path, fields: Mapping[str, Field]) -> list[list[str]]:
    """Pairs of tokens. The first space divides them that is not the first's own character."""
    merges = _field(path, fields, "tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise GGUFError(f"{str(path)!r}: tokenizer.ggml.merges must be a list of two tokens each, with a space between")
    at = [merge.index(" ", 1) for merge in merges]
    return [[merge[:i], merge[i + 1 :]] for merge, i in zip(merges, at, strict=True)]


def _special_tokens(path: Path, fields: Mapping[str, Field], tokens: list[str], pre: str) -> SpecialTokens:
    """The special tokens' names, the ends of an answer and the chat template."""
    ids: dict[str, int] = {}
    for ours, theirs in _SPECIAL_IDS.items():
        name = f"tokenizer.ggml.{theirs}_token_id"
        if name not in fields:
            continue
        i = _field(path, fields, name)
        if type(i) is not int or not 0 <= i < len(tokens):
            raise GGUFError(f"{str(path)!r}: {name}={str(i)[:80]}, but there are {len(tokens)} tokens")
        ids[ours] = i
    adds_bos = _field(path, fields, "tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    if adds_bos and "bos_token" not in ids:
        raise GGUFError(f"{str(path)!r} puts BOS before texts (add_bos_token), but names no bos_token_id")
    template = "tokenizer.chat_template"
    return SpecialTokens(
        names={"bos_token": None, "eos_token": None}
        | {name: tokens[i] for name, i in ids.items() if name.endswith("_token")},
        end_ids={path.name: tuple(ids[name] for name in ("eos_token", "eot", "eom") if name in ids)},
        chat_template=_field(path, fields, template) if template in fields else None,
        adds_bos=bool(adds_bos),
    )
