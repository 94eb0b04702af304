"""The two kinds of vocabulary behind a `Tokenizer`: a SentencePiece model and a Hugging Face `tokenizers` one.

Both answer the same few questions (`TokenizerModel`); everything built on them is in `tokenizer.py`.
"""

import abc
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from itertools import batched, chain
from typing import Any, override

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int32, Int64

from sepjax.config import first_line
from sepjax.data.special_tokens import OLDER, ORDER, SpecialTokenError, SpecialTokens
from sepjax.separators import BYTE_TOKEN, bytes_of_alphabet

SPACE = "▁"  # U+2581, what SentencePiece writes for a space
_UNKNOWN = "\ufffd".encode()
_PIECES, _NORMALIZER = 1, 3  # fields of SentencePiece's ModelProto, written in this order
_PART = re.compile(r"[\s\S]{512}[^\n]*\n*|[\s\S]+")  # half a kilobyte or more, up to the end of a run of newlines
_PARTS_AT_ONCE = 8192  # bounds the Python integers alive at a time
_DECODERS_OF_PIECES = {"Sequence", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
_START_AND_END = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<bos>", "<eos>"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerModel(abc.ABC):
    """What `Tokenizer` needs to know of a vocabulary."""

    vocabulary: Any  # the wrapped object, as `sepjax.separators.token_texts` reads it
    special = SpecialTokens()  # what the files beside the vocabulary say
    bos_id: int | None
    eos_id: int | None
    end_ids: tuple[int, ...] = ()  # further tokens that end an answer
    adds_bos: bool  # whether the model's own tokenizer puts BOS in front of texts; ours are trained so
    starts_with_space: bool  # whether encoding puts a space before the text, which decoding takes away

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "N"], Int64[np.ndarray, "texts"]]:
        """The ids of all texts, one after the other, and how many each text has; no special tokens."""

    def encode_as_text(self, text: str) -> list[int]:
        """The ids of one text in which control tokens are ordinary characters; none of them comes out."""
        return self.encode([text])[0].tolist()

    def offsets(self, text: str) -> Int64[np.ndarray, "N 2"] | None:
        """[first, last) characters of each token of `encode`; None where nothing tells."""
        return None

    def dividers(self) -> list[str]:
        """Names of control tokens behind which a text may be cut: both parts have the ids of the whole."""
        return []

    def within(self, vocab_size: int) -> "TokenizerModel":
        """Without the control tokens of ids from `vocab_size` on; itself where that would not make it fit."""
        return self

    @abc.abstractmethod
    def token_bytes(self) -> list[bytes]:
        """What each token id writes; nothing for control tokens."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """File names and contents that `read_model` reads back."""


class SentencePieceModel(TokenizerModel):
    """A SentencePiece model, ours or an imported one."""

    def __init__(self, proto: bytes, special: SpecialTokens | None = None):
        if not {_PIECES, _NORMALIZER} <= _fields(proto):
            raise ValueError("it is cut short: pieces or normalizer are missing")
        self.vocabulary = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.special = special or SpecialTokens()
        self._check_added()
        size = self.vocabulary.get_piece_size()
        self.bos_id, self.eos_id = (self._named(key) for key in ("bos_token", "eos_token"))
        self.end_ids = self.special.check_ends(size)
        self.special = dataclasses.replace(self.special, end_ids={"": self.end_ids}, default_end=None)
        self.adds_bos = self.bos_id is not None and self.special.adds_bos is not False
        self.starts_with_space = self.vocabulary.encode("a", out_type=str)[0].startswith(SPACE)
        # Our kind of model adds and drops nothing and no piece reaches over a newline: texts may be cut behind one.
        pieces = [self.vocabulary.id_to_piece(i) for i in range(self.vocabulary.get_piece_size())]
        probe = "".join(self.vocabulary.encode(" \n  a\n", out_type=str)).replace(SPACE, " ")
        self._is_plain = probe == " \n  a\n" and not any("\n" in piece and piece.strip("\n") for piece in pieces)
        space = [self.vocabulary.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_character = space if self._is_plain and all(map(self.vocabulary.is_byte, space)) else None

    def __reduce__(self) -> tuple[Any, ...]:
        """For Grain's worker processes."""
        return SentencePieceModel, (self.vocabulary.serialized_model_proto(), self.special)

    def _named(self, key: str) -> int | None:
        """The id of BOS or EOS: of the name in the files beside the model, else the model's own."""
        if key in self.special.names:
            pieces = {self.vocabulary.id_to_piece(i): i for i in range(self.vocabulary.get_piece_size())}
            name = self.special.check_name(key, pieces)
            return None if name is None else pieces[name]
        return _known(self.vocabulary.bos_id() if key == "bos_token" else self.vocabulary.eos_id())

    def _check_added(self) -> None:
        size = self.vocabulary.get_piece_size()
        for i, token in self.special.added.items():
            if i >= size or self.vocabulary.id_to_piece(i) != token["content"]:
                raise SpecialTokenError(
                    f"added token {token['content'][:80]!r} of id {i} is not in the SentencePiece model; a "
                    "tokenizer.json can have such tokens: write one with transformers (save_pretrained)"
                )

    @override
    def encode(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "N"], Int64[np.ndarray, "texts"]]:
        parts_of = [self._parts(text) for text in texts]
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for parts in batched(chain.from_iterable(parts_of), _PARTS_AT_ONCE):
            encoded = self._encode_parts(parts)
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            ids.append(np.fromiter(chain.from_iterable(encoded), np.int32, lengths[-1].sum()))
        return np.concatenate(ids), _sums(np.concatenate(lengths), [len(parts) for parts in parts_of])

    def _parts(self, text: str) -> list[str]:
        """Cuts the text where that cannot change its ids: BPE is slow on long texts, and one core deep."""
        parts = _PART.findall(text) if self._is_plain else [text]
        if self._space_character and SPACE in text:  # SentencePiece would read this character as a space
            parts = [piece for part in parts for piece in re.split(f"({SPACE})", part)]
        return parts

    def _encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        encoded = self.vocabulary.encode(list(parts))
        if self._space_character:
            return [self._space_character if part == SPACE else ids for part, ids in zip(parts, encoded, strict=True)]
        return encoded

    @override
    def token_bytes(self) -> list[bytes]:
        return [self._bytes_of(i) for i in range(self.vocabulary.get_piece_size())]

    def _bytes_of(self, i: int) -> bytes:
        if self.vocabulary.is_unknown(i):
            return _UNKNOWN
        if self.vocabulary.is_control(i) or self.vocabulary.is_unused(i):
            return b""
        return _piece_bytes(self.vocabulary.id_to_piece(i))

    @override
    def files(self) -> dict[str, bytes]:
        return self.special.files() | {"tokenizer.model": self.vocabulary.serialized_model_proto()}


