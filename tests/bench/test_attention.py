"""The attention bench: what it counts, and that its table and JSON say what was measured."""

import dataclasses
import json

import numpy as np
import pytest

from sepjax.bench import attention as bench
from sepjax.config import ConfigError
from sepjax.measure import Timing

SMALL = bench.Settings(
    lengths=(16,),
    tokens=32,
    density=0.2,
    window_size=4,
    num_sinks=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dtype="float32",
    document_lengths=(10, 3),
    implementations=("best", "reference"),
    repeats=2,
    seconds=0.0,
)


def row(**changes) -> bench.Row:
    return bench.Row(
        **{
            "length": 100,
            "rows": 1,
            "passes": "forward",
            "implementation": "best",
            "ours": Timing(2.0, (2.0,), 1),
            "dense": Timing(5.0, (5.0,), 1),
            "window": bench.Failure("too wide"),
            "pairs": 10**6,
            "dense_pairs": 4 * 10**6,
            "layout_milliseconds": 0.5,
        }
        | changes
    )


@pytest.mark.soak  # eight programs; what is counted is below
def test_writes_a_table_and_json(capsys, tmp_path):
    bench.main(dataclasses.replace(SMALL, json=str(tmp_path / "bench.json")))
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["settings"] | {"json": None} == json.loads(json.dumps(dataclasses.asdict(SMALL)))
    assert "without cuDNN (cpu, float32)" in report["baseline"]
    assert report["baseline"] in printed
    cases = [(r["length"], r["rows"], r["passes"], r["implementation"]) for r in report["rows"]]
    assert cases == [
        (length, rows, passes, name)
        for length, rows in ((16, 2),)
        for passes in ("forward", "forward+backward")
        for name in ("best", "reference")
    ]
    assert all(r[column]["milliseconds"] > 0 for r in report["rows"] for column in ("ours", "dense", "window"))
    assert len([line for line in printed.splitlines() if line.split()[:1] == ["16"]]) == len(cases)


def test_pairs_are_those_of_the_mask():
    layout = bench.make_inputs(SMALL, 1, 64)[3]
    first = next(r for r in bench.measure(dataclasses.replace(SMALL, lengths=(64,))))
    assert first.pairs == np.asarray(layout.as_mask()).sum()
    assert first.dense_pairs == 64 * 65 // 2
    documents = np.unique(np.asarray(layout.document_start))
    assert documents.tolist() == [0, 10, 13, 23, 26, 36, 39, 49, 52, 62]


def test_ratios_and_rates():
    derived = row().derived(bench.Settings())
    assert derived["speedup"] == 2.5
    assert derived["ideal_speedup"] == 4.0
    assert derived["tflops_per_second"] == pytest.approx(4 * 32 * 128 * 1e6 / 2e-3 / 1e12)
    assert derived["dense_tflops_per_second"] == pytest.approx(4 * 32 * 128 * 4e6 / 5e-3 / 1e12)
    both = row(passes="forward+backward").derived(bench.Settings())
    assert both["tflops_per_second"] == pytest.approx(3.5 * derived["tflops_per_second"])


def test_a_figure_that_is_missing_says_why():
    failed = row(ours=bench.Failure("out of memory"))
    assert failed.derived(bench.Settings())["speedup"] is None
    assert bench.table_line(failed, bench.Settings()).split()[3:7] == ["best", "-", "5.000", "-"]
    foot = bench.table_foot([failed])
    assert "T = 100, best: out of memory" in foot
    assert "T = 100, window: too wide" in foot


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"implementations": ("nonsense",)}, "--implementations=nonsense"),
        ({"implementations": ()}, "--implementations"),
        ({"num_heads": 3, "num_kv_heads": 2}, "multiple"),
        ({"lengths": ()}, "--lengths"),
    ],
)
def test_settings_that_cannot_work_are_errors(changes, names):
    with pytest.raises(ConfigError, match=names):
        bench.check(dataclasses.replace(SMALL, **changes))
