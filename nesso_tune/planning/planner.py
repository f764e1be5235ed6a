"""Computes the plan of a run from the recipe, the devices and the amount of data."""

from __future__ import annotations

import math
from dataclasses import replace

from nesso_tune.errors import RecipeError, check_instance
from nesso_tune.lr_schedule import check_schedule
from nesso_tune.planning.advice import advise, auto_learning_rate
from nesso_tune.planning.auto import Recorded, Setting, choose
from nesso_tune.planning.memory import checkpoint_bytes
from nesso_tune.planning.plan import DataVolume, Plan, SchedulePlan, World
from nesso_tune.planning.shapes import ModelShape, find_shape
from nesso_tune.recipes.load import RecipeSource, as_recipe
from nesso_tune.recipes.rules import SORTED_LOSSES
from nesso_tune.recipes.schema import DPORecipe, Interval, Recipe
from nesso_tune.recipes.sections import SFTData

# Work per process above which torch.compile pays off. On a CPU in FLOPs: about 20 s to compile, for 20 % of several
# minutes. On a GPU in seconds at its peak: a minute to compile, for a third of some ten minutes.
MIN_FLOPS_TO_COMPILE = 1e14
MIN_PEAK_SECONDS_TO_COMPILE = 120


def make_plan(
    recipe: RecipeSource,
    world: World | None = None,
    volume: DataVolume | None = None,
    shape: ModelShape | None = None,
    recorded: Recorded | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        recipe: a recipe, or what `load_recipe` takes.
        world: number and kind of devices (default: one, of unknown kind).
        volume: amount of data in an epoch; without it, the quantities that depend on it are None.
        shape: shape of the base model. None reads it from the model folder, the hub cache or the built-in table.
        recorded: what `auto` chose before, for a run that resumes.

    Raises:
        RecipeError: if batch sizes, steps and schedule are inconsistent, or do not match the number of devices.
    """
    recipe, world = as_recipe(recipe), World() if world is None else world
    check_instance("world", world, World, "World(8)")
    _check_processes(recipe, world)
    shape, train, rows = shape or find_shape(recipe.model), recipe.train, _rows(recipe, world)
    global_batch = rows * world.processes
    rate = _learning_rate(recipe, shape)
    total, epochs = _steps(recipe, volume, global_batch)
    evaluation = recipe.evaluation
    setting = Setting(recipe, shape, world, volume, rows, _compiles(recipe, shape, world, total))
    chosen = choose(setting, recorded or Recorded())
    how = chosen.micro_batch, chosen.sharded, bool(chosen.checkpointing)
    plan = Plan(
        method=recipe.method,
        processes=world.processes,
        micro_batch=chosen.micro_batch,
        accumulation=rows // chosen.micro_batch,
        global_batch=global_batch,
        learning_rate=rate,
        volume=volume,
        epochs=epochs,
        total_steps=total,
        schedule=None if total is None else _schedule(recipe, rate, total),
        shares=_schedule(recipe, rate, 1000) if total is None and train.schedule.warmup_steps is None else None,
        log_every=_interval(recipe.logging.every_steps, total),
        evaluate_every=None if evaluation is None else _interval(evaluation.every_steps, total),
        save_every=None if recipe.checkpoint is None else _interval(recipe.checkpoint.every_steps, total),
        shape=shape,
        checkpoint_bytes=None if shape is None else checkpoint_bytes(recipe, shape),
        final_bytes=shape.parameters * (2 if recipe.model.dtype == "bfloat16" else 4) if shape else None,
        gpu=world.gpu,
        gradient_checkpointing=chosen.checkpointing,
        torch_compile=setting.compiled,
        memory=setting.memory(*how),
        sharded=chosen.sharded,
        replicas=chosen.replicas,
        per_node=world.per_node,
        sharded_checkpoints=chosen.sharded and recipe.distributed.state_dict == "sharded",
        micro_batch_reason=chosen.micro_batch_reason,
        sharding_reason=chosen.sharding_reason,
        bound=setting.bound(*how),
    )
    return replace(plan, advice=tuple(advise(recipe, plan)))


def _learning_rate(recipe: Recipe, shape: ModelShape | None) -> float:
    rate = recipe.train.learning_rate
    return auto_learning_rate(recipe.method, shape, recipe.model.adapter is not None) if rate == "auto" else rate


def _steps(recipe: Recipe, volume: DataVolume | None, global_batch: int) -> tuple[int | None, float | None]:
    """Optimizer steps and epochs of a run, None if unknown."""
    total, epochs = recipe.train.max_steps, recipe.num_epochs
    if total is None and volume is not None and epochs is not None:
        total = max(1, math.ceil(round(epochs * volume.rows, 6) / global_batch))
    if total is not None and volume is not None and volume.rows:
        epochs = total * global_batch / volume.rows  # of whole steps, so it can exceed the recipe
    return total, epochs


def _check_processes(recipe: Recipe, world: World) -> None:
    losses = [name for name in recipe.dpo.loss if name in SORTED_LOSSES] if isinstance(recipe, DPORecipe) else []
    if losses and world.processes > 1:
        raise RecipeError(
            "dpo.loss", f"{losses[0]} sorts all pairs of a step, which are split over {world.processes} processes",
            "start a single process (nesso-tune train), or use another loss",
        )  # fmt: skip


def _compiles(recipe: Recipe, shape: ModelShape | None, world: World, steps: int | None) -> bool:
    """Whether to compile the layers: as in the recipe, or for auto, with enough work per process."""
    setting = recipe.train.torch_compile
    if setting != "auto":
        return setting
    if not isinstance(recipe.data, SFTData) or not recipe.data.packing or shape is None or steps is None:
        return False
    tokens = steps * recipe.data.sequence_len * _rows(recipe, world)
    enough = MIN_FLOPS_TO_COMPILE
    if world.gpu is not None:
        adapter = recipe.model.adapter
        if not world.gpu.bfloat16 or (adapter is not None and adapter.type == "qlora"):
            return False  # Triton may not support an older GPU; 4-bit layers are not compiled
        enough = MIN_PEAK_SECONDS_TO_COMPILE * 1e12 * (world.gpu.teraflops or 100)
    return 6 * shape.parameters * tokens > enough


def _rows(recipe: Recipe, world: World) -> int:
    """Rows of a step on each process."""
    train = recipe.train
    micro = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    if train.global_batch_size is None:
        return micro * (train.gradient_accumulation_steps or 1)
    at_once = micro * world.processes
    if train.global_batch_size % at_once:
        below = train.global_batch_size // at_once * at_once
        remedy = " or ".join(str(n) for n in (below, below + at_once) if n)
        product = f"{world.processes} process(es)"
        if train.micro_batch_size != "auto":
            product = f"micro_batch_size {micro} x {product}"
        raise RecipeError(
            "train.global_batch_size", f"{train.global_batch_size} is not a multiple of {product}",
            f"set it to {remedy}",
        )  # fmt: skip
    return train.global_batch_size // world.processes


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
