"""Callbacks of the trainer: when to log, evaluate and save, the progress bar, and the profiler."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch.profiler import profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune.distributed.process_group import broadcast_from_rank0
from nesso_tune.files import atomic_replace
from nesso_tune.logs import logger, output_flags, visible, with_figures
from nesso_tune.metric_registry import better_direction, progress_metrics
from nesso_tune.planning.plan import Plan
from nesso_tune.runs.layout import METRICS, PROFILE
from nesso_tune.runs.metrics_log import read_metrics
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
        control.should_save = plan.save_every is not None and (last or _is_due(step, plan.save_every))
        return control


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class ProgressCallback(TrainerCallback):
    """Shows the progress on the main process: a message for each log line, and a bar in a terminal or a notebook.

    A program that uses the library and does not show messages sees the lines above the bar.
    """

    def __init__(self, name: str) -> None:
        self._name = visible(name)
        self._bar: TerminalBar | NotebookBar | None = None
        self._begun = self._second = (0.0, 0)  # time and step at the begin of this session, and after its first step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the bar."""
        if state.is_world_process_zero and not output_flags():
            self._bar = NotebookBar.open(self._name) or TerminalBar.open(self._name)
        self._begun = self._second = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advances the bar."""
        if state.global_step == self._begun[1] + 1:
            self._second = time.monotonic(), state.global_step
        if self._bar is not None:
            self._bar.advance(state.global_step, state.max_steps, self._time_left(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Shows loss, learning rate and speed."""
        if state.is_world_process_zero and logs and "loss" in logs:
            numbers = f"loss {logs['loss']:.4f} lr {logs['learning_rate']:.2e} {logs['tokens_per_second']:,.0f} tok/s"
            numbers += f" {logs['mfu']:.1%} MFU ({logs['mfu_common']:.1%} common)" if "mfu" in logs else ""
            self._show(state, numbers, logs)
            if self._bar is not None:
                self._bar.numbers = numbers

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
            shown = " ".join(f"{key} {metrics[key]:.4g}" for key in progress_metrics() if key in metrics)
            self._show(state, f"evaluation {shown}", metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Closes the bar, also if training ends with an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, state: TrainerState, numbers: str, figures: Mapping[str, Any]) -> None:
        left = self._time_left(state)
        at = f"step {state.global_step}/{state.max_steps} epoch {state.epoch or 0:.2f} ETA {clock(left)}"
        line = f"{at} {numbers}"
        keys = {"step": state.global_step, "total_steps": state.max_steps, "seconds_left": left}
        logger.info(line, extra=with_figures({**keys, **figures}))
        if self._bar is not None:
            self._bar.show(time.strftime("%H:%M:%S ") + line, logger.isEnabledFor(logging.INFO))

    def _time_left(self, state: TrainerState) -> float:
        """Seconds to the last step at the speed of this session, evaluations included.

        The first step counts only until there is a second one: it includes compilation.
        """
        since, step = self._second if state.global_step > self._second[1] else self._begun
        made = max(1, state.global_step - step)
        return (time.monotonic() - since) / made * (state.max_steps - state.global_step)


def clock(seconds: float) -> str:
    """A duration as `4:32` or `1:04:32`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TerminalBar:
    """A bar on stderr. Step and time left come first, so that a narrow terminal cuts off other things."""

    WIDTH = 20  # of the bar itself

    def __init__(self, name: str, console: Console) -> None:
        self._name, self.numbers = name, ""  # the figures of the last log line
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    @classmethod
    def open(cls, name: str) -> TerminalBar | None:
        """A bar, if stderr is a terminal."""
        console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        return cls(name, console) if console.is_terminal else None

    def advance(self, step: int, total: int, left: float) -> None:
        """Shows a step and the seconds that are left."""
        self._live.update(Text(f"{_bar_text(step, total, left, self.WIDTH)} {self.numbers} {self._name}", no_wrap=True,
                               overflow="ellipsis"), refresh=True)  # fmt: skip

    def show(self, line: str, is_message: bool) -> None:
        """Shows a line above the bar, unless it is shown as a message."""
        if not is_message:
            self._live.console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar; the lines above it stay."""
        self._live.stop()


def _bar_text(step: int, total: int, left: float, width: int) -> str:
    done = width * step // max(1, total)
    return f"step {step}/{total} ETA {clock(left)} {'━' * done}{'─' * (width - done)}"


class NotebookBar:
    """A cell output of a notebook with the bar and the last lines: plain preformatted text, without styles."""

    WIDTH, LINES, INTERVAL_S = 40, 200, 0.25

    def __init__(self, name: str, display: Any) -> None:
        self.numbers = ""
        self._name, self._lines, self._bar, self._shown_at = name, deque[str](maxlen=self.LINES), "", 0.0
        self._handle = display({"text/plain": name}, raw=True, display_id=True)

    @classmethod
    def open(cls, name: str) -> NotebookBar | None:
        """A bar, in the kernel of a notebook."""
        shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
        if shell is None or not hasattr(shell, "kernel"):
            return None
        from IPython.display import display

        return cls(name, display)

    def advance(self, step: int, total: int, left: float) -> None:
        """Shows a step and the seconds that are left."""
        self._bar = _bar_text(step, total, left, self.WIDTH)
        if time.monotonic() - self._shown_at > self.INTERVAL_S:
            self._update()

    def show(self, line: str, is_message: bool) -> None:
        """Adds a line."""
        self._lines.append(line)
        self._update()

    def close(self) -> None:
        """Shows the last state."""
        self._update()

    def _update(self) -> None:
        self._shown_at = time.monotonic()
        text = "\n".join((f"{self._name} {self._bar}", *self._lines))
        self._handle.update({"text/plain": text, "text/html": f"<pre>{escape(text)}</pre>"}, raw=True)


class AfterEvaluation(TrainerCallback):
    """Calls a function after each evaluation, on the main process."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer."""
        if state.is_world_process_zero:
            self._function()


class StopWhenWorse(TrainerCallback):
    """Stops a run at an evaluation that is worse than that of another run at the same step.

    A resumed run decides again at the step of its checkpoint: a session that was killed after this decision may have
    saved the checkpoint without finishing the run.

    Args:
        metric: has a better direction, see `better_direction`.
        margin: by how much a value may be worse, in the unit of the metric.
        others: the values of the other run by step. At other steps nothing is compared.
        name: of the other run, for the message.
        run: the run directory of this run.
    """

    def __init__(self, metric: str, margin: float, others: Mapping[int, float], name: str, run: Path) -> None:
        self._metric, self._margin, self._others, self._name = metric, margin, others, name
        self._file = run / METRICS

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decides by the evaluation of the checkpoint that the run resumes from."""
        value = None
        if state.is_world_process_zero and state.global_step:
            lines = (line for line in read_metrics(self._file) if line.get("step") == state.global_step)
            value = next((line[self._metric] for line in lines if "event" not in line and self._metric in line), None)
        self._decide(state, control, broadcast_from_rank0(value))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Decides by this evaluation."""
        self._decide(state, control, (metrics or {}).get(self._metric))

    def _decide(self, state: TrainerState, control: TrainerControl, value: float | None) -> None:
        step, other = state.global_step, self._others.get(state.global_step)
        if value is None or other is None or step >= state.max_steps:
            return
        worse_by = (value - other) * (1 if better_direction(self._metric) == "lower" else -1)
        if worse_by > self._margin:
            compared = f"{self._metric} {value:.4g} is worse by more than {self._margin:g} than {other:.4g}"
            logger.info(f"stopping at step {step:,}: {compared} of {self._name}")
            control.should_training_stop = True


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
