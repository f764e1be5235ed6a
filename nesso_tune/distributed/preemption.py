"""Being asked to stop: the run saves at the next step boundary, on all processes at the same one, and ends with 75.

SIGTERM and SIGUSR1 come from schedulers, before they kill; SIGINT from Ctrl-C. A second one ends the process at once.
Before training begins there is nothing to save: then the first one ends the run, with 75 too. What has been trained to
its end is still exported; the rest of a chain waits for the next time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune.errors import Preempted
from nesso_tune.logs import print_notes

LAUNCHED = "NESSO_TUNE_LAUNCHED"  # set by our launcher, which passes signals on
ECHO_S = 1.0  # within which such a signal is the one that a terminal sent to all processes already
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Catches the signals while it is entered; `asked` holds the first one's name."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._asked_at = 0.0
        self._training = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self._before = {number: signal.signal(number, self._handle) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for_steps(self) -> None:
        """From now on there are steps to wait for, and what they made to save."""
        self._training = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._training:
            raise Preempted(name, "asked to stop before training began", "the same command starts again")
        if self.asked is None:
            self.asked, self._asked_at = name, time.monotonic()
            print_notes(f"{name}: saving after this step; once more ends at once")
        elif LAUNCHED not in os.environ or time.monotonic() - self._asked_at > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class StopWhenAsked(TrainerCallback):
    """Agrees with all processes after each step whether to stop, so that none waits for one that is gone.

    Added after `IntervalCallback`, whose flags it overrides. `stopped_at` is the step of the checkpoint, if it stopped.
    """

    def __init__(self, trainer: Any, request: StopRequest, total_steps: int) -> None:
        self._trainer, self._request, self._total = trainer, request, total_steps
        self.stopped_at: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Called by the trainer."""
        asked = torch.tensor(float(self._request.asked is not None))
        if self._trainer.accelerator.num_processes > 1:
            asked = self._trainer.sum_over_processes(asked)
        if asked.item() and state.global_step < self._total:  # the last step ends the run anyway
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
        return control
