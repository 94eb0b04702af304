"""`sepjax evaluate` within this process: every setting of a job reaches what scores, and files are where it says."""

import dataclasses
import json
import re
from typing import Any

import pytest

from sepjax import programs
from sepjax.config import AttentionConfig, ConfigError
from sepjax.data.errors import DataError
from sepjax.evaluation import jobs, needle, recall
from sepjax.programs import COMMANDS
from sepjax.programs.evaluate import common
from tests.commands import Called, command, leaves, own_flags, unlike
from tests.hub.test_gguf_file import write

CALLS = {
    "windows": "evaluate",
    "compare": "evaluate",
    "stream": "stream",
    "needle": "find_needles",
    "tasks": "run_tasks",
}
JOBS = [name.split()[1] for name in COMMANDS if name.startswith("evaluate ")]


@pytest.mark.parametrize("job", JOBS)
def test_no_setting_is_lost_on_its_way(job, monkeypatch, tmp_path):
    module = programs.program(f"evaluate {job}")
    seen: list[Any] = []

    def spy(*arguments, **named):
        seen.append((arguments, named))
        raise Called

    if job == "recall":
        monkeypatch.setattr(recall, "score_run", spy)
    else:
        monkeypatch.setattr(jobs, CALLS[job], spy)
    values = {flag.name: unlike(flag, i) for i, flag in enumerate(own_flags(module.Settings))}
    values["output"] = str(tmp_path / "scores.json")
    if "arms" in values:  # whose words are read before a model is
        values["arms"] = "sink_window n=8"
    ways = [{"model": None, "download": False}, {"workdir": None}]
    ways = [way | other for way in ways for other in ({"arms": ""}, {"patterns": None, "budgets": None})]
    found: set[str] = set()
    for way in ways:
        given = values | {name: value for name, value in way.items() if name in values}
        with pytest.raises(Called):
            module.main(module.Settings(**given))
        reached = leaves(list(seen.pop()))
        for name, value in given.items():
            percents = [x / 100 for x in value] if name == "depths" else None
            if value in reached or percents in reached:
                found.add(name)
    assert set(values) - found == {"output"}


def test_arms_begin_with_the_models_own_settings_and_the_window_that_is_asked_for(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf")
    (tmp_path / "text.txt").write_text("abc, ab. a bc, c " * 20)
    model, tokenizer = jobs.load(tmp_path / "m.gguf")
    own = AttentionConfig(pattern="gated", gate_layer=0, gate_stretch=4, gate_keep=2, kept_layers=(1,), cache_size=200)
    model.attention = own
    seen: list[Any] = []
    monkeypatch.setattr(jobs, "load", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr(needle, "needle_grid", lambda model, tokenizer, haystack, arms, **_: seen.extend(arms) or [])
    monkeypatch.setattr(jobs.compare, "score_arms", lambda other, windows, arms, **_: seen.extend(arms) or [])
    arms = "gated; sink_window; separator n=9"
    expected = [
        dataclasses.replace(own, cache_size=0, window_size=300),
        dataclasses.replace(own, cache_size=0, window_size=300, pattern="sink_window", kept_layers=()),
        dataclasses.replace(own, cache_size=0, window_size=9, pattern="separator", kept_layers=()),
    ]
    cut: dict[str, Any] = {"text": str(tmp_path / "text.txt"), "arms": arms, "window_size": 300}
    jobs.find_needles(tmp_path / "m.gguf", (), lengths=[9], depths=[0.5], **cut)
    assert [arm.attention for arm in seen] == expected
    seen.clear()
    jobs.evaluate(tmp_path / "m.gguf", length=16, **cut)
    assert [arm.attention for arm in seen] == expected
    with pytest.raises(ConfigError, match=r"--text_key=body does nothing for --text=.*text\.txt, which has no fields"):
        jobs.evaluate(tmp_path / "m.gguf", length=16, text_key="body", **cut)
    starts: list[Any] = []
    monkeypatch.setattr(needle, "needle_grid", lambda *_, start, **__: starts.append(start) or [])
    for trained in (False, True):  # texts begin as documents of a run do
        monkeypatch.setattr(jobs, "is_trained", lambda _, trained=trained: trained)
        jobs.find_needles(tmp_path / "m.gguf", (), lengths=[9], depths=[0.5], **cut)
    assert starts == [None, [tokenizer.document_start]]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "abc, ab. a bc, c " * 20}) + "\n")
    cut["text"] = str(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="'text'"):
        jobs.evaluate(tmp_path / "m.gguf", length=16, **cut)
    jobs.evaluate(tmp_path / "m.gguf", length=16, text_key="body", **cut)
    with pytest.raises(ConfigError, match="--text_key does nothing for the run's own corpus"):
        programs.program("evaluate windows").Settings(model="m", text_key="body")


