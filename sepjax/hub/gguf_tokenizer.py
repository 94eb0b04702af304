"""The tokenizers of GGUF files, put together as a Hugging Face tokenizer.json."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepjax.data.special_tokens import SpecialTokens
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.hub.gguf_header import Field, GGUFError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokens; 5: unused, 6: a byte
_TOKEN_TYPES = set(range(1, 7))
_SPACE = "\u2581"  # what SentencePiece writes for one
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
# Control tokens at which llama.cpp ends an answer whether or not the file names them.
_END_TEXTS = {
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>",
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>",
}  # fmt: skip
_AFTER_SPLIT = _BYTE_LEVEL | {"use_regex": False}
_QWEN2 = _LLAMA3 | {"pattern": {"Regex": _LLAMA3["pattern"]["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")}}
_PRE_TOKENIZERS = {
    "gpt-2": [_BYTE_LEVEL],
    "olmo": [_BYTE_LEVEL],
    "smollm": [_DIGITS, _BYTE_LEVEL],
    "refact": [_DIGITS, _BYTE_LEVEL],  # Granite 3
    "llama-bpe": [_LLAMA3, _AFTER_SPLIT],
    "dbrx": [_LLAMA3, _AFTER_SPLIT],  # OLMo 2
    "qwen2": [_QWEN2, _AFTER_SPLIT],  # digits one by one
}


def field_of(path: Path, fields: Mapping[str, Field], name: str, default: Any = None) -> Any:
    """A field's contents as Python objects. Raises GGUFError for one that is missing and has no default."""
    if name in fields:
        return fields[name].contents()
    if default is None:
        raise GGUFError(f"{str(path)!r} lacks the field {name!r}; it is damaged or of another kind")
    return default


def tokenizer_of(path: Path, fields: Mapping[str, Field]) -> Tokenizer:
    """A file's tokenizer: byte-level BPE, or SentencePiece with scores.

    Raises:
      GGUFError: it is of another kind, or damaged.
    """
    tokens = field_of(path, fields, "tokenizer.ggml.tokens")
    parts = _sentencepiece if _is_sentencepiece(path, fields) else _byte_level
    file = {"version": "1.0", "added_tokens": _added_tokens(path, fields, tokens), "post_processor": None}
    file |= parts(path, fields, tokens)
    special = special_tokens(path, fields, tokens)
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


def _is_sentencepiece(path: Path, fields: Mapping[str, Field]) -> bool:
    return field_of(path, fields, "tokenizer.ggml.model") == "llama"


def _byte_level(path: Path, fields: Mapping[str, Field], tokens: list[str]) -> dict[str, Any]:
    model = field_of(path, fields, "tokenizer.ggml.model")
    pre = field_of(path, fields, "tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise GGUFError(
            f"{str(path)!r} has a tokenizer of the kind {model!r} / {pre!r}; supported are SentencePiece ('llama') and "
            f"byte-level BPE ('gpt2') with the splitting of {', '.join(_PRE_TOKENIZERS)}"
        )
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(path, fields),
            "ignore_merges": pre == "llama-bpe",  # a word that is a token is that token, whatever its merges
        },
    }


def _sentencepiece(path: Path, fields: Mapping[str, Field], tokens: list[str]) -> dict[str, Any]:
    """Pieces with scores: of all pairs that make a piece the one of the highest score is merged first."""
    scores = field_of(path, fields, "tokenizer.ggml.scores")
    is_number = isinstance(scores, list) and all(isinstance(x, float | int) and x == x for x in scores)
    if not is_number or len(scores) != len(tokens):
        raise GGUFError(f"{str(path)!r}: tokenizer.ggml.scores must be {len(tokens)} numbers, one a token")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    kinds = field_of(path, fields, "tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    pairs = [
        (-score, i, [token[:cut], token[cut:]])
        for i, (token, score) in enumerate(zip(tokens, scores, strict=True))
        if kinds[i] == _NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: pair[:2])
    prefix = field_of(path, fields, "tokenizer.ggml.add_space_prefix", True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    unspace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [pair for _, _, pair in pairs],
            "unk_token": next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None),
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _added_tokens(path: Path, fields: Mapping[str, Field], tokens: list[str]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before it is split: control tokens, and those that a model's makers defined.

    The latter are plain text, which is also written.
    """
    kinds = _kinds(path, fields, tokens)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": tokens[i], "special": kind != _USER_DEFINED} | plain
        for i, kind in enumerate(kinds)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and tokens[i]
    ]


def _kinds(path: Path, fields: Mapping[str, Field], tokens: list[str]) -> list[int]:
    kinds = field_of(path, fields, "tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not {*kinds} <= _TOKEN_TYPES:
        raise GGUFError(
            f"{str(path)!r}: tokenizer.ggml.token_type must be {len(tokens)} numbers, one a token, from 1 to 6"
        )
    return kinds


def _merges(path: Path, fields: Mapping[str, Field]) -> list[list[str]]:
    """Pairs of tokens. The first space divides them that is not the first's own character."""
    merges = field_of(path, fields, "tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise GGUFError(f"{str(path)!r}: tokenizer.ggml.merges must be a list of two tokens each, with a space between")
    at = [merge.index(" ", 1) for merge in merges]
    return [[merge[:i], merge[i + 1 :]] for merge, i in zip(merges, at, strict=True)]


def special_tokens(path: Path, fields: Mapping[str, Field], tokens: list[str]) -> SpecialTokens:
    """The special tokens' names, the ends of an answer and the chat template."""
    pre = field_of(path, fields, "tokenizer.ggml.pre", "gpt-2")
    puts_bos = pre == "llama-bpe" or _is_sentencepiece(path, fields)  # where the file does not say
    ids: dict[str, int] = {}
    for ours, theirs in _SPECIAL_IDS.items():
        name = f"tokenizer.ggml.{theirs}_token_id"
        if name not in fields:
            continue
        i = field_of(path, fields, name)
        if type(i) is not int or not 0 <= i < len(tokens):
            raise GGUFError(f"{str(path)!r}: {name}={str(i)[:80]}, but there are {len(tokens)} tokens")
        ids[ours] = i
    adds_bos = field_of(path, fields, "tokenizer.ggml.add_bos_token", puts_bos)
    if adds_bos and "bos_token" not in ids:
        raise GGUFError(f"{str(path)!r} puts BOS before texts (add_bos_token), but names no bos_token_id")
    template = fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template.value, str):
        raise GGUFError(f"{str(path)!r}: tokenizer.chat_template must be a text")
    ends = {ids[name] for name in ("eos_token", "eot", "eom") if name in ids}
    ends |= {i for i, kind in enumerate(_kinds(path, fields, tokens)) if kind == _CONTROL and tokens[i] in _END_TEXTS}
    return SpecialTokens(
        names={"bos_token": None, "eos_token": None}
        | {name: tokens[i] for name, i in ids.items() if name.endswith("_token")},
        end_ids={path.name: tuple(sorted(ends))},
        chat_template=None if template is None else template.value,
        adds_bos=bool(adds_bos),
    )
