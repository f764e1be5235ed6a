"""The run directory: who may write into it, and whether a run begins, continues or is finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.recipes.shipped import local_path
from nesso_tune.training.checkpoint import (
    MANIFEST,
    PREFIX,
    checkpoints,
    is_step,
    read_data,
    read_manifest,
    remove,
    remove_staging,
    sync,
)

FINAL, METRICS, RECIPE, LOCK = "final", "metrics.jsonl", "recipe.yaml", ".lock"
PROFILE = "profile"  # traces of `train.profile`
DATA_REPORT = ("data_report.html", "data_report.json")
OURS = (FINAL, METRICS, RECIPE, MANIFEST, "reference.safetensors", "report.html", PROFILE, *DATA_REPORT)
BEFOREHAND = (LOCK, f".{MANIFEST}.partial", *DATA_REPORT)  # may be there before a run is; of a report a half, too
# A finished or running model does not depend on these; they may change between sessions.
FREE = ("output_dir", "checkpoint", "logging", "evaluation", "distributed", "cluster", "data.preferences",
        "train.profile")  # fmt: skip


@dataclass
class RunDir:
    """An open run directory.

    Attributes:
        path: the folder.
        checkpoint: what the run continues from; None if it begins.
        finished: a finished run of the same recipe: nothing is to be done.
        notes: what was found and done on opening, for the user.
        changed: keys of the recipe whose change was accepted, with both values.
        environment: what is otherwise than where the checkpoint was written, with both values.
    """

    path: Path
    checkpoint: Path | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    environment: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    lock: FileLock | None = None

    @property
    def final(self) -> Path:
        """The finished model."""
        return self.path / FINAL

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / METRICS

    @property
    def step(self) -> int:
        """The step that the run continues from; 0 if it begins."""
        return int(self.checkpoint.name.removeprefix(PREFIX)) if self.checkpoint else 0

    def shared(self) -> RunDir:
        """The same for the other processes: they do not hold the lock."""
        return replace(self, lock=None)

    def close(self) -> None:
        """Lets others in; a folder in which nothing came about is removed again."""
        if self.lock is not None:
            if self.path.is_dir() and [entry.name for entry in self.path.iterdir()] == [LOCK]:
                shutil.rmtree(self.path, ignore_errors=True)
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
    _check_path(path)
    if path.resolve() in (base := local_path(recipe.model.base).resolve()).parents or path.resolve() == base:
        raise RecipeError("model.base", f"{recipe.model.base} lies in output_dir {path}", "set another output_dir")
    manifest = _manifest(path, overwrite)
    if resume not in ("auto", "never"):
        _check_chosen(Path(resume), path, manifest, overwrite)
    if manifest is None and path.exists() and any(_is_foreign(p) for p in path.iterdir()):
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


def _check_path(path: Path) -> None:
    """Raises RunEnvironmentError for a path that leads nowhere."""
    try:
        path.resolve()
    except (OSError, RuntimeError):  # links that lead to each other
        raise RunEnvironmentError(str(path), "is a link that leads nowhere", "set another output_dir") from None
    if path.is_symlink() and not path.exists():
        raise RunEnvironmentError(str(path), "is a link to what is not there", "make it, or set another output_dir")


def write_start(run: RunDir, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Writes what a run begins with: its resolved recipe, and a manifest of `facts` (versions, hashes, …)."""
    _replace(run.path / MANIFEST, {**facts, "recipe": dump(recipe), "finished": False})  # first: it marks the folder
    _replace_text(run.path / RECIPE, recipe.to_yaml())


def write_end(run: RunDir, facts: Mapping[str, Any] | None = None) -> None:
    """Marks the run finished, with the sizes of the files in `final/` and with `facts` that its end has shown."""
    manifest = {**read_data(run.path, MANIFEST), **(facts or {})}
    _replace(run.path / MANIFEST, {**manifest, "finished": True, "final": _sizes(run.final)})


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values. Keys that may change freely are left out."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if name in FREE or a == b:
            continue
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            a, b = ({str(i): item for i, item in enumerate(items)} for items in (a, b))
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
        raise RecipeError(
            Problem(str(path), f"its run has {key}: {_said(old)}, the recipe now says {_said(new)}", _remedy(key))
            for key, (old, new) in refused.items()
        )
    finished = manifest.get("finished") and _is_whole(manifest, path)
    if finished and changed:
        raise RecipeError(
            str(path), f"its run is finished: a change of {', '.join(changed)} would do nothing",
            "train it again with --overwrite, or set another output_dir",
        )  # fmt: skip
    if finished:
        return RunDir(path, finished=True, lock=lock)
    if resume == "never":
        raise RunEnvironmentError(str(path), "holds an unfinished run", "use --resume auto, or --overwrite")
    if resume != "auto":
        chosen = _chosen(Path(resume), path)
        for later in checkpoints(path)[: checkpoints(path).index(path / chosen.name)]:
            _set_aside(later, "later")  # or it would win the next time
        return RunDir(path, chosen, changed=changed, lock=lock)
    newest, damaged = _newest_whole(path)
    if newest is None and (damaged or any(path.glob(f"damaged-{PREFIX}*"))):
        said = "; ".join(f"{candidate.name}: {why}" for candidate, why in damaged) or "all were set aside before"
        raise RunEnvironmentError(  # nothing is set aside now: the next time it is the same
            str(path), f"no checkpoint is usable ({said})", "start anew with --overwrite"
        )
    notes = [f"{c.name}: {why}; set aside as {_set_aside(c, 'damaged').name}" for c, why in damaged]
    if newest is None:
        notes.append("an unfinished run without a checkpoint: it starts from the beginning")
    if manifest.get("finished"):
        notes.insert(0, "its final/ is missing or damaged: made again")
        if os.path.lexists(path / FINAL):
            notes[0] += f"; what stands there is kept as {_set_aside(path / FINAL, 'damaged').name}"
    return RunDir(path, newest, notes=tuple(notes), changed=changed, lock=lock)


