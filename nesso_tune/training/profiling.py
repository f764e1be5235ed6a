"""`train.profile`: where the time of a few steps goes, as a trace that a browser shows."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from torch.profiler import profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune.terminal import print_notes
from nesso_tune.training.layout import PROFILE

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
        staging = file.with_name(f".{file.name}")
        recording.export_chrome_trace(str(staging))
        staging.replace(file)
        self._trainer.track.throughput.paused += time.monotonic() - began
        said = (
            f"profile of steps {self._first} to {last}: {file} (open it in https://ui.perfetto.dev or chrome://tracing)"
        )
        print_notes(said)
