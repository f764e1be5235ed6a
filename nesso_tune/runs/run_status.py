"""`status.json`: the plan of a run in figures, when it started, and how it ended. Read without torch."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import Timeout

from nesso_tune.errors import GateRefused, NessoError, Preempted, RunEnvironmentError
from nesso_tune.files import acquire_lock, atomic_write
from nesso_tune.logs import logger
from nesso_tune.metric_registry import HEADLINE
from nesso_tune.runs.checkpoint import MANIFEST, is_checkpoint_name
from nesso_tune.runs.layout import LOCK, METRICS, OVERWRITTEN, RECIPE, STATUS
from nesso_tune.runs.metrics_log import is_number, last_lines

if TYPE_CHECKING:
    from nesso_tune.data.privacy import Privacy
    from nesso_tune.planning.plan import Plan

State = Literal["training", "finished", "stopped", "refused", "failed"]
PLANNED_RATES = 200  # points of the planned learning rate


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        state: `training` until an end is recorded; `stopped` by a signal, with a checkpoint; `refused` by its
            gate; `failed` with an error.
        message: why it stopped, was refused or failed.
        total_steps, epochs, global_batch, processes: of the plan.
        learning_rates: planned learning rates as (step, rate), at most `PLANNED_RATES` of them.
        host, process: machine and process id of the main process.
        started, ended: seconds since 1970; `ended` is None without a recorded end.
    """

    state: State
    message: str
    total_steps: int
    epochs: float | None
    global_batch: int
    processes: int
    learning_rates: tuple[tuple[int, float], ...]
    host: str
    process: int
    started: float
    ended: float | None = None

    @classmethod
    def begin(cls, plan: Plan) -> RunStatus:
        """The status of a run that starts now, in this process."""
        return cls(
            state="training", message="", total_steps=plan.steps, epochs=plan.epochs, global_batch=plan.global_batch,
            processes=plan.processes, learning_rates=_planned_rates(plan), host=socket.gethostname(),
            process=os.getpid(), started=time.time(),
        )  # fmt: skip

    def end(self, state: State, message: str = "") -> RunStatus:
        """The same run, ended now."""
        return replace(self, state=state, message=message, ended=time.time())

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> RunStatus:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**raw, "learning_rates": tuple((step, rate) for step, rate in raw["learning_rates"])})


def read_status(run: Path) -> RunStatus | None:
    """The status of a run; None if it is not recorded or not readable."""
    try:
        return RunStatus.from_dict(json.loads((run / STATUS).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


@contextmanager
def recorded_status(run: Path, plan: Plan, privacy: Privacy) -> Iterator[None]:
    """Records that the run trains, and how the `with` block ends. A full disk does not stop the run.

    Only the type of an error is recorded if it is unexpected or names something private.
    """
    status = RunStatus.begin(plan)
    _write(run, status)
    try:
        yield
    except Preempted as error:
        _write(run, status.end("stopped", error.problems[0].what))
        raise
    except BaseException as error:
        shown = isinstance(error, NessoError) and not privacy.reveals(str(error))
        state: State = "refused" if isinstance(error, GateRefused) else "failed"
        _write(run, status.end(state, str(error) if shown else type(error).__name__))
        raise
    _write(run, status.end("finished"))


def is_locked(run: Path) -> bool:
    """Whether a process has the run open."""
    if not (run / LOCK).exists():
        return False
    try:
        with acquire_lock(run / LOCK, "", timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, RunEnvironmentError):
        return False


def status_in_words(run: Path) -> str:
    """The state of a run as text, e.g. `stopped at step 120 of 300: asked to stop; saved at step 120`."""
    status, step = read_status(run), last_step(run)
    if status is None:
        return f"at step {step:,}; its status is not recorded"
    at = f"step {step:,} of {status.total_steps:,}"
    if status.ended is not None:
        lost = "" if last_written(run) or status.state == "failed" else f"; {METRICS} is missing"
        return f"{status.state} at {at}{lost}{f': {status.message}' if status.message else ''}"
    if is_locked(run):
        return f"training, {at}"
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last_written(run)))
    return f"no end recorded: the process is gone, last line at {at}, {written}"


