"""Which tokens are separators: a bool table over the vocabulary, for any tokenizer.

A separator closes a segment of text; its key and value then stand for the whole segment (arXiv 2412.12094). The paper
lists nine: `. , ? ! ; :` space, tab, newline. Fixed id lists miss the merged tokens of real vocabularies (`."`,
`\n\n`) and other scripts, so the default policy reads the vocabulary itself.
"""

import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig, ConfigError
from sepjax.config.attention import TABLES
from sepjax.console import say

PAPER_SEPARATORS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")

# What ends a sentence or a clause in any script: Unicode's Sentence_Terminal and Terminal_Punctuation (16.0).
_TERMINALS = """
21 2C 2E 3A-3B 3F 37E 387 589 5C3 60C 61B 61D-61F 6D4 700-70A 70C 7F8-7F9 830-835 837-83E 85E 964-965 E5A-E5B F08
F0D-F12 104A-104B 1361-1368 166E 16EB-16ED 1735-1736 17D4-17D6 17DA 1802-1805 1808-1809 1944-1945 1AA8-1AAB 1B4E-1B4F
1B5A-1B5B 1B5D-1B5F 1B7D-1B7F 1C3B-1C3F 1C7E-1C7F 2024 203C-203D 2047-2049 2CF9-2CFB 2E2E 2E3C 2E41 2E4C 2E4E-2E4F
2E53-2E54 3001-3002 A4FE-A4FF A60D-A60F A6F3-A6F7 A876-A877 A8CE-A8CF A92F A9C7-A9C9 AA5D-AA5F AADF AAF0-AAF1 ABEB
FE12 FE15-FE16 FE50-FE52 FE54-FE57 FF01 FF0C FF0E FF1A-FF1B FF1F FF61 FF64 1039F 103D0 10857 1091F 10A56-10A57
10AF0-10AF5 10B3A-10B3F 10B99-10B9C 10F55-10F59 10F86-10F89 11047-1104D 110BE-110C1 11141-11143 111C5-111C6 111CD
111DE-111DF 11238-1123C 112A9 113D4-113D5 1144B-1144D 1145A-1145B 115C2-115C5 115C9-115D7 11641-11642 1173C-1173E 11944
11946 11A42-11A43 11A9B-11A9C 11AA1-11AA2 11C41-11C43 11C71 11EF7-11EF8 11F43-11F44 12470-12474 16A6E-16A6F 16AF5
16B37-16B39 16B44 16D6E-16D6F 16E97-16E98 1BC9F 1DA87-1DA8A
"""
_ENCLOSING = {"Ps", "Pe", "Pi", "Pf", "Pd"}  # Unicode's brackets, quotation marks and dashes
_MARKUP = frozenset("\"'`_*\\")  # quotes and emphasis of plain text and code; the backslash of an escaped line's end
# Frequent marks that many vocabularies spell in pieces of a character (`_mark_pieces`).
_FULL_WIDTH = "！，．：；？"
_OTHERS = "。、।،؛؟۔"
_FEW = 200  # tokens a separator
_warned: set[str] = set()  # texts that `warn_of_few` has named
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def separator_table(tokenizer: Any, policy: str | Sequence[int] = "punctuation") -> np.ndarray:
    """Returns bool[V]: which token ids are separators.

    Args:
      tokenizer: a `sepjax.data.tokenizer.Tokenizer`, a `sentencepiece.SentencePieceProcessor` or a
        `tokenizers.Tokenizer`.
      policy: "punctuation": the token's text, white space aside, has a character that ends a sentence or a clause in
        some script, and besides nothing but quotes, brackets, dashes and marks of emphasis; or it is nothing but white
        space; or it is the piece of such a character by which it is known (`_mark_pieces`). "paper": the text is
        exactly one of `PAPER_SEPARATORS`. Or the ids themselves.

    Raises:
      ValueError: for an unknown policy, ids outside the vocabulary, or a tokenizer of an unknown kind.
    """
    texts = token_texts(tokenizer)
    if not isinstance(policy, str):
        return _table_of_ids(policy, len(texts))
    if policy == "punctuation":
        table, pieces = np.array([_is_punctuation(text) for text in texts], bool), _mark_pieces(texts)
        broken = [i for i, text in enumerate(texts) if text and "\ufffd" in text]
        table[broken] = [_bytes_of(tokenizer, i) in pieces for i in broken]
        return table
    if policy == "paper":
        return np.array([text in PAPER_SEPARATORS for text in texts], bool)
    raise ValueError(
        f'unknown separator policy {policy!r}; use "punctuation", "paper" or a list of token ids '
        '(a fixed interval goes by position: attention.pattern="fixed_interval")'
    )


def configured_table(tokenizer: Any, attention: AttentionConfig) -> np.ndarray:
    """Returns the bool[V] table that an attention config asks for; all False for patterns without separators."""
    if not has_separators(attention):
        return np.zeros(len(token_texts(tokenizer)), bool)
    policy = attention.separator_ids if attention.separators == "ids" else attention.separators
    return separator_table(tokenizer, policy)


def has_separators(attention: AttentionConfig) -> bool:
    """Whether a pattern keeps separators, all of them or before other tokens."""
    return attention.pattern == "separator" or (attention.pattern == "watched" and attention.separators_first)


