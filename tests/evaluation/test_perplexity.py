"""Scores of texts against sums written out by hand."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from sepjax.config import AttentionConfig, Config, DataConfig, ModelConfig
from sepjax.data.packing import TokenStream
from sepjax.data.scored import marked, unmarked
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation import jobs, perplexity
from sepjax.evaluation.arms import plain_arms
from sepjax.evaluation.compare import score_arms, score_patterns
from sepjax.evaluation.documents import documents_of
from sepjax.evaluation.inputs import in_shares
from sepjax.evaluation.perplexity import TextError, TextWindows, score_windows, token_windows
from sepjax.evaluation.report import table
from sepjax.model.attend import forward
from sepjax.model.transformer import merge, split
from tests.models import random_model

LENGTH = 16
ATTENTION = AttentionConfig(
    num_sinks=2, window_size=4, separators="ids", separator_ids=(ord("."), ord(" ")), implementation="reference"
)  # the definition of the op compiles quickest
PATTERNS = [dataclasses.replace(ATTENTION, pattern=p) for p in ("separator", "dense", "sink_window", "fixed_interval")]
TEXTS = ["A cat. A dog, a mat. The end of these.", "Short.", "", "Ünïcode is two bytes"]  # windows of 16 and of 6 bytes


class Bytes(Tokenizer):
    """A tokenizer whose tokens are bytes, with BOS 256."""

    bos_id, eos_id, vocab_size, adds_bos, document_end = 256, None, 257, True, None
    starts_with_space = False

    def __init__(self):
        pass

    def encode(self, text):
        return list(text.encode())

    def encode_flat(self, texts):
        ids = [np.array(self.encode(x), np.int32) for x in texts]
        return np.concatenate([np.zeros(0, np.int32), *ids]), np.array([*map(len, ids)])

    def token_texts(self):
        return [chr(i) for i in range(256)] + [None]

    def token_bytes(self, i):
        return bytes([i])

    def token_widths(self):
        return np.ones(257, np.int32)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=257, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32
    )
    return random_model(config, ATTENTION)


@pytest.fixture(scope="module")
def scores(model):
    return {s.pattern: s for s in score_patterns(model, Bytes(), TEXTS, PATTERNS, length=LENGTH, batch_size=3)}


def windows():
    for text in TEXTS:
        ids = [256, *text.encode()]
        for i in range(0, len(ids) - 1, LENGTH):
            yield np.array(ids[i : i + LENGTH + 1], np.int32)


def test_equals_a_loop_over_windows_one_at_a_time(model, scores):
    """Padding and batch neighbours must not show: here each window is alone, unpadded, with the full softmax."""
    graph, params = split(model)
    exact = dataclasses.replace(ATTENTION, implementation="reference")

    @jax.jit
    def alone(params, *batch):
        model = merge(graph, params)
        return jax.nn.log_softmax(model.logits(forward(model, *batch, attention=exact)[0]))

    nll = 0.0
    for window in windows():
        tokens = window[None, :-1]
        positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
        is_separator = np.isin(tokens, ATTENTION.separator_ids)
        scores_of = np.asarray(alone(params, tokens, positions, is_separator))[0]
        nll -= float(np.sum(scores_of[np.arange(len(window) - 1), window[1:]]))
    size = sum(len(text.encode()) for text in TEXTS)
    assert scores["separator"].tokens == scores["separator"].bytes == size  # a byte a token; BOS is no target
    assert scores["separator"].perplexity == pytest.approx(math.exp(nll / size), rel=1e-4)
    assert scores["separator"].bits_per_byte == pytest.approx(nll / size / math.log(2), rel=1e-4)


class NoBos(Bytes):
    """GPT's kind: nothing in front of a text, and 256 between documents in training."""

    adds_bos, document_end = False, 256


