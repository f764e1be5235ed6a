"""Callbacks of the trainer: when to log, evaluate and save, the progress bar, and the profiler."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.profiler import profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune.files import atomic_replace
from nesso_tune.logs import logger, visible
from nesso_tune.metric_registry import PROGRESS_METRICS
from nesso_tune.planning.plan import Plan
from nesso_tune.runs.layout import PROFILE
from nesso_tune.training.throughput import Throughput

PROFILE_WARMUP_STEPS, PROFILE_STEPS = 5, 3


class IntervalCallback(TrainerCallback):
    """Requests logging, evaluation and saving at the plan's intervals, and always at the last step."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Sets the flags of the trainer; the first step is logged too."""
        plan, step = self._plan, state.global_step
        last = step == plan.total_steps
        control.should_log = last or step == 1 or _is_due(step, plan.log_every)
        control.should_evaluate = plan.evaluate_every is not None and (last or _is_due(step, plan.evaluate_every))
        control.should_save = last or _is_due(step, plan.save_every)
        return control


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class ProgressBar(TrainerCallback):
    """Shows the progress on the main process: a bar on stderr in a terminal, else messages."""

    def __init__(self, name: str) -> None:
        self._name = visible(name)
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the bar."""
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (
            TextColumn(self._name, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advances the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Shows loss, learning rate and speed."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        numbers = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {logs['tokens_per_second']:,.0f} tok/s"
        numbers += f"  {logs['mfu']:.1%} MFU" if "mfu" in logs else ""
        if self._bar is not None:
            self._bar.update(self._task, numbers=numbers)
        else:
            logger.info(f"step {state.global_step}/{state.max_steps}  {numbers}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Shows the main metrics of an evaluation."""
        if state.is_world_process_zero and metrics:
            shown = "  ".join(f"{key} {metrics[key]:.4g}" for key in PROGRESS_METRICS if key in metrics)
            logger.info(f"step {state.global_step}/{state.max_steps}  {shown}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.stop()


class ProfilerCallback(TrainerCallback):
    """Profiles some steps of this session on the main process, after a few warm-up steps if there are enough.

    Must be added after `IntervalCallback`: profiling ends before an evaluation or a save. The trace is in Chrome's
    format, gzipped: `<output_dir>/profile/steps-6-8.json.gz`. Profiling changes no result.

    Args:
        run: the run directory.
        total_steps: of the run.
        throughput: must not count the time that starting and writing the profile takes.
    """

    def __init__(self, run: Path, total_steps: int, throughput: Throughput) -> None:
        self._folder, self._total_steps, self._throughput = run / PROFILE, total_steps, throughput
        self._first = self._last = 0
        self._profiler: profile | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Chooses the steps to profile."""
        left = self._total_steps - state.global_step
        if left > 0 and state.is_world_process_zero:
            self._first = state.global_step + min(PROFILE_WARMUP_STEPS, left - 1) + 1
            self._last = min(self._first + PROFILE_STEPS - 1, self._total_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the profiler before the first micro batch of the first step to profile."""
        if state.global_step + 1 == self._first:
            with self._throughput.paused():
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides Kineto's own start and stop messages
                self._profiler = profile(record_shapes=True)  # of the CPU, and of the GPU if there is one
                self._profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes the trace after the last step to profile, or before an interruption."""
        interrupted = control.should_evaluate or control.should_save or control.should_training_stop
        if self._profiler is not None and (state.global_step == self._last or interrupted):
            self._write(self._profiler, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes the trace of a run that ended before the last step to profile."""
        if self._profiler is not None:
            self._write(self._profiler, state.global_step)

    def _write(self, profiler: profile, last: int) -> None:
        with self._throughput.paused():
            self._profiler = None
            profiler.stop()
            self._folder.mkdir(exist_ok=True)
            file = self._folder / f"steps-{self._first}-{last}.json.gz"
            with atomic_replace(file, durable=False, staging=file.with_name(f".{file.name}")) as staging:
                profiler.export_chrome_trace(str(staging))  # compressed, because of the suffix of the name
        logger.info(
            f"profile of steps {self._first} to {last}: {file} (open it in https://ui.perfetto.dev or chrome://tracing)"
        )
