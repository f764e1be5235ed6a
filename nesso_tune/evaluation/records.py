"""Results that a model folder keeps: `evaluations/SUITE.suite.json` and `GATE.gate.json`. Card and report show them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nesso_tune.evaluation.gate import Gate, Verdict
from nesso_tune.evaluation.results import ModelResult
from nesso_tune.evaluation.suites import Suite
from nesso_tune.evaluation.table import labels
from nesso_tune.files import atomic_write
from nesso_tune.logs import logger

FOLDER = "evaluations"
_SUITE, _GATE = ".suite.json", ".gate.json"


@dataclass(frozen=True)
class MetricRecord:
    """A metric: its label, value and standard error, and the published values of other models."""

    label: str
    value: float
    stderr: float | None
    published: Mapping[str, float]


@dataclass(frozen=True)
class SuiteRecord:
    """The results of a model on a suite.

    Attributes:
        name: of the suite; of a file, without its folder and suffix.
        title: of the suite.
        own_data: tasks whose rows were replaced.
        metrics: in the order of the suite.
    """

    name: str
    title: str
    own_data: Sequence[str]
    metrics: Sequence[MetricRecord]

    @property
    def published(self) -> list[str]:
        """Models with a published value of one of the metrics."""
        return list(dict.fromkeys(model for metric in self.metrics for model in metric.published))


@dataclass(frozen=True)
class GateRecord:
    """The verdicts of a gate.

    Attributes:
        name: of the gate; of a file, without its folder and suffix.
        title: of the gate.
        parent: the model that was compared with.
        verdicts: one for each metric.
    """

    name: str
    title: str
    parent: str
    verdicts: Sequence[Verdict]

    @property
    def passed(self) -> bool:
        """Whether no metric was refused."""
        return not any(verdict.refused for verdict in self.verdicts)


@dataclass(frozen=True)
class Evaluations:
    """All records of a model folder."""

    suites: Sequence[SuiteRecord] = ()
    gates: Sequence[GateRecord] = ()

    def __bool__(self) -> bool:
        return bool(self.suites or self.gates)


def suite_record(name: str, suite: Suite, result: ModelResult, own_data: Collection[str] = ()) -> SuiteRecord:
    """The record of a model's results on a suite."""
    values = result.metrics
    metrics = [
        MetricRecord(
            label, values[metric].value, values[metric].stderr,
            {model: known[metric] for model, known in suite.reference.items() if metric in known},
        )
        for metric, label in labels(suite).items() if metric in values
    ]  # fmt: skip
    return SuiteRecord(Path(name).stem, suite.title, [t.task for t in suite.tasks if t.task in own_data], metrics)


def gate_record(name: str, gate: Gate, parent: str, verdicts: Sequence[Verdict]) -> GateRecord:
    """The record of a gate's verdicts on a model."""
    return GateRecord(Path(name).stem, gate.title, parent, list(verdicts))


def write_records(folder: Path, records: Sequence[SuiteRecord | GateRecord]) -> None:
    """Writes records into a model folder; each replaces an earlier one of the same name."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for record in records:
        suffix = _SUITE if isinstance(record, SuiteRecord) else _GATE
        text = json.dumps(without_nan(asdict(record)), indent=1, ensure_ascii=False)
        atomic_write(folder / FOLDER / f"{record.name}{suffix}", text)


def read_records(folder: Path) -> Evaluations:
    """The records of a model folder, by name; empty without any. A record that cannot be read is left out."""
    files = sorted((folder / FOLDER).glob("*.json"))
    suites = [_read(file, _to_suite) for file in files if file.name.endswith(_SUITE)]
    gates = [_read(file, _to_gate) for file in files if file.name.endswith(_GATE)]
    return Evaluations([s for s in suites if s is not None], [g for g in gates if g is not None])


def _to_suite(raw: dict[str, Any]) -> SuiteRecord:
    return SuiteRecord(**{**raw, "metrics": [MetricRecord(**metric) for metric in raw["metrics"]]})


def _to_gate(raw: dict[str, Any]) -> GateRecord:
    verdicts = [Verdict(**_with_nan(verdict)) for verdict in raw["verdicts"]]
    return GateRecord(**{**raw, "verdicts": verdicts})


def _read(file: Path, convert: Any) -> Any:
    try:
        return convert(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        logger.warning(f"{file}: cannot be read ({error}): its results are not shown")
        return None


def _with_nan(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in raw.items()}


def without_nan(value: Any) -> Any:
    """Plain data with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
