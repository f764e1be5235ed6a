"""Preemption: on a signal, all ranks save a checkpoint after the same step, and the run exits with code 75.

Schedulers send SIGTERM or SIGUSR1 before they kill a job; Ctrl-C sends SIGINT. A second signal ends the process now.
Before training there is nothing to save: the first signal ends the run, also with code 75. A run that has finished its
last step is still exported, and the remaining runs of a chain are left to the next start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune.errors import Preempted
from nesso_tune.logs import EVERY_RANK, logger

# Set by `nesso-tune launch`: a file that it makes before it forwards a signal. Torch also sends SIGTERM, when
# another process has failed.
LAUNCHED_VARIABLE = "NESSO_TUNE_LAUNCHED"
DUPLICATE_SIGNAL_S = 1.0  # a forwarded signal within this time was also sent by the terminal to all processes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context manager that handles the stop signals; `signal_name` is the name of the first one, or None."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._received_at = 0.0
        self._training = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # handlers can only be set there
            self._previous_handlers = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def begin_training(self) -> None:
        """From now on, a signal stops the run after the current step instead of at once."""
        self._training = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._training:
            if number == signal.SIGTERM and _another_failed():
                sys.exit(128 + number)
            raise Preempted(name, "received before training began", "run the same command to start again")
        if self.signal_name is None:
            self.signal_name, self._received_at = name, time.monotonic()
            hint = "press Ctrl-C" if number == signal.SIGINT else "send it"
            logger.warning(f"{name}: saving a checkpoint after this step; {hint} again to exit now", extra=EVERY_RANK)
        elif LAUNCHED_VARIABLE not in os.environ or time.monotonic() - self._received_at > DUPLICATE_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _another_failed() -> bool:
    """Whether a SIGTERM means that another process of this machine has failed, which has its own message."""
    forwarded = os.environ.get(LAUNCHED_VARIABLE)
    return forwarded is not None and not os.path.exists(forwarded)


class PreemptionCallback(TrainerCallback):
    """Stops training on all ranks after the same step if any of them received a signal.

    Must be added after the callback that sets the save and stop flags, because it overrides them. `stopped_at` is the
    step of the checkpoint if training was stopped.
    """

    def __init__(self, trainer: Any, request: StopRequest, total_steps: int) -> None:
        self._trainer, self._request, self._total_steps = trainer, request, total_steps
        self.stopped_at: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Sets the save and stop flags of the trainer."""
        stop = torch.tensor(float(self._request.signal_name is not None))
        if self._trainer.accelerator.num_processes > 1:
            stop = self._trainer.sum_over_processes(stop)
        if stop.item() and state.global_step < self._total_steps:  # the last step ends the run anyway
            self.stopped_at, self._trainer.preempted = state.global_step, True
            control.should_save = control.should_training_stop = True
        elif control.should_training_stop:  # by a callback: the trainer then evaluates and saves
            control.should_log = True
        return control