class HuggingFaceModel(TokenizerModel):
    """A Hugging Face tokenizer.json, which itself does not say which tokens are BOS and EOS: `special` does."""

    def __init__(self, text: str, special: SpecialTokens | Mapping[str, str | None] | None = None):
        self.vocabulary = tokenizers.Tokenizer.from_str(text)
        self.vocabulary.no_truncation()
        self.vocabulary.no_padding()
        special = special if isinstance(special, SpecialTokens) else SpecialTokens(names=special or {})
        has = _checked_ids(self.vocabulary)
        if special.by_class.get("bos_token") == "<s>" and '"ByteLevel"' in text:
            # transformers does not take a byte-level tokenizer for a LlamaTokenizer, whatever the config says.
            special = dataclasses.replace(special, by_class={})
        if not special.has_class and not {"bos_token", "eos_token"} & set(special.names):
            special = dataclasses.replace(special, names={**special.names, **_usual_specials(has)})
        _add_tokens(self.vocabulary, special)
        self._name_tokens(special, self.vocabulary.get_vocab(with_added_tokens=True))
        kinds = set(re.findall(r'"type": *"(\w+)"', json.dumps(json.loads(text).get("decoder") or {})))
        self._is_byte_level = "ByteLevel" in kinds
        if not self._is_byte_level and (not kinds or kinds - _DECODERS_OF_PIECES):
            raise ValueError(f"its decoder {sorted(kinds)} is none of byte-level BPE or SentencePiece-like")
        first = self.vocabulary.encode("a", add_special_tokens=False).tokens
        self.starts_with_space = not self._is_byte_level and bool(first) and first[0].startswith(SPACE)
        self._without_control: tokenizers.Tokenizer | None = None

    def _name_tokens(self, special: SpecialTokens, has: Mapping[str, int]) -> None:
        """Sets the ids of BOS, EOS and the end tokens. BOS is what stands before a text, whatever its name."""
        bos, eos = (special.check_name(key, has) for key in ("bos_token", "eos_token"))
        names = {key: name for key, name in special.by_class.items() if name in has}
        names |= {**special.names, "bos_token": bos, "eos_token": eos}
        self.end_ids = special.check_ends(1 + max(has.values()))
        self.special = dataclasses.replace(special, names=names, end_ids={"": self.end_ids}, default_end=None)
        prefix = _prefix(self.vocabulary)
        if len(prefix) > 1 or not all(i in has.values() for i in prefix):
            raise ValueError(f"it puts the tokens {prefix[:8]} before every text; one of the vocabulary is supported")
        self.adds_bos = bool(prefix)
        self.bos_id = prefix[0] if prefix else has.get(bos or "")
        self.eos_id = has.get(eos or "")

    def __reduce__(self) -> tuple[Any, ...]:
        """For Grain's worker processes."""
        return HuggingFaceModel, (self.vocabulary.to_str(), self.special)

    @override
    def encode_as_text(self, text: str) -> list[int]:
        if self._without_control is None:
            self._without_control = tokenizers.Tokenizer.from_str(self.vocabulary.to_str())
            self._without_control.encode_special_tokens = True
        added = self.vocabulary.get_added_tokens_decoder()
        unknown = getattr(self.vocabulary.model, "unk_token", None)
        control = {i for i, token in added.items() if token.special and token.content != unknown}
        return [i for i in self._without_control.encode(text, add_special_tokens=False).ids if i not in control]

    @override
    def encode(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "N"], Int64[np.ndarray, "texts"]]:
        encodings = self.vocabulary.encode_batch_fast(list(texts), add_special_tokens=False)
        encoded = [np.array(encoding.ids, np.int32) for encoding in encodings]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.concatenate([np.zeros(0, np.int32), *encoded]), lengths

    @override
    def offsets(self, text: str) -> Int64[np.ndarray, "N 2"] | None:
        found = self.vocabulary.encode(text, add_special_tokens=False).offsets
        return np.array(found, np.int64).reshape(-1, 2)

    @override
    def dividers(self) -> list[str]:
        """Of byte-level BPE: added tokens are looked for first, the leftmost, then the longest, in the text as it is;
        what is between two of them is encoded by itself. Not those that another one overlaps with, or whose
        neighbours count.
        """
        added = list(self.vocabulary.get_added_tokens_decoder().values())
        if not self._is_byte_level or any(token.single_word for token in added):
            return []
        names = [token.content for token in added]
        return [
            token.content for token in added
            if token.special and not (token.lstrip or token.rstrip or token.normalized)
            and not any(_overlap(token.content, other) for other in names if other != token.content)
        ]  # fmt: skip

    @override
    def within(self, vocab_size: int) -> "TokenizerModel":
        added = self.vocabulary.get_added_tokens_decoder()
        vocabulary = self.vocabulary.get_vocab(with_added_tokens=True)
        beyond = {name: i for name, i in vocabulary.items() if i >= vocab_size}
        needed = {self.bos_id, self.eos_id, *self.end_ids}
        if not beyond or any(i in needed or i not in added or not added[i].special for i in beyond.values()):
            return self
        file = json.loads(self.vocabulary.to_str())
        file["added_tokens"] = [token for token in file["added_tokens"] if token["id"] < vocab_size]
        pieces = file["model"]["vocab"]  # a Unigram's is a list
        is_list = isinstance(pieces, list)
        kept = pieces[:vocab_size] if is_list else {name: i for name, i in pieces.items() if i < vocab_size}
        file["model"]["vocab"] = kept
        return HuggingFaceModel(json.dumps(file, ensure_ascii=False), self.special.without(beyond))

    @override
    def token_bytes(self) -> list[bytes]:
        added = self.vocabulary.get_added_tokens_decoder()
        vocabulary = self.vocabulary.get_vocab(with_added_tokens=True)
        table = [b""] * (1 + max(vocabulary.values()))
        for piece, i in vocabulary.items():
            if i in added:
                table[i] = b"" if added[i].special else added[i].content.encode()
            else:
                table[i] = bytes_of_alphabet(piece) if self._is_byte_level else _piece_bytes(piece)
        return table

    @override
    def files(self) -> dict[str, bytes]:
        return self.special.files() | {"tokenizer.json": self.vocabulary.to_str().encode()}


