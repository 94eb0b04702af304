"""All patterns at equal KV, and needles."""

import csv
import dataclasses
import math

import numpy as np
import pytest

from sepjax.evaluation.compare import compare, ratio_error, table
from sepjax.evaluation.documents import StreamError, read_texts
from sepjax.evaluation.needle import NeedleError, needle_grid, write_csv, write_png
from sepjax.evaluation.needle import table as needle_table
from sepjax.evaluation.perplexity import score_patterns

TEXT = "A cat, a dog, and a bird; all of them sang. Why? Nobody knew, but it was fine! " * 6


@pytest.fixture(scope="module")
def compared(byte_model, byte_tokenizer):
    texts = [TEXT, TEXT[40:300], TEXT[7:390]]
    return compare(byte_model, byte_tokenizer, texts, byte_model.attention, length=96, batch_size=4), texts


def test_all_patterns_keep_as_much_as_the_separators(compared):
    scores, _ = compared
    dense, separators, window, interval = scores
    assert [s.pattern for s in scores] == ["dense", "separator", "sink_window", "fixed_interval"]
    assert (dense.kv_kept, dense.difference, dense.difference_error) == (1, 0, 0)
    assert 0.2 < separators.kv_kept < 0.6
    for other in (window, interval):
        assert other.kv_kept == pytest.approx(separators.kv_kept, abs=0.02)
    assert len({s.tokens for s in scores}) == len({s.windows for s in scores}) == 1
    assert interval.interval > 1
    assert "one standard error each" in table(scores)


def test_perplexities_are_those_of_the_patterns_alone(compared, byte_model, byte_tokenizer):
    scores, texts = compared
    for score in (scores[1], scores[3]):
        attention = dataclasses.replace(
            byte_model.attention,
            pattern=score.pattern,
            window_size=score.window_size,
            interval=score.interval or 8,
        )
        (alone,) = score_patterns(byte_model, byte_tokenizer, texts, [attention], length=96, batch_size=4)
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
    assert math.isnan(ratio_error(sums[:1], counts[:1])[1])


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
    patterns = [dataclasses.replace(byte_model.attention, pattern=p) for p in ("dense", "sink_window")]
    return needle_grid(
        byte_model,
        byte_tokenizer,
        TEXT,
        patterns,
        lengths=[220, 300],
        depths=[0.0, 0.5, 1.0],
        trials=2,
        batch_tokens=2048,
    )


def test_the_grid_has_every_cell(cells, tmp_path):
    assert {(c.pattern, c.length, c.depth) for c in cells} == {
        (p, n, d) for p in ("dense", "sink_window") for n in (220, 300) for d in (0, 0.5, 1)
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
    assert needle_table(cells).count("\n") == 4


def test_a_needle_is_where_it_should_be(byte_model, byte_tokenizer, monkeypatch):
    seen = []

    def spy(model, tokenizer, requests, attention, **_):
        seen.extend(requests)
        raise InterruptedError

    monkeypatch.setattr("sepjax.evaluation.needle.score_continuations", spy)
    settings = {"lengths": [250], "depths": [0.0, 0.25, 1.0], "trials": 3}
    with pytest.raises(InterruptedError):
        needle_grid(byte_model, byte_tokenizer, TEXT, [byte_model.attention], **settings)
    assert len(seen) == 9
    for (context, answer), depth in zip(seen, np.repeat([0, 0.25, 1], 3), strict=True):
        text, number = byte_tokenizer.decode(context), byte_tokenizer.decode(answer)
        assert len(context) + len(answer) == 250
        assert text.endswith(" is")
        hay = text[: text.index("\n\nQuestion")]
        before, after = hay.split(f" is{number}.")
        before = before[: before.rindex(" The secret number of the ")]
        assert len(before) / len(before + after) == pytest.approx(depth, abs=0.02)


def test_impossible_grids_and_empty_folders_are_named(byte_model, byte_tokenizer, tmp_path):
    for text, lengths, depths, message in (
        (TEXT, [100], [0.0], "needs 1 of haystack"),
        ("short", [300], [0.0], "the haystack has 5"),
        (TEXT, [300], [2.0], "depths from 0 to 1"),
        (TEXT, [], [0.0], "needs lengths"),
    ):
        with pytest.raises(NeedleError, match=message):
            needle_grid(byte_model, byte_tokenizer, text, [], lengths=lengths, depths=depths)
    with pytest.raises(StreamError, match=r"no \.txt files"):
        read_texts(tmp_path)
