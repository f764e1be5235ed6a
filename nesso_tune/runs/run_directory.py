"""The run directory: who may write into it, and whether a run begins, continues or is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout

from nesso_tune.data.privacy import Privacy, as_recorded, recorded
from nesso_tune.data.sources import check_output
from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError
from nesso_tune.files import acquire_lock, atomic_write, remove, remove_staging
from nesso_tune.recipes.builtin import flag_path, local_path
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.runs.checkpoint import CHECKPOINT_PREFIX, MANIFEST, checkpoints, read_json, read_manifest
from nesso_tune.runs.layout import (
    FAILED_METRICS,
    FINAL,
    LOCK,
    METRICS,
    OVERWRITTEN,
    RECIPE,
    check_path,
    has_overwritten,
    is_foreign,
    move_aside,
    run_manifest,
    settle,
)
from nesso_tune.runs.provenance import names_content

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
        moved: keys that name other files than before, with both values: `check_same_run` compares their content.
        made: the folder was not there before.
        lock: keeps others out; only the main process has it.
    """

    path: Path
    checkpoint: Path | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    environment: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    moved: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    made: bool = False
    lock: BaseFileLock | None = None

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
        return int(self.checkpoint.name.removeprefix(CHECKPOINT_PREFIX)) if self.checkpoint else 0

    def shared(self) -> RunDir:
        """The same for the other processes: they do not hold the lock."""
        return replace(self, lock=None)

    def close(self) -> list[str]:
        """Lets others in; a folder that was made for this run and in which nothing came about is removed again.

        Returns:
            What a person should know: an earlier run that was to be overwritten is put back.
        """
        if self.lock is None:
            return []
        notes: list[str] = []
        try:
            if settle(self.path):
                failed = f"; {FAILED_METRICS} is of this one" if (self.path / FAILED_METRICS).exists() else ""
                notes.append(f"no checkpoint was saved, so the earlier run is put back{failed}")
        except OSError as error:
            notes.append(f"the earlier run is in {self.path / OVERWRITTEN}, the next start puts it back ({error})")
        if self.path.is_dir() and [entry.name for entry in self.path.iterdir()] == [LOCK]:
            (self.path / LOCK).unlink()
            if self.made:
                self.path.rmdir()
        self.lock.release()
        return notes


def open_run(
    recipe: Recipe,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    allowed: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda text: None,
) -> RunDir:
    """Opens the run directory of a recipe for writing; another process that wants it is refused.

    Args:
        recipe: the run.
        resume: `auto` continues an unfinished run, `never` refuses to, a path continues from that checkpoint.
        overwrite: moves an earlier run aside, see `overwrite.py`.
        allowed: dotted keys whose change is accepted when a run continues.
        say: told at once what is found, whether or not the folder can be opened then.

    Raises:
        RunEnvironmentError: if the folder is foreign, locked or not writable, or no checkpoint is usable.
        RecipeError: if the folder holds a run of another recipe.
    """
    path, resume = Path(recipe.output_dir), flag_path(resume)
    check_path(path)
    check_output(recipe)
    if path.resolve() in (base := local_path(recipe.model.base).resolve()).parents or path.resolve() == base:
        raise RecipeError("model.base", f"{recipe.model.base} lies in output_dir {path}", "set another output_dir")
    foreign = not has_overwritten(path) and run_manifest(path, overwrite) is None and path.exists()
    if foreign and any(is_foreign(entry) for entry in path.iterdir()):
        raise RunEnvironmentError(
            str(path), "is not empty and holds no run of nesso-tune", "set another output_dir; nothing was written"
        )
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    run = RunDir(path, made=made, lock=_locked(path, made))
    try:
        if settle(path):
            say("an --overwrite ended before its first checkpoint: the earlier run is put back")
        manifest = run_manifest(path, overwrite)
        if resume not in ("auto", "never"):
            _check_chosen(Path(resume), path, manifest, overwrite)
        remove_staging(path)
        if overwrite and manifest is not None:
            move_aside(path)
            manifest = None
        return run if manifest is None else _continue(run, manifest, recipe, resume, allowed)
    except BaseException:
        for text in run.close():
            say(text)
        raise


def write_start(run: RunDir, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Writes what a run begins with: its resolved recipe, and a manifest of `facts` (versions, hashes, …)."""
    manifest = {**facts, "recipe": dump(recipe), "finished": False}
    if Privacy(recipe.data):  # then only recipe.yaml has it whole
        salt = os.urandom(8).hex()
        manifest |= {"recipe": recorded(recipe, salt), "salt": salt}
    _replace(run.path / MANIFEST, manifest)  # first: it marks the folder
    atomic_write(run.path / RECIPE, recipe.to_yaml())


def write_end(run: RunDir, facts: Mapping[str, Any] | None = None) -> None:
    """Marks the run finished, with the sizes of the files in `final/` and with `facts` that its end has shown."""
    manifest = {**read_json(run.path, MANIFEST), **(facts or {})}
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


def _continue(run: RunDir, manifest: dict[str, Any], recipe: Recipe, resume: str, allowed: tuple[str, ...]) -> RunDir:
    path = run.path
    before = manifest["recipe"]
    changed = differences(before, as_recorded(before, recipe, manifest.get("salt", "")))
    moved = {key: changed.pop(key) for key in list(changed) if names_content(key, changed[key], recipe)}
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
        return replace(run, finished=True, moved=moved)
    if resume == "never":
        raise RunEnvironmentError(str(path), "holds an unfinished run", "use --resume auto, or --overwrite")
    if resume != "auto":
        chosen = _chosen(Path(resume), path)
        for later in checkpoints(path)[: checkpoints(path).index(path / chosen.name)]:
            _set_aside(later, "later")  # or it would win the next time
        return replace(run, checkpoint=chosen, changed=changed, moved=moved)
    newest, damaged = _newest_whole(path)
    if newest is None and (damaged or any(path.glob(f"damaged-{CHECKPOINT_PREFIX}*"))):
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
    return replace(run, checkpoint=newest, notes=tuple(notes), changed=changed, moved=moved)


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


def _locked(path: Path, made: bool) -> BaseFileLock:
    try:
        return acquire_lock(path / LOCK, "set another output_dir", timeout=0).lock
    except Timeout:
        raise RunEnvironmentError(
            str(path), "another nesso-tune is writing into it", "wait for it, or set another output_dir"
        ) from None
    except RunEnvironmentError:
        (path / LOCK).unlink(missing_ok=True)
        if made:
            path.rmdir()
        raise


def _replace(file: Path, data: Mapping[str, Any]) -> None:
    atomic_write(file, json.dumps(data, indent=2, ensure_ascii=False))
