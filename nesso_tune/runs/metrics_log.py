"""`metrics.jsonl`: one JSON object a line, never a NaN that looks like a number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nesso_tune.files import fsync


class MetricsLog:
    """Appends lines to a file; only the main process writes."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self._writes = path, writes

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line. A number that is not finite is written as a word (`"nan"`)."""
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n")

    def cut_back(self, step: int) -> None:
        """Drops what was written after `step`, and a last line that was cut short."""
        if not self._writes or not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        staging = self.path.with_name(f".{self.path.name}.partial")
        staging.write_text(text, encoding="utf-8")
        fsync(staging)
        staging.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; what is none, such as a line that a killed process did not finish, is left."""
    lines = []
    for text in path.read_bytes().split(b"\n"):  # and at no other line break: answers may hold them
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step", 0), int):
            lines.append(line)
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
