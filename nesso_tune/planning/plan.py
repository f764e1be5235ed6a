"""The plan of a run: batch sizes, steps, schedule, memory and time before it starts, and its text form.

The trainer takes its steps and its learning rates from this plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nesso_tune.files import format_bytes
from nesso_tune.lr_schedule import ScheduleType, lr_multiplier
from nesso_tune.planning.hardware import GIB, Gpu
from nesso_tune.planning.memory import Memory
from nesso_tune.planning.roofline import StepBound
from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import SFTData

REALISTIC = 1.3  # times the bound of the roofline: runs that were published take 0.9 to 1.3 times the bound
COMPILE_SECONDS = {"cpu": 20, "gpu": 60}  # of torch.compile, before the first step; that of GPUs is an estimate


@dataclass(frozen=True)
class World:
    """The processes of a run, one per device, and their GPU; None on a CPU or if the GPU is unknown."""

    processes: int = 1
    gpu: Gpu | None = None
    per_node: int | None = None  # processes of each node; None: all are on one


@dataclass(frozen=True)
class DataVolume:
    """The amount of data in one epoch.

    Attributes:
        rows: packed rows or single conversations (SFT), pairs (DPO).
        tokens: number of tokens without padding.
        supervised_tokens: number of supervised tokens.
        validation_rows: number of validation rows.
        exact: True if counted in prepared data, False if estimated.
        basis: description of the sample behind an estimate.
        dropped: fraction of the rows that are dropped, by reason.
        document_length: mean length of a document over the tokens (sum of squared lengths / sum of lengths), which
            decides what attention costs; None if unknown.
        unread: rows with each column or message key that is not read, by source; of an estimate, in its sample.
        warnings: about text that is not read.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    validation_rows: int = 0
    exact: bool = True
    basis: str = ""
    dropped: Mapping[str, float] = field(default_factory=dict)
    document_length: float | None = None
    unread: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SchedulePlan:
    """The learning-rate schedule with all lengths in steps."""

    shape: ScheduleType
    peak: float
    total_steps: int
    warmup_steps: int
    constant_ratio: float
    min_ratio: float

    def multiplier(self, step: int) -> float:
        """Multiplier of the peak learning rate at optimizer step `step`; steps past the end keep the last value."""
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
        """The schedule as text, e.g. "cosine to step 800, then constant 3e-04"; with `shares`, in percent."""

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


@dataclass(frozen=True, repr=False)
class Plan:
    """All quantities of a run that follow from the recipe, the devices and the data.

    Training reads one seeded order of rows that continues across epochs, in steps of exactly `global_batch` rows.
    `total_steps` is rounded up, and the last step is filled from the start of the next epoch. `epochs` counts the
    rows of all steps, so it can exceed the number of epochs in the recipe.
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
    gradient_checkpointing: bool | None = None  # None: undecided, because the GPU is unknown
    torch_compile: bool = False
    sharded: bool = False  # by FSDP2; otherwise replicated (DDP)
    replicas: int = 1  # groups of processes that each hold the whole sharded state (hybrid_shard: one on each node)
    per_node: int | None = None  # processes of each node; None: all are on one
    sharded_checkpoints: bool = False  # each process writes its own shard
    micro_batch_reason: str = ""  # why auto chose this micro batch; empty if the recipe sets it
    sharding_reason: str = ""  # why auto chose to shard or not, likewise
    bound: StepBound | None = None  # of an optimizer step on each GPU, by the roofline
    memory: Memory | None = None  # of a step on each GPU (without gradient checkpointing if undecided)
    shares: SchedulePlan | None = None  # if the number of steps is unknown: the schedule of a run of 1000 steps
    advice: tuple[str, ...] = ()

    def __repr__(self) -> str:
        steps = "unknown steps" if self.total_steps is None else f"{self.total_steps:,} steps"
        rate = f"learning rate {self.learning_rate:g}"
        return f"Plan({steps} of {self.global_batch:,} rows on {self.processes} process(es), {rate})"

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the model; None if its shape is unknown."""
        return self.shape.parameters if self.shape else None

    @property
    def steps(self) -> int:
        """Number of optimizer steps; requires a plan made with a data volume or `train.max_steps`."""
        assert self.total_steps is not None
        return self.total_steps

    @property
    def shards(self) -> int:
        """Number of processes that the state is sharded over; 1 if it is not sharded."""
        return self.processes // self.replicas if self.sharded else 1

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Seconds per optimizer step: the bound of the roofline, and a realistic time; None if unknown."""
        return None if self.bound is None else (self.bound.seconds, REALISTIC * self.bound.seconds)

    @property
    def compile_seconds(self) -> int:
        """Seconds to compile the decoder layers before the first step; not part of `step_seconds`."""
        return COMPILE_SECONDS["cpu" if self.gpu is None else "gpu"] if self.torch_compile else 0

    @property
    def rows_seen(self) -> int:
        """Number of rows that the run processes, repeats included."""
        return self.steps * self.global_batch

    def multiplier(self, step: int) -> float:
        """Multiplier of the peak learning rate at optimizer step `step`."""
        assert self.schedule is not None
        return self.schedule.multiplier(step)

    def trained(self, steps: int, epochs: float) -> Plan:
        """The plan with the actual number of steps and epochs of a run that stopped early."""
        return replace(self, total_steps=steps, epochs=epochs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`, with the schedule as text."""
        words = self.schedule.in_words() if self.schedule else None
        words = self.shares.in_words(shares=True) if self.shares else words
        return asdict(self) | {
            "parameters": self.parameters, "step_seconds": self.step_seconds, "schedule_in_words": words,
        }  # fmt: skip


