"""Tokenizers: what goes in comes out, one token at a time too, and files that are damaged say so."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from sepjax.data.errors import DataError
from sepjax.data.tokenizer import IncrementalDecoder, Tokenizer, train_sentencepiece
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.separators import separator_table

TEXT = "Rain fell, and the 12 cats ran home. Did 3 dogs?\n\n\tThey did not!\n" * 20


def byte_level() -> Tokenizer:
    """Byte-level BPE as GPT-2 has it, with a special token and an added one that is not special."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    model.train_from_iterator([TEXT], trainer)
    model.add_tokens(["    "])
    model.enable_truncation(5)  # files come with it; a tokenizer of whole documents must not obey
    return Tokenizer(HuggingFaceModel(model.to_str()))


def metaspace() -> Tokenizer:
    """Llama 2's kind: a space before every text, bytes for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    model.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    d = tokenizers.decoders
    model.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(HuggingFaceModel(model.to_str()))


@pytest.fixture(scope="module")
def kinds(tokenizer) -> dict[str, Tokenizer]:
    return {"sentencepiece": tokenizer, "byte_level": byte_level(), "metaspace": metaspace()}


KINDS = ("sentencepiece", "byte_level", "metaspace")


@given(text=st.text(max_size=60))
@example("▁ the ▁▁cat▁")  # SentencePiece's own sign for a space
@example("<s></s><unk><0x0A>\0")
@example("  two  spaces \r\n\n\n\t at e\u0301\ufeff nds  ")
@example("")
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(exclude_characters="▁"), max_size=40))
def test_imported_vocabularies_bring_text_back(kinds, text):
    assert kinds["byte_level"].decode(kinds["byte_level"].encode(text)) == text
    assert kinds["metaspace"].decode(kinds["metaspace"].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_incremental_decoding_is_decoding(kinds, kind, data):
    """Over any ids, valid UTF-8 or not; and what has come out is never taken back."""
    tokenizer = kinds[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    continues = data.draw(st.booleans())
    decoder = IncrementalDecoder(tokenizer, continues=continues)
    assert "".join([*map(decoder.feed, ids), decoder.flush()]) == tokenizer.decode(ids, continues=continues)
    assert decoder.flush() == ""


@given(text=st.text(max_size=20))
def test_streamed_text_is_whole_characters(tokenizer, text):
    decoder = IncrementalDecoder(tokenizer)
    seen = ""
    for i in tokenizer.encode(text):
        seen += decoder.feed(i)
        assert text.startswith(seen)
    assert seen == text
    assert decoder.flush() == ""


def test_decoding_agrees_with_the_tokenizers_library(kinds):
    """On any ids of a byte-level vocabulary; on the others where the bytes are text, broken bytes being told apart."""
    rng, tokenizer = random.Random(0), kinds["byte_level"]
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(8)]
        assert tokenizer.decode(ids) == tokenizer._model.vocabulary.decode(ids, skip_special_tokens=True)
    tokenizer = kinds["metaspace"]
    for text in ("a b", " a  é\n漢字 b", "ab\0😀 ", ""):
        ids = tokenizer.encode(text, bos=True)
        assert tokenizer.decode(ids) == tokenizer._model.vocabulary.decode(ids, skip_special_tokens=True) == text


def test_a_continuation_keeps_its_space(kinds):
    ids = kinds["metaspace"].encode("a b")
    assert kinds["metaspace"].decode(ids) == "a b"
    assert kinds["metaspace"].decode(ids[-1:], continues=True) == " b"
    assert kinds["metaspace"].decode(ids[-1:]) == "b"


@given(lines=st.lists(st.text("ab .\n▁", max_size=300), max_size=12))
def test_cutting_long_texts_does_not_change_their_ids(tokenizer, lines):
    text = "\n".join(lines)
    if "▁" in text:  # which the library cannot tell from a space
        assert tokenizer.decode(tokenizer.encode(text)) == text
    else:
        assert tokenizer.encode(text) == tokenizer._model.vocabulary.encode(text)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.text(max_size=20), max_size=5))
def test_many_texts_encode_as_each_alone(kinds, kind, texts):
    tokenizer = kinds[kind]
    ids, lengths = tokenizer.encode_flat(texts)
    assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text)]
    assert lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    numbered = tokenizer.encode_each(enumerate(texts), text=lambda item: item[1])
    assert [(item, ids.tolist()) for item, ids in numbered] == [(x, tokenizer.encode(x[1])) for x in enumerate(texts)]


def test_texts_are_read_no_further_than_twice_what_was_asked_for(kinds, monkeypatch):
    """A folder of books is not tokenised for a few of its tokens; and no more at a time than memory is meant for."""
    tokenizer, read, at_once = kinds[KINDS[0]], [], []
    encode = tokenizer.encode_flat
    monkeypatch.setattr(tokenizer, "encode_flat", lambda texts: at_once.append(len(texts)) or encode(texts))
    monkeypatch.setattr("sepjax.data.tokenizer._AT_ONCE", 40)
    each = tokenizer.encode_each(read.append(i) or "ten chars." for i in range(12))
    for taken in (1, 2, 4, 8):
        while len(at_once) == 0 or sum(at_once) < taken:
            next(each)
        assert len(read) == taken
    assert len(list(each)) + 8 >= 12
    assert at_once == [1, 1, 2, 4, 4]


def test_an_imported_sentencepiece_model_encodes_as_its_library(tmp_path):
    """One that puts a space before every text must see each text whole, the sign for a space included."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=330, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "llama.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer.load(tmp_path / "llama.model")
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokenizer.starts_with_space
    for text in ("Rain fell, and the cats ran home.", "the▁cats ran\nhome " * 200):
        ids = tokenizer.encode(text)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids)


