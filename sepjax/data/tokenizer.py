"""Text to token ids and back: SentencePiece models trained here, Hugging Face `tokenizers` files for imported models.

With a model of `train_sentencepiece`, `decode(encode(text)) == text` for any text: nothing is normalised, spaces and
newlines are kept, and characters outside the vocabulary are spelt in bytes.
"""

import codecs
import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
from etils import epath
from jaxtyping import Int32, Int64

from sepjax.data.errors import DataError
from sepjax.data.special_tokens import SpecialTokenError, read_beside, read_regular
from sepjax.data.tokenizer_models import SentencePieceModel, TokenizerModel, read_model
from sepjax.separators import token_texts

FILES = ("tokenizer.json", "tokenizer.model")  # what a tokenizer's folder holds one of; the first is read first
# Tokens that end a text, not a turn in a conversation: what divides the documents that a model is trained on.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_AT_ONCE = 8_000_000  # characters that are encoded at a time, at most; a token takes about a hundred bytes meanwhile
_LINE = 8192  # characters; SentencePiece's trainer drops lines of more than 65536 bytes


class Tokenizer:
    """A vocabulary with its special tokens. Immutable.

    Attributes:
      vocab_size: V, one more than the largest token id.
      bos_id, eos_id: ids of the tokens named so (a chat model's may begin and end a turn, not a text); None: none.
      adds_bos: whether texts get BOS in front when the model is used as its makers do (Llama's; not GPT's).
      starts_with_space: whether encoding puts a space before every text, which decoding takes away (Llama 2, not ours).
    """

    def __init__(self, model: TokenizerModel):
        self._model = model
        self._bytes = model.token_bytes()
        self.vocab_size = len(self._bytes)
        self._widths: np.ndarray | None = None
        self.bos_id = model.bos_id
        self.eos_id = model.eos_id
        self.adds_bos = model.adds_bos
        self.starts_with_space = model.starts_with_space
        self.special = model.special
        ends = (self.control_id(name) for name in _ENDS_OF_TEXT) if model.special.names else ()
        known = [i for i in ends if i is not None]
        self._end_of_text = model.eos_id if model.eos_id in known else next(iter(known), model.eos_id)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, BOS {self.bos_id}, EOS {self.eos_id})"

    @property
    def prefix(self) -> list[int]:
        """What stands before a text when the model is used as its makers do: BOS or nothing."""
        return [self.bos_id] if self.adds_bos and self.bos_id is not None else []

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: EOS and those of generation_config.json, config.json or the GGUF file."""
        return tuple(sorted({*self._model.end_ids, *([] if self.eos_id is None else [self.eos_id])}))

    @property
    def document_end(self) -> int | None:
        """What stands after a document in training: the token that ends a text, where EOS ends a turn."""
        return self._end_of_text if self.eos_id == self._model.eos_id else self.eos_id

    @property
    def document_start(self) -> int | None:
        """What stands before a document in training: BOS where texts get one, else what divides documents."""
        return self.prefix[0] if self.prefix else self.document_end

    def __reduce__(self) -> tuple[Any, ...]:
        """For Grain's worker processes."""
        return Tokenizer, (self._model,)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a SentencePiece model or a tokenizer.json: the file itself, or the folder that holds it.

        Raises:
          FileNotFoundError: there is no such file, or none of `FILES` in the folder.
          DataError: the file is neither kind, or damaged.
        """
        file = _tokenizer_file(epath.Path(path))
        try:
            return cls(read_model(read_regular(file), read_beside(file.parent)))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no tokenizer {str(file)!r}: expected a SentencePiece model, a tokenizer.json, or a folder with one"
            ) from error
        except SpecialTokenError as error:
            raise DataError(f"cannot read tokenizer {str(file)!r}: {error}") from error
        except ValueError as error:
            raise DataError(
                f"cannot read tokenizer {str(file)!r}: {error}; expected a SentencePiece model or a Hugging Face "
                "tokenizer.json: replace the file, or remove it to have one trained on the corpus"
            ) from error

    def within(self, vocab_size: int) -> "Tokenizer":
        """The tokenizer of a model with `vocab_size` embeddings: without control tokens that have no embedding.

        Gemma 3's text models have none for `<image_soft_token>`. In a text its name is characters as any others then.
        A tokenizer that has other tokens beyond, or needs one of them to begin or end texts, is returned as it is.
        """
        model = self._model.within(vocab_size)
        return self if model is self._model else Tokenizer(model)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.model or tokenizer.json into `folder`, made if missing. A reader never sees half a file."""
        target = epath.Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self._model.files().items():
            partial = target / f"{name}.{os.getpid()}.partial"
            partial.write_bytes(content)
            partial.replace(target / name)

    def spelled_out(self) -> "Tokenizer":
        """The same with what a SentencePiece model knows in files of its own, too, where transformers looks for it.

        These are the names of BOS, EOS and the unknown token, and whether texts begin with BOS.
        """
        model = self._model
        if not isinstance(model, SentencePieceModel):
            return self
        unknown = model.vocabulary.unk_id()
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": unknown if unknown >= 0 else None}
        names = {key: None if i is None else model.vocabulary.id_to_piece(i) for key, i in ids.items()}
        special = dataclasses.replace(model.special, names=names | dict(model.special.names), adds_bos=self.adds_bos)
        return Tokenizer(SentencePieceModel(model.vocabulary.serialized_model_proto(), special))

    def encode(self, text: str, *, bos: bool = False, control_tokens: bool = True) -> list[int]:
        """The ids of `text`; no EOS.

        Args:
          text: any.
          bos: whether BOS goes in front where the model's own tokenizer puts it; never twice.
          control_tokens: whether names of control tokens in the text ("<|im_end|>") are these tokens; False: they are
            characters as any others.
        """
        return self.encode_batch([text], bos=bos, control_tokens=control_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, control_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text."""
        if not len(texts):
            return []
        if control_tokens:
            ids, lengths = self.encode_flat(texts)
            parts = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
        else:
            self.check_unicode(texts)
            parts = [self._model.encode_as_text(text) for text in texts]
        return [self.with_bos(part) if bos else part for part in parts]

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """The ids after BOS, where the model's own tokenizer puts one and they do not begin with it already."""
        return [*(self.prefix if list(ids[:1]) != self.prefix else []), *ids]

    def encode_flat(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "N"], Int64[np.ndarray, "texts"]]:
        """The ids of all texts, one after the other, and how many each text has: the fast way for many texts.

        Raises:
          DataError: a text holds half of a surrogate pair, which is no Unicode text.
        """
        try:
            return self._model.encode(texts)
        except (RuntimeError, TypeError, UnicodeEncodeError) as error:
            self.check_unicode(texts)
            raise error

    def encode_each[Item](
        self, items: Iterable[Item], text: Callable[[Item], str] = str
    ) -> Iterator[tuple[Item, Int32[np.ndarray, "N"]]]:
        """Each item and the ids of its text, in order. Texts are encoded several at a time, on all cores.

        First one, then as many again as there were: whoever stops early has paid for twice as much at most.

        Args:
          items: texts, or what has one.
          text: the text of an item.

        Raises:
          DataError: as `encode_flat`.
        """
        left, size = iter(items), 0
        while taken := list(_up_to(min(size, _AT_ONCE), left, lambda item: len(text(item)))):
            texts = [text(item) for item in taken]
            ids, lengths = self.encode_flat(texts)
            yield from zip(taken, np.split(ids, np.cumsum(lengths)[:-1]), strict=True)
            size += sum(map(len, texts))

    def check_unicode(self, texts: Sequence[str]) -> None:
        """Raises DataError for a text with half of a surrogate pair."""
        for number, text in enumerate(texts):
            _check_unicode(number, text)

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of `ids`; control tokens write nothing, bytes that are no UTF-8 become U+FFFD.

        Args:
          ids: token ids.
          continues: whether text stands before these ids, so that a leading space is the text's own even where
            `starts_with_space`.

        Raises:
          ValueError: an id is not in the vocabulary.
        """
        decoder = IncrementalDecoder(self, continues=continues)
        return "".join([*map(decoder.feed, ids), decoder.flush()])

    def token_texts(self) -> list[str | None]:
        """The text of every token id; None for control tokens. For `sepjax.separators`."""
        return token_texts(self._model.vocabulary)

    def control_tokens(self) -> list[str]:
        """The names of all control tokens that the vocabulary finds in texts."""
        vocabulary = self._model.vocabulary
        if not hasattr(vocabulary, "get_added_tokens_decoder"):
            return []  # SentencePiece never makes one of a text
        return [token.content for token in vocabulary.get_added_tokens_decoder().values() if token.special]

    def dividers(self) -> list[str]:
        """Those behind which a text may be cut: the ids of both parts are those of the whole."""
        return self._model.dividers()

    def control_id(self, name: str) -> int | None:
        """The id of a control token by its name, such as "<|im_end|>"; None where the vocabulary has no such token."""
        vocabulary = self._model.vocabulary
        if hasattr(vocabulary, "token_to_id"):
            i = vocabulary.token_to_id(name)
        else:  # SentencePiece answers with the unknown token's id
            i = next((i for i in [vocabulary.piece_to_id(name)] if vocabulary.id_to_piece(i) == name), None)
        return i if i is not None and not self._bytes[i] else None

    def offsets(self, text: str) -> Int64[np.ndarray, "N 2"] | None:
        """[first, last) characters of the text that each of its tokens stands for; None where nothing tells."""
        return self._model.offsets(text)

    def token_widths(self) -> Int32[np.ndarray, "V"]:
        """Bytes of a text that each token stands for: what it writes, or a control token's name."""
        if self._widths is None:
            widths = np.array([len(x) for x in self._bytes], np.int32)
            for name in self.control_tokens():
                i = self.control_id(name)
                if i is not None:
                    widths[i] = len(name.encode())
            self._widths = widths
        return self._widths

    def token_bytes(self, i: int) -> bytes:
        """What token `i` writes: not always whole characters. Raises ValueError for an id outside the vocabulary."""
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size} tokens")
        return self._bytes[i]


