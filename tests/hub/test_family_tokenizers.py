"""Small tokenizers built as the families build theirs: ids, BOS, ends of an answer and chat templates.

Texts and ids are what transformers 5.24 gives for the same files; with torch there, it is asked again.
"""

import collections
import importlib.util
import json
import os
import sys

import pytest

from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.chat_template import ChatTemplate
from sepjax.separators import BYTE_OF_CHARACTER
from tests.hub.test_tokenizers_against_transformers import Reference, chat_differences, differences

pytest.importorskip("jinja2")

TORCH = sys.executable if importlib.util.find_spec("torch") else os.environ.get("SEPJAX_TORCH_PYTHON")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TURNS = (  # a turn between two control tokens, as {0} role {1} content {2}
    "{{%- for m in messages -%}}{{{{ '{0}' + {3} + '{1}' + m.content + '{2}' }}}}{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{ '{0}{4}{1}' }}}}{{%- endif -%}}"
)
CHATML = TURNS.format("<|im_start|>", "\\n", "<|im_end|>\\n", "m.role", "assistant")
# A Qwen3 thinks unless it is told not to; an empty thought is put in front of the answer then.
QWEN3 = CHATML + (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
)
GEMMA = "{{ bos_token }}" + TURNS.format(
    "<start_of_turn>", "\\n", "<end_of_turn>\\n", "('model' if m.role == 'assistant' else m.role)", "model"
)
PHI = TURNS.format("<|", "|>\\n", "<|end|>\\n", "m.role", "assistant")
GRANITE = TURNS.format("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\\n", "m.role", "assistant")
CHAT = [{"role": "user", "content": "the 12 things"}, {"role": "assistant", "content": "in"}]
CHAT += [{"role": "user", "content": "then?"}]


def byte_level(added, merges=(["t", "h"], ["th", "e"], ["i", "n"], ["Ġ", "the"], ["1", "2"])):
    words = [*BYTE_OF_CHARACTER, *("".join(pair) for pair in merges)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {"type": "BPE", "vocab": {x: i for i, x in enumerate(words)}, "merges": [*merges]},
    }, [(len(words) + i, content) for i, content in enumerate(added)]


def pieces(added, prefix, merges=(["t", "h"], ["th", "e"], ["i", "n"], ["▁", "the"])):
    words = [*added, *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    words += ["".join(pair) for pair in merges]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {"type": "BPE", "vocab": {x: i for i, x in enumerate(words)}, "merges": [*merges], "unk_token": "<unk>"}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*back, *strip]},
        "model": model | {"fuse_unk": True, "byte_fallback": True},
    }, list(enumerate(added))


def bos_first(bos, i):
    one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*one, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [i], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": one, "pair": pair, "special_tokens": special}


def beyond(parts, content):
    """A control token behind the vocabulary, for which a model may have no embedding."""
    (construction, added) = parts
    return construction, [*added, (len(construction["model"]["vocab"]), content)]


