"""What the files of a run directory say, for the pages that show it.

Everything comes from files, so a page can be written while a run trains, after it ended in any way, and again later.
Private sources are hidden in all of these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.evaluation.records import Evaluations, read_records
from nesso_tune.metric_registry import better_direction
from nesso_tune.reports.data_report import JSON_NAME
from nesso_tune.runs.layout import CANDIDATE, FINAL, METRICS, run_manifest
from nesso_tune.runs.metrics_log import exported_value, is_number, read_metrics
from nesso_tune.runs.run_status import RunStatus, read_status, status_in_words


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run directory say.

    Attributes:
        path: the run directory.
        manifest: of the run; empty if there is none yet.
        lines: of `metrics.jsonl`.
        data: the data report; empty if there is none.
        status: how the run was planned and how it ended; None for a run of an earlier version.
        evaluations: results of its model, in final/, or in candidate/ if a gate refused it.
    """

    path: Path
    manifest: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]
    status: RunStatus | None
    evaluations: Evaluations

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Reads a run directory.

        Raises:
            RunEnvironmentError: if it is not one, or its manifest is damaged.
        """
        metrics, manifest = path / METRICS, run_manifest(path, overwrite=False)
        if manifest is None:
            raise RunEnvironmentError(str(path), "is not a run directory", "name the output_dir of a run")
        lines = read_metrics(metrics) if metrics.is_file() else []
        model = path / (FINAL if (path / FINAL).is_dir() else CANDIDATE)
        data, status = _json(path / JSON_NAME), read_status(path)
        return cls(path, manifest, lines, data, status, read_records(model))

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe in the manifest, with private values hidden."""
        return self.manifest.get("recipe") or {}

    @cached_property
    def measured(self) -> list[Mapping[str, Any]]:
        """The lines with metrics."""
        return [line for line in self.lines if "event" not in line]

    @cached_property
    def state(self) -> str:
        """The state of the run as text."""
        return status_in_words(self.path)

    def values(self, metric: str) -> list[float]:
        """The values of a metric that are numbers, in the order of steps."""
        return [line[metric] for line in self.measured if is_number(line.get(metric))]

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None without one."""
        values = self.values(metric)
        return values[-1] if values else None

    def exported(self, metric: str) -> float | None:
        """The value of a metric for the weights of `final/`; the last one of a run that has not ended."""
        return exported_value(self.lines, metric)

    def typical(self, metric: str) -> float | None:
        """The median of a metric; None without a value."""
        values = self.values(metric)
        return median(values) if values else None

    def best(self, metric: str) -> float | None:
        """The best value of a metric with a direction; None without one."""
        values, direction = self.values(metric), better_direction(metric)
        return None if not values or direction is None else (min if direction == "lower" else max)(values)

    def languages(self, metric: str) -> list[str]:
        """The languages by which a metric was logged."""
        found = {key.removeprefix(f"{metric}/") for line in self.measured for key in line if f"{metric}/" in key}
        return sorted(code for code in found if "/" not in code)


def flattened(value: Any, above: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested data."""
    if isinstance(value, Mapping) and value:
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = enumerate(value)
    else:
        return {above: value}
    return {k: v for key, item in items for k, v in flattened(item, f"{above}.{key}" if above else str(key)).items()}


def without_nulls(value: Any) -> Any:
    """Nested data without nulls and without the empty containers that defaults leave."""
    if isinstance(value, Mapping):
        kept = {key: without_nulls(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if item not in ({}, [])}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def shown_value(value: Any) -> str:
    """A value of a recipe as text; empty for null."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}
