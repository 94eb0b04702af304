"""The page: config, curves, evaluations, samples, kept tokens and environment, of one run or several side by side."""

import base64
import datetime
import html
import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepjax.report.chart import DASHES, Line, line_chart, number
from sepjax.report.record import Evaluation, Record, Samples, defaults
from sepjax.report.tables import Table, score_table, slice_table

if TYPE_CHECKING:
    from sepjax.pictures.kept import KeptText

_CHARTS = {
    "train/loss": ("Training loss", "nats a token"),
    "eval/loss": ("Evaluation loss", "nats a token"),
    "optim/grad_norm": ("Gradient norm", "before clipping"),
    "throughput/tokens_per_second": ("Tokens a second", "all devices"),
}
_escape = html.escape


def page(records: Sequence[Record], kept: Mapping[str, "KeptText"] | None = None) -> str:
    """The whole page, which needs nothing from elsewhere and no script.

    Args:
      records: of `sepjax.report.record.read_records`.
      kept: name of a run -> the tokens that its cache keeps of a text, if they are to be shown.
    """
    names = [record.name for record in records]
    title = f"Run {names[0]}" if len(records) == 1 else f"Runs {', '.join(names)}"
    sections = {
        "Summary": _summary(records),
        "Config": _config(records),
        "Curves": _curves(records),
        "Evaluations": _evaluations(records),
        "Samples": _beside(records, {x.name: _samples(x.samples) for x in records if x.samples}),
        "Kept tokens": _beside(records, {name: _kept(found) for name, found in (kept or {}).items()}),
        "Environment": _environment(records),
    }
    present = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in present)
    parts = [f"<h1>{_escape(title)}</h1><nav>{links}</nav>"]
    parts += [f'<section id="{_anchor(name)}"><h2>{name}</h2>{body}</section>' for name, body in present.items()]
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    filled = {"{{title}}": _escape(title), "{{body}}": "\n".join(parts)}
    return re.sub("{{title}}|{{body}}", lambda found: filled[found[0]], template)  # in one pass: texts may say {{body}}


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _grid(rows: Mapping[str, Sequence[str]], records: Sequence[Record], head: str = "") -> str:
    """A table with a row for each name and a column for each run."""
    columns = (head, *(record.name for record in records))
    return Table("", columns, tuple((name, *cells) for name, cells in rows.items())).html()


def _summary(records: Sequence[Record]) -> str:
    found = [_facts(record) for record in records]
    names = list(dict.fromkeys(name for facts in found for name in facts))
    return _grid({name: [facts.get(name, "") for facts in found] for name in names}, records)


