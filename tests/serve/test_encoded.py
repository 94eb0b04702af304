"""Conversations whose beginnings are not encoded again have the ids that the whole has."""

import json
import random

from sepjax.data.tokenizer import Tokenizer
from sepjax.data.tokenizer_models import HuggingFaceModel
from sepjax.hub.chat_template import CLOSE, OPEN, encode_marked, marked
from sepjax.serve import encoded
from sepjax.serve.encoded import EncodedTexts
from tests.hub import made_up

MARKS = [OPEN, CLOSE, f"{OPEN}a<|im_end|>b{CLOSE}"]  # what a template may have made of marked texts


def tokenizer_of(rng, more=()):
    """`more`: names of control tokens of its own."""
    file = made_up.folder_of(rng, "")["tokenizer.json"]
    size = 1 + max([*file["model"]["vocab"].values(), *(token["id"] for token in file["added_tokens"])])
    plain = {"special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    file["added_tokens"] += [{"id": size + n, "content": name, **plain} for n, name in enumerate(more)]
    return Tokenizer(HuggingFaceModel(json.dumps(file)))


def spoken(rng, tokenizer):
    """A part of a rendered conversation: the template's own names, and a user's, which are text."""
    its_own, users = made_up.text(rng, most=5, names=0.6), marked(tokenizer, made_up.text(rng, names=0.5))
    return its_own + users + (rng.choice(MARKS) if rng.random() < 0.2 else "")


def test_the_ids_are_those_of_the_whole_text(monkeypatch):
    """Of made-up tokenizers, whose control tokens overlap, take spaces around them, or are found in changed text."""
    monkeypatch.setattr(encoded, "_BLOCK", 8)
    lengths, encode = [], encode_marked
    monkeypatch.setattr(encoded, "encode_marked", lambda of, text: lengths.append(len(text)) or encode(of, text))
    saved = 0
    for seed in range(40):
        rng = random.Random(seed)
        tokenizer, texts = tokenizer_of(rng), EncodedTexts(budget=4000)
        conversation = [spoken(rng, tokenizer)]
        for _ in range(12):
            if rng.random() < 0.2:  # another one, or an earlier turn
                conversation = conversation[: rng.randrange(len(conversation))]
            conversation.append(spoken(rng, tokenizer))
            text = "".join(conversation)
            lengths.clear()
            assert texts.encode(tokenizer, text) == encode(tokenizer, text), (seed, text)
            saved += len(text) - sum(lengths)
            assert texts.nbytes <= 4000
        assert len(texts._known) == sum(map(len, texts._places.values()))
    assert saved > 3000, "characters"


def test_texts_are_not_cut_behind_names_that_others_hold_or_overlap_with():
    names = "<|a|>", "<|a|>b", "<|c|>", "z<|c|>z", "<|d|>", "|><", "<|e|>", "[e]"
    for seed in range(30):
        tokenizer = tokenizer_of(random.Random(seed), names)
        found = [name for name in tokenizer.dividers() if name in names]
        assert found in ([], ["[e]"])  # none: one of its own counts whole words, or it is not byte-level
        if found:
            return
    raise AssertionError("no tokenizer can be cut")
