"""What a rule about a recipe finds, and how it looks at the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]
Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One inert or contradictory knob: where it stands, why it is wrong, and the remedy."""

    path: Path
    what: str
    remedy: str


def get(raw: Any, *path: str | int) -> Any:
    """The value at a path of plain nested data; None if there is none."""
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw
