"""All patterns at equal cost, slice by slice, and needles."""

import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest

from sepjax.config import AttentionConfig, ConfigError
from sepjax.evaluation.arms import parse_arms, plain_arms
from sepjax.evaluation.compare import at_equal_kv, score_arms, score_patterns
from sepjax.evaluation.documents import StreamError, read_texts
from sepjax.evaluation.equal import density, window_of_equal
from sepjax.evaluation.needle import NeedleError, needle_grid, write_csv, write_png
from sepjax.evaluation.needle import table as needle_table
from sepjax.evaluation.perplexity import token_windows
from sepjax.evaluation.report import plain, slice_table, table
from sepjax.evaluation.slices import ratio_error

TEXT = "A cat, a dog, and a bird; all of them sang. Why? Nobody knew, but it was fine! " * 6
ATTENTION = AttentionConfig(num_sinks=2, window_size=8, implementation="reference")


@pytest.fixture(scope="module")
def windows(byte_tokenizer):
    return token_windows(byte_tokenizer, [TEXT, TEXT[40:300], TEXT[7:390]], 96)


@pytest.fixture(scope="module")
def score(byte_model, byte_tokenizer, windows):
    def score(arms, **settings):
        load = lambda path: (byte_model, byte_tokenizer)  # noqa: E731
        return score_arms(load, windows, arms, length=96, batch_size=4, **settings)

    return score


@pytest.fixture(scope="module")
def compared(byte_model, byte_tokenizer, windows, score):
    return score(at_equal_kv(byte_model.attention, density(byte_model.attention, byte_tokenizer, windows.ids)))


def test_no_window_is_sought_for_a_gate(byte_tokenizer, windows):
    gated = AttentionConfig("gated", num_sinks=2, window_size=8, gate_stretch=8)
    with pytest.raises(ConfigError, match=r"what a gate keeps does not follow from the text.*give it a window_size"):
        window_of_equal(gated, byte_tokenizer, windows.ids, "kv", 0.2)


def test_all_patterns_keep_as_much_as_the_separators(compared):
    dense, separators, window, interval = compared
    assert [s.arm for s in compared] == ["dense", "separator", "sink_window", "fixed_interval"]
    assert (dense.kv_kept, dense.attention_fraction, dense.difference, dense.difference_error) == (1, 1, 0, 0)
    assert 0.2 < separators.kv_kept < 0.6
    for other in (window, interval):
        assert other.kv_kept == pytest.approx(separators.kv_kept, abs=0.01)
    assert [arm.equal for arm in at_equal_kv(ATTENTION, 0.1, "pairs")[2:]] == 2 * [("pairs", "separator")]
    assert interval.attention.interval > 1
    assert len({(s.tokens, s.windows, s.documents) for s in compared}) == 1
    assert compared[0].documents == 3
    said = table(compared) + slice_table([(s.arm, s.slices) for s in compared], 1, 2, "dense")
    assert "over 3 documents, paired" in said
    assert all(len(re.findall(rf"(?m)^{name} ", said)) == 4 for name in ("all", "unseen", "near", "far"))
    json.dumps(plain([dataclasses.asdict(s) for s in compared]), allow_nan=False)


def test_what_a_pattern_loses_is_told_slice_by_slice(score, windows, byte_model):
    """Against sums over tokens, one at a time, from one pass a pattern."""
    arms = parse_arms("dense; w: sink_window n=9; separator n=6 a=1; hybrid: sink_window windows=5,96", ATTENTION, 2)
    scores = {s.arm: s for s in score(arms, baseline="w", near=10, far=40)}
    with pytest.raises(ConfigError, match=r"'v' is not one of the arms dense, w, "):
        score(arms, baseline="v")
    hybrid = scores["hybrid"]
    assert hybrid.layer_kept[1] == 1
    assert hybrid.kv_kept == pytest.approx(np.mean(hybrid.layer_kept))
    sizes = windows.lengths
    assert scores["dense"].keys == 2 * sizes.mean()  # of both layers
    assert scores["w"].keys == pytest.approx(2 * np.mean([min(n, 9 + 2) for n in sizes]))
    far_nll = []
    for arm in ("w", "separator n=6 a=1"):
        slices = {x.name: x for x in scores[arm].slices}
        assert sum(slices[x].tokens for x in ("unseen", "near", "between", "far")) == slices["all"].tokens
        far_nll.append(np.array(slices["far"].document_nll))
        assert slices["all"].loss == pytest.approx(math.log(scores[arm].perplexity))
        position = sum(x.loss * x.tokens for x in scores[arm].positions)
        assert position == pytest.approx(slices["all"].loss * slices["all"].tokens)
    far = next(x for x in scores["separator n=6 a=1"].slices if x.name == "far")
    tokens = np.array(far.document_tokens)
    assert far.difference == pytest.approx((far_nll[1] - far_nll[0]).sum() / tokens.sum())
    assert far.difference_error == ratio_error(far_nll[1] - far_nll[0], tokens)[1]
    found = {arm: next(x for x in s.slices if x.name == "far") for arm, s in scores.items()}
    lost = found["w"].loss - found["dense"].loss
    for x in found.values():
        assert x.recovered == (pytest.approx((found["w"].loss - x.loss) / lost) if lost > 0 else None)


def test_perplexities_are_those_of_the_patterns_alone(compared, byte_model, byte_tokenizer):
    texts = [TEXT, TEXT[40:300], TEXT[7:390]]
    for score in (compared[1], compared[3]):
        (alone,) = score_patterns(byte_model, byte_tokenizer, texts, [score.attention], length=96, batch_size=4)
        assert alone.perplexity == pytest.approx(score.perplexity, rel=1e-6)
        assert alone.kv_kept == pytest.approx(score.kv_kept)


def test_errors_are_those_of_a_bootstrap():
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 100, 400).astype(float)
    sums = counts * rng.normal(3, 0.5, 400)
    mean, error = ratio_error(sums, counts)
    assert mean == sums.sum() / counts.sum()
    draws = rng.integers(0, 400, (2000, 400))
    assert error == pytest.approx(np.std(sums[draws].sum(1) / counts[draws].sum(1)), rel=0.1)
    assert ratio_error(sums[:1], counts[:1])[1] is None
    assert ratio_error(np.array([27000.0, 9.0]), np.array([9000.0, 7.0]))[1] is None  # 3e-6 of one document


def test_cut_documents_without_bos(byte_model, byte_tokenizer):
    settings = {"length": 32, "batch_size": 4, "max_tokens": 50, "bos": False}
    (score,) = score_patterns(byte_model, byte_tokenizer, [TEXT], [byte_model.attention], **settings)
    assert (score.tokens, score.bytes) == (49, 49)
    parts = [
        score_patterns(byte_model, byte_tokenizer, [text], [byte_model.attention], **settings)[0].perplexity
        for text in (TEXT[:33], TEXT[32:50])
    ]
    assert score.window_perplexity == pytest.approx(np.mean(parts), rel=1e-4)


@pytest.fixture(scope="module")
def cells(byte_model, byte_tokenizer):
    arms = parse_arms("dense; sink_window", byte_model.attention, 2)
    return needle_grid(
        byte_model,
        byte_tokenizer,
        TEXT,
        arms,
        lengths=[260, 300],
        depths=[0.0, 1.0],
        tails=[0, 7],
        trials=2,
        batch_tokens=2048,
    )


@pytest.mark.soak  # two patterns more are compiled; their scores are those above
def test_the_grid_has_every_cell(cells, tmp_path):
    assert {(c.arm, c.length, c.depth, c.tail) for c in cells} == {
        (p, n, d, k) for p in ("dense", "sink_window") for n in (260, 300) for d in (0, 1) for k in (0, 7)
    }
    assert all(c.trials == 2 and 0 <= c.found <= 1 and c.logprob < 0 for c in cells)
    assert {c.kv_kept for c in cells if c.pattern == "dense"} == {1}
    assert all(c.kv_kept < 0.1 for c in cells if c.pattern == "sink_window")
    write_csv(tmp_path / "n.csv", cells)
    with (tmp_path / "n.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(cells)
    pytest.importorskip("matplotlib")
    write_png(tmp_path / "n.png", cells)
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    assert needle_table(cells).count("\n") == 8


def test_a_needle_is_where_it_should_be(byte_model, byte_tokenizer, monkeypatch):
    seen = []

    def spy(model, tokenizer, requests, attention, **_):
        seen.extend(requests)
        raise InterruptedError

    monkeypatch.setattr("sepjax.evaluation.needle.score_continuations", spy)
    settings = {"lengths": [250], "depths": [0.0, 0.25, 1.0], "tails": [0, 2, 4], "trials": 1}
    with pytest.raises(InterruptedError):
        needle_grid(byte_model, byte_tokenizer, TEXT, plain_arms([byte_model.attention]), start=[7], **settings)
    assert {context.pop(0) for context, _ in seen} == {7}
    assert len(seen) == 9
    tails = 3 * ["", " and everybody", " and everybody who ever"]
    for (context, answer), depth, tail in zip(seen, np.repeat([0, 0.25, 1], 3), tails, strict=True):
        text, number = byte_tokenizer.decode(context), byte_tokenizer.decode(answer)
        assert 1 + len(context) + len(answer) == 250
        assert text.endswith(" is")
        hay = text[: text.index("\n\nQuestion")]
        before, after = hay.split(f" is{number}{tail}.")
        before = before[: before.rindex(" The secret number of the ")]
        assert len(before) / len(before + after) == pytest.approx(depth, abs=0.02)


def test_impossible_grids_and_empty_folders_are_named(byte_model, byte_tokenizer, tmp_path):
    for text, lengths, depths, message in (
        (TEXT, [100], [0.0], "100 tokens has no room for a haystack: needle and question take 1"),
        ("short", [300], [0.0], "of haystack, which has 5; give a longer --text"),
        (TEXT, [300], [2.0], "depths from 0 to 1"),
        (TEXT, [], [0.0], "needs lengths"),
        (TEXT, [300, 1026], [0.0], "1026 tokens is longer than the model's 1024 positions; lower --lengths"),
    ):
        with pytest.raises(NeedleError, match=message):
            needle_grid(byte_model, byte_tokenizer, text, [], lengths=lengths, depths=depths)
    with pytest.raises(NeedleError, match="tails of 0 to"):
        needle_grid(byte_model, byte_tokenizer, TEXT, [], lengths=[300], depths=[0.0], tails=[99])
    with pytest.raises(StreamError, match=r"no \.txt files"):
        read_texts(tmp_path)
