"""A plan in words, for a terminal."""

from __future__ import annotations

from nesso_tune.recipes.curve import curve
from nesso_tune.recipes.gpus import GIB
from nesso_tune.recipes.plan import DataVolume, Plan

USUAL = (0.4, 0.2)  # shares of a GPU's peak that training reaches on a good and on an ordinary day


def describe(plan: Plan, sequence_len: int) -> list[str]:
    """The plan as lines of a name and what it is."""
    unit = f"rows of {sequence_len} tokens" if plan.method == "sft" else f"pairs of up to {sequence_len} tokens"
    lines = [
        _line("method", plan.method),
        _line(
            "global batch",
            f"{plan.micro_batch} x {plan.accumulation} accumulation x {plan.processes} process(es)"
            f" = {plan.global_batch} {unit}",
        ),
        *_data(plan.volume),
        _line("steps", _steps(plan)),
    ]
    if plan.parameters:
        lines.append(_line("model", f"{plan.parameters / 1e6:,.1f} M parameters"))
    lines += [_line(name, text) for name, text in zip(("memory", ""), _memory(plan), strict=False)]
    lines += [_line("time", text) for text in _time(plan, sequence_len)]
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


def _line(name: str, text: str) -> str:
    return f"{name:<15}{text}"


def _data(volume: DataVolume | None) -> list[str]:
    if volume is None:
        return [_line("data", "not at hand: `nesso-tune prepare` fetches and counts it")]
    about = "" if volume.exact else "~"
    counts = (
        f"{about}{volume.rows:,} rows an epoch, {about}{volume.tokens:,} tokens, "
        f"{about}{volume.supervised_tokens:,} supervised; {about}{volume.validation_rows:,} rows held out"
    )
    return [_line("data", counts), *([_line("", f"(~ {volume.basis})")] if volume.basis else [])]


def _steps(plan: Plan) -> str:
    if plan.total_steps is None:
        return f"{plan.epochs:g} epochs"
    about = "" if plan.volume is None or plan.volume.exact else "~"
    epochs = f" ({about}{plan.epochs:.3g} epochs)" if plan.epochs else ""
    every = f"; log every {plan.log_every}, save every {plan.save_every}"
    if plan.evaluate_every:
        every += f", evaluate every {plan.evaluate_every}"
    return f"{about}{plan.total_steps:,}{epochs}{every}"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    if memory is None:
        return []
    needs = f"about {memory.total / GIB:.1f} GiB on each GPU"
    if plan.gpu:
        needs = f"about {memory.total / GIB:.1f} of {plan.gpu.memory / GIB:.0f} GiB on each {plan.gpu.name}"
    how = {True: "with", False: "without", None: "with"}[plan.gradient_checkpointing] + " gradient checkpointing"
    undecided = "; --gpu NAME tells whether that is needed" if plan.gradient_checkpointing is None else ""
    parts = {"weights and optimizer": memory.state, "activations": memory.activations, "logits": memory.logits,
             "gathered weights and CUDA": memory.working}  # fmt: skip
    return [f"{needs}, {how}{undecided}", f"({', '.join(f'{n / GIB:.1f} {name}' for name, n in parts.items())})"]


def _time(plan: Plan, sequence_len: int) -> list[str]:
    """Hours at usual shares of the GPU's peak, at 6 operations a weight and token (Kaplan et al., 2020)."""
    if not plan.gpu or not plan.gpu.teraflops or not plan.parameters or not plan.total_steps:
        return []
    tokens = plan.total_steps * plan.global_batch * sequence_len
    if plan.volume and plan.volume.rows:
        tokens = round(plan.volume.tokens / plan.volume.rows * plan.total_steps * plan.global_batch)
    work = (8 if plan.gradient_checkpointing else 6) * plan.parameters * tokens
    fast, slow = (work / (plan.processes * plan.gpu.teraflops * 1e12 * share) / 3600 for share in USUAL)
    if slow >= 1:
        took = f"{_short(fast)} to {_short(slow)} hours"
    elif slow >= 1 / 60:
        took = f"{_short(60 * fast)} to {_short(60 * slow)} minutes"
    else:
        took = "less than a minute"
    if plan.processes > 1:
        took += f" ({_short(fast * plan.processes)} to {_short(slow * plan.processes)} GPU hours)"
    return [f"{took} at {USUAL[0]:.0%} to {USUAL[1]:.0%} of the GPUs' peak, evaluation not counted"]


def _short(value: float) -> str:
    """A number in two digits, e.g. `0.46`, `5.7`, `170`."""
    return f"{float(f'{value:.2g}'):,g}"


def size(count: int) -> str:
    """Bytes in the unit that reads well, e.g. `5.25 GB`."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
