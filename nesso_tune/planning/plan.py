"""What a plan says: the arithmetic of a run before it starts. The trainer follows this plan and no other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nesso_tune.files import size
from nesso_tune.lr_schedule import ScheduleType, lr_multiplier
from nesso_tune.planning.hardware import GIB, Gpu
from nesso_tune.planning.memory import Memory
from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.schema import DistributedSection, Recipe
from nesso_tune.recipes.sections import SFTData

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

    shape: ScheduleType
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


BLOCKS = " ▁▂▃▄▅▆▇█"


def curve(schedule: SchedulePlan, width: int = 60, height: int = 6, shares: bool = False) -> list[str]:
    """Lines of a bar plot: one column per share of the run, the peak at the top, steps (or shares) along the foot."""
    last = max(schedule.total_steps - 1, 1)
    values = [schedule.multiplier(round(x * last / (width - 1))) for x in range(width)]
    labels = [f"{schedule.peak:.2g}", f"{schedule.peak / 2:.2g}", "0"]
    margin = max(map(len, labels))
    lines = []
    for row in range(height, 0, -1):
        cells = "".join(_cell(value * height - (row - 1)) for value in values)
        label = labels[0] if row == height else labels[1] if row == height // 2 else ""
        lines.append(f"{label:>{margin}} |{cells}")
    start, end = ("0 %", "100 %") if shares else ("step 0", str(schedule.total_steps))
    foot = f"{start}{end:>{width - len(start)}}"
    return [*lines, f"{labels[2]:>{margin}} +{'-' * width}", f"{'':>{margin}}  {foot}"]


def _cell(filled: float) -> str:
    return BLOCKS[max(0, min(8, round(filled * 8)))]


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
