"""Files of a run directory, and the earlier run that `--overwrite` keeps in it until the new one has a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.files import fsync, remove, remove_folder, remove_staging
from nesso_tune.runs.checkpoint import CHECKPOINT_PREFIX, MANIFEST, checkpoints, is_checkpoint_name

FINAL, METRICS, RECIPE, STATUS, LOCK = "final", "metrics.jsonl", "recipe.yaml", "status.json", ".lock"
CANDIDATE = "candidate"  # the model of a run with a gate, until it passes and becomes final/
DESCRIPTIONS = ("README.md", "provenance.json")  # files of final/ without which the model is the same
PROFILE = "profile"  # traces of `train.profile`
EXPORT = "export"  # folder of `nesso-tune export`
FAILED_METRICS = f"failed-{METRICS}"  # of a new run that ended before its first checkpoint
DAMAGED, LATER = "damaged-", "later-"  # prefixes of folders that are set aside
OVERWRITTEN = "being-overwritten"  # the earlier run
MOVING = f"{OVERWRITTEN}.moving"  # the earlier run, while its files are moved in or out
_DATA_REPORT = ("data_report.html", "data_report.json")
REPORT = "report.html"
INDEX, COMPARISON = "index.html", "comparison.html"  # of several runs, in the folder that contains them
_RUN_FILES = (FINAL, METRICS, RECIPE, STATUS, MANIFEST, "reference.safetensors", REPORT, PROFILE, EXPORT, CANDIDATE,
              *_DATA_REPORT)  # fmt: skip
_PRE_RUN_FILES = (LOCK, f".{MANIFEST}.partial", *_DATA_REPORT)  # may exist before the manifest does


def check_path(path: Path) -> None:
    """Raises RunEnvironmentError if the path is a circular or dangling link."""
    try:
        path.resolve()
    except (OSError, RuntimeError):
        raise RunEnvironmentError(str(path), "is a link in a loop of links", "set another output_dir") from None
    if path.is_symlink() and not path.exists():
        raise RunEnvironmentError(
            str(path), "is a link to a folder that does not exist", "create the folder, or set another output_dir"
        )


def run_manifest(path: Path, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of the run in a folder; None if the folder contains no run.

    Args:
        path: the folder.
        overwrite: accept a damaged manifest, since the run is going to be overwritten.

    Raises:
        RunEnvironmentError: if the path is a file or a checkpoint, or the manifest is damaged.
    """
    if path.exists() and not path.is_dir():
        raise RunEnvironmentError(str(path), "is a file", "set another output_dir")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise RunEnvironmentError(str(path), "lies below a file", "set another output_dir") from None
    except (OSError, ValueError, RecursionError):
        manifest = {"nesso_tune": "damaged"}
    if not isinstance(manifest, dict) or "nesso_tune" not in manifest:
        return None
    if {"step", "files"} <= manifest.keys():
        run = path.parent if path.name else path.resolve().parent
        remedy = f"name {run}; `nesso-tune export {run} --average {path.resolve().name}` exports the checkpoint"
        raise RunEnvironmentError(str(path), "is a checkpoint, not a run directory", remedy)
    if not isinstance(manifest.get("recipe"), dict) and not (overwrite and (path / RECIPE).is_file()):
        raise RunEnvironmentError(str(path / MANIFEST), "is damaged", "restore it, or start again with --overwrite")
    return dict(manifest)


def is_foreign(path: Path) -> bool:
    """Whether a file in a folder without a manifest was written neither by `prepare` nor by a run that was starting."""
    return path.name not in _PRE_RUN_FILES and not path.name.startswith(tuple(f".{name}." for name in _DATA_REPORT))


def is_run_file(name: str) -> bool:
    """Whether a run directory uses a name itself, for a file or folder of the run or of an earlier one."""
    kept = (*_RUN_FILES, *_PRE_RUN_FILES, f"{DAMAGED}{FINAL}", FAILED_METRICS, OVERWRITTEN, MOVING)
    return name in kept or _is_checkpoint(name)


