"""What lies in a run directory, and whether a folder is one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.training.checkpoint import MANIFEST, PREFIX, is_step

FINAL, METRICS, RECIPE, LOCK = "final", "metrics.jsonl", "recipe.yaml", ".lock"
PROFILE = "profile"  # traces of `train.profile`
DATA_REPORT = ("data_report.html", "data_report.json")
OURS = (FINAL, METRICS, RECIPE, MANIFEST, "reference.safetensors", "report.html", PROFILE, *DATA_REPORT)
BEFOREHAND = (LOCK, f".{MANIFEST}.partial", *DATA_REPORT)  # may be there before a run is; of a report a half, too


def check_path(path: Path) -> None:
    """Raises RunEnvironmentError for a path that leads nowhere."""
    try:
        path.resolve()
    except (OSError, RuntimeError):  # links that lead to each other
        raise RunEnvironmentError(str(path), "is a link that leads nowhere", "set another output_dir") from None
    if path.is_symlink() and not path.exists():
        raise RunEnvironmentError(str(path), "is a link to what is not there", "make it, or set another output_dir")


def files_of_run(path: Path) -> list[Path]:
    """A run's files and folders, and nothing that is not of a run; last what marks the folder as one."""
    kinds = ("", "damaged-", "later-")
    saved = [p for kind in kinds for p in path.glob(f"{kind}{PREFIX}*") if is_step(p.name.removeprefix(kind))]
    named = [path / name for name in (f"damaged-{FINAL}", *(name for name in OURS if name != MANIFEST), MANIFEST)]
    return [p for p in (*saved, *named) if os.path.lexists(p)]


def is_foreign(path: Path) -> bool:
    """Whether a file in a folder without a manifest is neither from `prepare` nor from a run stopped as it began."""
    return path.name not in BEFOREHAND and not path.name.startswith(tuple(f".{name}." for name in DATA_REPORT))


def run_manifest(path: Path, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of the run in a folder; None if it holds none."""
    if path.exists() and not path.is_dir():
        raise RunEnvironmentError(str(path), "is a file", "set another output_dir")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise RunEnvironmentError(str(path), "cannot be a folder", "set another output_dir") from None
    except (OSError, ValueError, RecursionError):
        manifest = {"nesso_tune": "damaged"}
    if not isinstance(manifest, dict) or "nesso_tune" not in manifest:
        return None
    if not isinstance(manifest.get("recipe"), dict) and not (overwrite and (path / RECIPE).is_file()):
        raise RunEnvironmentError(str(path / MANIFEST), "is damaged", "restore it, or start anew with --overwrite")
    return dict(manifest)