def test_a_runs_documents_begin_as_in_training(byte_model, monkeypatch, tmp_path):
    """The token that divides documents stands in front, so that the first of a text is scored, given it."""
    tokenizer = NoBos()
    stream = TokenStream.encode(tokenizer, ["A cat. A dog.", "Short."])
    windows = token_windows(tokenizer, ["A cat. A dog.", "Short."], 64, start=tokenizer.document_start)
    assert np.concatenate([ids[:-1] for ids in windows.ids]).tolist() == stream.tokens[stream.targets != 256].tolist()
    assert windows.num_bytes == sum(len(ids) - 1 for ids in windows.ids) == len("A cat. A dog.Short.")
    assert token_windows(tokenizer, ["Short."], 64).num_bytes == len("hort.")
    assert token_windows(tokenizer, ["Short."], 64, start=256, bos=False).ids[0].tolist() == list(b"Short.")
    (document,) = documents_of(tokenizer, ["Short."], as_in_training=True)
    assert (document.inputs[0], document.targets.tolist()) == (256, list(b"Short."))
    # Whoever scores a run asks for that, of other models nobody does.
    seen = []
    text = tmp_path / "a.txt"
    text.write_text("Short.")
    monkeypatch.setattr(jobs, "load", lambda *_, **__: (byte_model, tokenizer))
    monkeypatch.setattr(jobs, "config_of", lambda *_: Config(model=byte_model.config, data=DataConfig(name=str(text))))
    monkeypatch.setattr(jobs, "locate", lambda path: tmp_path)
    monkeypatch.setattr(jobs.compare, "score_arms", lambda *x, **_: seen.append(int(x[1].ids[0][0])) or [])
    monkeypatch.setattr(jobs.streaming, "score_streams", lambda *x, **_: seen.append(int(x[2][0].inputs[0])) or [])
    monkeypatch.setattr(jobs.limits, "trained_length", lambda *_: 999)
    for is_run in (False, True):
        if is_run:
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "config.json").write_text("{}")
        jobs.evaluate(tmp_path, ["separator"], text=str(text))
        jobs.stream(tmp_path, ["separator"], [], text=str(text))
    assert seen == [ord("S"), ord("S"), 256, 256]


def test_a_pattern_says_what_of_a_text_is_scored():
    """As in training, where `data.loss_on` does."""
    texts = ["a=12, b=3.", "nothing", "c=456"]
    found = token_windows(Bytes(), texts, 64, loss_on=r"=(\d+)")
    stream = TokenStream.encode(NoBos(), texts, 0, re.compile(r"=(\d+)"))
    assert bytes(found.of_scored([ids[1:] for ids in found.ids]).tolist()) == b"123456"
    assert stream.targets[stream.scored & (stream.targets != 256)].tolist() == list(b"123456")
    assert (found.num_bytes, found.documents.tolist()) == (6, [0, 2])
    with pytest.raises(TextError, match="or loss_on matches nothing"):
        token_windows(Bytes(), texts, 64, loss_on="z")


def test_windows_of_several_sources_are_joined():
    whole, marked_ones = token_windows(Bytes(), TEXTS, 8), token_windows(Bytes(), [marked("ab cd", [(1, 3)])], 8)
    few = whole.first(2, Bytes())
    joined = TextWindows.join([few, marked_ones])
    assert (few.num_bytes, joined.num_bytes, joined.documents.tolist()) == (16, 18, [0, 0, 1])
    targets = joined.of_scored([ids[1:] for ids in joined.ids])
    assert bytes(targets.tolist()) == TEXTS[0].encode()[:16] + b"b "
    assert whole.first(99, Bytes()) is whole
    assert in_shares([0.75, 0.25], [30, 100]) == [30, 10]
    assert in_shares([0.75, 0.25], [30, 5], most=8) == [6, 2]


def test_kv_kept_is_counted_from_the_last_rows(scores):
    kept = []
    for window in windows():
        T = len(window) - 1
        j = np.arange(T)
        kept.append(np.mean(np.isin(window[:-1], ATTENTION.separator_ids) | (j < 2) | (T - 1 - j < 4)))
    assert scores["separator"].kv_kept == pytest.approx(np.mean(kept), rel=1e-5)
    assert scores["dense"].kv_kept == scores["dense"].attention_fraction == 1.0
    assert scores["sink_window"].kv_kept < scores["separator"].kv_kept


