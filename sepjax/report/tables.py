"""Tables of evaluations, of whatever job: what differs between rows is a column, what does not is said once above."""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sepjax.report.chart import number
from sepjax.report.record import Evaluation

# Results are columns in any case, and so is what names a row.
_RESULTS = ("perplexity", "bits_per_byte", "difference", "loss", "found", "recalled", "kv_kept", "refused")
_NAMES = ("run", "step", "task", "slice", "arm", "pattern")
_SHARES = ("kv_kept", "attention_fraction", "found", "recalled", "recovered", "depth")  # are shown as percentages
_ERROR_OF = {"found", "recalled"}  # whose error is called "error" alone
_SLICE = ("tokens", "loss", "difference", "difference_error", "recovered", "recovered_error")
# Have tables of their own or none, or say in other words what another column says.
_PARTS = ("slices", "positions", "buckets", "layer_kept", "attention", "window_perplexity", "keys")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, as text."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self) -> str:
        """A <table>; everything in it is escaped."""
        head = "".join(f'<th scope="col">{html.escape(_words(column))}</th>' for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td{_kind(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _words(column: str) -> str:
    return column.replace("_", " ")


def _kind(cell: str) -> str:
    return ' class="number"' if cell[:1].isdigit() or cell[:1] in "-+" else ""


def score_table(evaluations: Sequence[tuple[str, Evaluation]]) -> Table:
    """The scores of evaluations of the same thing; of each (name of its run, evaluation)."""
    several = len({name for name, _ in evaluations}) > 1
    rows = []
    for name, evaluation in evaluations:
        lead = ({"run": name} if several else {}) | ({} if evaluation.step is None else {"step": evaluation.step})
        rows += [lead | _plain(score) for score in evaluation.scores]
    return _table(rows)


def slice_table(evaluations: Sequence[tuple[str, Evaluation]]) -> Table | None:
    """The loss by slice, if they have any."""
    several = len({name for name, _ in evaluations}) > 1
    rows = []
    for name, evaluation in evaluations:
        for score in evaluation.scores:
            for part in score.get("slices") or ():
                lead = ({"run": name} if several else {}) | {"slice": part.get("name", ""), "arm": _arm(score)}
                rows.append(lead | {x: part.get(x) for x in _SLICE})
    order = list(dict.fromkeys(row["slice"] for row in rows))
    return _table(sorted(rows, key=lambda row: order.index(row["slice"]))) if rows else None


def _arm(score: Mapping[str, Any]) -> str:
    return str(score.get("arm") or score.get("pattern") or "")


def _plain(score: Mapping[str, Any]) -> dict[str, Any]:
    """Single values by name; metrics of tasks, which come as an object, with their errors."""
    found: dict[str, Any] = {}
    for name, value in score.items():
        if name == "metrics" and isinstance(value, dict):
            errors = score.get("errors") or {}
            for metric, result in value.items():
                found |= {metric: result, f"{metric}_error": errors.get(metric)}
        elif name not in _PARTS and not isinstance(value, dict | list):
            found[name] = value
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    errors = {name: _error_of(name, names) for name in names}
    values = [name for name in names if name not in errors.values()]
    constant = {name: rows[0].get(name) for name in values if len({repr(row.get(name)) for row in rows}) == 1}
    is_column = {x: x in _NAMES or x in _RESULTS or x not in constant or errors[x] is not None for x in values}
    empty = {name for name, value in constant.items() if value in (None, "")}
    columns = [x for x in (*_NAMES, *values) if is_column.get(x) and x not in empty]
    columns = list(dict.fromkeys(columns))
    if {"arm", "pattern"} <= set(columns) and all(row.get("arm") == row.get("pattern") for row in rows):
        columns.remove("pattern")
    said = [f"{_words(x)} {_cell(x, constant[x], None)}" for x in values if not is_column[x] and x not in empty]
    cells = [tuple(_cell(x, row.get(x), row.get(errors[x] or "")) for x in columns) for row in rows]
    return Table(", ".join(said), tuple(columns), tuple(cells))


def _error_of(name: str, names: Sequence[str]) -> str | None:
    """The column that has the standard error of this one."""
    own = f"{name}_error"
    return own if own in names else "error" if name in _ERROR_OF and "error" in names else None


def _cell(name: str, value: Any, error: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name in _SHARES:
        return f"{value:.1%}" + (f" ± {error:.1%}" if isinstance(error, int | float) and error > 0 else "")
    if name == "step":
        return str(value)
    return _with_error(value, error) if isinstance(error, int | float) and error > 0 else number(value)


def _with_error(value: int | float, error: int | float) -> str:
    """Two digits of the error, and as many places of the value."""
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{places}f} ± {error:.{places}f}"
