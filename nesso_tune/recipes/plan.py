"""What a plan says: the arithmetic of a run before it starts. The trainer follows this plan and no other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nesso_tune.recipes.gpus import Gpu
from nesso_tune.recipes.memory import Memory
from nesso_tune.recipes.schedule import Shape, lr_multiplier
from nesso_tune.recipes.shape import ModelShape

USUAL = (0.4, 0.2)  # shares of a GPU's peak that training reaches on a good and on an ordinary day


@dataclass(frozen=True)
class World:
    """The processes of a run, one per device, and the kind of device; None where it is not known or no GPU."""

    processes: int = 1
    gpu: Gpu | None = None


@dataclass(frozen=True)
class DataVolume:
    """What one epoch holds.

    Attributes:
        rows: packed rows or single conversations (SFT), pairs (DPO).
        tokens: real tokens, padding excluded.
        supervised_tokens: tokens that are learned.
        validation_rows: rows held out.
        exact: counted in prepared data, not estimated.
        basis: what an estimate rests on, in words.
        dropped: share of the rows that cannot be used, by reason.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    validation_rows: int = 0
    exact: bool = True
    basis: str = ""
    dropped: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SchedulePlan:
    """The schedule in steps, and the multiplier at each of them."""

    shape: Shape
    peak: float
    total_steps: int
    warmup_steps: int
    constant_ratio: float
    min_ratio: float

    def multiplier(self, step: int) -> float:
        """The factor on the peak at optimizer step `step`; steps past the end keep the last value."""
        return lr_multiplier(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            constant_ratio=self.constant_ratio,
            min_ratio=self.min_ratio,
            shape=self.shape,
        )

    @property
    def decay_end(self) -> int:
        """The step from which the learning rate is constant."""
        return math.ceil(round(self.constant_ratio * self.total_steps, 6))

    def in_words(self, shares: bool = False) -> str:
        """One sentence, e.g. "cosine to step 800, then constant 3e-04"; with `shares`, in per cent of the run."""

        def at(step: int) -> str:
            return f"{100 * step / self.total_steps:g} % of the run" if shares else f"step {step}"

        over = f"{100 * self.warmup_steps / self.total_steps:g} %" if shares else f"{self.warmup_steps} steps"
        warm = f"warm-up over {over} to {self.peak:.3g}, " if self.warmup_steps else ""
        if self.shape == "constant":
            return f"{warm}constant {self.peak:.3g} to {at(self.total_steps)}"
        floor = self.peak * self.min_ratio
        if self.decay_end >= self.total_steps:
            return f"{warm}{self.shape} to {floor:.3g} at {at(self.total_steps)}"
        return f"{warm}{self.shape} to {at(self.decay_end)}, then constant {floor:.3g} to {at(self.total_steps)}"


@dataclass(frozen=True)
class Plan:
    """Everything about a run that follows from recipe, world and data.

    Rows are seen in one seeded order that runs through all epochs without a break, in steps of exactly
    `global_batch` rows: `total_steps` is rounded up, and the last step is filled from the start of the next epoch.
    `epochs` are those of all steps, so they may be more than the recipe asks for.
    """

    method: str
    processes: int
    micro_batch: int
    accumulation: int
    global_batch: int
    learning_rate: float
    volume: DataVolume | None
    epochs: float | None
    total_steps: int | None
    schedule: SchedulePlan | None
    log_every: int | None
    evaluate_every: int | None
    save_every: int | None
    shape: ModelShape | None
    checkpoint_bytes: int | None
    final_bytes: int | None
    gpu: Gpu | None = None
    gradient_checkpointing: bool | None = None  # None: not decided, the GPU is not known
    torch_compile: bool = False
    step_seconds: tuple[float, float] | None = None  # of an optimizer step, at usual shares of the GPU's peak
    memory: Memory | None = None  # of a step on each GPU, as decided (without checkpointing where it is not)
    shares: SchedulePlan | None = None  # where the steps are not known yet: the schedule of a run of 1000
    advice: tuple[str, ...] = ()

    @property
    def parameters(self) -> int | None:
        """Weights of the model, where its shape is known."""
        return self.shape.parameters if self.shape else None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; only of a plan that knows its data."""
        assert self.total_steps is not None
        return self.total_steps

    @property
    def rows_seen(self) -> int:
        """Rows of the whole run."""
        return self.steps * self.global_batch

    def multiplier(self, step: int) -> float:
        """The factor on the peak learning rate at optimizer step `step`."""
        assert self.schedule is not None
        return self.schedule.multiplier(step)

    def trained(self, steps: int, epochs: float) -> Plan:
        """The plan with what was trained: fewer steps and epochs where the run has stopped early."""
        return replace(self, total_steps=steps, epochs=epochs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`, with the schedule in words."""
        words = self.schedule.in_words() if self.schedule else None
        words = self.shares.in_words(shares=True) if self.shares else words
        return asdict(self) | {"parameters": self.parameters, "schedule_in_words": words}
