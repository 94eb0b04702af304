"""What is written of streamed scores, and evaluate.py --task=streaming as a user runs it."""

import csv
import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest

from sepjax.config import AttentionConfig, ConfigError, UserError
from sepjax.evaluation import curves, jobs
from sepjax.evaluation.arms import stream_attention
from sepjax.evaluation.documents import StreamError, read_documents
from sepjax.evaluation.streaming import Bucket, StreamScore
from sepjax.programs.evaluate.common import check_numbers
from tests.evaluation.test_streaming import Bytes

SCORE = StreamScore(
    pattern="separator", num_sinks=4, max_separators=64, window_size=256, cache_size=800, perplexity=20.5,
    bits_per_byte=1.01, buckets=(Bucket(1, 16, 30.5, 15), Bucket(16, 23, 20.25, 7)), tokens=22, bytes=99,
    slots_held=12.5, slots_most=22, cache_bytes=1_234_567, kv_kept=0.75, seconds=2.0, tokens_per_second=11.0, rows=1,
    chunk=480, compilations=0,
)  # fmt: skip


def test_the_table_shows_what_was_measured():
    header, line = curves.table([SCORE]).splitlines()
    assert header.split()[:7] == ["pattern", "a", "s", "w", "c", "cache", "perplexity"]
    assert line.split() == [
        *(
            "separator",
            "4",
            "64",
            "256",
            "800",
            "model",
            "20.500",
            "1.0100",
            "12.5",
            "22",
            "1,234,567",
            "75.00%",
            "22",
            "11",
            "0",
        ),
    ]


def test_times_are_told_apart():
    """The programs are compiled together, and told once."""
    told = [dataclasses.replace(SCORE, tokenise_seconds=1.5, compile_seconds=20.5)] * 3
    assert curves.times(told) == "seconds: read and tokenised 1.5; compiled 20.5; streamed 2.0, 2.0, 2.0"


def test_the_csv_has_a_row_a_bucket(tmp_path):
    curves.write_csv(tmp_path / "c.csv", [SCORE, dataclasses.replace(SCORE, cache_dtype="int8")])
    rows = list(csv.reader((tmp_path / "c.csv").read_text().splitlines()))
    assert rows[1:] == [
        ["separator a=4 s=64 w=256 c=800", "1", "16", "15", "30.5"],
        ["separator a=4 s=64 w=256 c=800", "16", "23", "7", "20.25"],
        ["separator a=4 s=64 w=256 c=800 cache=int8", "1", "16", "15", "30.5"],
        ["separator a=4 s=64 w=256 c=800 cache=int8", "16", "23", "7", "20.25"],
    ]


def test_the_picture_is_a_png_that_shows_the_curve(tmp_path):
    from matplotlib.image import imread

    curves.write_png(tmp_path / "c.png", [SCORE])
    image = imread(tmp_path / "c.png")
    assert image.shape == (540, 960, 4)
    is_blue = (image[..., 2] > 0.6) & (image[..., 0] < 0.3)
    assert is_blue.sum() > 300  # the line, in matplotlib's first colour


def test_without_matplotlib_the_csv_is_written_and_the_picture_explained(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = importlib.import_module("builtins").__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", no_matplotlib)
    said = jobs.write_files(tmp_path / "out.json", curves, [SCORE])
    assert 'pip install "sepjax[plot]"' in said
    assert (tmp_path / "out.csv").exists()
    assert not (tmp_path / "out.png").exists()


def test_scores_that_are_no_numbers_are_named(tmp_path):
    """The picture could not be drawn, and ended the program before the JSON was written."""
    score = dataclasses.replace(SCORE, perplexity=float("nan"), buckets=(Bucket(1, 16, float("nan"), 15),))
    assert "no picture: no perplexity is a number" in jobs.write_files(tmp_path / "out.json", curves, [score])
    assert (tmp_path / "out.csv").exists()
    check_numbers([SCORE])
    with pytest.raises(UserError, match=r"^separator: the model's scores are not numbers"):
        check_numbers([SCORE, score])


def test_budgets_give_the_window_what_separators_do_not_take():
    base = AttentionConfig(num_sinks=2, window_size=8, max_separators=4, layer_windows=(8, 8))
    budget = stream_attention(base, "separator", "4/64/256/800", 2)
    assert (budget.num_sinks, budget.max_separators, budget.window_size, budget.cache_size) == (4, 64, 256, 800)
    sinks = stream_attention(base, "sink_window", "4/64/256/800", 2)
    assert (sinks.window_size, sinks.cache_size, sinks.pattern) == (796, 800, "sink_window")
    assert stream_attention(base, "sink_window", "", 2).cache_size == 28  # 2 (a + s + w)
    for wrong in ("4/64/256", "4/64/256/-800", "a/b/c/d"):
        with pytest.raises(ConfigError, match="sinks/separators/window/cache"):
            stream_attention(base, "separator", wrong, 2)


def test_documents_are_read_from_texts_folders_and_token_ids(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    np.savez(tmp_path / "ids.npz", first=np.array(list(b"first"), np.uint16), second=np.array(list(b"second")))
    folder, ids = (read_documents(path, Bytes()) for path in (tmp_path, tmp_path / "ids.npz"))
    for x, y in zip(folder, ids, strict=True):
        np.testing.assert_array_equal(x.inputs, y.inputs)
        np.testing.assert_array_equal(x.targets, y.targets)
    assert bytes(folder[0].targets.tolist()) == b"first"
    assert len(read_documents(tmp_path / "b.txt", Bytes(), max_tokens=4)[0].inputs) == 4


def test_documents_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Où".encode("latin-1"))
    np.savez(tmp_path / "ids.npz", a=np.array([1, 999]))
    for name, line_wise, message in (
        ("latin.txt", False, "UTF-8"),
        ("ids.npz", False, "token id 999"),
        ("ids.npz", True, "lines of text"),
    ):
        with pytest.raises(StreamError, match=message):
            read_documents(tmp_path / name, Bytes(), line_wise=line_wise)
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "none.txt", Bytes())


def test_the_numbers_of_a_score_are_json():
    assert json.loads(json.dumps(SCORE.__dict__, default=lambda x: x.__dict__))["buckets"][0]["tokens"] == 15
