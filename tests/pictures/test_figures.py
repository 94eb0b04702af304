"""Figures: what is read from results and runs, and that it is drawn where it belongs."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from sepjax.keeping.kinds import KindShare
from sepjax.pictures.figures import FigureError, draw_curves, draw_pareto, read_curves, read_points
from sepjax.pictures.kinds import draw_kinds
from sepjax.pictures.slots import draw_slots

ROOT = Path(__file__).parents[2]


def results(path, arms, baseline="window"):
    scores = [
        {"pattern": p, "arm": a, "kv_kept": k, "difference": d, "difference_error": 0.001, "baseline": baseline}
        for p, a, k, d in arms
    ]
    path.write_text(json.dumps({"scores": scores}))
    return path


def test_quality_against_keys(tmp_path):
    first = results(tmp_path / "a.json", [("sink_window", "window", 0.175, 0.0), ("gated", "gate 8", 0.12, 0.004)])
    second = results(tmp_path / "b.json", [("gated", "gate & <16>", 0.17, -0.0137), ("dense", "dense", 1.0, -0.0368)])
    points, baseline = read_points([first, second])
    assert baseline == "window"
    points.append(dataclasses.replace(points[0], arm="one window", error=None))
    assert [(x.arm, x.kept, x.loss) for x in points][2] == ("gate & <16>", 0.17, -0.0137)
    draw_pareto(tmp_path / "p.svg", points, baseline, "SmolLM2 on books")
    drawn = (tmp_path / "p.svg").read_text()
    for words in (
        "SmolLM2 on books",
        "gate &amp; &lt;16&gt;",
        "keys held",
        "nats per token over 'window'",
        "sink_window",
    ):
        assert f"<!-- {words}" in drawn or words in drawn
    draw_pareto(tmp_path / "p.png", points, baseline, "t")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FigureError, match=r"to end in \.png, \.svg or \.pdf"):
        draw_pareto(tmp_path / "p.gif", points, baseline, "t")
    dollars = [dataclasses.replace(points[0], arm="$x_{$")]  # which is not mathematics
    draw_pareto(tmp_path / "p.svg", dollars, "$y_{$", "$z_{$")
    assert all(f"<!-- {text}" in (tmp_path / "p.svg").read_text() for text in ("$x_{$", "$z_{$"))


def test_the_projects_own_results_are_those_of_the_page(tmp_path):
    """docs/figures/keeping_pareto.png is drawn of a file whose numbers docs/keeping.md has."""
    file, text = ROOT / "docs" / "figures" / "keeping_pareto.json", (ROOT / "docs" / "keeping.md").read_text()
    points, baseline = read_points([file])
    scores = json.loads(file.read_text())["scores"]
    dense = next(x["perplexity"] for x in scores if x["pattern"] == baseline)
    for point, score in zip(points, scores, strict=True):
        assert f"{score['perplexity']:.3f}" in text
        assert point.loss == pytest.approx(math.log(score["perplexity"] / dense), abs=1e-5)
        assert point.kept == pytest.approx(score["slots"] / 8192, abs=1e-5)
    draw_pareto(tmp_path / "p.svg", points, baseline, "SmolLM2")
    drawn = (tmp_path / "p.svg").read_text()
    assert all(f"<!-- {mark} -->" in drawn for mark in ("4", "9.8", "100"))  # a logarithmic axis says its shares
    assert (ROOT / "docs" / "figures" / "keeping_pareto.png").is_file()


def test_bars_of_kinds(tmp_path):
    kinds = [KindShare("sink", 0.01, 0.8, 90.0, 3.0), KindShare("number", 0.2, 0.04, 0.25, None)]
    draw_kinds(tmp_path / "k.svg", kinds, "SmolLM2 & books")
    drawn = (tmp_path / "k.svg").read_text()
    for words in (
        "sink",
        "number",
        "1.0% of tokens,",
        "4.0% of far attention",
        "80% of far attention",
        "SmolLM2 &amp; books",
    ):
        assert f"<!-- {words}" in drawn or words in drawn


def test_slots_are_drawn_beside_dense(tmp_path):
    draw_slots(tmp_path / "s.svg", {"a": ([5, 5, 9], [5, 3, 7]), "b": ([9], [9])}, "model reads text")
    drawn = (tmp_path / "s.svg").read_text()
    for words in ("model reads text", "dense: every token", "a: at most 7", "b: at most 9", "tokens seen"):
        assert f"<!-- {words}" in drawn


def test_results_that_do_not_belong_together_are_named(tmp_path):
    mine = results(tmp_path / "a.json", [("dense", "dense", 1.0, 0.0)], baseline="dense")
    other = results(tmp_path / "b.json", [("dense", "dense", 1.0, 0.0)])
    with pytest.raises(FigureError, match="2 baselines"):
        read_points([mine, other])
    (tmp_path / "c.json").write_text('{"scores": [{"arm": 1}]}')
    with pytest.raises(FigureError, match=r"c\.json holds no results of sepjax evaluate compare \(KeyError"):
        read_points([tmp_path / "c.json"])


def test_curves_of_runs(tmp_path):
    for name, scale in (("a", 1.0), ("b", 2.0)):
        rows = [{"step": s, "time": 0.0, "train/loss": scale / s} for s in (1, 2, 3, 2)]
        rows.append({"step": 3, "eval/loss": 9.0})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4, "tra')
    curves = read_curves([tmp_path / "a", tmp_path / "b"], "train/loss")
    assert curves == {"a": ([1, 2, 3], [1, 0.5, 1 / 3]), "b": ([1, 2, 3], [2, 1, 2 / 3])}
    draw_curves(tmp_path / "c.svg", curves, "train/loss")
    assert "train/loss of a, b" in (tmp_path / "c.svg").read_text()
    (tmp_path / "c").mkdir()
    (tmp_path / "a").rename(tmp_path / "c" / "b")
    assert list(read_curves([tmp_path / "c" / "b", tmp_path / "b"], "train/loss")) == ["c/b", f"{tmp_path.name}/b"]
    (tmp_path / "c" / "b").rename(tmp_path / "a")
    with pytest.raises(FigureError, match="has no 'loss'; it has eval/loss, train/loss"):
        read_curves([tmp_path / "a"], "loss")
    with pytest.raises(FigureError, match=r"has no metrics\.jsonl"):
        read_curves([tmp_path], "train/loss")
