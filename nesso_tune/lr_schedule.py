"""The learning-rate schedule: warm-up, decay to a minimum, then constant."""

from __future__ import annotations

import math
from typing import Literal, get_args

ScheduleType = Literal["cosine", "linear", "constant"]  # values of `train.schedule.type` in a recipe
SCHEDULE_TYPES: tuple[str, ...] = get_args(ScheduleType)
DECAYING_TYPES = tuple(name for name in SCHEDULE_TYPES if name != "constant")


def lr_multiplier(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    constant_ratio: float = 1.0,
    min_ratio: float = 0.0,
    shape: ScheduleType = "cosine",
) -> float:
    """Multiplier of the peak learning rate at optimizer step `step`, counted from 0.

    Linear warm-up from 0 to 1 over `warmup_steps`, then decay from 1 to `min_ratio` that ends at
    `constant_ratio * total_steps`, then constant at `min_ratio`. With progress p in [0, 1], the decay is
    (1 + cos(pi p)) / 2 for `shape="cosine"` (Loshchilov & Hutter, 2017, arXiv:1608.03983, one cycle without restarts)
    and 1 - p for `shape="linear"`. `shape="constant"` stays at 1 after the warm-up.

    Raises:
        ValueError: if `shape` is unknown, or the steps and ratios leave no room for the decay.
    """
    check_schedule(total_steps, warmup_steps, constant_ratio, min_ratio, shape)
    if step < warmup_steps:
        return step / warmup_steps
    if shape == "constant":
        return 1.0
    decay_end = constant_ratio * total_steps
    if step >= decay_end:
        return min_ratio
    progress = (step - warmup_steps) / (decay_end - warmup_steps)
    return min_ratio + (1.0 - min_ratio) * _decay(progress, shape)


def _decay(progress: float, shape: ScheduleType) -> float:
    """Decay from 1 to 0 as `progress` goes from 0 to 1."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "linear":
        return 1.0 - progress
    raise ValueError(f"the schedule type {shape!r} has no decay")


def check_schedule(
    total_steps: int, warmup_steps: int, constant_ratio: float, min_ratio: float, shape: ScheduleType
) -> None:
    """Raises ValueError, with the reason, if the arguments do not define a schedule."""
    if shape not in SCHEDULE_TYPES:
        raise ValueError(f"shape must be one of {', '.join(SCHEDULE_TYPES)}, got {shape!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    if not 0.0 < constant_ratio <= 1.0:
        raise ValueError(f"constant_ratio must be above 0 and at most 1, got {constant_ratio}")
    if not 0.0 <= min_ratio <= 1.0:
        raise ValueError(f"min_ratio must be between 0 and 1, got {min_ratio}")
    end = total_steps if shape == "constant" else constant_ratio * total_steps
    if warmup_steps and warmup_steps >= end:
        raise ValueError(
            f"the warm-up of {warmup_steps} steps does not end before step {end:g}, the end of the schedule"
        )
