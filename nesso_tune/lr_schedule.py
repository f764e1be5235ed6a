"""The learning-rate schedule: warm-up, decay to a floor, then constant at the floor."""

from __future__ import annotations

import math
from typing import Literal, get_args

Shape = Literal["cosine", "linear", "constant"]  # also the recipe's `train.schedule.type`


def lr_multiplier(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    constant_ratio: float = 1.0,
    min_ratio: float = 0.0,
    shape: Shape = "cosine",
) -> float:
    """The factor on the peak learning rate at optimizer step `step` (0 is the first).

    Linear warm-up from 0 to 1 over `warmup_steps`; then from 1 to `min_ratio`, along half a cosine
    (Loshchilov & Hutter, 2017, arXiv:1608.03983, one cycle without restarts) or a straight line, ending at
    `constant_ratio * total_steps`; then constant at `min_ratio`. `shape="constant"` stays at 1 after the warm-up.

    Raises:
        ValueError: for an unknown shape, or if the steps or ratios leave no room for the decay.
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
    falling = 0.5 * (1.0 + math.cos(math.pi * progress)) if shape == "cosine" else 1.0 - progress
    return min_ratio + (1.0 - min_ratio) * falling


def check_schedule(total_steps: int, warmup_steps: int, constant_ratio: float, min_ratio: float, shape: Shape) -> None:
    """Raises ValueError, with the reason, if these numbers do not make a schedule."""
    if shape not in get_args(Shape):
        raise ValueError(f"shape must be one of {', '.join(get_args(Shape))}, got {shape!r}")
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
            f"the warm-up of {warmup_steps} steps reaches past step {end:g}, where the schedule should have ended"
        )
