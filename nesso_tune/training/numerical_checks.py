"""What is looked at before every update: loss and gradient norm, of all processes, finite and not leaping.

NaN and infinity end the run before they reach the weights. A spike is a loss or a gradient norm above
`mean + 6 standard deviations` of the last 128 steps (of the norm: of its logarithm, which is nearer to normal).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from nesso_tune.distributed.process_group import from_first
from nesso_tune.errors import NumericalError
from nesso_tune.logs import print_notes
from nesso_tune.runs.checkpoint import checkpoints
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.training.dataset import RunDataset
from nesso_tune.training.state_dict import State, canonical_name

WINDOW, ENOUGH, DEVIATIONS = 128, 32, 6.0  # steps that are remembered, that must be, and how far is too far
LEAST = {"loss": 0.05, "grad_norm": 0.1}  # deviations below which nothing is called a leap: nats, and log of the norm
NAMED, SHOWN = 64, 3  # rows in metrics.jsonl, and in a message
Place = tuple[int, int]  # process and micro batch of a step
Row = tuple[str, str]  # where a row stands, and what others may read of that


class SpikeGuard:
    """Decides before each update whether it is made. All processes decide alike: they have seen the same numbers."""

    def __init__(self, on_spike: str, order: RunDataset, log: MetricsLog) -> None:
        self._on_spike, self._order, self._log = on_spike, order, log
        self._losses: list[Tensor] = []  # of this process's micro batches in this step
        self._usual = {name: deque[float](maxlen=WINDOW) for name in LEAST}

    def note(self, loss: Tensor) -> None:
        """Takes the loss of one micro batch, as a share of the step's; nothing waits for the device."""
        self._losses.append(loss.detach().double())

    def allows_update(self, trainer: Any, norm: float) -> bool:
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


Named = list[tuple[str, Tensor]]


def check_trained(trainer: Any) -> None:
    """Checks the trained weights and the optimizer's moments after a step. Every process calls this.

    Raises:
        NumericalError: with the step, how many values are not finite, and the first parameter with such values.
    """
    wrong = _not_finite(trainer, _weights(trainer) + _moments(trainer))
    if wrong:
        step = trainer.state.global_step
        trainer.track.log.write({"step": step, "event": "not_finite", "values": dict(list(wrong.items())[:64])})
        raise NumericalError(
            f"step {step}", f"{_said(wrong)} after the update, this step is not saved",
            f"lower train.learning_rate or train.max_grad_norm; {intact(trainer)}",
        )  # fmt: skip


def check_evaluation(trainer: Any, metrics: Mapping[str, Any]) -> None:
    """Checks the figures of an evaluation, and where they are not finite the weights that they come of.

    Raises:
        NumericalError: with the step and the first figure that is not finite.
    """
    wrong = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        check_trained(trainer)
        raise NumericalError(
            f"step {trainer.state.global_step}", f"{wrong[0]} is {metrics[wrong[0]]}, of finite weights",
            f"look at the validation rows, or lower train.learning_rate; {intact(trainer)}",
        )  # fmt: skip


def check_final(state: State, dtype: str, step: int) -> None:
    """Checks the weights of `final/` in the precision in which they are saved.

    Raises:
        NumericalError: if some are not finite, or not any more in that precision.
    """
    wrong: dict[str, int] = {}
    overflows = True
    for name, tensor in state.items():
        if not _all_finite([saved := tensor.to(getattr(torch, dtype))]):
            wrong[name] = _count(saved)
            overflows = overflows and _all_finite([tensor])
    if not wrong:
        return
    if overflows and dtype != "float32":
        what, remedy = f"{_said(wrong)} in {dtype}, which they overflow", "set model.dtype: float32"
    else:
        what, remedy = _said(wrong), "lower train.learning_rate, or look at the base"
    raise NumericalError(f"step {step}", f"{what}; final/ is not written", f"{remedy}; the checkpoints are intact")


def _weights(trainer: Any) -> Named:
    named = trainer.model_wrapped.named_parameters()
    return [(canonical_name(name), weight.detach()) for name, weight in named if weight.requires_grad]


def _moments(trainer: Any) -> Named:
    state = trainer.optimizer.optimizer.state
    return [
        (f"{moment} of {canonical_name(name)}", value)
        for name, weight in trainer.model_wrapped.named_parameters()
        for moment, value in state.get(weight, {}).items()
        if isinstance(value, Tensor)
    ]


def _not_finite(trainer: Any, named: Named) -> dict[str, int]:
    """{name: how many} of the values that are not finite, the same on all processes."""
    named = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    wrong = not _all_finite(_local(tensor) for _, tensor in named)
    if not trainer.sum_over_processes(torch.tensor(float(wrong))).item():
        return {}
    whole = ((name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor) for name, tensor in named)
    return {name: count for name, tensor in whole if (count := _count(tensor))}


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """A sum is finite only if every term is: one read of each tensor, no copy, one wait for the device."""
    tensors = list(tensors)
    sums = [tensor.sum().double() for tensor in tensors]
    if not sums or torch.isfinite(torch.stack([value.to(sums[0].device) for value in sums])).all():
        return True
    return not any(map(_count, tensors))  # or a sum of finite terms has overflowed


def _count(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _said(wrong: Mapping[str, int]) -> str:
    return f"{sum(wrong.values()):,} values are not finite (first in {next(iter(wrong))})"
