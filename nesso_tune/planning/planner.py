"""Computes the plan of a run from the recipe, the devices and the amount of data."""

from __future__ import annotations

import math
from dataclasses import replace

from nesso_tune.errors import RecipeError
from nesso_tune.lr_schedule import check_schedule
from nesso_tune.planning.advice import MEMORY_SAFE_SHARE, advise, auto_learning_rate
from nesso_tune.planning.memory import Memory, checkpoint_bytes, estimate_memory
from nesso_tune.planning.plan import TYPICAL_UTILIZATION, DataVolume, Plan, SchedulePlan, World
from nesso_tune.planning.shapes import ModelShape, find_shape
from nesso_tune.recipes.rules import SORTED_LOSSES
from nesso_tune.recipes.schema import DPORecipe, Interval, Recipe
from nesso_tune.recipes.sections import SFTData

# FLOPs per process above which torch.compile pays off on a CPU: about 20 s to compile, for 20 % of several minutes.
MIN_FLOPS_TO_COMPILE = 1e14


def make_plan(
    recipe: Recipe, world: World | None = None, volume: DataVolume | None = None, shape: ModelShape | None = None
) -> Plan:
    """The plan of a run.

    Args:
        recipe: the recipe.
        world: number and kind of devices (default: one, of unknown kind).
        volume: amount of data in an epoch; without it, the quantities that depend on it are None.
        shape: shape of the base model. None reads it from the model folder, the hub cache or the built-in table.

    Raises:
        RecipeError: if batch sizes, steps and schedule are inconsistent, or do not match the number of devices.
    """
    world, shape = world or World(), shape or find_shape(recipe.model)
    _check_processes(recipe, world)
    train = recipe.train
    accumulation = _accumulation(recipe, world)
    global_batch = train.micro_batch_size * accumulation * world.processes
    rate = train.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(recipe.method, shape, recipe.model.adapter is not None)
    epochs = recipe.num_epochs
    total = train.max_steps
    if total is None and volume is not None and epochs is not None:
        total = max(1, math.ceil(round(epochs * volume.rows, 6) / global_batch))
    if total is not None and volume is not None and volume.rows:
        epochs = total * global_batch / volume.rows  # of whole steps, so it can exceed the recipe
    evaluation = recipe.evaluation
    checkpointing = _checkpointing(recipe, shape, world)
    memory = None if shape is None else _memory(recipe, shape, world, bool(checkpointing), volume)
    plan = Plan(
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
        shape=shape,
        checkpoint_bytes=None if shape is None else checkpoint_bytes(recipe, shape),
        final_bytes=shape.parameters * (2 if recipe.model.dtype == "bfloat16" else 4) if shape else None,
        gpu=world.gpu,
        gradient_checkpointing=checkpointing,
        torch_compile=_compiles(recipe, shape, world, total),
        memory=memory,
    )
    plan = replace(plan, step_seconds=_step_seconds(recipe, plan))
    return replace(plan, advice=tuple(advise(recipe, plan)))


def _step_seconds(recipe: Recipe, plan: Plan) -> tuple[float, float] | None:
    """High and low estimate of the speed in seconds per optimizer step.

    6 FLOPs per parameter and token (Kaplan et al., 2020, arXiv:2001.08361), 8 with gradient checkpointing; 2 less
    with an adapter, as the base weights have no gradient.
    """
    if not plan.gpu or not plan.gpu.teraflops or not plan.parameters:
        return None
    tokens = plan.global_batch * recipe.data.sequence_len
    if plan.volume and plan.volume.rows:
        tokens = round(plan.volume.tokens / plan.volume.rows * plan.global_batch)
    operations = (8 if plan.gradient_checkpointing else 6) - (2 if recipe.model.adapter is not None else 0)
    work = operations * plan.parameters * tokens
    fast, slow = (work / (plan.processes * plan.gpu.teraflops * 1e12 * share) for share in TYPICAL_UTILIZATION)
    return fast, slow


def _check_processes(recipe: Recipe, world: World) -> None:
    losses = [name for name in recipe.dpo.loss if name in SORTED_LOSSES] if isinstance(recipe, DPORecipe) else []
    if losses and world.processes > 1:
        raise RecipeError(
            "dpo.loss", f"{losses[0]} sorts all pairs of a step, which are split over {world.processes} processes",
            "start a single process (nesso-tune train), or use another loss",
        )  # fmt: skip


def _checkpointing(recipe: Recipe, shape: ModelShape | None, world: World) -> bool | None:
    """Whether to recompute activations: as in the recipe, or for auto, if a step would not fit into GPU memory."""
    setting = recipe.train.gradient_checkpointing
    if setting != "auto" or world.gpu is None:
        return None if setting == "auto" else setting
    if shape is None:
        return True
    return _memory(recipe, shape, world, checkpointing=False).total > MEMORY_SAFE_SHARE * world.gpu.memory


def _compiles(recipe: Recipe, shape: ModelShape | None, world: World, steps: int | None) -> bool:
    """Whether to compile the layers: as in the recipe, or for auto, on a CPU with enough work per process."""
    setting = recipe.train.torch_compile
    if setting != "auto":
        return setting
    if not isinstance(recipe.data, SFTData) or not recipe.data.packing or world.gpu or shape is None or steps is None:
        return False
    tokens = steps * recipe.data.sequence_len * recipe.train.micro_batch_size * _accumulation(recipe, world)
    return 6 * shape.parameters * tokens > MIN_FLOPS_TO_COMPILE


def _memory(
    recipe: Recipe, shape: ModelShape, world: World, checkpointing: bool, volume: DataVolume | None = None
) -> Memory:
    rows = recipe.train.micro_batch_size
    return estimate_memory(
        recipe, shape, processes=world.processes, micro_batch=rows, checkpointing=checkpointing,
        on_gpu=world.gpu is not None,
        supervised=volume.supervised_tokens / volume.tokens if volume and volume.tokens else 1.0,
    )  # fmt: skip


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
            f"{train.global_batch_size} is not a multiple of micro_batch_size {train.micro_batch_size} x "
            f"{world.processes} process(es)",
            f"set it to {remedy}",
        )
    return train.global_batch_size // at_once


def _schedule(recipe: Recipe, peak: float, total: int) -> SchedulePlan:
    section = recipe.train.schedule
    ratio = 0.03 if section.warmup_ratio is None else section.warmup_ratio
    end = 1.0 if section.constant_ratio is None else section.constant_ratio
    warmup = math.ceil(round(ratio * total, 6)) if section.warmup_steps is None else section.warmup_steps
    if section.warmup_steps is None:  # a rounded-up fraction must not cover a very short run
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