def _newest_whole(path: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that can be used, and the later ones that cannot, each with why."""
    damaged: list[tuple[Path, str]] = []
    for candidate in checkpoints(path):
        try:
            read_manifest(candidate)
        except ValueError as why:
            damaged.append((candidate, str(why)))
        else:
            return candidate, damaged
    return None, damaged


def _check_chosen(checkpoint: Path, run: Path, manifest: Mapping[str, Any] | None, overwrite: bool) -> None:
    """Raises if a checkpoint that was named would not be continued from."""
    if overwrite:
        raise RecipeError("--overwrite", f"would remove {checkpoint}, which --resume names", "remove one of the two")
    if manifest is None or checkpoint.resolve() not in [known.resolve() for known in checkpoints(run)]:
        raise RunEnvironmentError(str(checkpoint), f"is no checkpoint of a run in {run}", "name one of this run")
    if manifest.get("finished") and _is_whole(manifest, run):
        raise RunEnvironmentError(
            str(run),
            f"its run is finished: {checkpoint} would not be continued",
            "remove its final/, or use --overwrite",
        )


def _chosen(checkpoint: Path, run: Path) -> Path:
    try:
        read_manifest(checkpoint)
    except ValueError as why:
        raise RunEnvironmentError(str(checkpoint), f"cannot be used: {why}", "name another checkpoint") from None
    return checkpoint


def _said(value: Any) -> str:
    """A value as YAML says it."""
    return json.dumps(value, ensure_ascii=False)


def _remedy(key: str) -> str:
    if key.startswith(("data.", "model.base", "method", "seed", "chat.")):
        return "undo it, set another output_dir, or start anew with --overwrite"
    return f"undo it, set another output_dir, --overwrite, or accept it with --allow-changes {key}"


def _set_aside(folder: Path, why: str) -> Path:
    aside = folder.with_name(f"{why}-{folder.name}")
    remove(aside)
    return folder.rename(aside)


def _is_whole(manifest: Mapping[str, Any], run: Path) -> bool:
    """Whether a finished run's `final/` has all its files; an edited card and files that were added are fine."""
    noted, there = manifest.get("final"), _sizes(run / FINAL)
    if not isinstance(noted, Mapping) or there is None:
        return False
    return all(there.get(name) == size or (name == "README.md" and name in there) for name, size in noted.items())


def _sizes(folder: Path) -> dict[str, int] | None:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir())} if folder.is_dir() else None


def _is_foreign(path: Path) -> bool:
    """Whether a file in a folder without a manifest is neither from `prepare` nor from a run stopped as it began."""
    return path.name not in BEFOREHAND and not path.name.startswith(tuple(f".{name}." for name in DATA_REPORT))


def _manifest(path: Path, overwrite: bool) -> dict[str, Any] | None:
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
    """Removes an earlier run, and nothing that is not of a run; last what marks the folder as one."""
    kinds = ("", "damaged-", "later-")
    saved = [p for kind in kinds for p in path.glob(f"{kind}{PREFIX}*") if is_step(p.name.removeprefix(kind))]
    for target in [*saved, path / f"damaged-{FINAL}", *(path / name for name in OURS if name != MANIFEST)]:
        remove(target)
    remove(path / MANIFEST)


def _replace(file: Path, data: Mapping[str, Any]) -> None:
    _replace_text(file, json.dumps(data, indent=2, ensure_ascii=False))


def _replace_text(file: Path, text: str) -> None:
    staging = file.with_name(f".{file.name}.partial")
    staging.write_text(text, encoding="utf-8")
    sync(staging)
    staging.replace(file)