def _is_checkpoint(name: str) -> bool:
    """Whether a name is that of a checkpoint, or of one that was set aside."""
    return any(is_checkpoint_name(name.removeprefix(prefix)) for prefix in ("", DAMAGED, LATER))


def run_files(path: Path) -> list[Path]:
    """The existing files and folders of a run, and no others; last the manifest, which marks the folder as a run."""
    saved = [folder for folder in path.glob(f"*{CHECKPOINT_PREFIX}*") if _is_checkpoint(folder.name)]
    others = [path / name for name in (f"{DAMAGED}{FINAL}", *(name for name in _RUN_FILES if name != MANIFEST))]
    return [file for file in (*saved, *others, path / MANIFEST) if os.path.lexists(file)]


def final_sizes(path: Path) -> dict[str, int] | None:
    """{name: bytes} of the files in `final/` of a run; None if there is no such folder."""
    folder = path / FINAL
    if not folder.is_dir():
        return None
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}


def changed_final_files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files of `final/` that are missing, or have another size than at the end of the run.

    Those that describe the model may have changed: `eval` and `card` write them again, and users edit them.
    """
    recorded, sizes = manifest.get("final") or {}, final_sizes(path) or {}
    missing = [name for name in recorded if name not in sizes]
    changed = [name for name, size in recorded.items() if name not in DESCRIPTIONS and sizes.get(name, size) != size]
    return [*missing, *changed]


def has_overwritten(path: Path) -> bool:
    """Whether a run directory contains an earlier run that `--overwrite` moved aside."""
    return (path / MOVING).is_dir() or os.path.lexists(path / OVERWRITTEN / MANIFEST)


def move_aside(path: Path) -> None:
    """Moves the run in a folder aside, to be overwritten; `settle` must have been called before.

    Raises:
        RunEnvironmentError: if a file or folder of the user has one of the names that this needs.
    """
    moving, overwritten = path / MOVING, path / OVERWRITTEN
    for taken in (name for name in (moving, overwritten) if os.path.lexists(name)):
        raise RunEnvironmentError(
            str(taken), "is the name that --overwrite uses for the earlier run", "rename or remove it"
        )
    moving.mkdir()
    for file in run_files(path):
        file.rename(moving / file.name)
    fsync(moving)
    moving.rename(overwritten)
    fsync(path)


def settle(path: Path) -> bool:
    """Completes an overwrite: deletes the earlier run if the new one has a checkpoint, else restores it.

    Returns:
        Whether the earlier run was restored.
    """
    if (path / MOVING).is_dir():
        _restore(path)
        return True
    if not has_overwritten(path):
        return False
    if checkpoints(path) or (path / FINAL).exists():
        delete_overwritten(path)
        return False
    remove_staging(path)
    if (path / METRICS).is_file():  # kept, since they show why the new run failed
        (path / METRICS).replace(path / FAILED_METRICS)
    for file in run_files(path):
        remove(file)
    (path / OVERWRITTEN).rename(path / MOVING)
    _restore(path)
    return True


def delete_overwritten(path: Path) -> None:
    """Deletes the earlier run, if one was moved aside: the new one has a checkpoint now."""
    if has_overwritten(path):
        remove_folder(path / OVERWRITTEN)
        remove(path / FAILED_METRICS)


def overwritten_bytes(path: Path) -> int:
    """Size of the earlier run that was moved aside; 0 if there is none."""
    if not has_overwritten(path):
        return 0
    files = (Path(folder) / name for folder, _, names in os.walk(path / OVERWRITTEN) for name in names)
    return sum(file.lstat().st_size for file in files)


def _restore(path: Path) -> None:
    """Moves the files of the earlier run back; first its manifest, which marks the folder as a run."""
    moving = path / MOVING
    for file in sorted(moving.iterdir(), key=lambda file: file.name != MANIFEST):
        file.rename(path / file.name)
    fsync(path)
    moving.rmdir()