_MAX_KEYS = 10  # unread columns in one line
BAR_CHARACTERS = " ▁▂▃▄▅▆▇█"


def curve(schedule: SchedulePlan, width: int = 60, height: int = 6, shares: bool = False) -> list[str]:
    """Lines of a bar plot of the schedule: learning rate over steps, or over percent of the run with `shares`."""
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
    return BAR_CHARACTERS[max(0, min(8, round(filled * 8)))]


def describe(plan: Plan, recipe: Recipe, base_note: str | None = None) -> list[str]:
    """The plan as lines of text. `base_note` replaces the line about the model if its size is unknown."""
    sequence_len = recipe.data.sequence_len
    unit = f"rows of {sequence_len} tokens" if plan.method == "sft" else f"pairs of up to {sequence_len} tokens"
    lines = [
        _line("method", plan.method),
        _line(
            "global batch",
            f"{plan.micro_batch} x {plan.accumulation} accumulation x {plan.processes} process(es)"
            f" = {plan.global_batch} {unit}",
        ),
        *([_line("", f"(micro batch auto: {plan.micro_batch_reason})")] if plan.micro_batch_reason else []),
        _line("weights", _sharing(plan)),
        *_data(plan.volume, row_name(recipe)),
        _line("steps", _steps(plan)),
    ]
    if plan.parameters:
        lines.append(_line("model", f"{in_short(plan.parameters)} parameters"))
    else:
        lines.append(_line("model", base_note or f"unknown size of {recipe.model.base}"))
    if plan.gpu and plan.memory is None:
        lines.append(_line("memory", f"unknown on {plan.gpu.name}: the size of the base model is unknown"))
    lines += [_line(name, text) for name, text in zip(("memory", ""), memory_in_words(plan), strict=False)]
    lines += [_line(name, text) for name, text in zip(("time", ""), _time(plan), strict=False)]
    if plan.torch_compile:
        lines.append(_line("compilation", f"about {plan.compile_seconds} s before the first step, once"))
    if plan.checkpoint_bytes and plan.final_bytes:
        sizes = f"{format_bytes(plan.checkpoint_bytes)} per checkpoint, {format_bytes(plan.final_bytes)} for final/"
        lines.append(_line("disk", sizes))
    if plan.schedule:
        lines += [_line("learning rate", plan.schedule.in_words()), "", *curve(plan.schedule)]
    elif plan.shares:
        lines += [_line("learning rate", plan.shares.in_words(shares=True)), "", *curve(plan.shares, shares=True)]
    else:
        lines.append(_line("learning rate", f"peak {plan.learning_rate:g}; the steps depend on the data"))
    if plan.advice:
        lines += ["", *(f"advice: {text}" for text in plan.advice)]
    return lines


def _sharing(plan: Plan) -> str:
    if plan.processes == 1:
        return "not sharded (single process)"
    why = f"; fsdp auto: {plan.sharding_reason}" if plan.sharding_reason else ""
    if not plan.sharded:
        return f"replicated on {plan.processes} processes (DDP){why}"
    files = "sharded" if plan.sharded_checkpoints else "full"
    over = f"{plan.processes} processes (FSDP2 FULL_SHARD)"
    if plan.replicas > 1:
        over = f"the {plan.shards} processes of each node, replicated on {plan.replicas} nodes (FSDP2 HYBRID_SHARD)"
    return f"sharded over {over}, {files} checkpoints{why}"


def _line(name: str, text: str) -> str:
    return f"{name:<15}{text}"


