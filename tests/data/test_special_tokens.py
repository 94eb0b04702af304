"""What the files beside a vocabulary say: names, ends of an answer, what divides documents, and what is refused."""

import io
import json
import os

import pytest
import sentencepiece

from sepjax.data.errors import DataError
from sepjax.data.packing import TokenStream
from sepjax.data.tokenizer import Tokenizer
from sepjax.separators import BYTE_OF_CHARACTER

BYTES = list(BYTE_OF_CHARACTER)
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
DECODER = {str(256 + i): {"content": name, "special": True} for i, name in enumerate(["<s>", "</s>", "<|end|>"])}


def write(folder, control=("<s>", "</s>"), *, bos=None, vocabulary=BYTES, **files):
    """A byte-level tokenizer: ids 256, 257, ... are `control`, `bos` goes before every text; files by their stem."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = [{"SpecialToken": {"id": name, "type_id": 0}} for name in bos or ()]
    post = {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {n: {"id": n, "ids": [256 + control.index(n)], "tokens": [n]} for n in bos or ()},
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 256 + i, "content": name} | plain for i, name in enumerate(control)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": post if bos else None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(vocabulary)}, "merges": []},
    }
    folder.mkdir(exist_ok=True)
    for name, content in {"tokenizer": tokenizer, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def spelt(tokenizer, ids):
    return [tokenizer._model.vocabulary.id_to_token(i) for i in ids]


@pytest.mark.parametrize(
    ("files", "bos", "eos", "ends"),
    [
        # EOS in one file, BOS in the other; where both name one, the map counts, as in transformers.
        ({"tokenizer_config": CLASS | {"eos_token": "</s>"}, "special_tokens_map": {"bos_token": "<s>"}}, 256, 257, []),
        (
            {"tokenizer_config": CLASS | {"eos_token": "<s>"}, "special_tokens_map": {"eos_token": "</s>"}},
            None, 257, [],
        ),
        # Unless the config lists its tokens, one of which the tokenizer.json lacks: then the map is not read.
        (
            {
                "tokenizer_config": CLASS | {"eos_token": "<|end|>", "added_tokens_decoder": DECODER},
                "special_tokens_map": {"eos_token": "</s>", "bos_token": {"content": "<s>"}},
            },
            None, 258, [],
        ),
        ({"tokenizer_config": CLASS | {"eos_token": "<e>"}, "added_tokens": {"<e>": 258}}, None, 258, []),
        # Ends of an answer: a number or a list, of both files.
        (
            {
                "tokenizer_config": CLASS | {"eos_token": "</s>"},
                "generation_config": {"eos_token_id": [3, 5]},
                "config": {"eos_token_id": 7},
            },
            None, 257, [3, 5, 7],
        ),
        # Names that nothing gives are those of the class: none of Llama's for bytes, as transformers has it. Without
        # a class the usual ones count.
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}}, None, None, []),
        ({"tokenizer_config": CLASS}, None, None, []),
        ({"tokenizer_config": {}}, 256, 257, []),
        ({"tokenizer_config": CLASS | {"bos_token": None, "eos_token": None}}, None, None, []),
        # GPT-2's own end stands in every such file, whatever the vocabulary.
        ({"config": {"model_type": "gpt2"}, "generation_config": {"eos_token_id": 50256}}, 256, 257, []),
    ],
)  # fmt: skip
def test_special_tokens_are_found_in_whatever_file_names_them(tmp_path, files, bos, eos, ends):
    tokenizer = Tokenizer.load(write(tmp_path, **files))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    assert tokenizer.end_ids == tuple(sorted({*ends, *([] if eos is None else [eos])}))
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert (saved.bos_id, saved.eos_id, saved.end_ids) == (bos, eos, tokenizer.end_ids)


def test_named_tokens_are_control_tokens_even_where_the_vocabulary_has_them_as_text(tmp_path):
    files = {"tokenizer_config": CLASS | {"eos_token": "</s>", "additional_special_tokens": ["<u>"]}}
    tokenizer = Tokenizer.load(write(tmp_path, (), vocabulary=[*BYTES, "</s>", "<u>"], **files))
    assert tokenizer.encode("a</s><u>") == [*tokenizer.encode("a"), 256, 257]
    assert tokenizer.decode([256, 257]) == ""


def test_of_a_token_with_several_names_the_last_flags_count(tmp_path):
    one, other = ({"content": "</s>", "single_word": flag} for flag in (True, False))
    for number, (bos, pad, found) in enumerate([(one, other, True), (other, one, False)]):
        files = {"tokenizer_config": CLASS | {"pad_token": pad, "bos_token": bos}}
        tokenizer = Tokenizer.load(write(tmp_path / str(number), (), vocabulary=[*BYTES, "</s>"], **files))
        assert (256 in tokenizer.encode("a</s>a")) == found


def test_flags_of_a_tokenizer_json_count_over_added_tokens_json_and_own_names_of_the_config_over_the_map(tmp_path):
    config = CLASS | {"image_token": "<s>", "a_token": {"content": "<a>"}}
    files = {"tokenizer_config": config, "special_tokens_map": {"image_token": "</s>"}}
    tokenizer = Tokenizer.load(write(tmp_path, added_tokens={"<s>": 256, "</s>": 257}, **files))
    assert tokenizer.control_tokens() == ["<s>", "</s>"]  # not special in the older file; "a_token" has no type
    assert tokenizer.special.names["image_token"] == "<s>"


def test_tokens_that_the_vocabulary_lacks_get_the_next_ids(tmp_path):
    single = {"content": "<u>", "single_word": True, "__type": "AddedToken"}
    config = CLASS | {"pad_token": "<pad>", "unk_token": "<?>", "additional_special_tokens": [single]}
    config |= {"extra_special_tokens": {"audio_token": "<a>", "picture": "</s>"}}
    ignored = {"additional_special_tokens": ["<m>"]}  # the map's list counts in place of the config's, named ones not
    for files, added in (
        ({"tokenizer_config": config}, "<?> <pad> <a> <u>"),
        ({"tokenizer_config": config, "special_tokens_map": ignored}, "<?> <pad> <a> <m>"),
    ):
        tokenizer = Tokenizer.load(write(tmp_path / added[-2], **files))
        tokenizer.save(tmp_path / "saved" / added[-2])
        for again in (tokenizer, Tokenizer.load(tmp_path / "saved" / added[-2])):
            assert [again.control_id(name) for name in added.split()] == [258, 259, 260, 261]
            assert again.special.names["audio_token"] == "<a>"
            assert again.special.names["picture"] == "</s>"
        assert tokenizer.encode("x<u>x") == [*tokenizer.encode("x"), *tokenizer.encode("<u"), *tokenizer.encode(">x")]


SMOL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")


def test_bos_is_put_where_the_tokenizer_puts_it_and_never_twice(tmp_path):
    named = {"tokenizer_config": CLASS | {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}}
    chat = Tokenizer.load(write(tmp_path / "smol", SMOL, **named))
    assert (chat.adds_bos, chat.bos_id) == (False, 257)
    assert chat.encode("a", bos=True) == chat.encode("a")
    named = {"tokenizer_config": CLASS | {"bos_token": LLAMA3[0], "eos_token": "<|eot_id|>"}}
    llama = Tokenizer.load(write(tmp_path / "llama", LLAMA3, bos=LLAMA3[:1], **named))
    assert llama.encode("a", bos=True) == [256, *llama.encode("a")]
    assert llama.encode("<|begin_of_text|>a", bos=True) == [256, *llama.encode("a")]
    unnamed = Tokenizer.load(write(tmp_path / "null", bos=["<s>"], tokenizer_config=CLASS | {"bos_token": None}))
    assert (unnamed.adds_bos, unnamed.bos_id) == (True, 256)  # it is what stands in front that counts
    assert unnamed.special.names["bos_token"] is None  # to a template it has no name


def test_documents_are_divided_as_in_the_models_own_training(tmp_path):
    named = {"tokenizer_config": CLASS | {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}}
    chat = Tokenizer.load(write(tmp_path / "smol", SMOL, **named))
    end = "<|endoftext|>"
    stream = TokenStream.encode(chat, ["ab", f"{end}c{end}", ""])
    assert spelt(chat, stream.tokens) == [end, "a", "b", end, "c", end]
    assert spelt(chat, stream.targets) == ["a", "b", end, "c", end, end]
    named = {"tokenizer_config": CLASS | {"bos_token": LLAMA3[0], "eos_token": "<|eot_id|>"}}
    llama = Tokenizer.load(write(tmp_path / "llama", LLAMA3, bos=LLAMA3[:1], **named))
    stream = TokenStream.encode(llama, ["ab", "<|begin_of_text|>c"])
    assert spelt(llama, stream.tokens) == [LLAMA3[0], "a", "b", LLAMA3[0], "c"]
    assert spelt(llama, stream.targets) == ["a", "b", LLAMA3[1], "c", LLAMA3[1]]


def test_control_tokens_in_a_users_text_can_be_text(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, SMOL))
    assert tokenizer.encode("a<|im_end|>b") == [*tokenizer.encode("a"), 258, *tokenizer.encode("b")]
    ids = tokenizer.encode("a<|im_end|>b", control_tokens=False)
    assert tokenizer.decode(ids) == "a<|im_end|>b"
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("\ud800", control_tokens=False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<s"}}, r"eos_token is '<s', .* lacks; did you mean '<s>'"),
        ({"special_tokens_map": {"bos_token": "<b>"}}, "bos_token is '<b>', which the vocabulary"),
        ({"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens=True: .* remove it"),
        ({"tokenizer_config": {"eos_token": 3}}, "eos_token is 3, expected a token's text"),
        ({"tokenizer_config": {"added_tokens_decoder": {"300": {"content": "<x>"}}}}, "'<x>' should have the id 300"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"a": {"content": "<x>"}}}},
            "expected an id with a token's text",
        ),
        ({"tokenizer_config": {"additional_special_tokens": 3}}, "expected a list of tokens"),
        ({"generation_config": {"eos_token_id": [2, 2**32]}}, r"generation_config.json has .*=4294967296, .* lacks"),
        ({"config": {"eos_token_id": -1}}, r"config.json has the end token eos_token_id=-1"),
        ({"config": {"eos_token_id": "</s>"}}, "expected a token id or a list of them"),
        ({"config": [1]}, "config.json holds a list, expected a JSON object"),
        ({"vocabulary": [*BYTES], "tokenizer": {}}, "cannot read tokenizer"),
        ({"bos": ["<s>", "</s>"]}, r"puts the tokens \[256, 257\] before every text; one"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, files, message):
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(write(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_hostile_files_are_refused_at_once(tmp_path):
    folder = write(tmp_path / "large")
    text = (folder / "tokenizer.json").read_text().replace(": 255}", f": {2**32 - 1}}}")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="have ids up to 4294967295"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text(text.replace(str(2**32 - 1), str(2**32)))
    with pytest.raises(DataError, match="cannot read tokenizer"):
        Tokenizer.load(folder)
    for name in ("tokenizer.json", "generation_config.json"):
        for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
            folder = write(tmp_path / f"{name}{len(os.listdir(tmp_path))}")
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            with pytest.raises(DataError, match=rf"{name} is a pipe, a device or a folder"):
                Tokenizer.load(folder)


def test_a_sentencepiece_model_is_read_with_the_files_beside_it(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat, a mat. " * 9]), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, control_symbols=["<|end|>"], minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    plain = Tokenizer.load(tmp_path)
    assert (plain.bos_id, plain.eos_id, plain.adds_bos) == (1, 2, True)
    config = {"bos_token": "<s>", "eos_token": "<|end|>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "temperature": 0.5}))
    for folder in (tmp_path, tmp_path / "saved"):
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.eos_id == tokenizer.control_id("<|end|>")
        assert (tokenizer.adds_bos, tokenizer.end_ids) == (False, (2, tokenizer.eos_id))
        assert (tokenizer.document_start, tokenizer.document_end) == (2, 2)  # </s>, not the end of a turn
        assert tokenizer.special.sampling == {"temperature": 0.5}
        tokenizer.save(tmp_path / "saved")
    config = {"added_tokens_decoder": {"900": {"content": "<new>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="'<new>' of id 900 is not in the SentencePiece model"):
        Tokenizer.load(tmp_path)
