"""What lies in a run directory, and whether a folder is one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.files import fsync
from nesso_tune.runs.checkpoint import MANIFEST, PREFIX, checkpoints, discard, is_step, remove, remove_staging

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


ASIDE = "being-overwritten"
MOVING = f"{ASIDE}.moving"
FAILED_METRICS = f"failed-{METRICS}"  # of a new run that ended before its first checkpoint


def is_pending(path: Path) -> bool:
    """Whether a run directory holds an earlier run that was moved aside."""
    return (path / MOVING).is_dir() or os.path.lexists(path / ASIDE / MANIFEST)


def move_aside(path: Path) -> None:
    """Moves the run in a folder aside; `settle` must have been called before.

    Raises:
        RunEnvironmentError: if something that is not ours has the name of the folder for it.
    """
    moving, aside = path / MOVING, path / ASIDE
    for taken in (name for name in (moving, aside) if os.path.lexists(name)):
        raise RunEnvironmentError(str(taken), "is where --overwrite keeps the earlier run", "rename or remove it")
    moving.mkdir()
    for file in files_of_run(path):
        file.rename(moving / file.name)
    fsync(moving)
    moving.rename(aside)
    fsync(path)


def settle(path: Path) -> bool:
    """Ends what an overwrite left: the earlier run goes if the new one has a checkpoint, else it is put back.

    Returns:
        Whether it was put back.
    """
    if (path / MOVING).is_dir():
        _put_back(path)
        return True
    if not is_pending(path):
        return False
    if checkpoints(path) or (path / FINAL).exists():
        delete_earlier(path)
        return False
    remove_staging(path)
    if (path / METRICS).is_file():  # they say what went wrong
        (path / METRICS).replace(path / FAILED_METRICS)
    for file in files_of_run(path):
        remove(file)
    (path / ASIDE).rename(path / MOVING)
    _put_back(path)
    return True


def delete_earlier(path: Path) -> None:
    """Deletes the earlier run, if one was moved aside: the new one has a checkpoint now."""
    if is_pending(path):
        discard(path / ASIDE)
        remove(path / FAILED_METRICS)


def bytes_aside(path: Path) -> int:
    """Size of the earlier run that was moved aside; 0 if none was."""
    if not is_pending(path):
        return 0
    files = (Path(folder) / name for folder, _, names in os.walk(path / ASIDE) for name in names)
    return sum(file.lstat().st_size for file in files)


def _put_back(path: Path) -> None:
    """Moves the earlier run's files back; first what marks the folder as that of a run."""
    moving = path / MOVING
    for file in sorted(moving.iterdir(), key=lambda file: file.name != MANIFEST):
        file.rename(path / file.name)
    fsync(path)
    moving.rmdir()