@dataclass(frozen=True)
class RunSummary:
    """One line of `nesso-tune status`.

    Attributes:
        run: path of the run directory.
        name: its path relative to the folder that was listed.
        state: `training`, `finished`, `stopped`, `refused`, `failed`, or `gone` if the process ended without a record.
        step, total_steps: the last step and that of the plan; `total_steps` is None if the plan is not recorded.
        loss, tokens_per_second: of the last line that has them.
        metric, metric_value: the headline metric of its method, at the last evaluation.
        started: when it was last started, in seconds since 1970.
        seconds_left: estimated from the mean speed of the run; None unless it trains.
        seconds_since_last_line: age of the last line of the metrics.
    """

    run: str
    name: str
    state: str
    step: int
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    metric: str | None
    metric_value: float | None
    started: float | None
    seconds_left: float | None
    seconds_since_last_line: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """The line as texts: name, state, step, loss, speed, time left and age of the last line."""
        step = f"{self.step:,}" if self.total_steps is None else f"{self.step:,}/{self.total_steps:,}"
        loss = "" if self.loss is None else f"{self.loss:.4f}"
        speed = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}"
        left, age = format_duration(self.seconds_left), format_duration(self.seconds_since_last_line)
        return self.name, self.state, step, loss, speed, left, f"{age} ago" if age else ""


def find_runs(folder: Path) -> list[Path]:
    """The run directories in a folder and below it, sorted; a run directory itself is the only one."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = (file.parent for file in folder.rglob(MANIFEST))
    runs = [run for run in found if not is_checkpoint_name(run.name) and OVERWRITTEN not in run.parts]
    return sorted(run for run in runs if any((run / name).is_file() for name in (RECIPE, STATUS, METRICS)))


def summarize_run(run: Path, folder: Path) -> RunSummary:
    """The state of a run in figures."""
    status, lines = read_status(run), last_lines(run / METRICS)
    values: dict[str, Any] = {}
    for line in lines:
        values |= line
    step, total = values.get("step", 0), None if status is None else status.total_steps
    state: str = "unknown" if status is None else status.state
    if state == "training" and not is_locked(run):
        state = "gone"
    seconds = values.get("seconds")
    left = seconds / step * (total - step) if state == "training" and total and step and is_number(seconds) else None
    written = last_written(run)
    metric = next((name for name in reversed(HEADLINE.values()) if is_number(values.get(name))), None)
    name = folder.resolve().name if run == folder else str(run.relative_to(folder))
    return RunSummary(
        run=str(run), name=name, state=state, step=step, total_steps=total,
        loss=_number(values.get("loss")), tokens_per_second=_number(values.get("tokens_per_second")), metric=metric,
        metric_value=None if metric is None else values[metric],
        started=None if status is None else status.started, seconds_left=left,
        seconds_since_last_line=max(0.0, time.time() - written) if written else None,
    )  # fmt: skip


def format_duration(seconds: float | None) -> str:
    """A duration in its two largest units, e.g. `2 h 5 min`; empty for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if n]
    return " ".join(parts[:2]) or "0 s"


def _number(value: Any) -> float | None:
    return value if is_number(value) else None


def last_step(run: Path) -> int:
    """The step of the last line of the metrics; 0 without one."""
    return max((line.get("step", 0) for line in last_lines(run / METRICS)), default=0)


def last_written(run: Path) -> float:
    """When a line of the metrics was last written, in seconds since 1970; 0 for a run without metrics."""
    file = run / METRICS
    return file.stat().st_mtime if file.is_file() else 0.0


def _planned_rates(plan: Plan) -> tuple[tuple[int, float], ...]:
    schedule = plan.schedule
    if schedule is None:
        return ()
    every = max(1, schedule.total_steps // PLANNED_RATES)
    steps = [*range(0, schedule.total_steps, every), schedule.total_steps]
    return tuple((step, schedule.peak * schedule.multiplier(step)) for step in steps)


def _write(run: Path, status: RunStatus) -> None:
    try:
        atomic_write(run / STATUS, json.dumps(asdict(status), indent=1))
    except OSError as error:
        logger.warning(f"{run / STATUS} cannot be written ({error.strerror})")
