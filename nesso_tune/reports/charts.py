"""Data of the charts in a run report: series of `metrics.jsonl`, thinned to what a screen can show.

`templates/report.js` draws them with Plotly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log10
from typing import Any, Literal

from nesso_tune.metric_registry import METRICS, TRAIN_PREFIX, charts
from nesso_tune.runs.metrics_log import is_number

MAX_POINTS = 1000  # of a series: more than a chart has pixels
SOURCE = "source/"  # between the name of a metric and that of a source
Group = Literal["all", "language", "source", "run", "plan"]
Lines = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: in the legend: a metric, e.g. `eval_loss/it`, or a run.
        group: what `part` is a part of; `all` for a metric over all rows.
        part: the language, source or run; the metric for `all`.
        colour: index of the colour; -1 for the colour of text.
        dash: index of the dash pattern; 0 for a solid line.
        x, y: steps and values.
    """

    name: str
    group: Group
    part: str
    colour: int
    dash: int
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """Curves over steps on common axes."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Mark:
    """An event at a step: a resume, an alarm, a checkpoint, the best evaluation or the end of the run."""

    step: int
    kind: Literal["alarm", "resumed", "checkpoint", "best", "end"]
    text: str


def chart_data(charts: Sequence[Chart], marks: Sequence[Mark] = ()) -> dict[str, Any]:
    """Charts and marks as the JSON data of a page."""
    return {"charts": [asdict(chart) for chart in charts], "marks": [asdict(mark) for mark in marks]}


def run_charts(lines: Lines, planned_rates: Sequence[tuple[float, float]] = ()) -> list[Chart]:
    """The charts of one run: each metric over all rows and by language, or by source.

    Args:
        lines: lines of `metrics.jsonl`.
        planned_rates: planned learning rates as (step, rate).
    """
    values = _values(lines)
    colours = _Colours(values)
    found = []
    for title, names in charts().items():
        keys = _keys(names, values) or _keys([f"{TRAIN_PREFIX}{name}" for name in names], values)
        series = [_series(key, names, values[key], colours) for key in keys]
        if series and names == ("learning_rate",) and planned_rates:
            series.append(_curve("plan", "plan", "plan", 0, 1, list(planned_rates)))
        if series:
            found.append(Chart(title, tuple(series)))
    for name in _unregistered(values):  # metrics that were passed to `train`
        keys = _keys((name,), values)
        found.append(Chart(name, tuple(_series(key, (name,), values[key], colours) for key in keys)))
    return found


def _unregistered(values: Mapping[str, Any]) -> list[str]:
    """The metrics over all answers that the registry of this process does not know."""
    names = [name.removeprefix(TRAIN_PREFIX) for name in METRICS]
    return [
        key
        for key in values
        if "/" not in key and not key.startswith(TRAIN_PREFIX) and not any(_belongs(key, name) for name in names)
    ]


def comparison_charts(runs: Mapping[str, Lines], looks: Mapping[str, tuple[int, int]]) -> list[Chart]:
    """The charts of several runs: each metric over all rows, one curve per run.

    Args:
        runs: lines of `metrics.jsonl` of each run.
        looks: index of its variant, which gives the colour, and of the run in it, which gives the dash pattern.
    """
    values = {run: _values(lines) for run, lines in runs.items()}
    found = []
    own = dict.fromkeys(name for run in values for name in _unregistered(values[run]))
    for title, names in (*charts().items(), *((name, (name,)) for name in own)):
        for name in (name for name in names if not name.endswith("/source")):
            series = tuple(
                _curve(run, "run", run, looks[run][0] % COLOURS, looks[run][0] // COLOURS + looks[run][1], points)
                for run, points in ((run, values[run].get(name)) for run in values)
                if points is not None
            )
            if series:
                found.append(Chart(title if len(names) == 1 else f"{title}: {name}", series))
    return found


COLOURS = 7  # in `report.js`


class _Colours:
    """One colour per language and per source, the same in all charts."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        parts = {_part(key, None) for key in keys}
        languages = sorted(part for part in parts if part and not part.startswith(SOURCE) and len(part) <= 3)
        sources = sorted(part for part in parts if part and part.startswith(SOURCE))
        self._index = {part: i for group in (languages, sources) for i, part in enumerate(group)}

    def of(self, part: str) -> int:
        """Index of a language (`it`) or source (`source/NAME`)."""
        return self._index.get(part, 0)


def _part(key: str, names: Sequence[str] | None) -> str:
    """The language (`it`) or source (`source/NAME`) in a key; empty for a metric over all rows."""
    if SOURCE in key:
        return key[key.index(SOURCE) :]
    name = next((name for name in names or () if key in (name, f"{TRAIN_PREFIX}{name}")), None)
    if name is not None:
        return ""
    return key.rpartition("/")[2] if "/" in key else ""


def _series(key: str, names: Sequence[str], points: Points, colours: _Colours) -> Series:
    part = _part(key, names)
    index = next((i for i, name in enumerate(names) if key.removeprefix(TRAIN_PREFIX).startswith(name)), 0)
    if len(names) > 1:  # one colour per metric, one dash pattern per language
        group: Group = "language" if part else "all"
        return _curve(key, group, part or key, index, colours.of(part) + 1 if part else 0, points)
    if not part:
        return _curve(key, "all", key, -1, 0, points)
    number = colours.of(part)
    if part.startswith(SOURCE):
        return _curve(part.removeprefix(SOURCE), "source", part.removeprefix(SOURCE), number % COLOURS,
                      number // COLOURS, points)  # fmt: skip
    return _curve(key, "language", part, number % COLOURS, number // COLOURS, points)


def _curve(name: str, group: Group, part: str, colour: int, dash: int, points: Points) -> Series:
    shown = thinned(points, MAX_POINTS)
    return Series(name, group, part, colour, dash, tuple(x for x, _ in shown), tuple(_rounded(y) for _, y in shown))


def thinned(points: Points, limit: int) -> Points:
    """At most about `limit` of the points: the lowest and the highest of each interval, so that no spike is lost."""
    if len(points) <= limit:
        return points
    size = 2 * len(points) / (limit - 2)
    kept = {0, len(points) - 1}
    for i in range((limit - 2) // 2):
        interval = range(round(i * size), min(round((i + 1) * size), len(points)))
        if interval:
            kept |= {_extreme(points, interval, min), _extreme(points, interval, max)}
    return [points[i] for i in sorted(kept)]


def _extreme(points: Points, interval: range, choose: Callable[..., int]) -> int:
    return choose(interval, key=lambda i: points[i][1])


def _rounded(value: float) -> float:
    """Six significant digits: the page is half as long."""
    return value if value == 0 else round(value, 5 - int(log10(abs(value)) // 1))


def _values(lines: Lines) -> dict[str, Points]:
    """The finite numbers of each key, with their steps."""
    values: dict[str, Points] = {}
    for line in lines:
        if "event" in line:
            continue
        for key, value in line.items():
            if key != "step" and is_number(value):
                values.setdefault(key, []).append((float(line["step"]), float(value)))
    return values


def _keys(names: Sequence[str], values: Mapping[str, Points]) -> list[str]:
    return sorted((key for key in values if any(_belongs(key, name) for name in names)), key=lambda key: (
        next(i for i, name in enumerate(names) if _belongs(key, name)), key))  # fmt: skip


def _belongs(key: str, name: str) -> bool:
    """Whether a key is the metric `name` or part of its breakdown; by source only if `name` ends with `/source`."""
    suffix = key.removeprefix(f"{name}/")
    return key == name or (suffix != key and (name.endswith("/source") or not suffix.startswith(SOURCE)))