def read_model(content: bytes, beside: dict[str, bytes]) -> TokenizerModel:
    """The model in a file's `content`; `beside` holds the files next to it (`sepjax.data.special_tokens.BESIDE`).

    Raises:
      SpecialTokenError: the files next to it are damaged, or do not fit it.
      ValueError: it is neither kind, or damaged; the message is a reason to put behind the file's name.
    """
    if not content:
        raise ValueError("it is empty")
    try:
        special = SpecialTokens.read(beside)
        if content.lstrip()[:1] == b"{":
            return HuggingFaceModel(content.decode(), special)
        return SentencePieceModel(content, special)
    except SpecialTokenError:
        raise
    except Exception as error:  # both libraries raise bare RuntimeError and Exception
        raise ValueError(first_line(error)) from error


def _overlap(name: str, other: str) -> bool:
    """Whether a text may hold both names in one place."""
    sizes = range(1, min(len(name), len(other)))
    return name in other or other in name or any(
        name.endswith(other[:n]) or other.endswith(name[:n]) for n in sizes
    )  # fmt: skip


def _fields(proto: bytes) -> set[int]:
    """Numbers of a protobuf message's top-level fields.

    A file cut between two pieces is a valid, smaller model to the library; here it shows.
    """
    fields, at = set(), 0
    while at < len(proto):
        key, at = _varint(proto, at)
        if key & 7 != 2:  # ModelProto holds messages only
            raise ValueError("it is not a SentencePiece model")
        size, at = _varint(proto, at)
        fields.add(key >> 3)
        at += size
    return fields if at == len(proto) else set()


