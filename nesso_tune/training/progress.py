"""What a person sees while a run trains: a bar in a terminal, a line per log line elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune.terminal import visible

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
