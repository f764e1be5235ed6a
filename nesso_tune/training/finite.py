"""Whether weights and moments are finite: checked before every save, and in what `final/` gets.

The guard before an update sees its loss and gradient. What the update made of the weights shows only in the next loss,
which does not look at all of them, and after the last update there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nesso_tune.errors import NumericalError
from nesso_tune.training.guards import intact
from nesso_tune.training.state import State, canonical

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
    return [(canonical(name), weight.detach()) for name, weight in named if weight.requires_grad]


def _moments(trainer: Any) -> Named:
    state = trainer.optimizer.optimizer.state
    return [
        (f"{moment} of {canonical(name)}", value)
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