def with_ids(attention: AttentionConfig) -> AttentionConfig:
    """The settings with the ids of a file in place of its name, `separators` = "table.json" or "table.npy".

    Raises:
      ConfigError: the file is missing or has no ids.
    """
    path = Path(attention.separators)
    if path.suffix not in TABLES:
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
      table: bool[V] from `configured_table`. Ids outside 0 ... V - 1 are no separators. Or the flags themselves, shaped
        like `tokens`, for two axes and more.
      attention: its `pattern` decides; "fixed_interval" flags every `interval`-th token and needs no table.
    """
    if attention.pattern == "fixed_interval":
        return (positions + 1) % attention.interval == 0
    inside = (tokens >= 0) & (tokens < len(table))
    if not has_separators(attention):
        return inside & False
    if table.ndim > 1:
        return table
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
    if byte is None:
        return piece.replace("▁", " ")
    return bytes([int(byte[1], 16)]).decode("utf-8", errors="replace")  # most bytes are a part of a character only


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
    """The text of a piece; characters that stand for no byte are left out."""
    return piece.translate(_TEXT_OF_CODE).encode("latin-1", errors="ignore").decode("utf-8", errors="replace")


def bytes_of_alphabet(piece: str) -> bytes:
    """The bytes of a piece of a byte-level vocabulary; one with characters that stand for no byte stands for itself."""
    try:
        return piece.translate(_BYTE_OF_CODE).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
_OF_BYTES = {ord(c): byte for c, byte in BYTE_OF_CHARACTER.items()}
# What these do to a whole vocabulary, Python's loops would take seconds for. None: left out; "\uffff": no byte.
_TEXT_OF_CODE: dict[int, int | None] = dict.fromkeys(range(256)) | _OF_BYTES
_BYTE_OF_CODE = dict.fromkeys(range(256), 0xFFFF) | _OF_BYTES


def _is_punctuation(text: str | None) -> bool:
    if not text:
        return False
    if terminals().isdisjoint(text):  # most of a vocabulary
        return text.isspace()
    return all(c.isspace() or _may_surround(c) for c in text)


@functools.cache
def terminals() -> frozenset[str]:
    """The characters that end a sentence or a clause, of all scripts."""
    ends = [[int(end, 16) for end in part.split("-")] for part in _TERMINALS.split()]
    return frozenset(chr(c) for part in ends for c in range(part[0], part[-1] + 1))


@functools.cache
def _may_surround(c: str) -> bool:
    return c in terminals() or c in _MARKUP or unicodedata.category(c) in _ENCLOSING


def _mark_pieces(texts: Sequence[str | None]) -> set[bytes]:
    """The pieces of a character that stand for a mark which the vocabulary has no token for.

    A full-width mark is known by its first bytes, EF BC, with which hardly anything else begins; others by their last,
    which some characters share: docs/method.md says how many.
    """
    known = set(texts)
    pieces = {mark.encode()[:n] for mark in _FULL_WIDTH if mark not in known for n in (1, 2)}
    for data in (mark.encode() for mark in _OTHERS if mark not in known):
        pieces |= {data[n:] for n in range(1, len(data))}
    return pieces


def _bytes_of(tokenizer: Any, i: int) -> bytes:
    """What token `i` writes; nothing where a tokenizer shows texts alone."""
    if hasattr(tokenizer, "token_texts"):
        return tokenizer.token_bytes(i) if hasattr(tokenizer, "token_bytes") else b""
    piece = tokenizer.id_to_piece(i) if hasattr(tokenizer, "id_to_piece") else tokenizer.id_to_token(i)
    byte = BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else bytes(BYTE_OF_CHARACTER.get(c, 0) for c in piece)


def warn_of_few(share: float, tokens: int, what: str, kind: str = "") -> None:
    """Says in one line, once for each `kind`, that a text has fewer than 1 separator in 200 tokens.

    Args:
      share: of its tokens that are separators.
      tokens: its length; fewer than 200 are too few to tell.
      what: names the text.
      kind: of texts; "": `what`.
    """
    if tokens >= _FEW and share < 1 / _FEW and (kind or what) not in _warned:
        _warned.add(kind or what)
        say(
            f"warning: {what}: {share:.2%} of {tokens} tokens are separators, fewer than 1 in {_FEW}: hardly anything "
            "is kept beyond the window; see attention.separators in docs/method.md"
        )


def warn_of_few_in(tokens: Sequence[int] | np.ndarray, table: Any, attention: AttentionConfig, what: str) -> None:
    """`warn_of_few` of token ids; where `attention` knows no separators, nothing.

    Args:
      tokens: the text's ids, all of them within `table`.
      table: bool[V] from `configured_table`.
      attention: its `pattern` decides.
      what: names the text.
    """
    if attention.pattern == "separator" and len(tokens) >= _FEW:
        warn_of_few(float(np.mean(np.asarray(table)[np.asarray(tokens)])), len(tokens), what)


def warn_of_few_among(prompts: Sequence[Sequence[int]], table: Any, attention: AttentionConfig) -> None:
    """The same of prompts, in one line for all that have few: how many they are, and what they have together."""
    if attention.pattern != "separator":
        return
    flags = [np.asarray(table)[np.asarray(ids)] for ids in prompts if len(ids) >= _FEW]
    few = [x for x in flags if np.mean(x) < 1 / _FEW]
    if few:
        what = f"{len(few)} of {len(prompts)} prompts" if len(prompts) > 1 else "the prompt"
        together = np.concatenate(few)
        warn_of_few(float(np.mean(together)), len(together), what, "prompts")


def _table_of_ids(ids: Sequence[int], size: int) -> np.ndarray:
    table = np.zeros(size, bool)
    outside = [i for i in ids if not 0 <= i < size]
    if outside:
        raise ValueError(f"separator ids {outside[:5]} are outside the vocabulary of {size} tokens (0 to {size - 1})")
    table[list(ids)] = True
    return table
