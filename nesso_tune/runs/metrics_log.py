"""`metrics.jsonl`: one JSON object per line; NaN and infinities are strings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nesso_tune.files import atomic_write


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
    """All complete lines of a metrics file; a line that a killed process did not finish is skipped."""
    lines = []
    for text in path.read_bytes().split(b"\n"):  # not at other line breaks: generated answers may contain them
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step", 0), int):
            lines.append(line)
    return lines


def last_metrics(path: Path) -> dict[str, Any]:
    """The last value of every metric; if `train.best_metric` selected earlier weights, up to their step."""
    lines = read_metrics(path) if path.exists() else []
    last_step = next((line["taken"] for line in reversed(lines) if line.get("event") == "best"), math.inf)
    metrics: dict[str, Any] = {}
    for line in lines:
        if "event" not in line and line["step"] <= last_step:
            metrics |= line
    return metrics


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
