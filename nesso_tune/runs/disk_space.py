"""Disk space of a run: what it needs, whether it is free, and the error when it is not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nesso_tune.errors import RunEnvironmentError, is_disk_full
from nesso_tune.files import format_bytes, remove_staging
from nesso_tune.planning.plan import Plan
from nesso_tune.runs.checkpoint import checkpoints
from nesso_tune.runs.layout import overwritten_bytes


@dataclass(frozen=True)
class DiskSpace:
    """What a run writes, and the disk that it writes to.

    Attributes:
        run: the run directory.
        checkpoint: size of one checkpoint in bytes.
        final: size of `final/` in bytes.
    """

    run: Path
    checkpoint: int
    final: int

    def check_run(self, plan: Plan, step: int, keep: int, best: bool = False) -> None:
        """Checks that all checkpoints still to be written, before they are pruned, and `final/` fit on the disk.

        An earlier run that is overwritten occupies its space until the first checkpoint is saved.

        Args:
            plan: number of steps and interval of checkpoints.
            step: the step that the run resumes from; 0 for a new run.
            keep: checkpoints that are kept.
            best: the best checkpoint is kept too, and any evaluation may be the best.

        Raises:
            RunEnvironmentError: with the space needed and the space free.
        """
        save_every, keep = plan.save_every, keep + best
        if best and save_every is not None and plan.evaluate_every is not None:
            save_every = math.gcd(save_every, plan.evaluate_every)
        existing, remaining = len(checkpoints(self.run)), saves_left(plan.steps, save_every, step)
        peak = max(min(existing + remaining, keep + 1) - existing, min(1, remaining))  # more than now
        at_end = max(min(existing + remaining, keep) - existing, 0)
        needed = max(peak * self.checkpoint, at_end * self.checkpoint + self.final)
        free, earlier = self.free(), overwritten_bytes(self.run)
        if needed > free + earlier:
            later = f", {format_bytes(earlier)} more after the earlier run is deleted" if earlier else ""
            what = f"{peak} more checkpoint(s) and final/ need {format_bytes(needed)}, {format_bytes(free)} are free"
            raise RunEnvironmentError(
                str(self.run), f"the disk is full for this run: {what}{later}",
                "free some space, lower checkpoint.keep, or set another output_dir",
            )  # fmt: skip
        if earlier and self.checkpoint > free:
            what = (
                f"the first checkpoint needs {format_bytes(self.checkpoint)}, {format_bytes(free)} are free, and the "
                f"earlier run ({format_bytes(earlier)}) is kept until it is saved"
            )
            remedy = "free some space, remove the earlier run's checkpoints yourself, or set another output_dir"
            raise RunEnvironmentError(str(self.run), f"the disk is full for this run: {what}", remedy)

    def check_save(self, step: int) -> None:
        """Checks that one more checkpoint fits.

        Raises:
            RunEnvironmentError: with the space needed, the space free, and the checkpoint that the run resumes from.
        """
        if self.checkpoint > (free := self.free()):
            what = f"checkpoint-{step} needs {format_bytes(self.checkpoint)}, {format_bytes(free)} are free"
            raise RunEnvironmentError(str(self.run), f"the disk is full: {what}", self._remedy())

    @contextmanager
    def full_disk_errors(self, *, remove_partial: bool) -> Iterator[None]:
        """Turns any write that failed on a full disk into an error that says how much space is needed.

        Args:
            remove_partial: delete the files of the failed write; on the main process only, as the other ranks may
                still be writing.

        Raises:
            RunEnvironmentError: in place of the original error.
        """
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            if remove_partial:
                remove_staging(self.run)
            needed = f"a checkpoint needs {format_bytes(self.checkpoint)}, final/ {format_bytes(self.final)}"
            what = f"{needed}, {format_bytes(self.free())} are free"
            raise RunEnvironmentError(str(self.run), f"the disk is full: {what}", self._remedy()) from error

    def free(self) -> int:
        """Free bytes on the disk of the run; a quota is not included and shows only when a write fails."""
        return shutil.disk_usage(self.run).free

    def _remedy(self) -> str:
        saved = checkpoints(self.run)
        later = f"continues from {saved[0].name}" if saved else "starts again: no checkpoint was saved yet"
        return f"free some space; the same command {later}"


def saves_left(steps: int, save_every: int | None, step: int) -> int:
    """Number of checkpoints that a run at `step` of `steps` still writes: at its interval, and at the end.

    None without checkpoints.
    """
    if step >= steps or save_every is None:
        return 0
    return steps // save_every - step // save_every + (steps % save_every != 0)
