"""`nesso-tune check`: validates a recipe and prints the plan."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer

from nesso_tune.chat.files import check_at_hand, unknown_base
from nesso_tune.cli.options import JsonOption, RecipeArgument, SetOption, load_all
from nesso_tune.data.volume import find_volume
from nesso_tune.recipes.describe import describe
from nesso_tune.recipes.gpus import find_gpu
from nesso_tune.recipes.plan import World
from nesso_tune.recipes.planning import make_plan


def check(
    recipe: RecipeArgument,
    settings: SetOption = [],  # noqa: B006 - typer copies it
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs (processes) on each machine.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Kind of GPU, e.g. a100-80gb: does a step fit into its memory?")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Validate a recipe and show what it would do."""
    (loaded,) = load_all([recipe], settings)
    check_at_hand(loaded.model)
    world = World(nodes * gpus_per_node, None if gpu is None else find_gpu(gpu))
    plan = make_plan(loaded, world, find_volume(loaded))
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        closing = ["", f"next: nesso-tune preview {shlex.quote(recipe)}"]
        print("\n".join([f"{recipe}: valid", "", *describe(plan, loaded, unknown_base(loaded.model.base)), *closing]))
