"""Which tokens are separators: a bool table over the vocabulary, for any tokenizer.

A separator closes a segment of text; its key and value then stand for the whole segment (arXiv 2412.12094). The paper
lists nine: `. , ? ! ; :` space, tab, newline. Fixed id lists miss the merged tokens of real vocabularies (`."`,
`\n\n`), so the default policy reads the vocabulary itself.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig, ConfigError

PAPER_SEPARATORS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")

_PUNCTUATION = re.compile(r"""[.,?!;:][.,?!;:"'”’»)\]}]*""")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def separator_table(tokenizer: Any, policy: str | Sequence[int] = "punctuation") -> np.ndarray:
    """Returns bool[V]: which token ids are separators.

    Args:
      tokenizer: a `sepjax.data.tokenizer.Tokenizer`, a `sentencepiece.SentencePieceProcessor` or a
        `tokenizers.Tokenizer`.
      policy: "punctuation": the token's text, spaces aside, is separator characters with closing quotes or brackets
        after them, or it is nothing but spaces, tabs and newlines; "paper": the text is exactly one of
        `PAPER_SEPARATORS`; or the ids themselves.

    Raises:
      ValueError: for an unknown policy, ids outside the vocabulary, or a tokenizer of an unknown kind.
    """
    texts = token_texts(tokenizer)
    if not isinstance(policy, str):
        return _table_of_ids(policy, len(texts))
    if policy == "punctuation":
        return np.array([_is_punctuation(text) for text in texts], bool)
    if policy == "paper":
        return np.array([text in PAPER_SEPARATORS for text in texts], bool)
    raise ValueError(
        f'unknown separator policy {policy!r}; use "punctuation", "paper" or a list of token ids '
        '(a fixed interval goes by position: attention.pattern="fixed_interval")'
    )


def configured_table(tokenizer: Any, attention: AttentionConfig) -> np.ndarray:
    """Returns the bool[V] table that an attention config asks for; all False for patterns without separators."""
    if not _has_separators(attention):
        return np.zeros(len(token_texts(tokenizer)), bool)
    policy = attention.separator_ids if attention.separators == "ids" else attention.separators
    return separator_table(tokenizer, policy)


def _has_separators(attention: AttentionConfig) -> bool:
    return attention.pattern == "separator" or (attention.pattern == "watched" and attention.separators_first)


def with_ids(attention: AttentionConfig) -> AttentionConfig:
    """The settings with the ids of a file in place of its name, `separators` = "table.json" or "table.npy".

    Raises:
      ConfigError: the file is missing or has no ids.
    """
    path = Path(attention.separators)
    if path.suffix not in (".json", ".npy"):
        return attention
    try:
        return dataclasses.replace(attention, separators="ids", separator_ids=read_ids(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"attention.separators={str(path)!r} cannot be read: {error}") from error


def read_ids(path: Path) -> tuple[int, ...]:
    """Token ids from a file: .npy of ids or of a bool for every id; .json, a list or an object's "separator_ids".

    Raises:
      ValueError: it has something else.
      OSError: it cannot be read.
    """
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        array = np.flatnonzero(array) if array.dtype == bool and array.ndim == 1 else array
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{str(path)!r} is {array.dtype}{list(array.shape)}, expected ids [N] or bool [V]")
        return tuple(array.tolist())
    values = json.loads(path.read_text(encoding="utf-8"))
    values = values.get("separator_ids") if isinstance(values, dict) else values
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f'{str(path)!r} has no list of whole numbers, nor an object with "separator_ids"')
    return tuple(values)


def flag_separators(tokens: Any, positions: Any, table: Any, attention: AttentionConfig) -> Any:
    """Returns bool, shaped like `tokens`: which tokens stay visible for ever (sinks aside).

    Works on NumPy and JAX arrays alike, inside jit too.

    Args:
      tokens: int32[...] token ids.
      positions: int32[...] positions within the document, from 0.
      table: bool[V] from `configured_table`. Ids outside 0 ... V - 1 are no separators.
      attention: its `pattern` decides; "fixed_interval" flags every `interval`-th token and needs no table.
    """
    if attention.pattern == "fixed_interval":
        return (positions + 1) % attention.interval == 0
    inside = (tokens >= 0) & (tokens < len(table))
    if not _has_separators(attention):
        return inside & False
    if isinstance(tokens, jax.Array):  # a tracer cannot index a NumPy table
        table = jnp.asarray(table)
    return inside & table[tokens * inside]


def token_texts(tokenizer: Any) -> list[str | None]:
    """The text of every token id; None for control tokens (BOS, EOS, ...), which no policy may flag."""
    if hasattr(tokenizer, "token_texts"):
        return tokenizer.token_texts()
    if hasattr(tokenizer, "id_to_piece"):
        return _sentencepiece_texts(tokenizer)
    if hasattr(tokenizer, "id_to_token"):
        return _hugging_face_texts(tokenizer)
    raise ValueError(
        f"cannot read the vocabulary of a {type(tokenizer).__name__}; expected a sepjax Tokenizer, a "
        "sentencepiece.SentencePieceProcessor or a tokenizers.Tokenizer"
    )


def _sentencepiece_texts(processor: Any) -> list[str | None]:
    texts: list[str | None] = []
    for i in range(processor.get_piece_size()):
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            texts.append(None)
        else:
            texts.append(_piece_text(processor.id_to_piece(i)))
    return texts


def _piece_text(piece: str) -> str:
    byte = BYTE_TOKEN.fullmatch(piece)
    return chr(int(byte[1], 16)) if byte else piece.replace("▁", " ")


def _hugging_face_texts(tokenizer: Any) -> list[str | None]:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    texts: list[str | None] = [None] * max(size, 1 + max(vocabulary.values(), default=-1))
    added = tokenizer.get_added_tokens_decoder()
    byte_level = _is_byte_level(tokenizer)
    for piece, i in vocabulary.items():
        if i in added:
            texts[i] = None if added[i].special else added[i].content
        else:
            texts[i] = _byte_level_text(piece) if byte_level else _piece_text(piece)
    return texts


def _is_byte_level(tokenizer: Any) -> bool:
    settings = json.loads(tokenizer.to_str())
    return '"ByteLevel"' in json.dumps([settings["pre_tokenizer"], settings["decoder"]])


def _byte_level_text(piece: str) -> str:
    values = bytes(BYTE_OF_CHARACTER[c] for c in piece if c in BYTE_OF_CHARACTER)
    return values.decode("utf-8", errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


def _is_punctuation(text: str | None) -> bool:
    if not text:
        return False
    visible = re.sub(r"[ \t\r\n]", "", text)
    return not visible or _PUNCTUATION.fullmatch(visible) is not None


def _table_of_ids(ids: Sequence[int], size: int) -> np.ndarray:
    table = np.zeros(size, bool)
    outside = [i for i in ids if not 0 <= i < size]
    if outside:
        raise ValueError(f"separator ids {outside[:5]} are outside the vocabulary of {size} tokens (0 to {size - 1})")
    table[list(ids)] = True
    return table
