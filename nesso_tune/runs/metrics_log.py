"""`metrics.jsonl`: one JSON object per line; NaN and infinities are strings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nesso_tune.files import atomic_write
from nesso_tune.logs import logger

TAIL_BYTES = 1 << 18


class MetricsLog:
    """Appends lines to a file.

    Args:
        path: the file.
        writes: whether this process writes; True on the main process only.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self._writes = path, writes

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line. A number that is not finite is written as a string (`"nan"`)."""
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_without_nan(line), ensure_ascii=False, allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drops lines of later steps, and an incomplete last line."""
        if not self._writes or not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
        atomic_write(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a line that a killed process did not finish is skipped.

    Other lines that are none of metrics are skipped with a warning.
    """
    lines, unreadable = _parse(path.read_bytes())
    if unreadable:
        what = "1 line is not one of metrics" if unreadable == 1 else f"{unreadable} lines are not lines of metrics"
        logger.warning(f"{path}: {what}, and left out")
    return lines


def is_number(value: Any) -> bool:
    """Whether a value of a line is a number; NaN and infinities are strings there."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines in the last `TAIL_BYTES` of a metrics file; empty without a file."""
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return _parse(stream.read())[0]


def _parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines, and the number of others that end with a line break."""
    lines, unreadable = [], 0
    *complete, last = content.split(b"\n")  # not at other line breaks: generated answers may contain them
    for text in (*complete, last):
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("step", 0), int):
            lines.append(line)
        elif text is not last and text.strip():
            unreadable += 1
    return lines, unreadable


def exported_step(lines: Iterable[Mapping[str, Any]]) -> float:
    """The step whose weights `final/` has if `train.best_metric` selected earlier ones; else infinity."""
    return next((float(line["taken"]) for line in reversed(list(lines)) if line.get("event") == "best"), math.inf)


def values_by_step(lines: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """The values of a metric that are numbers, by step."""
    return {line["step"]: line[metric] for line in lines if "event" not in line and is_number(line.get(metric))}


def exported_value(lines: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """The value of a metric for the weights of `final/`; the last one if the run has not ended. None without one."""
    last_step = exported_step(lines)
    values = [value for step, value in values_by_step(lines, metric).items() if step <= last_step]
    return values[-1] if values else None


def stopped_by_callback(lines: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a callback, such as the rule of a sweep, ended the run before its last planned step."""
    return any(line.get("event") == "early_stopped" and line.get("by") == "callback" for line in lines)


def last_metrics(path: Path) -> dict[str, Any]:
    """The last value of every metric; if `train.best_metric` selected earlier weights, up to their step.

    What only an earlier evaluation measured is left out: it is not of the same weights as the rest.
    """
    lines = read_metrics(path) if path.exists() else []
    last_step = exported_step(lines)
    metrics: dict[str, Any] = {}
    evaluated: Iterable[str] = ()
    for line in lines:
        if "event" in line or line["step"] > last_step:
            continue
        if any(key.startswith("eval_") for key in line):
            metrics = {key: value for key, value in metrics.items() if key not in evaluated}
            evaluated = line
        metrics |= line
    return metrics


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
