"""Packing against a second definition of it, one token at a time, and what follows from it."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepjax.data.corpora.recall.recall import recall_tokenizer
from sepjax.data.errors import DataError
from sepjax.data.packing import TokenStream, pack_rows
from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import TokenizerModel

BOS, EOS = 1, 2


class Letters(TokenizerModel):
    """A vocabulary of the characters 'a' to 'z', ids 3 to 28."""

    vocabulary = None
    starts_with_space = False

    def __init__(self, bos_id: int | None, eos_id: int | None, adds_bos: bool):
        self.bos_id, self.eos_id, self.adds_bos = bos_id, eos_id, adds_bos

    def encode(self, texts: Sequence[str]):
        ids = [BOS if c == "<" else EOS if c == ">" else ord(c) - ord("a") + 3 for text in texts for c in text]
        return np.array(ids, np.int32), np.array([len(text) for text in texts], np.int64)

    def token_bytes(self) -> list[bytes]:
        return [b""] * 3 + [chr(ord("a") + i).encode() for i in range(26)]

    def files(self) -> dict[str, bytes]:
        return {}


TEXTS = st.lists(st.text("abcdefgh<>", max_size=9), max_size=8)  # < is BOS, > is EOS
TOKENIZERS = st.builds(
    lambda b, e, adds: Tokenizer(Letters(BOS if b else None, EOS if e else None, b and adds)), *[st.booleans()] * 3
)


def flag_vowels(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return (tokens == 3) | (tokens == 7) | (positions == 5)


def pairs_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """(token, target, document, offset) of every input, document by document.

    A document begins with BOS where the tokenizer adds it, else with what ends the one before; with neither twice.
    """
    pairs = []
    for document, text in enumerate(texts):
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        start = [BOS] if tokenizer.adds_bos else end
        ids = tokenizer.encode(text)
        ids = ids[1:] if start and ids[:1] == start else ids
        ids = [*start, *(ids[:-1] if end and ids[-1:] == end else ids), *end]
        pairs += [(ids[i], ids[i + 1], document, i) for i in range(len(ids) - 1)]
    return pairs


@given(tokenizer=TOKENIZERS, texts=TEXTS)
def test_the_stream_is_the_documents(tokenizer, texts):
    stream = TokenStream.encode(tokenizer, texts, first=100)
    fields = (stream.tokens, stream.targets, stream.documents - 100, stream.offsets)
    assert list(zip(*(field.tolist() for field in fields), strict=True)) == pairs_of(tokenizer, texts)


@given(tokenizer=TOKENIZERS, texts=TEXTS, length=st.integers(1, 9))
def test_rows_are_the_stream_cut(tokenizer, texts, length):
    """Every token once and in order, with its target; positions and segments as a loop counts them."""
    pairs = pairs_of(tokenizer, texts)
    batch = pack_rows(TokenStream.encode(tokenizer, texts), length, flag_vowels)
    assert batch.tokens.shape == (-(-len(pairs) // length), length)
    assert batch.tokens[batch.loss_mask].tolist() == [p[0] for p in pairs]
    assert batch.targets[batch.loss_mask].tolist() == [p[1] for p in pairs]
    position = segment = 0
    for i, (token, _, _, offset) in enumerate(pairs):
        row, column = divmod(i, length)
        if column == 0:
            position, segment = 0, 1
        elif offset == 0:
            position, segment = 0, segment + 1
        else:
            position += 1
        at = row, column
        assert (batch.positions[at], batch.segment_ids[at]) == (position, segment)
        assert batch.is_separator[at] == (token in (3, 7) or position == 5)


@given(tokenizer=TOKENIZERS, texts=TEXTS, length=st.integers(1, 9))
def test_padding_is_at_the_end_and_blank(tokenizer, texts, length):
    batch = pack_rows(TokenStream.encode(tokenizer, texts), length, flag_vowels)
    assert np.all(np.diff(batch.loss_mask.ravel().astype(int)) <= 0)
    assert (~batch.loss_mask).sum() < length
    for field in (batch.tokens, batch.targets, batch.positions, batch.segment_ids, batch.is_separator):
        assert not field[~batch.loss_mask].any()
    assert np.array_equal(batch.segment_ids > 0, batch.loss_mask)


@given(texts=TEXTS, cut=st.integers(0, 60))
def test_a_stream_taken_apart_joins_again(texts, cut):
    stream = TokenStream.encode(Tokenizer(Letters(BOS, EOS, True)), texts)
    again = TokenStream.join([stream[:cut], TokenStream.empty(), stream[cut:]])
    for name in ("tokens", "targets", "documents", "offsets", "scored"):
        np.testing.assert_array_equal(getattr(again, name), getattr(stream, name))
        assert getattr(again, name).dtype == getattr(stream, name).dtype
    assert again[cut:].start() == (stream.documents[cut], stream.offsets[cut]) if cut < len(stream) else True


@given(
    tokenizer=TOKENIZERS,
    texts=st.lists(st.text("abcdefgh", max_size=9), max_size=8),
    loss_on=st.sampled_from(["a", "a(.)", "b.*?c", "(d)|e", "h$", "a(b)?", "", "(?=g)", "[a-h]+"]),
)
def test_only_what_a_regular_expression_matches_is_scored(tokenizer, texts, loss_on):
    found = re.compile(loss_on)
    stream = TokenStream.encode(tokenizer, texts, 0, found)
    scored = []
    for text in texts:
        spans = [match.span(min(found.groups, 1)) for match in found.finditer(text)]
        letters = [any(start <= i < stop for start, stop in spans) for i in range(len(text))]
        starts = tokenizer.adds_bos or tokenizer.eos_id is not None
        ends = [any(start < stop == len(text) for start, stop in spans)] if tokenizer.eos_id is not None else []
        scored += [*letters, *ends][not starts :]
    assert stream.scored.tolist() == scored
    batch = pack_rows(stream, 5, flag_vowels)
    assert batch.loss_mask.ravel().tolist() == scored + [False] * (-len(scored) % 5)
    assert (batch.segment_ids > 0).sum() == len(scored)


def test_matches_are_found_among_bytes_and_control_tokens():
    tokenizer = recall_tokenizer()  # a token a byte
    text = "<|endoftext|>é: ß!<|endoftext|>"
    stream = TokenStream.encode(tokenizer, [f"x{text}"], 0, re.compile(r"é: (.+)"))
    kept = tokenizer.encode(f"x{text}")[:-1]  # the last one ends the document, once
    assert stream.targets.tolist() == [*kept, tokenizer.eos_id]
    assert stream.scored.tolist() == [False] * 6 + [True] * 3 + [True]  # x, end, two bytes, colon, space; ß of two, !
    with pytest.raises(DataError, match=r"found by their bytes, but those of text 1, '<a', are 1 for 2: this"):
        TokenStream.encode(Tokenizer(Letters(BOS, EOS, True)), ["a", "<a"], 0, re.compile("a"))


def test_the_drawing_of_the_docstring():
    tokenizer = Tokenizer(Letters(BOS, EOS, True))
    batch = pack_rows(TokenStream.encode(tokenizer, ["abc", "d", "efghi"]), 4, flag_vowels)
    a, b, c, d, e, f, g, h, i = tokenizer.encode("abcdefghi")
    assert batch.tokens.tolist() == [[BOS, a, b, c], [BOS, d, BOS, e], [f, g, h, i]]
    assert batch.targets.tolist() == [[a, b, c, EOS], [d, EOS, e, f], [g, h, i, EOS]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("bos", [None, BOS])
def test_a_text_without_a_pair_leaves_no_token(bos):
    stream = TokenStream.encode(Tokenizer(Letters(bos, None, bos is not None)), ["", "a", ""])
    assert len(stream) == (0 if bos is None else 1)
    assert (stream.start() is None) == (bos is None)
