"""Results of several models as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nesso_tune.evaluation.results import Metric, ModelResult
from nesso_tune.evaluation.suites import Suite

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution
BEST, TIED, NONE = "*", "~", "-"


def to_json(name: str, suite: Suite, results: Sequence[ModelResult]) -> dict[str, Any]:
    """{suite: {metric: value}} of one model; of several models, {model: {suite: {metric: value}}}.

    A standard error has the name of its metric and the suffix `_stderr`.
    """
    each = {}
    for result in results:
        values: dict[str, float] = {}
        for metric, found in _shown(suite, result).items():
            values[metric] = found.value
            if found.stderr is not None:
                values[f"{metric}_stderr"] = found.stderr
        each[result.model] = {name: values}
    return each[results[0].model] if len(results) == 1 else each


def to_lines(suite: Suite, results: Sequence[ModelResult]) -> list[str]:
    """The table: a row for each metric, a column for each model with its standard error, and the published results.

    With several models, `*` marks the best one, and `~` those whose difference from it is within 1.96 standard errors.
    """
    rows = [["", *(_short(result.model) for result in results), *suite.reference]]
    columns = [_shown(suite, result) for result in results]
    for name, label in labels(suite).items():
        found = [column.get(name) for column in columns]
        if not any(found):
            continue
        marks = _marks(found)
        own = [f"{_value(metric)}{mark}" for metric, mark in zip(found, marks, strict=True)]
        published = [f"{values[name]:.4f}" if name in values else NONE for values in suite.reference.values()]
        rows.append([label, *own, *published])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths,
                                                                                                      strict=True)))
        for row in rows
    ]  # fmt: skip
    if len(results) > 1:
        lines += ["", f"{BEST} best; {TIED} not distinguishable from the best (difference within 1.96 standard errors)"]
    return lines


def _shown(suite: Suite, result: ModelResult) -> dict[str, Metric]:
    metrics = result.metrics
    return {name: metrics[name] for name in suite.metric_names if name in metrics}


def labels(suite: Suite) -> dict[str, str]:
    """The label of each metric's row; the metric is added to a label that has several rows."""
    labels = {}
    for task in suite.tasks:
        label = task.label or task.task
        for metric, name in zip(task.metrics, task.metric_names, strict=True):
            labels[name] = label if task.label is not None and len(task.metrics) == 1 else f"{label} {metric}"
    return labels


def _value(metric: Metric | None) -> str:
    if metric is None:
        return NONE
    return f"{metric.value:.4f}" + (f" ± {metric.stderr:.4f}" if metric.stderr is not None else "")


def _marks(metrics: Sequence[Metric | None]) -> list[str]:
    """The mark of each model; none with fewer than two models, or for a metric without a better direction."""
    known = [metric for metric in metrics if metric is not None]
    if len(metrics) < 2 or not known or known[0].better is None:
        return [""] * len(metrics)
    sign = 1 if known[0].better == "higher" else -1
    best = max(known, key=lambda metric: sign * metric.value)
    marks = []
    for metric in metrics:
        if metric is None:
            marks.append(" ")
        elif metric.value == best.value:
            marks.append(BEST)
        else:
            error = stderr_of_difference(metric, best)
            marks.append(TIED if error is not None and abs(metric.value - best.value) <= Z95 * error else " ")
    return marks


def stderr_of_difference(a: Metric, b: Metric) -> float | None:
    """Standard error of the difference of two means: paired if both have scores of the same prompts.

    Returns:
        None if a standard error is missing.
    """
    if a.scores and a.prompts == b.prompts and a.weights == b.weights and len(a.scores) > 1:
        w: Sequence[float] = a.weights or [1.0] * len(a.scores)
        n, total = len(w), math.fsum(w)
        differences = [x - y for x, y in zip(a.scores, b.scores, strict=True)]
        mean = math.fsum(d * weight for d, weight in zip(differences, w, strict=True)) / total
        squares = math.fsum((weight * (d - mean)) ** 2 for d, weight in zip(differences, w, strict=True))
        return math.sqrt(squares * n / (n - 1)) / total
    return None if a.stderr is None or b.stderr is None else math.hypot(a.stderr, b.stderr)


def _short(model: str) -> str:
    """The end of a long model name, which tells checkpoints apart."""
    return model if len(model) <= 28 else f"…{model[-27:]}"
