"""The run directory: opened for one writer, and its recipe and manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout

from nesso_tune.data.privacy import Privacy, manifest_recipe
from nesso_tune.data.sources import check_output
from nesso_tune.errors import RecipeError, RunEnvironmentError
from nesso_tune.files import acquire_lock, atomic_write, remove, remove_staging
from nesso_tune.logs import logger
from nesso_tune.recipes.builtin import flag_path, local_path
from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.runs.checkpoint import MANIFEST, checkpoint_step, read_json
from nesso_tune.runs.layout import (
    CANDIDATE,
    FAILED_METRICS,
    FINAL,
    LOCK,
    METRICS,
    OVERWRITTEN,
    RECIPE,
    check_path,
    final_sizes,
    has_overwritten,
    is_foreign,
    move_aside,
    run_manifest,
    settle,
)
from nesso_tune.runs.provenance import DATA_IDENTITY, RunFacts, data_identity
from nesso_tune.runs.resume import FRESH, Changes, ResumeDecision, decide_resume


@dataclass(frozen=True)
class RunDir:
    """An open run directory.

    Attributes:
        path: the folder.
        decision: whether and from where the run resumes.
        created: the folder did not exist before.
        lock: excludes other processes; held by the main process only.
    """

    path: Path
    decision: ResumeDecision = FRESH
    created: bool = False
    lock: BaseFileLock | None = None

    @property
    def final(self) -> Path:
        """The folder of the finished model."""
        return self.path / FINAL

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / METRICS

    @property
    def data_identity(self) -> int:
        """Version of the data fingerprint that this run compares and records: that with which it began."""
        if self.decision.action == "fresh" and not self.decision.moved:
            return DATA_IDENTITY
        return data_identity(read_json(self.checkpoint or self.path, MANIFEST))

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the run resumes from; None for a fresh or finished run."""
        return self.decision.checkpoint

    @property
    def step(self) -> int:
        """The step that the run resumes from; 0 for a fresh run."""
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0

    @property
    def finished(self) -> bool:
        """The run of this recipe is finished; there is nothing to do."""
        return self.decision.action == "finished"

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user about the decision."""
        return self.decision.notes

    @property
    def changed(self) -> Changes:
        """Recipe keys whose change was accepted, with both values."""
        return self.decision.changed

    @property
    def environment(self) -> Changes:
        """Differences from the environment of the checkpoint, with both values."""
        return self.decision.environment

    def without_lock(self) -> RunDir:
        """The same directory for the other ranks, which do not hold the lock."""
        return replace(self, lock=None)

    def close(self) -> bool:
        """Releases the lock; restores an earlier run that was not overwritten, and deletes a folder left empty.

        Returns:
            Whether the folder holds the earlier run again, or will at the next start.
        """
        if self.lock is None:
            return False
        restored = False
        try:
            if restored := settle(self.path):
                kept = (self.path / FAILED_METRICS).exists()
                metrics = f"; the metrics of this one are kept as {FAILED_METRICS}" if kept else ""
                logger.warning(f"no checkpoint was saved: the earlier run is restored{metrics}")
        except OSError as error:
            restored = True
            logger.warning(f"the earlier run is in {self.path / OVERWRITTEN}; the next start restores it ({error})")
        if self.path.is_dir() and [entry.name for entry in self.path.iterdir()] == [LOCK]:
            (self.path / LOCK).unlink()
            if self.created:
                self.path.rmdir()
        self.lock.release()
        return restored


def find_run(path: Path) -> Path:
    """The run directory that a user names: itself, or that of its `final/`.

    Raises:
        RunEnvironmentError: if it is not the directory of a run. For a recipe or a checkpoint, the remedy names it.
    """
    run = path.parent if path.name == FINAL and not (path / RECIPE).exists() else path
    if not run.is_dir():
        with suppress(RecipeError):
            remedy = f"name its run directory {load_recipe(run).output_dir}"
            raise RunEnvironmentError(str(path), "is a recipe, not a run directory", remedy)
    if not run.is_dir() or run_manifest(run, overwrite=False) is None:
        raise RunEnvironmentError(str(path), "is not a run directory", "name the output_dir of a finished run")
    return run


def check_final_exists(run: Path) -> None:
    """Raises RunEnvironmentError if a run directory has no `final/`."""
    if not (run / FINAL).is_dir():
        why, remedy = "the run is not finished", "finish it with the same `nesso-tune train`"
        if any((run / CANDIDATE).glob("evaluations/*.gate.json")):
            why, remedy = "its gate refused the model", "train another way, or relax evaluation.gate"
        raise RunEnvironmentError(str(run), f"has no {FINAL}/: {why}", remedy)


def open_run(
    recipe: Recipe,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    allow_changes: tuple[str, ...] = (),
) -> RunDir:
    """Locks the run directory of a recipe, completes what an interrupted process left, and decides how to resume.

    Args:
        recipe: the recipe to run.
        resume: `auto` continues an unfinished run, `never` refuses to, a path continues from that checkpoint.
        overwrite: moves an earlier run aside, see `runs/layout.py`.
        allow_changes: dotted recipe keys that may differ from the run that is continued.

    Raises:
        RunEnvironmentError: if the folder is foreign, locked or not writable, or no checkpoint is usable.
        RecipeError: if the folder contains a run of another recipe.
    """
    path, resume = Path(recipe.output_dir), flag_path(resume)
    _check_folder(path, recipe, overwrite)
    created = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    run = RunDir(path, created=created, lock=_lock(path, created))
    try:
        if settle(path):
            logger.warning("an --overwrite ended before its first checkpoint: the earlier run is restored")
        remove_staging(path)
        manifest = run_manifest(path, overwrite)
        decision = decide_resume(path, manifest, recipe, resume, overwrite=overwrite, allow_changes=allow_changes)
        decision.raise_if_refused()
        if overwrite and manifest is not None:
            move_aside(path)
        for folder, name in decision.set_aside:
            remove(folder.with_name(name))
            folder.rename(folder.with_name(name))
        return replace(run, decision=decision)
    except BaseException:
        run.close()
        raise


def write_start(run: RunDir, recipe: Recipe, facts: RunFacts) -> None:
    """Writes the manifest and the resolved recipe of a run that starts or resumes.

    Values of private sources are recorded as salted digests; only `recipe.yaml` contains them.
    """
    manifest = {**facts.to_dict(), "recipe": dump(recipe), "finished": False}
    if Privacy(recipe.data):
        salt = os.urandom(8).hex()
        manifest |= {"recipe": manifest_recipe(recipe, salt), "salt": salt}
    _write_json(run.path / MANIFEST, manifest)  # first: it marks the folder as a run
    atomic_write(run.path / RECIPE, recipe.to_yaml())


def write_end(run: RunDir, best: Mapping[str, Any] | None = None, verified: Mapping[str, Any] | None = None) -> None:
    """Marks the run as finished, with the sizes of the files in `final/`.

    Args:
        run: the run.
        best: its best evaluation, if it kept that.
        verified: the loss of `final/` in transformers; None if it was not verified.
    """
    manifest = read_json(run.path, MANIFEST) | ({} if best is None else {"best": best})
    manifest |= {"finished": True, "final": final_sizes(run.path), "verified": verified}
    _write_json(run.path / MANIFEST, manifest)


def _check_folder(path: Path, recipe: Recipe, overwrite: bool) -> None:
    """Raises if the folder must not be written to."""
    check_path(path)
    check_output(recipe)
    base = local_path(recipe.model.base).resolve()
    if path.resolve() in base.parents or path.resolve() == base:
        raise RecipeError("model.base", f"{recipe.model.base} is inside output_dir {path}", "set another output_dir")
    no_run = not has_overwritten(path) and run_manifest(path, overwrite) is None and path.exists()
    if no_run and any(is_foreign(entry) for entry in path.iterdir()):
        raise RunEnvironmentError(
            str(path), "is not empty and contains no run of nesso-tune", "set another output_dir; nothing was written"
        )


def _lock(path: Path, created: bool) -> BaseFileLock:
    try:
        return acquire_lock(path / LOCK, "set another output_dir", timeout=0).lock
    except Timeout:
        raise RunEnvironmentError(
            str(path), "is in use by another nesso-tune process", "wait for it, or set another output_dir"
        ) from None
    except RunEnvironmentError:
        (path / LOCK).unlink(missing_ok=True)
        if created:
            path.rmdir()
        raise


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    atomic_write(file, json.dumps(data, indent=2, ensure_ascii=False))
