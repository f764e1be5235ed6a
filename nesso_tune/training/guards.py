"""What is looked at before every update: loss and gradient norm, of all processes, finite and not leaping.

NaN and infinity end the run before they reach the weights. A spike is a loss or a gradient norm above
`mean + 6 standard deviations` of the last 128 steps (of the norm: of its logarithm, which is nearer to normal).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from nesso_tune.errors import NumericalError
from nesso_tune.terminal import print_notes
from nesso_tune.training.checkpoint import checkpoints
from nesso_tune.training.metrics import MetricsLog
from nesso_tune.training.order import RunOrder
from nesso_tune.training.processes import from_first

WINDOW, ENOUGH, DEVIATIONS = 128, 32, 6.0  # steps that are remembered, that must be, and how far is too far
LEAST = {"loss": 0.05, "grad_norm": 0.1}  # deviations below which nothing is called a leap: nats, and log of the norm
NAMED, SHOWN = 64, 3  # rows in metrics.jsonl, and in a message
Place = tuple[int, int]  # process and micro batch of a step
Row = tuple[str, str]  # where a row stands, and what others may read of that


class Guard:
    """Decides before each update whether it is made. All processes decide alike: they have seen the same numbers."""

    def __init__(self, on_spike: str, order: RunOrder, log: MetricsLog) -> None:
        self._on_spike, self._order, self._log = on_spike, order, log
        self._losses: list[Tensor] = []  # of this process's micro batches in this step
        self._usual = {name: deque[float](maxlen=WINDOW) for name in LEAST}

    def note(self, loss: Tensor) -> None:
        """Takes the loss of one micro batch, as a share of the step's; nothing waits for the device."""
        self._losses.append(loss.detach().double())

    def lets_pass(self, trainer: Any, norm: float) -> bool:
        """Whether the update of this step is made.

        Args:
            trainer: asked for the sum over processes, and for where it stands.
            norm: of the whole gradient, before clipping.

        Raises:
            NumericalError: if loss or norm are not finite, or leap under `on_spike: stop`.
        """
        losses = torch.stack(self._losses)
        self._losses = []
        wrong = ~torch.isfinite(losses)
        own = torch.stack([losses.sum(), losses.new_tensor(norm), wrong.sum().double()])
        loss, norm, count = trainer.sum_over_processes(own).tolist()  # the norm too: all must decide alike
        loss, norm = (value / trainer.accelerator.num_processes for value in (loss, norm))
        step = trainer.state.global_step + 1
        if count or not math.isfinite(norm):
            raise self._not_finite(trainer, step, wrong.tolist(), {"loss": loss, "grad_norm": norm}, bool(count))
        leaps = self._leaps({"loss": loss, "grad_norm": norm})
        return not leaps or self._spike(trainer, step, losses.tolist(), leaps)

    def state(self) -> dict[str, list[float]]:
        """What was usual, as plain data, exact."""
        return {name: list(values) for name, values in self._usual.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Takes back what `state` gave."""
        for name, values in self._usual.items():
            values.clear()
            values.extend(state.get(name, ()))

    def _leaps(self, now: dict[str, float]) -> dict[str, tuple[float, float]]:
        """{name: value and limit} of what leaps; remembers the values, so that what stays becomes the usual."""
        found: dict[str, tuple[float, float]] = {}
        for name, value in now.items():
            usual, logarithmic = self._usual[name], name == "grad_norm"
            scaled = math.log(max(value, 1e-30)) if logarithmic else value
            if len(usual) >= ENOUGH:
                limit = statistics.fmean(usual) + DEVIATIONS * max(statistics.pstdev(usual), LEAST[name])
                if scaled > limit:
                    found[name] = value, math.exp(limit) if logarithmic else limit
            usual.append(scaled)
        return found

    def _spike(self, trainer: Any, step: int, losses: list[float], leaps: dict[str, tuple[float, float]]) -> bool:
        """Says it, and does what the recipe says; `rows` are those of the micro batch with the highest loss."""
        highest = max(range(len(losses)), key=losses.__getitem__)
        each = gather_object([(losses[highest], (trainer.accelerator.process_index, highest))])
        rows = self._rows(trainer, step, [max(each)[1]])
        said = ", ".join(f"{name} {value:.4g} (above {limit:.4g})" for name, (value, limit) in leaps.items())
        values, limits = ({name: pair[i] for name, pair in leaps.items()} for i in (0, 1))
        event = {"action": self._on_spike, "values": values, "limits": limits, "rows": _shown(rows)}
        self._log.write({"step": step, "event": "spike", **event})
        if self._on_spike == "stop":
            raise NumericalError(
                f"step {step}", f"{said} leaps above the last {WINDOW} steps, nothing was updated{_among(rows)}",
                f"look at these rows, lower train.learning_rate, or set on_spike: skip; {intact(trainer)}",
            )  # fmt: skip
        if trainer.is_world_process_zero():
            what = "no update is made" if self._on_spike == "skip" else "the update is made"
            print_notes(f"step {step}: {said} leaps above the last {WINDOW} steps; {what}")
        return self._on_spike == "warn"

    def _not_finite(
        self, trainer: Any, step: int, wrong: list[bool], values: dict[str, float], in_loss: bool
    ) -> NumericalError:
        rank = trainer.accelerator.process_index
        mine = [(rank, i) for i, is_wrong in enumerate(wrong) if is_wrong or not in_loss]
        rows = self._rows(trainer, step, gather_object(mine))
        self._log.write({"step": step, "event": "not_finite", "values": values, "rows": _shown(rows)})
        what = f"the loss is {values['loss']}" if in_loss else f"the gradient's norm is {values['grad_norm']}"
        return NumericalError(
            f"step {step}", f"{what}, nothing was updated{_among(rows)}",
            f"look at these rows, or lower train.learning_rate; {intact(trainer)}",
        )  # fmt: skip

    def _rows(self, trainer: Any, step: int, of: Sequence[Place]) -> list[Row]:
        """Where the rows of some micro batches stand; the first process looks for all.

        Accelerate deals micro batches in turn: number `i` of process `r` is the `i * processes + r`-th of its step.
        """
        size, processes = trainer.args.per_device_train_batch_size, trainer.accelerator.num_processes
        before = (step - 1) * trainer.args.gradient_accumulation_steps * processes
        batches = sorted(before + i * processes + rank for rank, i in of)
        positions = [batch * size + row for batch in batches for row in range(size)]
        found: list[Row] = []
        if trainer.is_world_process_zero():
            entries = self._order.entries(positions)[:NAMED]
            documents = self._order.stream.documents
            found = [(documents.place(entry), documents.shown_place(entry)) for entry in entries]
        return list(from_first(found))


def _shown(rows: Sequence[Row]) -> list[str]:
    """The places for a file that others may read."""
    return [shown for _, shown in rows]


def _among(rows: Sequence[Row]) -> str:
    """The places for the terminal of the one who trains."""
    more = f" and {len(rows) - SHOWN} more (in metrics.jsonl)" if len(rows) > SHOWN else ""
    return f"; its rows: {', '.join(place for place, _ in rows[:SHOWN])}{more}" if rows else ""


def intact(trainer: Any) -> str:
    """From where a run that ends with a numerical error goes on."""
    saved = checkpoints(Path(trainer.args.output_dir))
    return f"{saved[0].name} is intact, the same command continues from it" if saved else "nothing had been saved yet"