def test_results_are_named_by_what_was_scored(tmp_path, monkeypatch):
    """Another job, model, text or setting never takes the place of a result; only the same thing again does."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a/SmolLM2-1.7B", "b/SmolLM2-1.7B", "books"):
        (tmp_path / folder).mkdir(parents=True)

    def name(job, **settings):
        found = programs.program(f"evaluate {job}").Settings(**{"model": "a/SmolLM2-1.7B", "text": "books"} | settings)
        return str(common.begin(found, job)[1])

    first = name("windows")
    assert re.fullmatch(r"evaluations/windows_SmolLM2-1.7B_books_[0-9a-f]{6}\.json", first)
    assert not (tmp_path / "evaluations").exists()  # nothing is scored yet
    same = [{"batch_size": 3}, {"model": f"{tmp_path}/a/SmolLM2-1.7B"}, {"text": "../" + tmp_path.name + "/books/"}]
    assert {name("windows", **settings) for settings in same} == {first}
    others = [
        {"model": "b/SmolLM2-1.7B"},
        {"text": "a"},
        {"length": 9},
        {"arms": "dense; sink_window n=3"},
        {"bos": False},
    ]
    others += [{"text": "/elsewhere/books"}, {"patterns": ("dense",)}, {"dtype": "bfloat16"}]
    names = {first, name("compare"), name("stream"), *(name("windows", **settings) for settings in others)}
    assert len(names) == 3 + len(others)
    assert "tasks_SmolLM2-1.7B_a-b-c_" in str(
        common.begin(programs.program("evaluate tasks").Settings(model="a/SmolLM2-1.7B", task=("a", "b/c")), "tasks")[1]
    )
    (tmp_path / "0a1b2c").touch()  # as caches of the hub have it: the name is the link's
    for link in ("tiny.gguf", "train.jsonl"):
        (tmp_path / link).symlink_to("0a1b2c")
    assert name("windows", model="tiny.gguf", text="train.jsonl").startswith("evaluations/windows_tiny_train_")
    assert name("windows", output="mine.json") == "mine.json"
    versions = set()  # of a file of arms, whose name stays
    for window in (3, 4):
        (tmp_path / "mine.arm").write_text(f"sink_window n={window}\n")
        versions.add(name("windows", arms="dense; @mine.arm"))
    assert len(versions) == 2
    assert name("windows", arms="dense; mine: sink_window n=4") in versions
    with pytest.raises(ConfigError, match=r"'@none\.arm'"):
        name("windows", arms="@none.arm")


def test_a_stream_is_scored_and_its_curve_written_beside_the_output(tmp_path, capfd):
    write(tmp_path / "m.gguf")
    (tmp_path / "text.txt").write_text("abc, ab. a bc, c " * 20)
    flags = [f"--text={tmp_path}/text.txt", f"--output={tmp_path}/scores.json", "--budgets=2/4/8/20", "--rows=1"]
    ended = command(capfd, "evaluate", "stream", f"--model={tmp_path}/m.gguf", *flags, "--patterns=sink_window")
    assert ended.code == 0, ended.err
    assert (
        f"written to {tmp_path}/scores.json\ncurve by position: {tmp_path}/scores.csv, {tmp_path}/scores.png\n"
        in ended.out
    )
    written = json.loads((tmp_path / "scores.json").read_text())
    (score,) = written["scores"]
    assert (score["cache_size"], score["pattern"], written["text"]) == (20, "sink_window", f"{tmp_path}/text.txt")
    assert (tmp_path / "scores.csv").exists()