def _varint(proto: bytes, at: int) -> tuple[int, int]:
    """The number that starts at byte `at`, and where it ends."""
    value = shift = 0
    while at < len(proto):
        value |= (proto[at] & 127) << shift
        if proto[at] < 128:
            return value, at + 1
        at, shift = at + 1, shift + 7
    raise ValueError("it is cut short")


def _known(i: int) -> int | None:
    return i if i >= 0 else None


def _sums(lengths: Int64[np.ndarray, "parts"], counts: Sequence[int]) -> Int64[np.ndarray, "texts"]:
    """Adds up the first counts[0] lengths, the next counts[1], ..."""
    ends = np.concatenate([[0], np.cumsum(lengths)])[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])]
    return np.diff(ends)


def _piece_bytes(piece: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _checked_ids(vocabulary: tokenizers.Tokenizer) -> dict[str, int]:
    """The tokens' ids. Tables have a row for each up to the largest: one of 2^32 - 1 must not become 4 billion rows."""
    has = vocabulary.get_vocab(with_added_tokens=True)
    largest = max(has.values(), default=0)
    if not has or largest >= 4 * len(has) + 4096:
        raise ValueError(f"its {len(has)} tokens have ids up to {largest}: it is damaged")
    return has


def _add_tokens(vocabulary: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """Adds what only the files beside it have, and makes named tokens control tokens, as transformers does.

    A padding token and the like that the vocabulary lacks get the next ids. Added tokens of the tokenizer's own file
    stay as they are: it says itself what they are.
    """
    known = {token.content for token in vocabulary.get_added_tokens_decoder().values()}
    added = [token for token in special.added.values() if OLDER not in token or token["content"] not in known]
    vocabulary.add_tokens([_added_token(token) for token in added])  # in the order of their ids
    for i, token in special.added.items():
        if (found := vocabulary.token_to_id(token["content"])) != i:
            raise SpecialTokenError(
                f"added token {token['content'][:80]!r} should have the id {i}, but the next one of the vocabulary "
                f"is {found}; the files do not belong together"
            )
    has = vocabulary.get_vocab(with_added_tokens=True)
    for key in ("bos_token", "eos_token"):
        special.check_name(key, has)
    known = {token.content for token in vocabulary.get_added_tokens_decoder().values()}
    named = [*(special.names.get(key) for key in ORDER), *special.names.values(), *special.more]
    named = [name for name in dict.fromkeys(named) if name and name not in known]
    vocabulary.add_special_tokens([_added_token({**special.flags.get(x, {}), "content": x}) for x in named])


def _added_token(token: Mapping[str, Any]) -> tokenizers.AddedToken:
    flags = {key: token[key] for key in _FLAGS if isinstance(token.get(key), bool)}
    return tokenizers.AddedToken(token["content"], **flags)


def _prefix(vocabulary: tokenizers.Tokenizer) -> list[int]:
    """The ids that its post-processor puts in front of a text."""
    for text in ("a", "0", ".", " "):
        plain, whole = (vocabulary.encode(text, add_special_tokens=add).ids for add in (False, True))
        found = [k for k in range(len(whole)) if plain and whole[k : k + len(plain)] == plain]
        if found:
            return whole[: found[0]]
    return []


def _usual_specials(has: Mapping[str, int]) -> dict[str, str | None]:
    """GPT-2's and GPT-NeoX's one token for both, else the pairs of Llama, Llama 3 and Gemma."""
    for bos, eos in (("<|endoftext|>", "<|endoftext|>"), *_START_AND_END):
        if bos in has and eos in has:
            return {"bos_token": bos, "eos_token": eos}
    return {"bos_token": None, "eos_token": None}
