"""A plan in words, for a terminal."""

from __future__ import annotations

from nesso_tune.files import size
from nesso_tune.recipes.curve import curve
from nesso_tune.recipes.data import SFTData
from nesso_tune.recipes.gpus import GIB
from nesso_tune.recipes.plan import USUAL, DataVolume, Plan
from nesso_tune.recipes.schema import DistributedSection, Recipe


def describe(plan: Plan, recipe: Recipe, base_note: str | None = None) -> list[str]:
    """The plan as lines of a name and what it is; `base_note` says why the size of the base is not known."""
    sequence_len = recipe.data.sequence_len
    unit = f"rows of {sequence_len} tokens" if plan.method == "sft" else f"pairs of up to {sequence_len} tokens"
    lines = [
        _line("method", plan.method),
        _line(
            "global batch",
            f"{plan.micro_batch} x {plan.accumulation} accumulation x {plan.processes} process(es)"
            f" = {plan.global_batch} {unit}",
        ),
        _line("weights", _sharing(plan, recipe.distributed)),
        *_data(plan.volume, row_name(recipe)),
        _line("steps", _steps(plan)),
    ]
    if plan.parameters:
        lines.append(_line("model", f"{in_short(plan.parameters)} parameters"))
    else:
        lines.append(_line("model", base_note or f"the size of {recipe.model.base} is not known here"))
    if plan.gpu and plan.memory is None:
        lines.append(_line("memory", f"cannot be said for {plan.gpu.name}: the size of the base is not known"))
    lines += [_line(name, text) for name, text in zip(("memory", ""), _memory(plan), strict=False)]
    lines += [_line("time", text) for text in _time(plan)]
    if plan.checkpoint_bytes and plan.final_bytes:
        sizes = f"{size(plan.checkpoint_bytes)} a checkpoint, {size(plan.final_bytes)} for final/"
        lines.append(_line("disk", sizes))
    if plan.schedule:
        lines += [_line("learning rate", plan.schedule.in_words()), "", *curve(plan.schedule)]
    elif plan.shares:
        lines += [_line("learning rate", plan.shares.in_words(shares=True)), "", *curve(plan.shares, shares=True)]
    else:
        lines.append(_line("learning rate", f"peak {plan.learning_rate:g}; its steps follow from the data"))
    if plan.advice:
        lines += ["", *(f"advice: {text}" for text in plan.advice)]
    return lines


def _sharing(plan: Plan, distributed: DistributedSection) -> str:
    if plan.processes == 1:
        return "whole: one process has nobody to share them with"
    if not distributed.shards(plan.processes):
        return f"whole on each of {plan.processes} processes (DDP)"
    files = "in shards" if distributed.in_shards(plan.processes) else "as whole files"
    return f"sharded over {plan.processes} processes (FSDP2 FULL_SHARD), checkpoints {files}"


def _line(name: str, text: str) -> str:
    return f"{name:<15}{text}"


def row_name(recipe: Recipe) -> str:
    """What a row of this recipe is."""
    if recipe.method == "dpo":
        return "pairs"
    return "packed rows" if isinstance(recipe.data, SFTData) and recipe.data.packing else "conversations"


def _data(volume: DataVolume | None, name: str) -> list[str]:
    if volume is None:
        return [_line("data", "not at hand: `nesso-tune prepare` fetches and counts it")]
    about = "" if volume.exact else "~"
    counts = (
        f"{about}{volume.rows:,} {name} an epoch, {about}{volume.tokens:,} tokens, {about}{volume.supervised_tokens:,} "
        f"supervised; {about}{volume.validation_rows:,} {name.removeprefix('packed ')} held out"
    ).replace("rows held", "conversations held")
    lines = [_line("data", counts), *([_line("", f"(~ {volume.basis})")] if volume.basis else [])]
    if volume.dropped:
        lost = ", ".join(f"{about}{share:.0%} {reason}" for reason, share in volume.dropped.items())
        lines.append(_line("", f"dropped: {lost}; `nesso-tune prepare` shows examples"))
    return lines


def _steps(plan: Plan) -> str:
    if plan.total_steps is None:
        return f"{plan.epochs:g} epochs"
    about = "" if plan.volume is None or plan.volume.exact else "~"
    epochs = f" ({about}{_short(plan.epochs)} epochs)" if plan.epochs else ""
    every = f"; log every {plan.log_every}, save every {plan.save_every}"
    if plan.evaluate_every:
        every += f", evaluate every {plan.evaluate_every}"
    return f"{about}{plan.total_steps:,}{epochs}{every}"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    if memory is None:
        return []
    how = f"{'with' if plan.gradient_checkpointing else 'without'} gradient checkpointing"
    if plan.gpu:
        needs = f"about {memory.total / GIB:.1f} of {plan.gpu.memory / GIB:.0f} GiB on each {plan.gpu.name}, {how}"
    else:
        needs = f"about {memory.total / GIB:.1f} GiB for a process on a CPU, {how}; --gpu NAME says it for a GPU"
    working = "gathered weights and CUDA" if plan.gpu else "weights in compute precision"
    parts = {"weights and optimizer": memory.state, "activations": memory.activations, "logits": memory.logits,
             working: memory.working}  # fmt: skip
    return [needs, f"({', '.join(f'{n / GIB:.1f} {name}' for name, n in parts.items())})"]


def _time(plan: Plan) -> list[str]:
    """Seconds of a step, and hours of the run, at usual shares of the GPU's peak."""
    if plan.step_seconds is None or plan.total_steps is None:
        return []
    fast, slow = (seconds * plan.total_steps / 3600 for seconds in plan.step_seconds)
    if slow >= 1:
        took = f"{_short(fast)} to {_short(slow)} hours"
    elif slow >= 1 / 60:
        took = f"{_short(60 * fast)} to {_short(60 * slow)} minutes"
    else:
        took = "less than a minute"
    if plan.processes > 1:
        took += f" ({_short(fast * plan.processes)} to {_short(slow * plan.processes)} GPU hours)"
    step = " to ".join(f"{seconds:.2g}" for seconds in plan.step_seconds)
    shares = f"{USUAL[0]:.0%} to {USUAL[1]:.0%} of the GPUs' peak"
    return [f"{took}, {step} s a step, at {shares}, evaluation not counted"]


def in_short(parameters: int) -> str:
    """A number of weights as people say it, e.g. `437.8 M`, `8.03 B`."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} M"


def _short(value: float) -> str:
    """A number in two digits, e.g. `0.46`, `5.7`, `170`."""
    return f"{float(f'{value:.2g}'):,g}"
