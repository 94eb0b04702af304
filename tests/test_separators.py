"""Separator tables from tiny vocabularies trained here: SentencePiece, and byte-level BPE as Hugging Face saves it."""

import io
import time
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers

from sepjax.config import AttentionConfig
from sepjax.separators import (
    PAPER_SEPARATORS,
    configured_table,
    flag_separators,
    separator_table,
    terminals,
    token_texts,
    warn_of_few,
    warn_of_few_among,
)

TEXT = (
    'He said: "Stop!" She asked, "Why?" Then both left; it was late.\n\n'
    '"Come in," said the man. "It is cold." (They came in.) So they sat... and ate, \tand slept.\n\n'
    "1.5 and 2,5 are numbers: x = [3, 4]; y = {a: b}!\n"
)


@pytest.fixture(scope="session")
def sentence_pieces():
    """A SentencePiece model with byte fallback, control tokens and one of its own merged separators."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", "\n\n", '."'],
        control_symbols=["<mask>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="session")
def byte_level():
    """A byte-level BPE with special tokens, one of which looks like a separator, and plain added tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", ".."],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT + "\n"] * 20, trainer)
    tokenizer.add_tokens(["    ", "word"])
    return tokenizer


def texts_of(table, tokenizer):
    return {text for text, flag in zip(token_texts(tokenizer), table, strict=True) if flag}


@pytest.mark.parametrize("vocabulary", ["sentence_pieces", "byte_level"])
def test_paper_policy_finds_the_nine_and_nothing_else(vocabulary, request):
    tokenizer = request.getfixturevalue(vocabulary)
    found = texts_of(separator_table(tokenizer, "paper"), tokenizer)
    assert found == set(PAPER_SEPARATORS)


@pytest.mark.parametrize("vocabulary", ["sentence_pieces", "byte_level"])
def test_punctuation_policy_finds_merged_tokens_too(vocabulary, request):
    tokenizer = request.getfixturevalue(vocabulary)
    paper, punctuation = (separator_table(tokenizer, policy) for policy in ("paper", "punctuation"))
    merged = texts_of(punctuation & ~paper, tokenizer)
    assert {'."', "\n\n"} <= merged
    assert (punctuation | ~paper).all(), "every separator of the paper is punctuation"
    assert not any(c.isalnum() for text in merged for c in text)


def test_a_space_is_a_separator_and_a_quotation_mark_is_not(byte_level):
    found = texts_of(separator_table(byte_level), byte_level)
    assert ' "' in token_texts(byte_level)
    assert ' "' not in found
    assert " " in found


@pytest.mark.parametrize("vocabulary", ["sentence_pieces", "byte_level"])
@pytest.mark.parametrize("policy", ["paper", "punctuation"])
def test_control_tokens_are_never_separators(vocabulary, policy, request):
    tokenizer = request.getfixturevalue(vocabulary)
    table = separator_table(tokenizer, policy)
    if vocabulary == "sentence_pieces":
        control = [tokenizer.piece_to_id(piece) for piece in ("<unk>", "<s>", "</s>", "<mask>")]
    else:
        control = [tokenizer.token_to_id(piece) for piece in ("<|endoftext|>", "..")]
    assert not table[control].any()
    assert all(token_texts(tokenizer)[i] is None for i in control)


def test_byte_tokens_are_read_as_the_characters_they_are(sentence_pieces):
    table = separator_table(sentence_pieces, "paper")
    assert table[sentence_pieces.piece_to_id("<0x2E>")]  # full stop
    assert table[sentence_pieces.piece_to_id("<0x0A>")]  # newline
    assert not table[sentence_pieces.piece_to_id("<0x41>")]  # A


def test_added_tokens_that_are_not_special_are_text(byte_level):
    assert separator_table(byte_level)[byte_level.token_to_id("    ")]
    assert not separator_table(byte_level)[byte_level.token_to_id("word")]


def test_texts_are_what_the_tokenizer_decodes(byte_level):
    for i, text in enumerate(token_texts(byte_level)):
        if text is not None:
            assert byte_level.decode([i]) == text


