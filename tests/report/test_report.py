"""The page of a run: all that a workdir holds is on it, none of it can break it, and nothing comes from elsewhere."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sepjax.config import Config, to_json
from sepjax.pictures.kept import Frame, KeptText
from sepjax.report.chart import Line, line_chart, thinned, ticks
from sepjax.report.page import page
from sepjax.report.record import ReportError, read_records
from sepjax.report.tables import score_table
from tests.commands import command, refusal

HOSTILE = '</div><script>alert("1")</script><img src=x onerror=y>&amp; {{body}}'


class Read(HTMLParser):
    """Tags, their attributes, and text in order; raises where an element is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())

    def rows(self, *cells):
        """How often these texts stand side by side."""
        words = [word for word in self.words if word]
        return sum(tuple(words[i : i + len(cells)]) == cells for i in range(len(words)))


def score(arm, loss, **more):
    part = {"name": "far", "tokens": 9, "loss": loss, "difference": 0.25, "difference_error": 0.012, "recovered": 0.5}
    return {
        "arm": arm, "pattern": arm, "window_size": 32, "perplexity": 20.5, "perplexity_error": None, "tokens": 1836,
        "kv_kept": 0.362, "difference": -0.01296, "difference_error": 0.003139, "attention": {}, "slices": [part],
    } | more  # fmt: skip