def _facts(record: Record) -> dict[str, str]:
    facts = {"workdir": str(record.workdir), "attention": str(record.config.get("attention.pattern", ""))}
    if "train/loss" in record.curves:
        steps, values = record.curves["train/loss"]
        finite = [v for v in values if v is not None]
        facts["steps"] = f"{steps[-1]:,} of {record.config.get('training.steps', 0):,}"
        facts["training loss, last"] = number(finite[-1]) if finite else "not finite"
    if pairs := _finite(record, "eval/loss"):
        best = min(pairs, key=lambda x: x[1])
        facts["evaluation loss, last"] = f"{number(pairs[-1][1])} at step {pairs[-1][0]:,}"
        facts["evaluation loss, best"] = f"{number(best[1])} at step {best[0]:,}"
        if pairs[0][0] == 0:
            facts["evaluation loss, before"] = number(pairs[0][1])
    if speeds := _finite(record, "throughput/tokens_per_second"):
        facts["tokens a second, median"] = number(statistics.median(v for _, v in speeds))
    if len(record.times) == 2:
        ended = datetime.datetime.fromtimestamp(record.times[1], datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        facts["last line"] = f"{ended}, {(record.times[1] - record.times[0]) / 60:.1f} minutes after the first"
    return facts


def _finite(record: Record, metric: str) -> list[tuple[int, int | float]]:
    steps, values = record.curves.get(metric, ((), ()))
    return [(step, v) for step, v in zip(steps, values, strict=True) if v is not None]


def _config(records: Sequence[Record]) -> str:
    """What differs from the defaults first; of several runs before that what differs between them."""
    plain = defaults()
    names = list(dict.fromkeys(name for record in records for name in record.config))
    values = {name: [json.dumps(record.config.get(name)) for record in records] for name in names}
    apart = [name for name in names if len(set(values[name])) > 1]
    changed = [x for x in names if x not in apart and any(x in record.changed for record in records)]
    rest = [name for name in names if name not in apart and name not in changed]

    def rows(chosen: Sequence[str]) -> str:
        default = {name: json.dumps(plain[name]) if name in plain else "" for name in chosen}
        columns = ("setting", *(record.name for record in records), "default")
        return Table("", columns, tuple((x, *values[x], default[x]) for x in chosen)).html()

    parts = [f"<h3>What differs between the runs</h3>{rows(apart)}"] if apart else []
    parts += [f"<h3>What differs from the defaults</h3>{rows(changed)}"] if changed else []
    parts.append(f"<details><summary>The other {len(rest)} settings</summary>{rows(rest)}</details>" if rest else "")
    return "".join(parts)


def _curves(records: Sequence[Record]) -> str:
    charts = []
    for metric, (title, unit) in _CHARTS.items():
        lines = [Line(x.name, *x.curves[metric], number=i) for i, x in enumerate(records) if metric in x.curves]
        if lines:
            charts.append(line_chart(title, unit, lines))
    if not charts:
        return ""
    return (_legend(records) if len(records) > 1 else "") + f'<div class="charts">{"".join(charts)}</div>'


def _legend(records: Sequence[Record]) -> str:
    items = []
    for i, record in enumerate(records):
        style = f'class="line c{i % len(DASHES)}" stroke-dasharray="{DASHES[i % len(DASHES)]}"'
        swatch = f'<svg viewBox="0 0 40 12" aria-hidden="true"><line {style} x1="0" x2="40" y1="6" y2="6"/></svg>'
        items.append(f"<li>{swatch}{_escape(record.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _evaluations(records: Sequence[Record]) -> str:
    """A table for each thing that was scored, with the runs and steps of which it was."""
    found: dict[str, list[tuple[str, Evaluation]]] = {}
    for record in records:
        for evaluation in record.evaluations:
            found.setdefault(evaluation.of_what, []).append((record.name, evaluation))
    return "".join(_evaluation(some) for some in found.values())


def _evaluation(some: Sequence[tuple[str, Evaluation]]) -> str:
    first = some[0][1]
    on = f" on {Path(first.text).name}" if first.text else ""
    said = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in first.settings.items()
    ]
    parts = [f"<h3>{_escape(first.job + on)}</h3>"]
    parts += [f'<p class="setting">{_escape("  ".join(said))}</p>'] if said else []
    parts.append(score_table(some).html())
    slices = slice_table(some)
    parts += [f"<h3>{_escape(first.job + on)}: loss by slice</h3>{slices.html()}"] if slices else []
    parts += [_picture(name, evaluation) for name, evaluation in some]
    sources = dict.fromkeys(f"{evaluation.file.name}: {evaluation.made}" for _, evaluation in some)
    return "".join(parts) + "".join(f"<p>{_escape(source)}</p>" for source in sources)


def _picture(name: str, evaluation: Evaluation) -> str:
    """The picture that the job has written beside its file, if any."""
    file = evaluation.file.with_suffix(".png")
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    alt = _escape(f"{evaluation.job} of {name}")
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>'


def _beside(records: Sequence[Record], bodies: Mapping[str, str]) -> str:
    """Side by side, each under the name of its run where there are several."""
    if len(records) == 1:
        return "".join(bodies.values())
    parts = (f"<div><h3>{_escape(name)}</h3>{body}</div>" for name, body in bodies.items())
    return f'<div class="beside">{"".join(parts)}</div>' if bodies else ""


def _samples(samples: Sequence[Samples]) -> str:
    """The newest step's texts; those of earlier steps folded."""
    parts = [_texts(x) for x in samples if x.step == samples[0].step]
    earlier = [x for x in samples if x.step != samples[0].step]
    parts += [f"<details><summary>step {x.step}</summary>{_texts(x)}</details>" for x in earlier]
    return "".join(parts)


def _texts(samples: Samples) -> str:
    said = ", ".join(f"{name} {value}" for name, value in samples.settings.items())
    step = "" if samples.step is None else f"step {samples.step}"
    texts = [
        f'<div class="text"><span class="prompt">{_escape(str(x.get("prompt", "")))}</span>'
        f"{_escape(str(x.get('text', '')))}</div>"
        for x in samples.texts
    ]
    return f"<p>{_escape(', '.join(filter(None, (step, said))))}</p>" + "".join(texts)


def _kept(picture: "KeptText") -> str:
    """The text as it stands at the end; neighbours of one state in one element."""
    shown = picture.frames[-1]
    parts = []
    for state, pairs in itertools.groupby(zip(picture.tokens, shown.states, strict=False), lambda pair: pair[1]):
        text = _escape("".join(piece for piece, _ in pairs))
        kind = {"s": ' class="sink"', "0": ' class="gone"', "r": ""}.get(state)
        if kind is None:
            kind = f' class="kept" style="--share: {0.1 + 0.8 * int(state) / 9:.2f}"'
        parts.append(f"<span{kind}>{text}</span>")
    key = (
        '<p><span class="sink">sink</span>, <span class="kept" style="--share: .9">kept by all that keep</span>, '
        '<span class="kept" style="--share: .3">by some</span>, recent, <span class="gone">gone</span></p>'
    )
    said = f"<p>{_escape(picture.title)}; {_escape(picture.caption(shown))}</p>"
    return f'{said}{key}<div class="text">{"".join(parts)}</div>'


def _environment(records: Sequence[Record]) -> str:
    found = [_surroundings(record.meta) for record in records]
    names = list(dict.fromkeys(name for one in found for name in one))
    return _grid({name: [one.get(name, "") for one in found] for name in names}, records) if names else ""


def _surroundings(meta: Mapping[str, Any]) -> dict[str, str]:
    if not meta:
        return {}
    commit = f"{meta.get('commit') or 'not known'}{', with changes' if meta.get('dirty') else ''}"
    devices = [str(device) for device in meta.get("devices", [])]
    kinds = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
    versions = {name: str(version) for name, version in meta.get("versions", {}).items() if version}
    starts = [start for start in meta.get("starts", []) if isinstance(start, dict)]
    facts = {"commit": commit, "devices": kinds, "processes": str(meta.get("processes", ""))}
    facts |= {"platform": str(meta.get("platform", "")), "seed": str(meta.get("seed", "")), **versions}
    facts["command"] = " ".join(map(str, meta.get("argv", [])))
    return facts | {"starts": ", ".join(str(start.get("time", ""))[:19] for start in starts)}