def test_an_entry_named_like_the_byte_level_decoder_does_not_make_one():
    vocabulary = {"▁ByteLevel": 0, "ByteLevel": 1, "▁.": 2, "Ġ": 3, "<unk>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    assert token_texts(tokenizer) == [" ByteLevel", "ByteLevel", " .", "Ġ", "<unk>"]
    assert separator_table(tokenizer).tolist() == [False, False, True, False, False]


def test_explicit_ids(byte_level):
    size = byte_level.get_vocab_size()
    table = separator_table(byte_level, [3, size - 1])
    assert np.flatnonzero(table).tolist() == [3, size - 1]
    assert table.shape == (size,)
    assert not separator_table(byte_level, []).any()


@pytest.mark.parametrize("wrong", [-1, 100_000])
def test_ids_outside_the_vocabulary_are_refused(byte_level, wrong):
    with pytest.raises(ValueError, match=rf"\[{wrong}\] are outside the vocabulary of \d+ tokens"):
        separator_table(byte_level, [3, wrong])


def test_unknown_policy_and_unknown_tokenizer(byte_level):
    with pytest.raises(ValueError, match="unknown separator policy 'comma'"):
        separator_table(byte_level, "comma")
    with pytest.raises(ValueError, match="cannot read the vocabulary of a dict"):
        separator_table({}, "paper")


class Texts:
    """A vocabulary of given texts, as `sepjax.data.tokenizer.Tokenizer` shows it."""

    def __init__(self, *texts):
        self.texts = list(texts)

    def token_texts(self):
        return self.texts


ENGLISH = (".", ' ."', "\n\n", "\r\n", "...", "?!", ".)", ".).", ',"', "::", " \t", "!’", "_,", ".--", " '.", "\u3000")
CLOSED_FIRST = ("),", ").", ");", '",', '":', "”.", '".', "»,", '."[', "],", " },")
JSON = ('","', '":"', '":{"', '":["', '"],"', "},{", '.\\"', ".\\")
PYTHON = ("):", "',", "._", ".__", "().", "')):", "[:")
SCRIPTS = (*"。，、；：？！।؟،؛۔።։．｡､﹐", "。」", "」、", "）。", "？”", "؟»", "。\u3000")
OTHERS = (
    "",
    None,
    '"',
    ")",
    "a.",
    ".a",
    "-",
    "1.",
    "'",
    "…",
    "!=",
    ":=",
    "://",
    "。a",
    "あ",
    "「",
    "()",
    "_",
    "\ufffd",
)


@pytest.mark.parametrize("text", [*ENGLISH, *CLOSED_FIRST, *JSON, *PYTHON, *SCRIPTS, *OTHERS])
def test_what_punctuation_is(text):
    assert separator_table(Texts(text)).tolist() == [text not in OTHERS]


def test_terminals_are_those_of_unicode():
    pattern = tokenizers.Regex(r"[\p{Terminal_Punctuation}\p{Sentence_Terminal}]")
    known = [chr(i) for i in range(0x20000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    split = tokenizers.pre_tokenizers.Split(pattern, "isolated").pre_tokenize_str("a".join(known))
    expected = {piece for piece, _ in split if len(piece) == 1} - {"a"}
    assert terminals() & set(known) == expected
    assert len(expected) > 250


@pytest.mark.parametrize("vocabulary", ["sentence_pieces", "byte_level"])
def test_marks_in_pieces_of_a_character_are_flagged(vocabulary, request):
    """Neither vocabulary has a token for any of them; few other characters end in a piece that is flagged."""
    tokenizer = request.getfixturevalue(vocabulary)
    table = separator_table(tokenizer)

    def flagged(text):
        encoded = tokenizer.encode(text)
        return int(table[getattr(encoded, "ids", encoded)].sum())

    before = flagged("a")
    assert all(flagged("a" + mark) > before for mark in "。、।،؛؟۔！，．：；？")
    others = [chr(c) for c in range(0x4E00, 0x5000)]
    assert sum(flagged("a" + c) > before for c in others) < len(others) / 8


def test_a_mark_with_a_token_of_its_own_lends_no_piece_its_meaning(byte_level):
    tail = byte_level.token_to_id("Ĥ")  # byte 82, the last of E3 80 82: 。
    assert separator_table(byte_level)[tail]
    byte_level = tokenizers.Tokenizer.from_str(byte_level.to_str())
    byte_level.add_tokens(["。"])
    table = separator_table(byte_level)
    assert not table[tail]
    assert table[byte_level.token_to_id("。")]


def test_a_text_of_hardly_any_separators_is_named_once(capsys):
    for share, tokens, what in [
        (1 / 201, 201, "a poem"),
        (0.0, 400, "a poem"),
        (0.005, 200, "rich"),
        (0.0, 199, "short"),
    ]:
        warn_of_few(share, tokens, what)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: a poem: 0.50% of 201 tokens are separators, fewer than 1 in 200")


def test_prompts_of_hardly_any_separators_are_told_in_one_line(capsys):
    table, poor = np.arange(8) == 7, [1] * 300
    prompts = [poor, [1, 7] * 150, poor[:199], [7, *poor[:200]]]
    for attention, few in (
        (AttentionConfig("dense"), prompts),
        (AttentionConfig(), prompts),
        (AttentionConfig(), [poor]),
    ):
        warn_of_few_among(few, table, attention)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 2 of 4 prompts: 0.20% of 501 tokens are separators, fewer than 1 in 200")


def test_long_runs_take_linear_time():
    start = time.perf_counter()
    assert not separator_table(Texts("." * 10_000 + "x")).any()
    assert time.perf_counter() - start < 5, "a backtracking pattern would take for ever"


def test_configured_table_follows_the_pattern(byte_level):
    stop = byte_level.token_to_id(".")
    assert configured_table(byte_level, AttentionConfig(separators="paper")).sum() == len(PAPER_SEPARATORS)
    by_ids = configured_table(byte_level, AttentionConfig(separators="ids", separator_ids=(stop,)))
    assert np.flatnonzero(by_ids).tolist() == [stop]
    for pattern in ("dense", "sink_window", "fixed_interval"):
        assert not configured_table(byte_level, AttentionConfig(pattern=pattern)).any()


TABLE = np.array([False, True, False, True])
TOKENS = np.array([[1, 0, 3, 2], [4, 1000, -1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3], [0, 1, 0, 1]], np.int32)
FLAGS = {
    "separator": [[1, 0, 1, 0], [0, 0, 0, 1]],  # 4, 1000 and -1 are outside the table
    "dense": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "sink_window": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "fixed_interval": [[0, 1, 0, 1], [0, 1, 0, 1]],  # every second token of each document
}


@pytest.mark.parametrize("pattern", FLAGS)
def test_flags_on_the_host_and_inside_jit(pattern):
    attention = AttentionConfig(pattern=pattern, interval=2)
    flags = flag_separators(TOKENS, POSITIONS, TABLE, attention)
    assert flags.dtype == bool
    np.testing.assert_array_equal(flags, np.array(FLAGS[pattern], bool))
    for table in (TABLE, jnp.asarray(TABLE)):
        traced = jax.jit(lambda t, p, table=table: flag_separators(t, p, table, attention))(TOKENS, POSITIONS)
        np.testing.assert_array_equal(traced, flags)
