"""The plan: the arithmetic of a run before it starts. The trainer follows this plan and no other."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.presets import auto_learning_rate, batch_advice
from nesso_tune.recipes.schedule import Shape, check_schedule, lr_multiplier
from nesso_tune.recipes.schema import Interval, Recipe
from nesso_tune.recipes.sections import SFTData
from nesso_tune.recipes.shape import ModelShape, find_shape


@dataclass(frozen=True)
class World:
    """The processes of a run, one per device."""

    processes: int = 1


@dataclass(frozen=True)
class DataVolume:
    """What one epoch holds.

    Attributes:
        rows: packed rows or single conversations (SFT), pairs (DPO).
        tokens: real tokens, padding excluded.
        supervised_tokens: tokens that are learned.
        validation_rows: rows held out.
        exact: counted in prepared data, not estimated from a sample.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    validation_rows: int = 0
    exact: bool = True


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
    parameters: int | None
    checkpoint_bytes: int | None
    final_bytes: int | None
    advice: tuple[str, ...]
    shares: SchedulePlan | None = None  # where the steps are not known yet: the schedule of a run of 1000

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`, with the schedule in words."""
        words = self.schedule.in_words() if self.schedule else None
        words = self.shares.in_words(shares=True) if self.shares else words
        return asdict(self) | {"schedule_in_words": words}


def make_plan(
    recipe: Recipe, world: World | None = None, volume: DataVolume | None = None, shape: ModelShape | None = None
) -> Plan:
    """The plan of a run.

    Args:
        recipe: what to do.
        world: on how many devices (default: one).
        volume: how much data an epoch holds; None leaves all that depends on it open.
        shape: the base model's shape; None looks for it in the base's folder, the hub cache and a table.

    Raises:
        RecipeError: if batch sizes, steps or schedule do not fit together.
    """
    world, shape = world or World(), shape or find_shape(recipe.model)
    train = recipe.train
    accumulation = _accumulation(recipe, world)
    global_batch = train.micro_batch_size * accumulation * world.processes
    rate = auto_learning_rate(recipe.method, shape) if train.learning_rate == "auto" else train.learning_rate
    epochs = recipe.num_epochs
    total = train.max_steps
    if total is None and volume is not None and epochs is not None:
        total = max(1, math.ceil(round(epochs * volume.rows, 6) / global_batch))
    elif total is not None and volume is not None and volume.rows:
        epochs = total * global_batch / volume.rows
    evaluation = recipe.evaluation
    return Plan(
        method=recipe.method,
        processes=world.processes,
        micro_batch=train.micro_batch_size,
        accumulation=accumulation,
        global_batch=global_batch,
        learning_rate=rate,
        volume=volume,
        epochs=epochs,
        total_steps=total,
        schedule=None if total is None else _schedule(recipe, rate, total),
        shares=_schedule(recipe, rate, 1000) if total is None and train.schedule.warmup_steps is None else None,
        log_every=_interval(recipe.logging.every_steps, total),
        evaluate_every=None if evaluation is None else _interval(evaluation.every_steps, total),
        save_every=_interval(recipe.checkpoint.every_steps, total),
        parameters=shape.parameters if shape else None,
        checkpoint_bytes=shape.parameters * 12 if shape and recipe.model.adapter is None else None,
        final_bytes=shape.parameters * (2 if recipe.model.dtype == "bfloat16" else 4) if shape else None,
        advice=tuple(_advice(recipe, shape, rate, global_batch, volume)),
    )


def _accumulation(recipe: Recipe, world: World) -> int:
    train = recipe.train
    if train.global_batch_size is None:
        return train.gradient_accumulation_steps or 1
    at_once = train.micro_batch_size * world.processes
    if train.global_batch_size % at_once:
        below = train.global_batch_size // at_once * at_once
        remedy = " or ".join(str(n) for n in (below, below + at_once) if n)
        raise RecipeError(
            "train.global_batch_size",
            f"{train.global_batch_size} is no multiple of micro_batch_size {train.micro_batch_size} x "
            f"{world.processes} process(es)",
            f"set it to {remedy}",
        )
    return train.global_batch_size // at_once


def _schedule(recipe: Recipe, peak: float, total: int) -> SchedulePlan:
    section = recipe.train.schedule
    ratio = 0.03 if section.warmup_ratio is None else section.warmup_ratio
    end = 1.0 if section.constant_ratio is None else section.constant_ratio
    warmup = math.ceil(round(ratio * total, 6)) if section.warmup_steps is None else section.warmup_steps
    if section.warmup_steps is None:  # a rounded-up share never swallows a very short run
        warmup = min(warmup, max(0, math.ceil(end * total) - 1))
    plan = SchedulePlan(section.type, peak, total, warmup, end, section.min_ratio or 0.0)
    try:
        check_schedule(total, warmup, end, plan.min_ratio, plan.shape)
    except ValueError as error:
        raise RecipeError("train.schedule", str(error), "warm up for fewer steps, or train longer") from None
    return plan


def _interval(interval: Interval, total: int | None) -> int | None:
    if isinstance(interval, int):
        return interval
    return None if total is None else max(1, math.ceil(round(interval * total, 6)))


def _advice(
    recipe: Recipe, shape: ModelShape | None, rate: float, global_batch: int, volume: DataVolume | None
) -> list[str]:
    per_row = recipe.data.sequence_len if recipe.method == "sft" else 1
    if volume and volume.rows and recipe.method == "sft":
        per_row = round(volume.tokens / volume.rows)
    found = [batch_advice(recipe.method, shape, rate, global_batch * per_row)]
    if shape and shape.context and recipe.data.sequence_len > shape.context:
        found.append(
            f"data.sequence_len {recipe.data.sequence_len} is beyond the base model's context of {shape.context}"
        )
    if volume and volume.rows and volume.rows < global_batch:
        found.append(
            f"one epoch ({volume.rows} rows) is smaller than one global batch ({global_batch}): "
            "every step sees rows more than once; lower train.global_batch_size"
        )
    split = not recipe.data.validation_sources and not (isinstance(recipe.data, SFTData) and recipe.data.packing)
    if split and volume and volume.validation_rows > volume.rows:  # packed rows are no measure of conversations
        found.append("more rows are held out for evaluation than trained on; lower data.validation_size")
    return [text for text in found if text]
