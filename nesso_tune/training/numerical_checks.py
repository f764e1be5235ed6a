"""Checks for NaN, infinity and spikes: loss and gradient norm before each update, weights and metrics before a save."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from nesso_tune.distributed.process_group import broadcast_from_rank0
from nesso_tune.errors import NumericalError
from nesso_tune.logs import logger
from nesso_tune.runs.checkpoint import checkpoints
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.training.dataset import RunDataset
from nesso_tune.training.grouped_metrics import sum_over_processes
from nesso_tune.training.state_dict import State, canonical_name

WINDOW, MIN_STEPS = 128, 32  # steps that the statistics cover, and that they need
DEVIATIONS = 6.0  # a spike is more standard deviations above the mean
MIN_DEVIATION = {"loss": 0.05, "grad_norm": 0.1}  # in nats, and of the logarithm of the norm
MAX_LOGGED_ROWS, MAX_SHOWN_ROWS = 64, 3  # in metrics.jsonl, and in a message
MAX_LOGGED_PARAMETERS = 64


@dataclass(frozen=True)
class Spike:
    """A loss or gradient norm above its limit."""

    value: float
    limit: float


class RowPlace(NamedTuple):
    """Where a training row comes from: its file and line, and the form that others may read (private sources)."""

    full: str
    public: str


class SpikeGuard:
    """Checks loss and gradient norm before each update and decides whether the update is applied.

    NaN and infinity end the run. A spike is a value above `mean + 6 standard deviations` of the last 128 steps; for the
    gradient norm, of its logarithm, whose distribution is closer to normal. The values are reduced over all processes,
    so all of them decide alike.

    Args:
        on_spike: `warn`, `skip` or `stop`.
        dataset: names the rows of a step.
        log: gets one line per event.
    """

    def __init__(self, on_spike: str, dataset: RunDataset, log: MetricsLog) -> None:
        self._on_spike, self._dataset, self._log = on_spike, dataset, log
        self._losses: list[Tensor] = []  # of this process's micro batches in the current step
        self._window = {name: deque[float](maxlen=WINDOW) for name in MIN_DEVIATION}

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a micro batch, as a share of the step's loss. Does not synchronise with the device."""
        self._losses.append(loss.detach().double())

    def allows_update(self, trainer: Trainer, norm: Tensor | float) -> bool:
        """Whether the update of this step is applied. Waits for the device, once.

        Args:
            trainer: has the step and the process group.
            norm: of the whole gradient, before clipping.

        Raises:
            NumericalError: if the loss or the norm is not finite, or is a spike with `on_spike: stop`.
        """
        losses = torch.stack(self._losses)
        self._losses = []
        not_finite = ~torch.isfinite(losses)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norm_here = whole.to(losses) if isinstance(whole, Tensor) else losses.new_tensor(whole)
        own = torch.stack([losses.sum(), norm_here.reshape(()), not_finite.sum().double()])
        # the norm is reduced too, so that all processes decide alike
        loss, grad_norm, count = sum_over_processes(trainer.accelerator, own).tolist()
        loss, grad_norm = (value / trainer.accelerator.num_processes for value in (loss, grad_norm))
        step = trainer.state.global_step + 1
        if count or not math.isfinite(grad_norm):
            values = {"loss": loss, "grad_norm": grad_norm}
            raise self._not_finite_error(trainer, step, not_finite.tolist(), values, in_loss=bool(count))
        spikes = self._find_spikes({"loss": loss, "grad_norm": grad_norm})
        return not spikes or self._handle_spikes(trainer, step, losses.tolist(), spikes)

    def state_dict(self) -> dict[str, list[float]]:
        """The values of the window as plain data, exact."""
        return {name: list(values) for name, values in self._window.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restores what `state_dict` returned."""
        for name, values in self._window.items():
            values.clear()
            values.extend(state.get(name, ()))

    def _find_spikes(self, values: Mapping[str, float]) -> dict[str, Spike]:
        """Spikes by name. Adds all values to the window, so that a lasting new level stops being a spike."""
        found: dict[str, Spike] = {}
        for name, value in values.items():
            window, logarithmic = self._window[name], name == "grad_norm"
            scaled = math.log(max(value, 1e-30)) if logarithmic else value
            if len(window) >= MIN_STEPS:
                deviation = max(statistics.pstdev(window), MIN_DEVIATION[name])
                limit = statistics.fmean(window) + DEVIATIONS * deviation
                if scaled > limit:
                    found[name] = Spike(value, math.exp(limit) if logarithmic else limit)
            window.append(scaled)
        return found

    def _handle_spikes(self, trainer: Trainer, step: int, losses: list[float], spikes: Mapping[str, Spike]) -> bool:
        """Logs the spikes with the rows of the micro batch with the highest loss, and acts on `on_spike`."""
        highest = max(range(len(losses)), key=losses.__getitem__)
        each = gather_object([(losses[highest], (trainer.accelerator.process_index, highest))])
        rows = self._rows_of(trainer, step, [max(each)[1]])
        described = ", ".join(f"{name} {spike.value:.4g} (limit {spike.limit:.4g})" for name, spike in spikes.items())
        self._log.write({
            "step": step,
            "event": "spike",
            "action": self._on_spike,
            "values": {name: spike.value for name, spike in spikes.items()},
            "limits": {name: spike.limit for name, spike in spikes.items()},
            "rows": [row.public for row in rows],
        })  # fmt: skip
        what = f"{described}: spike over the {WINDOW}-step window"
        if self._on_spike == "stop":
            raise NumericalError(
                f"step {step}", f"{what}; update not applied{_list_rows(rows)}",
                f"inspect these rows, lower train.learning_rate, or set on_spike: skip; {_how_to_continue(trainer)}",
            )  # fmt: skip
        logger.warning(f"step {step}: {what}; update {'skipped' if self._on_spike == 'skip' else 'applied'}")
        return self._on_spike == "warn"

    def _not_finite_error(
        self, trainer: Trainer, step: int, not_finite: Sequence[bool], values: dict[str, float], in_loss: bool
    ) -> NumericalError:
        rank = trainer.accelerator.process_index
        own = [(rank, i) for i, wrong in enumerate(not_finite) if wrong or not in_loss]
        rows = self._rows_of(trainer, step, gather_object(own))
        shown = [row.public for row in rows]
        self._log.write({"step": step, "event": "not_finite", "values": values, "rows": shown})
        what = f"the loss is {values['loss']}" if in_loss else f"the gradient norm is {values['grad_norm']}"
        return NumericalError(
            f"step {step}", f"{what}; update not applied{_list_rows(rows)}",
            f"inspect these rows, or lower train.learning_rate; {_how_to_continue(trainer)}",
        )  # fmt: skip

    def _rows_of(self, trainer: Trainer, step: int, micro_batches: Sequence[tuple[int, int]]) -> list[RowPlace]:
        """The rows of some micro batches of a step, on every process.

        Accelerate distributes micro batches round-robin: micro batch `i` of rank `r` is number `i * world_size + r` of
        its step.

        Args:
            trainer: has the batch sizes.
            step: number of the step, from 1.
            micro_batches: (rank, index within the step) of each.
        """
        size, world_size = trainer.args.per_device_train_batch_size, trainer.accelerator.num_processes
        start = (step - 1) * trainer.args.gradient_accumulation_steps * world_size
        numbers = sorted(start + i * world_size + rank for rank, i in micro_batches)
        positions = [number * size + row for number in numbers for row in range(size)]
        found: list[RowPlace] = []
        if trainer.is_world_process_zero():
            records = self._dataset.records(positions)[:MAX_LOGGED_ROWS]
            documents = self._dataset.stream.documents
            found = [RowPlace(documents.location(record), documents.public_location(record)) for record in records]
        return list(broadcast_from_rank0(found))


def check_trained(trainer: Trainer, log: MetricsLog) -> None:
    """Checks the trained weights and the optimizer state after a step. Every process must call this.

    Raises:
        NumericalError: with the step, the number of values that are not finite, and the first tensor that has some.
    """
    counts = _count_not_finite(trainer, _trained_weights(trainer) + _optimizer_state(trainer))
    if counts:
        step = trainer.state.global_step
        logged = dict(list(counts.items())[:MAX_LOGGED_PARAMETERS])
        log.write({"step": step, "event": "not_finite", "values": logged})
        raise NumericalError(
            f"step {step}", f"{_describe(counts)} after the update; this step is not saved",
            f"lower train.learning_rate or train.max_grad_norm; {_how_to_continue(trainer)}",
        )  # fmt: skip


def check_evaluation(trainer: Trainer, log: MetricsLog, metrics: Mapping[str, Any]) -> None:
    """Checks the metrics of an evaluation and, if one is not finite, the weights. Every process must call this.

    Raises:
        NumericalError: with the step and the first metric that is not finite.
    """
    wrong = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        check_trained(trainer, log)
        raise NumericalError(
            f"step {trainer.state.global_step}", f"{wrong[0]} is {metrics[wrong[0]]}, but the weights are finite",
            f"inspect the validation rows, or lower train.learning_rate; {_how_to_continue(trainer)}",
        )  # fmt: skip


def check_final(state: State, dtype: str, step: int) -> None:
    """Checks the weights of `final/` in the precision in which they are saved.

    Raises:
        NumericalError: if some are not finite in this precision.
    """
    counts: dict[str, int] = {}
    overflows = True
    for name, tensor in state.items():
        if not _all_finite([saved := tensor.to(getattr(torch, dtype))]):
            counts[name] = _not_finite(saved)
            overflows = overflows and _all_finite([tensor])
    if not counts:
        return
    if overflows and dtype != "float32":
        what, remedy = f"{_describe(counts)} in {dtype} because of overflow", "set model.dtype: float32"
    else:
        what, remedy = _describe(counts), "lower train.learning_rate, or check the base model"
    raise NumericalError(f"step {step}", f"{what}; final/ is not written", f"{remedy}; the checkpoints are intact")


def _trained_weights(trainer: Trainer) -> list[tuple[str, Tensor]]:
    named = trainer.model_wrapped.named_parameters()
    return [(canonical_name(name), weight.detach()) for name, weight in named if weight.requires_grad]


def _optimizer_state(trainer: Trainer) -> list[tuple[str, Tensor]]:
    state = trainer.optimizer.optimizer.state
    return [
        (f"{moment} of {canonical_name(name)}", value)
        for name, weight in trainer.model_wrapped.named_parameters()
        for moment, value in state.get(weight, {}).items()
        if isinstance(value, Tensor)
    ]


def _count_not_finite(trainer: Trainer, named: Sequence[tuple[str, Tensor]]) -> dict[str, int]:
    """{name: number of values that are not finite}, of the tensors that have some; the same on all processes."""
    named = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    wrong = not _all_finite(tensor.to_local() if isinstance(tensor, DTensor) else tensor for _, tensor in named)
    if not sum_over_processes(trainer.accelerator, torch.tensor(float(wrong))).item():
        return {}
    whole = ((name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor) for name, tensor in named)
    return {name: count for name, tensor in whole if (count := _not_finite(tensor))}


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are finite. Sums are checked first: no copies, and one synchronisation with the device."""
    tensors = list(tensors)
    sums = [tensor.sum().double() for tensor in tensors]
    if not sums or torch.isfinite(torch.stack([value.to(sums[0].device) for value in sums])).all():
        return True
    return not any(map(_not_finite, tensors))  # a sum of finite values may have overflowed


def _not_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _describe(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values()):,} values are not finite (first in {next(iter(counts))})"


def _list_rows(rows: Sequence[RowPlace]) -> str:
    """The first rows of a step, for the terminal of the person who trains."""
    more = f" and {len(rows) - MAX_SHOWN_ROWS} more (in metrics.jsonl)" if len(rows) > MAX_SHOWN_ROWS else ""
    return f"; rows: {', '.join(row.full for row in rows[:MAX_SHOWN_ROWS])}{more}" if rows else ""


def _how_to_continue(trainer: Trainer) -> str:
    saved = checkpoints(Path(trainer.args.output_dir))
    return f"{saved[0].name} is intact, the same command continues from it" if saved else "no checkpoint was saved yet"