IMAGE = "<image_soft_token>"
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FAMILIES = {  # name -> (construction, template, tokenizer_config, ends in generation_config.json, BOS in front)
    "qwen3": (byte_level(QWEN), QWEN3, {"eos_token": QWEN[2], "bos_token": None}, [QWEN[2], QWEN[0]], None),
    "smollm3": (byte_level(QWEN), CHATML, {"eos_token": QWEN[2]}, [QWEN[2]], None),
    "olmo": (byte_level(["<|endoftext|>"]), PHI, {"eos_token": "<|endoftext|>"}, ["<|endoftext|>"], None),
    "granite": (
        byte_level(["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"]),
        GRANITE,
        {"eos_token": "<|end_of_text|>", "bos_token": "<|end_of_text|>"},
        ["<|end_of_text|>"],
        None,
    ),
    "gemma3": (
        beyond(pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], False), IMAGE),
        GEMMA,
        {"eos_token": "<eos>", "bos_token": "<bos>", "extra_special_tokens": {"image_token": IMAGE}},
        ["<eos>", "<end_of_turn>"],
        "<bos>",
    ),
    "phi3": (
        pieces(["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], True),
        PHI,
        {"eos_token": "<|endoftext|>", "bos_token": "<s>"},
        ["<|endoftext|>", "<|end|>"],
        None,
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    (parts, added), template, config, ends, bos = FAMILIES[request.param]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {content: i for i, content in added}
    file = {"version": "1.0", "truncation": None, "padding": None, **parts}
    file["added_tokens"] = [{"id": i, "content": content, **plain} for i, content in added]
    file["post_processor"] = bos_first(bos, ids[bos]) if bos else None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **config}
    files = {"tokenizer.json": file, "tokenizer_config.json": config}
    files["generation_config.json"] = {"eos_token_id": [ids[end] for end in ends]}
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    return tmp_path, ids, ends, bos


def test_a_tokenizer_of_the_familys_construction_is_read_as_it_is_meant(family):
    folder, ids, ends, bos = family
    tokenizer = Tokenizer.load(folder)
    assert set(tokenizer.end_ids) == {ids[end] for end in ends}
    assert tokenizer.prefix == ([ids[bos]] if bos else [])
    for text in ("the things", "  then\n\n12", "é 😀", "in"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    template = ChatTemplate.of(tokenizer)
    written = template.render(CHAT)
    assert written.count("the 12 things") == 1
    assert written.startswith(bos or "<|")
    encoded = template.encode(tokenizer, CHAT)
    assert bos is None or encoded[0] == ids[bos]
    assert sum(i in ids.values() for i in encoded) == sum(written.count(name) for name in ids)
    as_text = template.encode(tokenizer, [CHAT[0] | {"content": ends[-1]}], control_tokens=False)
    assert sum(i == ids[ends[-1]] for i in as_text) == template.render(CHAT[:1]).count(ends[-1])


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_a_control_token_without_an_embedding_is_text(family, tmp_path):
    folder, ids, ends, _ = family
    whole = Tokenizer.load(folder)
    size = ids[IMAGE]
    assert whole.encode(f"a{IMAGE}") == [*whole.encode("a"), size]
    fits = Tokenizer.load(folder).within(size)
    fits.save(tmp_path / "saved")
    for tokenizer in (fits, Tokenizer.load(tmp_path / "saved")):
        assert (tokenizer.vocab_size, tokenizer.prefix) == (size, whole.prefix)
        assert tokenizer.end_ids == whole.end_ids == tuple(sorted(ids[end] for end in ends))
        assert tokenizer.encode(f"the {IMAGE}") == whole.encode(f"the {IMAGE}", control_tokens=False)
        assert tokenizer.decode(tokenizer.encode(f"the {IMAGE}")) == f"the {IMAGE}"
    assert whole.within(size + 1) is whole
    for too_small in (size - 1, ids["<end_of_turn>"]):  # an ordinary token, an end of an answer
        assert whole.within(too_small) is whole


@pytest.fixture(scope="module")
def reference():
    found = Reference()
    yield found
    found.process.communicate()


@pytest.mark.skipif(TORCH is None, reason="needs torch and transformers here, or SEPJAX_TORCH_PYTHON")
def test_transformers_writes_and_splits_alike(family, reference):
    folder, *_ = family
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": None}))
    tokenizer, texts = Tokenizer.load(folder), ["the things", "  then\n\n12", "é 😀 e\u0301", "in"]
    theirs = reference.ask(folder=str(folder), texts=texts, conversations=[[CHAT, True], [CHAT[:1], False]])
    assert not differences(tokenizer, theirs, texts)
    for messages, prompt, found in ((CHAT, True, theirs["chats"][0]), (CHAT[:1], False, theirs["chats"][1])):
        assert not chat_differences(tokenizer, messages, prompt, found, collections.Counter())