def test_bos_comes_first_when_asked_for(tokenizer):
    assert tokenizer.encode("cat", bos=True) == [tokenizer.bos_id, *tokenizer.encode("cat")]
    assert tokenizer.decode(tokenizer.encode("cat", bos=True)) == "cat"


def test_a_trained_vocabulary_keeps_separators_apart(tokenizer):
    texts = tokenizer.token_texts()
    assert texts[tokenizer.bos_id] is None
    assert texts[tokenizer.eos_id] is None
    for text in filter(None, texts):
        assert not any(c in text for c in ".,?!;:") or not any(c.isalpha() for c in text)
        assert text in ("\n", "\t") or not ("\n" in text or "\t" in text)
        assert sum(c.isdigit() for c in text) <= 1
    flagged = separator_table(tokenizer)
    for character in ".,?!;:\n\t ":
        assert flagged[tokenizer.encode(character)].all()


def test_training_twice_gives_the_same_model(corpus, tokenizer):
    again = train_sentencepiece([file.read_text() for file in sorted(corpus.iterdir())], 400)
    assert again._model.files() == tokenizer._model.files()


def test_a_short_text_gives_a_smaller_vocabulary():
    small = train_sentencepiece(["a cat, a mat."], 4000)
    assert small.vocab_size < 400
    assert small.decode(small.encode("a cat, a dog!")) == "a cat, a dog!"


def test_lines_of_any_length_are_trained_on():
    long = train_sentencepiece(["abcdefgh" * 20_000], 300)
    assert len(long.encode("abcdefgh")) == 1


def test_training_says_what_is_missing():
    with pytest.raises(DataError, match="every document is empty"):
        train_sentencepiece(["", "\n"], 400)
    with pytest.raises(DataError, match=r"a tokenizer of 100 tokens .* raise data.tokenizer_vocab_size to 2\d\d"):
        train_sentencepiece(["some text"], 100)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same(kinds, kind, tmp_path):
    tokenizer = kinds[kind]
    tokenizer.save(tmp_path / "new" / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "new" / "tokenizer")
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert loaded.token_texts() == tokenizer.token_texts()
    assert not list((tmp_path / "new" / "tokenizer").glob("*.partial"))
    file = next(p for p in (tmp_path / "new" / "tokenizer").iterdir() if p.name.startswith("tokenizer."))
    assert Tokenizer.load(file).encode(TEXT) == tokenizer.encode(TEXT)


def test_a_folder_of_hugging_face_names_its_special_tokens(kinds, tmp_path):
    kinds["byte_level"].save(tmp_path)
    assert Tokenizer.load(tmp_path).bos_id == 0
    named = {"bos_token": {"content": "!"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == loaded.encode("!")[0]
    assert loaded.eos_id is None


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.model"):
        Tokenizer.load(tmp_path / "nothing.model")


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"\x00not a model", b"text", b'{"model": {"type": "BPE"}}'])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, content):
    (tmp_path / "odd.model").write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.model.*expected a SentencePiece model or a Hugging Face"):
        Tokenizer.load(tmp_path / "odd.model")


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_refused(tokenizer, share, tmp_path_factory):
    """Wherever the cut falls: between two pieces what is left would be a model too."""
    (content,) = tokenizer._model.files().values()
    file = tmp_path_factory.mktemp("cut") / "tokenizer.model"
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        Tokenizer.load(file)


def test_a_vocabulary_of_word_pieces_is_refused(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    model.decoder = tokenizers.decoders.WordPiece()
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="WordPiece"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_no_text(kinds, kind):
    with pytest.raises(DataError, match="text 1 holds half of a surrogate pair"):
        kinds[kind].encode_batch(["fine", "not \ud800"])


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {i} is outside the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([i])


def test_control_tokens_are_found_by_name():
    for tokenizer, control in ((byte_level(), "<|endoftext|>"), (train_sentencepiece([TEXT], 300), "<s>")):
        i = tokenizer.control_id(control)
        assert i is not None
        assert tokenizer.token_bytes(i) == b""
        assert tokenizer.control_id("<|no such token|>") is None
        assert tokenizer.control_id("a") is None  # a token, but no control token


def test_a_decoder_goes_on_where_its_state_was_taken():
    tokenizer = byte_level()
    ids = tokenizer.encode("é€🙂 end")
    for cut in range(len(ids) + 1):
        first, second = IncrementalDecoder(tokenizer), IncrementalDecoder(tokenizer, continues=True)
        text = "".join(map(first.feed, ids[:cut]))
        second.restore(json.loads(json.dumps(first.state())))
        assert text + "".join(map(second.feed, ids[cut:])) + second.flush() == "é€🙂 end"
