"""`nesso-tune check`: validates a recipe and prints the plan."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nesso_tune.cli.options import JsonOption, RecipeArgument, SetOption, load_all
from nesso_tune.data.volume import find_volume
from nesso_tune.recipes.curve import curve
from nesso_tune.recipes.plan import DataVolume, Plan, World, make_plan


def check(
    recipe: RecipeArgument,
    settings: SetOption = [],  # noqa: B006 - typer copies it
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs (processes) on each machine.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Validate a recipe and show what it would do."""
    (loaded,) = load_all([recipe], settings)
    plan = make_plan(loaded, World(nodes * gpus_per_node), find_volume(loaded))
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        print("\n".join([f"{recipe}: valid", "", *describe(plan, loaded.data.sequence_len)]))


def describe(plan: Plan, sequence_len: int) -> list[str]:
    """The plan as lines for a terminal."""
    unit = f"rows of {sequence_len} tokens" if plan.method == "sft" else f"pairs of up to {sequence_len} tokens"
    lines = [
        f"method         {plan.method}",
        f"global batch   {plan.micro_batch} x {plan.accumulation} accumulation x {plan.processes} process(es)"
        f" = {plan.global_batch} {unit}",
        *_data(plan.volume),
        f"steps          {_steps(plan)}",
    ]
    if plan.parameters:
        lines.append(f"model          {plan.parameters / 1e6:,.1f} M parameters")
    if plan.checkpoint_bytes and plan.final_bytes:
        sizes = f"{_size(plan.checkpoint_bytes)} a checkpoint, {_size(plan.final_bytes)} for final/"
        lines.append(f"disk           {sizes}")
    if plan.schedule:
        lines += [f"learning rate  {plan.schedule.in_words()}", "", *curve(plan.schedule)]
    elif plan.shares:
        lines += [f"learning rate  {plan.shares.in_words(shares=True)}", "", *curve(plan.shares, shares=True)]
    else:
        lines.append(f"learning rate  peak {plan.learning_rate:g}; its steps follow from the data")
    if plan.advice:
        lines += ["", *(f"advice: {text}" for text in plan.advice)]
    return lines


def _data(volume: DataVolume | None) -> list[str]:
    if volume is None:
        return ["data           not at hand: `nesso-tune prepare` fetches and counts it"]
    about = "" if volume.exact else "~"
    return [
        f"data           {about}{volume.rows:,} rows an epoch, {about}{volume.tokens:,} tokens, "
        f"{about}{volume.supervised_tokens:,} supervised; {about}{volume.validation_rows:,} rows held out"
    ]


def _steps(plan: Plan) -> str:
    if plan.total_steps is None:
        return f"{plan.epochs:g} epochs"
    about = "" if plan.volume is None or plan.volume.exact else "~"
    epochs = f" ({about}{plan.epochs:.3g} epochs)" if plan.epochs else ""
    every = f"; log every {plan.log_every}, save every {plan.save_every}"
    if plan.evaluate_every:
        every += f", evaluate every {plan.evaluate_every}"
    return f"{about}{plan.total_steps:,}{epochs}{every}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