def row_name(recipe: Recipe) -> str:
    """The plural name of one training row: pairs, packed rows or conversations."""
    if recipe.method == "dpo":
        return "pairs"
    return "packed rows" if isinstance(recipe.data, SFTData) and recipe.data.packing else "conversations"


def _data(volume: DataVolume | None, name: str) -> list[str]:
    if volume is None:
        return [_line("data", "not available here: `nesso-tune prepare` downloads and counts it")]
    about = "" if volume.exact else "~"
    held_out = name.removeprefix("packed ")
    counts = (
        f"{about}{volume.rows:,} {name} per epoch, {about}{volume.tokens:,} tokens, "
        f"{about}{volume.supervised_tokens:,} supervised; {about}{volume.validation_rows:,} {held_out} held out"
    ).replace("rows held", "conversations held")
    lines = [_line("data", counts), *([_line("", f"(~ {volume.basis})")] if volume.basis else [])]
    if volume.dropped:
        lost = ", ".join(f"{about}{share:.0%} {reason}" for reason, share in volume.dropped.items())
        lines.append(_line("", f"dropped: {lost}; `nesso-tune prepare` shows examples"))
    for source, keys in volume.unread.items():
        shown = ", ".join(key or '""' for key in list(keys)[:_MAX_KEYS])
        more = f" and {len(keys) - _MAX_KEYS:,} more" if len(keys) > _MAX_KEYS else ""
        lines.append(_line("", f"not read of {source}: {shown}{more}"))
    return [*lines, *(_line("warning", text) for text in volume.warnings)]


def _steps(plan: Plan) -> str:
    if plan.total_steps is None:
        return f"{plan.epochs:g} epochs"
    about = "" if plan.volume is None or plan.volume.exact else "~"
    epochs = f" ({about}{_short(plan.epochs)} epochs)" if plan.epochs else ""
    every = f"; log every {plan.log_every}, "
    every += "no checkpoints" if plan.save_every is None else f"save every {plan.save_every}"
    if plan.evaluate_every:
        every += f", evaluate every {plan.evaluate_every}"
    return f"{about}{plan.total_steps:,}{epochs}{every}"


def memory_in_words(plan: Plan) -> list[str]:
    """The memory of a step and its parts; empty if the size of the model is unknown."""
    memory = plan.memory
    if memory is None:
        return []
    how = f"{'with' if plan.gradient_checkpointing else 'without'} gradient checkpointing"
    if plan.gpu:
        needs = f"about {memory.total / GIB:.1f} of {plan.gpu.memory / GIB:.0f} GiB on each {plan.gpu.name}, {how}"
    else:
        needs = f"about {memory.total / GIB:.1f} GiB per process on a CPU, {how}; use --gpu NAME for a GPU"
    working = "gathered weights and CUDA" if plan.gpu else "weights in compute precision"
    parts = {"weights and optimizer": memory.state, "activations": memory.activations, "logits": memory.logits,
             working: memory.working}  # fmt: skip
    return [needs, f"({', '.join(f'{n / GIB:.1f} {name}' for name, n in parts.items())})"]


def _time(plan: Plan) -> list[str]:
    """Seconds per step and hours of the run, from the bound to a realistic time, and the MFU of the bound."""
    if plan.bound is None or plan.step_seconds is None:
        return []
    fast, slow = (seconds * (plan.total_steps or 0) / 3600 for seconds in plan.step_seconds)
    if plan.total_steps is None:
        took = "the number of steps is unknown"
    elif slow >= 1:
        took = f"{_short(fast)} to {_short(slow)} hours"
    elif slow >= 1 / 60:
        took = f"{_short(60 * fast)} to {_short(60 * slow)} minutes"
    else:
        took = "less than a minute"
    if plan.processes > 1 and plan.total_steps is not None:
        took += f" ({_short(fast * plan.processes)} to {_short(slow * plan.processes)} GPU hours)"
    step = " to ".join(f"{seconds:.2g}" for seconds in plan.step_seconds)
    kind = "compiled" if plan.torch_compile else "eager"
    mfu = f"{plan.bound.mfu:.0%} MFU ({plan.bound.mfu_common:.0%} common)"
    return [
        f"{took}, {step} s per step, without evaluation",
        f"(from the roofline's bound, {mfu}, {kind}, to {REALISTIC:g} times that)",
    ]


def in_short(parameters: int) -> str:
    """A number of parameters in short form, e.g. `437.8 M`, `8.03 B`."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} M"


def _short(value: float) -> str:
    """A number with two significant digits, e.g. `0.46`, `5.7`, `170`."""
    return f"{float(f'{value:.2g}'):,g}"
