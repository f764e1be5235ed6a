"""The run directory: who may write into it, and whether a run begins, continues or is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.training.checkpoint import MANIFEST, PREFIX, checkpoints, read_manifest, remove_staging

FINAL, METRICS, RECIPE, LOCK = "final", "metrics.jsonl", "recipe.yaml", ".lock"
OURS = (FINAL, METRICS, RECIPE, MANIFEST, "reference.safetensors", "report.html")
# A finished or running model does not depend on these; they may change between sessions.
FREE = ("output_dir", "checkpoint", "logging", "evaluation", "distributed")


@dataclass
class RunDir:
    """An open run directory.

    Attributes:
        path: the folder.
        checkpoint: what the run continues from; None if it begins.
        finished: a finished run of the same recipe: nothing is to be done.
        notes: what was found and done on opening, for the user.
        changed: keys of the recipe whose change was accepted, with both values.
    """

    path: Path
    checkpoint: Path | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    lock: FileLock | None = None

    @property
    def final(self) -> Path:
        """The finished model."""
        return self.path / FINAL

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / METRICS

    def shared(self) -> RunDir:
        """The same for the other processes: they do not hold the lock."""
        return replace(self, lock=None)

    def close(self) -> None:
        """Lets others in."""
        if self.lock is not None:
            self.lock.release()


def open_run(recipe: Recipe, *, resume: str = "auto", overwrite: bool = False, allowed: tuple[str, ...] = ()) -> RunDir:
    """Opens the run directory of a recipe for writing; another process that wants it is refused.

    Args:
        recipe: the run.
        resume: `auto` continues an unfinished run, `never` refuses to, a path continues from that checkpoint.
        overwrite: removes an earlier run first.
        allowed: dotted keys whose change is accepted when a run continues.

    Raises:
        RunEnvironmentError: if the folder is foreign, locked or not writable, or no checkpoint is usable.
        RecipeError: if the folder holds a run of another recipe.
    """
    path = Path(recipe.output_dir)
    manifest = _manifest(path)
    if manifest is None and path.exists() and any(p.name != LOCK for p in path.iterdir()):
        raise RunEnvironmentError(
            str(path), "is not empty and holds no run of nesso-tune", "set another output_dir; nothing was written"
        )
    path.mkdir(parents=True, exist_ok=True)
    lock = _locked(path)
    try:
        if overwrite:
            _clear(path)
            manifest = None
        remove_staging(path)
        if manifest is None:
            return RunDir(path, lock=lock)
        return _continue(path, manifest, recipe, resume, allowed, lock)
    except BaseException:
        lock.release()
        raise


def write_start(run: RunDir, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Writes what a run begins with: its resolved recipe, and a manifest of `facts` (versions, hashes, …)."""
    (run.path / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    _replace(run.path / MANIFEST, {**facts, "recipe": dump(recipe), "finished": False})


def write_end(run: RunDir) -> None:
    """Marks the run finished."""
    manifest = json.loads((run.path / MANIFEST).read_text(encoding="utf-8"))
    _replace(run.path / MANIFEST, {**manifest, "finished": True})


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values. Keys that may change freely are left out."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if name in FREE or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{name}.")
        else:
            found[name] = (a, b)
    return found


def _continue(
    path: Path, manifest: dict[str, Any], recipe: Recipe, resume: str, allowed: tuple[str, ...], lock: FileLock
) -> RunDir:
    changed = differences(manifest["recipe"], dump(recipe))
    refused = {key: values for key, values in changed.items() if key not in allowed}
    if refused:
        remedy = "undo it, set another output_dir, --overwrite, or accept it with --allow-changes"
        raise RecipeError(
            Problem(str(path), f"its run has {key}: {old!r}, the recipe now says {new!r}", f"{remedy} {key}")
            for key, (old, new) in refused.items()
        )
    if manifest.get("finished") and (path / FINAL).is_dir():
        return RunDir(path, finished=True, lock=lock)
    if resume == "never":
        raise RunEnvironmentError(str(path), "holds an unfinished run", "use --resume auto, or --overwrite")
    if resume != "auto":
        return RunDir(path, _chosen(Path(resume), path), changed=changed, lock=lock)
    notes = []
    for candidate in checkpoints(path):
        try:
            read_manifest(candidate)
        except ValueError as why:
            aside = candidate.with_name(f"damaged-{candidate.name}")
            shutil.rmtree(aside, ignore_errors=True)
            candidate.rename(aside)
            notes.append(f"{candidate.name}: {why}; set aside as {aside.name}")
        else:
            return RunDir(path, candidate, notes=tuple(notes), changed=changed, lock=lock)
    if notes:
        raise RunEnvironmentError(
            str(path), f"no checkpoint is usable ({'; '.join(notes)})", "start anew with --overwrite"
        )
    return RunDir(path, notes=("an unfinished run without a checkpoint: it starts from the beginning",), lock=lock)


def _chosen(checkpoint: Path, run: Path) -> Path:
    try:
        read_manifest(checkpoint)
    except ValueError as why:
        raise RunEnvironmentError(str(checkpoint), f"cannot be used: {why}", "name another checkpoint") from None
    if checkpoint.resolve().parent != run.resolve():
        raise RunEnvironmentError(str(checkpoint), f"is not in {run}", "name a checkpoint of this run")
    return checkpoint


def _manifest(path: Path) -> dict[str, Any] | None:
    if path.exists() and not path.is_dir():
        raise RunEnvironmentError(str(path), "is a file", "set another output_dir")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise RunEnvironmentError(
            str(path / MANIFEST), "is damaged", "restore it, or start anew with --overwrite"
        ) from None
    return manifest if isinstance(manifest, dict) and "nesso_tune" in manifest else None


def _locked(path: Path) -> FileLock:
    lock = FileLock(path / LOCK)  # held by the operating system: it ends with its process, however that ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunEnvironmentError(
            str(path), "another nesso-tune is writing into it", "wait for it, or set another output_dir"
        ) from None
    return lock


def _clear(path: Path) -> None:
    """Removes an earlier run, and nothing that is not of a run."""
    for name in OURS:
        target = path / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    for folder in [*path.glob(f"{PREFIX}*"), *path.glob(f"damaged-{PREFIX}*")]:
        shutil.rmtree(folder)


def _replace(file: Path, data: Mapping[str, Any]) -> None:
    staging = file.with_name(f".{file.name}.partial")
    staging.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
    staging.replace(file)
