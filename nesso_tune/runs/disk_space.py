"""Room on the disk: what a run needs, whether it is there, and what is said when it is not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nesso_tune.distributed.process_group import is_main_process
from nesso_tune.errors import RunEnvironmentError, is_full
from nesso_tune.files import format_bytes
from nesso_tune.planning.plan import Plan
from nesso_tune.runs.checkpoint import checkpoints, remove_staging
from nesso_tune.runs.layout import bytes_aside

REMEDY = "free some space, lower checkpoint.keep, or set another output_dir"


@dataclass(frozen=True)
class Room:
    """What a run writes, and the disk that it writes to.

    Attributes:
        run: the run directory.
        checkpoint: bytes of one checkpoint.
        final: bytes of `final/`.
    """

    run: Path
    checkpoint: int
    final: int

    def check_run(self, plan: Plan, begun: int, keep: int, best: bool = False) -> None:
        """Makes sure that all that is still to be written fits: checkpoints before they are pruned, and `final/`.

        An earlier run that is overwritten takes its room until the first checkpoint is saved, and no longer.

        Args:
            plan: says how many saves there are.
            begun: the step that the run continues from.
            keep: checkpoints that are kept.
            best: the best one is kept too, and any evaluation may be the best.

        Raises:
            RunEnvironmentError: naming what is needed and what is free.
        """
        every, keep = plan.save_every, keep + best
        if best and every is not None and plan.evaluate_every is not None:
            every = math.gcd(every, plan.evaluate_every)
        here, left = len(checkpoints(self.run)), saves_left(plan.steps, every, begun)
        most = max(min(here + left, keep + 1) - here, min(1, left))
        at_end = max(min(here + left, keep) - here, 0)
        need = max(most * self.checkpoint, at_end * self.checkpoint + self.final)
        free, earlier = self.free(), bytes_aside(self.run)
        if need > free + earlier:
            later = f", {format_bytes(earlier)} more when the earlier run is deleted" if earlier else ""
            what = (
                f"{most} more checkpoint(s) and final/ need {format_bytes(need)}, {format_bytes(free)} are free{later}"
            )
            raise RunEnvironmentError(str(self.run), f"the disk is full for this run: {what}", REMEDY)
        if earlier and self.checkpoint > free:
            what = (
                f"the first checkpoint needs {format_bytes(self.checkpoint)}, {format_bytes(free)} are free, and the "
                f"earlier run ({format_bytes(earlier)}) is kept until it is saved"
            )
            remedy = "free some space, remove the earlier run's checkpoints yourself, or set another output_dir"
            raise RunEnvironmentError(str(self.run), f"the disk is full for this run: {what}", remedy)

    def check_save(self, step: int) -> None:
        """Makes sure that one more checkpoint fits.

        Raises:
            RunEnvironmentError: naming what is needed, what is free, and from where the run goes on later.
        """
        if self.checkpoint > (free := self.free()):
            what = f"checkpoint-{step} needs {format_bytes(self.checkpoint)}, {format_bytes(free)} are free"
            raise RunEnvironmentError(str(self.run), f"the disk is full: {what}", self._remedy())

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turns a write that failed for want of room, whoever made it, into an error that says how much is needed.

        What the first process's failed write left is removed, so that the room it took is free again.

        Raises:
            RunEnvironmentError: instead of what was raised.
        """
        try:
            yield
        except Exception as error:
            if not is_full(error):
                raise
            if is_main_process():  # the others may still be writing there
                remove_staging(self.run)
            need = f"a checkpoint needs {format_bytes(self.checkpoint)}, final/ {format_bytes(self.final)}"
            what = f"{need}, {format_bytes(self.free())} are free"
            raise RunEnvironmentError(str(self.run), f"the disk is full: {what}", self._remedy()) from error

    def free(self) -> int:
        """Bytes that may still be written; quotas do not show here, they show when a write fails."""
        return shutil.disk_usage(self.run).free

    def _remedy(self) -> str:
        saved = checkpoints(self.run)
        later = f"continues from {saved[0].name}" if saved else "starts again: nothing had been saved yet"
        return f"free some space; the same command {later}"


def saves_left(steps: int, every: int | None, begun: int) -> int:
    """How many checkpoints a run still writes: at its interval, and at the end."""
    if begun >= steps:
        return 0
    if every is None:
        return 1
    return steps // every - begun // every + (steps % every != 0)