class IncrementalDecoder:
    """Decodes token ids one at a time, in whole characters; all it returns joins to `Tokenizer.decode` of all ids.

    A character may be spelt by several tokens: its bytes wait until the last one arrives.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False):
        """See `Tokenizer.decode` for `continues`."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.starts_with_space and not continues

    def feed(self, i: int) -> str:
        """The characters that token `i` completes, possibly none."""
        data = self._tokenizer.token_bytes(i)
        if self._drops_space and data:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._utf8.decode(data)

    def feed_all(self, ids: Sequence[int]) -> str:
        """The characters that these complete, in one go: many times faster than one after the other."""
        if self._drops_space:
            return "".join(map(self.feed, ids))
        return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def state(self) -> dict[str, Any]:
        """Where the text stands, for `restore`: plain JSON."""
        return {"bytes": list(self._utf8.getstate()[0]), "drops_space": self._drops_space}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._utf8.setstate((bytes(state["bytes"]), 0))
        self._drops_space = state["drops_space"]

    def flush(self) -> str:
        """What is left of an unfinished character: U+FFFD or nothing. The next `feed` starts a new one."""
        return self._utf8.decode(b"", final=True)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-pair-encoding SentencePiece model; the same texts give the same model.

    Newlines and tabs are tokens of their own, digits too, words never merge with punctuation, and any character can be
    spelt in bytes. Texts too short for `vocab_size` give a smaller vocabulary.

    Raises:
      DataError: there is no text, or `vocab_size` has no room for the bytes and characters themselves.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=8 * _LINE,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise DataError("no text to train a tokenizer on: every document is empty") from error
        if "required_chars" in str(error):
            needed = str(error).partition(" vs ")[2].partition(".")[0]
            raise DataError(
                f"a tokenizer of {vocab_size} tokens has no room for the 256 bytes, special tokens and the corpus's "
                f"characters; raise data.tokenizer_vocab_size to {needed} or more"
            ) from error
        raise
    return Tokenizer(SentencePieceModel(model.getvalue()))


def _up_to[Item](most: int, items: Iterator[Item], size: Callable[[Item], int]) -> Iterator[Item]:
    """Items until their sizes are `most` or more together; one at least, if there is any."""
    done = 0
    for item in items:
        yield item
        done += size(item)
        if done >= most:
            return


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in filter(None, text.split("\n")):
            yield from (line[i : i + _LINE] for i in range(0, len(line), _LINE))


def _tokenizer_file(path: epath.Path) -> epath.Path:
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"no tokenizer in folder {str(path)!r}: expected one of {', '.join(FILES)}")


def _check_unicode(number: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text {number} holds half of a surrogate pair, {text[error.start]!r} at character {error.start}; "
            "it is not Unicode text: decode its source with errors='replace'"
        ) from error