def test_what_is_dense_to_a_model_with_a_window_keeps_that_window_where_it_slides(model):
    config = dataclasses.replace(model.config, num_layers=2, sliding_window=5, full_layers=(1,))
    mixed = random_model(config, ATTENTION)
    (score,) = score_patterns(mixed, Bytes(), TEXTS, PATTERNS[1:2], length=LENGTH)
    lengths = np.array([len(window) - 1 for window in windows()])
    assert score.kv_kept == pytest.approx(np.mean((np.minimum(5 / lengths, 1) + 1) / 2), rel=1e-5)


def test_a_window_over_everything_is_dense(model, scores):
    wide = dataclasses.replace(ATTENTION, window_size=LENGTH)
    (score,) = score_patterns(model, Bytes(), TEXTS, [wide], length=LENGTH)
    assert score.perplexity == pytest.approx(scores["dense"].perplexity, rel=1e-5)


def test_batch_size_changes_nothing(model, scores):
    (score,) = score_patterns(model, Bytes(), TEXTS, PATTERNS[:1], length=LENGTH, batch_size=1)
    assert score.perplexity == pytest.approx(scores["separator"].perplexity, rel=1e-6)
    assert score.kv_kept == pytest.approx(scores["separator"].kv_kept, rel=1e-6)
    assert score.attention_fraction == pytest.approx(scores["separator"].attention_fraction, rel=1e-6)


def test_the_table_has_a_row_a_pattern(scores):
    lines = table(list(scores.values())).splitlines()
    assert [line.split()[0] for line in lines] == ["arm", *scores, f"{scores['dense'].tokens:,}"]


def test_nothing_to_score_is_an_error(model):
    with pytest.raises(TextError, match="no text to score"):
        score_patterns(model, Bytes(), ["", ""], PATTERNS, length=LENGTH)


def test_rows_are_not_much_longer_than_the_longest_text(model, monkeypatch):
    lengths = []

    def spy(windows, table, attention, length, size):
        lengths.append(length)
        raise InterruptedError

    monkeypatch.setattr(perplexity, "_batches", spy)
    for asked in (64, 10**6):
        windows = token_windows(Bytes(), ["ab " * 100, "A dog."], asked)
        with pytest.raises(InterruptedError):
            score_windows(model, Bytes(), windows, ATTENTION, length=asked, batch_size=8)
    assert lengths == [64, 512]


def test_of_a_conversation_what_is_marked_is_scored(model):
    """The losses are those that the same tokens have when all of the text is scored."""
    said = "A cat. A dog, a mat. The end of these."
    both = [marked(said, [(2, 6), (33, len(said))]), marked("Short.", [(0, 5)]), "All of it."]
    cut = {"length": LENGTH, "batch_size": 3}
    plain = [unmarked(text)[0] for text in both]
    # As in training nothing stands in front of a conversation, also where a tokenizer puts BOS in front of texts.
    whole = [token_windows(Bytes(), plain[:2], LENGTH, bos=False), token_windows(Bytes(), plain[2:], LENGTH)]
    whole, part = TextWindows.join(whole), token_windows(Bytes(), both, LENGTH)
    ids = [x.tolist() for x in whole.ids]
    assert [x.tolist() for x in part.ids] == [ids[0], *ids[2:]], "nothing is said in the second window"
    every = score_windows(model, Bytes(), whole, ATTENTION, **cut).nll
    ends = np.cumsum([len(unmarked(text)[0].encode()) for text in both])
    ends -= [1, 2, 2]  # the first tokens of conversations are no targets
    at = [*range(1, 5), *range(32, ends[0]), *range(ends[0], ends[0] + 4), *range(ends[1], ends[2])]
    found = score_windows(model, Bytes(), part, ATTENTION, **cut)
    np.testing.assert_allclose(found.nll, every[at], rtol=1e-4)
    (score,) = score_arms(lambda _: (model, Bytes()), part, plain_arms([ATTENTION]), **cut)
    assert (score.tokens, score.windows, score.documents, score.bytes) == (len(at), len(part.ids), 3, len(at))
    assert score.perplexity == pytest.approx(math.exp(every[at].mean()), rel=1e-4)
    rows = np.split(every[at], np.cumsum([int(x.sum()) for x in part.scored])[:-1])
    assert score.window_perplexity == pytest.approx(np.mean([math.exp(x.mean()) for x in rows]), rel=1e-4)