def workdir(folder: Path, *, rate: float = 1.0, step: int = 20) -> Path:
    """What a run leaves, without a run."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "samples").mkdir()
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, name=HOSTILE))
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    (folder / "config.json").write_text(to_json(config))
    rows = [{"step": s, "time": 60.0 * s, "train/loss": 9 / s, "optim/grad_norm": 1.0} for s in range(1, step + 1)]
    rows[4]["train/loss"] = None
    rows += [{"step": s, "time": 60.0 * s, "eval/loss": 5 - s / 100} for s in (0, step)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 9, "tra')
    meta = {"commit": "0123abc", "dirty": True, "versions": {"jax": "0.99"}, "devices": ["TPU v9"] * 2}
    (folder / "run_meta.json").write_text(json.dumps(meta | {"starts": [{"time": "2026-11-30T04:00:00.5"}]}))
    first = {"job": "windows", "text": "/t/book.txt", "step": step, "settings": {"length": 9, "arms": HOSTILE}}
    first |= {"device": "TPU v9", "commit": "0123abcdef01", "scores": [score("dense", 3.0), score(HOSTILE, 3.5)]}
    (folder / "evaluations" / "windows_book.json").write_text(json.dumps(first))
    (folder / "evaluations" / "windows_book.png").write_bytes(b"\x89PNG")
    task = {
        "task": "arc",
        "pattern": "dense",
        "metrics": {"acc,none": 0.5},
        "errors": {"acc,none": 0.02},
        "refused": "",
    }
    (folder / "tasks.json").write_text(json.dumps({"scores": [task]}))  # of --output
    for number in (5, step):
        text = {
            "step": number,
            "settings": {"seed": 0},
            "samples": [{"prompt": "Once", "text": f" {HOSTILE} {number}"}],
        }
        (folder / "samples" / f"step{number}.json").write_text(json.dumps(text))
    return folder


def test_all_of_a_workdir_is_on_its_page_and_nothing_breaks_it(tmp_path):
    kept = KeptText("pattern", (HOSTILE, "b", "c", "d", "e"), (Frame(5, 4, 9, "s039r"),), 4)
    (record,) = read_records([workdir(tmp_path / "run & <1>")])
    text = page([record], {record.name: kept})
    read = Read(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    outside = [x for _, attributes in read.tags for x in (attributes.get("src"), attributes.get("href")) if x]
    assert all(x.startswith(("data:image/png;base64,", "#")) for x in outside)
    assert not re.search(r"https?://|@import|url\(", text)
    assert [w for w in read.words if w in ("Config", "Curves", "Evaluations", "Samples", "Environment")][5:] == [
        "Config", "Curves", "Evaluations", "Samples", "Environment",
    ]  # fmt: skip
    changed = read.words.index("What differs from the defaults")
    assert (
        changed
        < read.words.index("optimizer.learning_rate")
        < next(i for i, word in enumerate(read.words) if re.fullmatch(r"The other \d+ settings", word))
    )
    assert read.rows("data.name", json.dumps(HOSTILE), '"embedded"') == 1
    assert read.rows("evaluation loss, before", "5") == 1
    assert read.rows("evaluation loss, best", "4.8 at step 20") == 1
    lines = [attributes for tag, attributes in read.tags if tag == "polyline"]
    assert [len(x["points"].split()) for x in lines] == [4, 15, 2, 20]  # the loss with its gap, eval, gradient norm
    assert read.rows("length=9  arms=" + HOSTILE, "window size 32, perplexity 20.5, tokens 1,836") == 0
    assert read.rows("window size 32, tokens 1,836") == 1  # said once, for it is the same in all rows
    assert read.rows("20", "dense", "20.5", "36.2%", "-0.0130 ± 0.0031") == 1
    assert read.rows("20", HOSTILE, "20.5", "36.2%", "-0.0130 ± 0.0031") == 1
    assert read.rows("far", "dense", "3", "0.250 ± 0.012", "50.0%") == 1
    assert read.rows("arc", "dense", "0.500 ± 0.020") == 1
    assert read.rows("Once", f"{HOSTILE} 20") == read.rows("Once", f"{HOSTILE} 5") == 1
    assert read.words.index(f"{HOSTILE} 20") < read.words.index("step 5")
    assert read.rows("commit", "0123abc, with changes", "devices", "2 x TPU v9") == 1
    states = [attributes.get("class") for tag, attributes in read.tags if tag == "span"][-5:]
    assert states == ["sink", "gone", "kept", "kept", None]


def test_runs_side_by_side(tmp_path):
    records = read_records([workdir(tmp_path / "a"), workdir(tmp_path / "b", rate=0.5, step=40)])
    read = Read(page(records))
    assert read.rows("Runs a, b") == 2  # title and heading
    assert read.rows("What differs between the runs", "setting", "a", "b", "default") == 1
    assert read.rows("optimizer.learning_rate", "1.0", "0.5", "0.001") == 1
    assert read.rows("windows on book.txt") == 1  # one table
    assert read.rows("a", "20", "dense", "20.5") == read.rows("b", "40", "dense", "20.5") == 1
    dashes = {attributes["stroke-dasharray"] for tag, attributes in read.tags if tag == "polyline"}
    assert dashes == {"", "6 3"}
    assert [x.name for x in read_records([tmp_path / "a", tmp_path / "a"])] == ["a", "a"]


def test_what_others_and_older_versions_left_is_read_as_it_is_meant(tmp_path):
    a, b = workdir(tmp_path / "a"), workdir(tmp_path / "b")
    config = json.loads((a / "config.json").read_text())
    del config["attention"]["cache_dtype"]  # an older version had no such setting
    (a / "config.json").write_text(json.dumps(config))
    (a / "kept.json").write_text("[3, 5]")  # the user's own
    with (a / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 30, "train/loss": NaN, "optim/grad_norm": "much"}\n')
    for folder, text in ((a, "book.txt"), (b, "../t/book.txt")):  # one text, named from two places
        file = folder / "evaluations" / "windows_book.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"text": text, "settings": {"text": "/t/book.txt"}}))
    (folder / "samples" / "step20_abc.json").write_text(json.dumps({"step": 20, "samples": [{"text": "other prompt"}]}))
    records = read_records([a, b])
    assert records[0].curves["train/loss"][1][-1] is None
    assert 30 not in records[0].curves["optim/grad_norm"][0]
    text = page(records)
    read = Read(text)
    assert "What differs between the runs" not in read.words
    assert read.rows("windows on book.txt") == 1
    assert "other prompt" in read.words
    assert "step 20" not in re.findall("<summary>(.*?)</summary>", text)
    (a / "evaluations" / "x.json").write_text("[3, 5]")
    with pytest.raises(ReportError, match=r"x\.json is not a JSON object"):
        read_records([a])


def test_a_column_has_what_differs():
    record = [("a", _evaluation(score("x", 1.0, window_size=5), score("y", 1.0)))]
    table = score_table(record)
    assert (
        table.columns
        == ("arm", "pattern", "window_size", "perplexity", "difference", "kv_kept")[:1] + table.columns[1:]
    )
    assert "pattern" not in table.columns  # the same as the arm
    assert table.columns[1] == "window_size"
    assert table.caption == "tokens 1,836"


def _evaluation(*scores):
    from sepjax.report.record import Evaluation

    return Evaluation(Path("e.json"), "windows", "", None, {}, scores, "")


def test_charts_show_spikes_gaps_and_round_numbers():
    values = [1.0 + (i == 777) * 5e3 for i in range(5000)]
    points = thinned(range(5000), values)
    assert len(points) <= 400
    assert (777, 5001.0) in points
    chart = line_chart("norm", "", [Line("a <b>", range(5000), values, 0)])
    assert "norm, logarithmic" in chart
    assert "a &lt;b&gt;" in chart
    assert "logarithmic" not in line_chart("loss", "", [Line("a", [1, 2], [1.0, -3.0], 0)])
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(3, 4000, 6) == [1000, 2000, 3000, 4000]
    assert "nothing" in line_chart("loss", "", [Line("a", [1], [None], 0)])  # never a finite number
    assert "<circle" in line_chart("loss", "", [Line("a", [1], [2.0], 0)])  # a single one
    lone = [None if i % 2 else 1.0 for i in range(100)]  # the seventh run has the first one's colour again
    assert 'class="dot c0"' in line_chart("loss", "", [Line("a", range(100), lone, 6)])


def test_the_command_writes_the_page_and_names_mistakes(tmp_path, capfd):
    run = workdir(tmp_path / "run")
    ended = command(capfd, "report", f"--workdir={run}")
    assert (ended.code, ended.out) == (0, f"written to {run}/report.html\n")
    assert Read((run / "report.html").read_text()).rows("Run run") == 2
    again = command(capfd, "report", f"--workdirs={run},{workdir(tmp_path / 'b')}", f"--output={tmp_path}/both.html")
    assert again.out == f"written to {tmp_path}/both.html\n"
    assert "got neither" in refusal(capfd, "report")
    assert "--prompt does nothing without --samples" in refusal(capfd, "report", f"--workdir={run}", "--prompt=a")
    assert "--arm does nothing without --kept" in refusal(capfd, "report", f"--workdir={run}", "--arm=dense")
    assert "has no config.json" in refusal(capfd, "report", f"--workdir={tmp_path}")
    (run / "run_meta.json").write_text("[")
    with pytest.raises(ReportError, match=r"run_meta\.json is not JSON"):
        read_records([run])
