"""The generated recall task: its texts, and what counts as recalled."""

import math
import re
import types

import numpy as np
import pytest

from sepjax.config import AttentionConfig, DataConfig
from sepjax.data.corpora.recall.recall import document, recall_tokenizer
from sepjax.data.errors import DataError
from sepjax.data.sources import text_source
from sepjax.evaluation import recall
from sepjax.evaluation.arms import plain_arms
from sepjax.evaluation.perplexity import token_windows
from sepjax.generation.lost import NotNumbers


def test_documents_ask_for_their_facts_out_of_sight():
    rng, lengths = np.random.default_rng(0), set()
    for size in (63, 127, 200):
        for _ in range(20):
            text = document(rng, size)
            assert len(text) == size
            facts, asked = dict(re.findall(r"(?<!\?)([A-Z])([a-z])", text)), re.findall(r"\?([A-Z])([a-z])", text)
            assert facts == dict(asked)
            assert len(facts) == (size + 1) // 16
            assert len(asked) == 2 * len(facts)
            assert sorted(asked[: len(facts)]) == sorted(asked[len(facts) :])  # two rounds
            first, last = text.index("?"), max(text.index(key + value) for key, value in facts.items())
            assert first - last > 16
            lengths |= set(map(len, text[:last].split(".")))
    assert {2, 3, 4} < lengths  # segments of random length


def test_the_corpus_has_a_document_a_row_and_is_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("sepjax.data.corpora.recall.recall._SIZES", {"train": 8, "validation": 4})
    first, second = (
        text_source(DataConfig(name="recall", sequence_length=64), str(tmp_path / name), "train")[:] for name in "ab"
    )
    assert first == second
    assert len(set(first)) == 8
    tokenizer = recall_tokenizer()
    assert {1 + len(tokenizer.encode(text)) for text in first} == {64}
    with pytest.raises(DataError, match="64 or more, got 32"):
        text_source(DataConfig(name="recall", sequence_length=32), str(tmp_path), "train")


def test_answers_are_found_and_judged(byte_model, monkeypatch):
    tokenizer = recall_tokenizer()
    texts = ["-Kq--.Zb.----.?Zb?Kq?Kq", "Aa.-----.?Aa"]
    windows = token_windows(tokenizer, texts, 64, start=tokenizer.document_start)
    assert [ids[0] for ids in windows.ids] == [tokenizer.document_start] * 2
    answers = recall.Answers.find(tokenizer, windows)
    targets = np.concatenate([ids[1:] for ids in windows.ids])
    assert tokenizer.decode(targets[answers.at].tolist()) == "bqa"
    assert answers.ago.tolist() == [texts[0].rindex("b") - 7, 19 - 2, len(texts[1]) - 2]
    assert answers.place.tolist() == [0, 2, 0]
    nll = np.full(len(targets), 9.0)
    nll[answers.at] = [0.1, math.log(2) + 0.1, 0.2]
    monkeypatch.setattr(recall, "score_windows", lambda *_, **__: types.SimpleNamespace(nll=nll, kv_kept=0.5))
    arms = plain_arms([AttentionConfig()])
    cells = {x.kind: x for x in recall.score_recall(byte_model, tokenizer, windows, arms, length=64)}
    assert (cells["all"].recalled, cells["all"].answers) == (pytest.approx(2 / 3), 3)
    assert cells["all"].loss == pytest.approx(nll[answers.at].mean())
    assert (cells["place 2"].recalled, cells["place 0"].recalled) == (0, 1)
    assert sum(x.answers for kind, x in cells.items() if kind.startswith("ago")) == 3
    nll[answers.at[1]] = np.nan
    with pytest.raises(NotNumbers, match=r"recall with .*: the model's scores"):
        recall.score_recall(byte_model, tokenizer, windows, arms, length=64)
    assert "chance: 3.8%, 3.258 nats" in recall.table(list(cells.values()))
    with pytest.raises(recall.RecallError, match="no questions"):
        recall.Answers.find(tokenizer, token_windows(tokenizer, ["Kq-?."], 64))
