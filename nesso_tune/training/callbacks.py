"""When a run logs, evaluates and saves: the plan's intervals, and always at the end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.profiler import profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune.files import atomic_replace
from nesso_tune.logs import print_notes, visible
from nesso_tune.planning.plan import Plan
from nesso_tune.runs.layout import PROFILE


class Pace(TrainerCallback):
    """Sets the trainer's flags after each optimizer step."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Called by the trainer; the first step is logged too."""
        plan, step = self._plan, state.global_step
        last = step == plan.total_steps
        control.should_log = last or step == 1 or _due(step, plan.log_every)
        control.should_evaluate = plan.evaluate_every is not None and (last or _due(step, plan.evaluate_every))
        control.should_save = last or _due(step, plan.save_every)
        return control


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


KEYS = (
    "eval_loss", "stop_rate", "exact_match", "language_fidelity", "repetition_rate", "train_exact_match",
    "eval_rewards/accuracies", "closer_to_chosen",
)  # fmt: skip


class ProgressBar(TrainerCallback):
    """Writes to stderr, on the main process only."""

    def __init__(self, name: str) -> None:
        self._name = visible(name)
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer."""
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
        """Called by the trainer."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Called by the trainer with a log line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        numbers = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {logs['tokens_per_second']:,.0f} tok/s"
        numbers += f"  {logs['mfu']:.1%} MFU" if "mfu" in logs else ""
        if self._bar is not None:
            self._bar.update(self._task, numbers=numbers)
        else:
            self._say(f"{self._name} step {state.global_step}/{state.max_steps}  {numbers}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        """Called by the trainer with an evaluation's metrics."""
        if state.is_world_process_zero and metrics:
            shown = "  ".join(f"{key} {metrics[key]:.4g}" for key in KEYS if key in metrics)
            self._say(f"{self._name} step {state.global_step}/{state.max_steps}  {shown}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, text: str) -> None:
        (self._bar.console if self._bar is not None else self._console).print(visible(text), soft_wrap=True)


WARM_UP, STEPS = 5, 3  # steps of a session that are let pass, and that are recorded


class Profile(TrainerCallback):
    """Records some steps of this session on the first process; a short session is recorded as far as it goes.

    Added after `Pace`: a recording ends with the step after which something else than training comes. The trace is in
    Chrome's format, gzipped: `<output_dir>/profile/steps-6-8.json.gz`. Nothing that is computed depends on it.
    """

    def __init__(self, trainer: Any, run: Path, total_steps: int) -> None:
        self._trainer, self._folder, self._total = trainer, run / PROFILE, total_steps
        self._first = self._last = 0
        self._recording: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer: chooses the steps."""
        left = self._total - state.global_step
        if left > 0 and state.is_world_process_zero:
            self._first = state.global_step + min(WARM_UP, left - 1) + 1
            self._last = min(self._first + STEPS - 1, self._total)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer, before the first micro batch of a step."""
        if state.global_step + 1 == self._first:
            began = time.monotonic()
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own lines say when it starts and stops
            self._recording = profile(record_shapes=True)  # of the CPU, and of the GPU where there is one
            self._recording.start()
            self._trainer.track.throughput.paused += time.monotonic() - began

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer, after the update."""
        interrupted = control.should_evaluate or control.should_save or control.should_training_stop
        if self._recording is not None and (state.global_step == self._last or interrupted):
            self._write(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer; a run may end before the last step that was to be recorded."""
        if self._recording is not None:
            self._write(state.global_step)

    def _write(self, last: int) -> None:
        began, recording = time.monotonic(), self._recording
        self._recording = None
        recording.stop()
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"steps-{self._first}-{last}.json.gz"
        with atomic_replace(file, durable=False, staging=file.with_name(f".{file.name}")) as staging:
            recording.export_chrome_trace(str(staging))  # compressed, because of the name's suffix
        self._trainer.track.throughput.paused += time.monotonic() - began
        said = (
            f"profile of steps {self._first} to {last}: {file} (open it in https://ui.perfetto.dev or chrome://tracing)"
        )
        print_notes(said)
