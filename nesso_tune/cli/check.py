"""`nesso-tune check` validates recipes and shows their plans, `schema` prints the JSON Schema of recipes, and `doctor`
checks the environment of a run.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.cli.options import JsonOption, SetOption, check_folders, file_path, load_all
from nesso_tune.data.estimate import estimate_volume
from nesso_tune.data.sources import check_output
from nesso_tune.errors import RunEnvironmentError
from nesso_tune.hub import check_local_base, missing_base_note
from nesso_tune.launch.command import Machines, count_local_gpus
from nesso_tune.logs import print_lines, print_text
from nesso_tune.planning.hardware import NO_MPS, Gpu, find_gpu, has_apple_gpu
from nesso_tune.planning.plan import Plan, World, describe
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.json_schema import recipe_schema
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import ClusterSection


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    print_text(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")


def check(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="YAML files, or names of bundled recipes.")],
    settings: SetOption = [],  # noqa: B006 - typer copies it
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of machines; by default `cluster.nodes`.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs (processes) per machine; by default `cluster.gpus_per_node`.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="GPU model, e.g. a100-80gb, to compare the memory with.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Validate recipes and show their plans. `--json` prints an object, or a list of objects for several recipes."""
    loaded = load_all(recipes, settings)
    check_folders(recipes, loaded)
    found = None if gpu is None else find_gpu(gpu)
    plans = [_plan(recipe, nodes, gpus_per_node, found) for recipe in loaded]
    if as_json:
        texts = [plan.to_dict() for plan in plans]
        print_text(json.dumps(texts if len(texts) > 1 else texts[0], indent=2) + "\n")
        return
    for name, recipe, plan in zip(recipes, loaded, plans, strict=True):
        closing = ["", f"next: nesso-tune preview {shlex.quote(name)}", *([""] if len(recipes) > 1 else [])]
        print_lines(f"{name}: valid", "", *describe(plan, recipe, missing_base_note(recipe.model.base)), *closing)


def _plan(recipe: Recipe, nodes: int | None, gpus_per_node: int | None, gpu: Gpu | None) -> Plan:
    """The plan of a recipe on these machines, by default those of its cluster section."""
    check_local_base(recipe.model)
    check_output(recipe)
    cluster = recipe.cluster or ClusterSection()
    machines = Machines(nodes or cluster.nodes, gpus_per_node or cluster.gpus_per_node)
    plan = make_plan(recipe, World(machines.processes, gpu, machines.gpus_per_node), estimate_volume(recipe))
    here = (NO_MPS,) if gpu is None and has_apple_gpu() else ()
    return replace(plan, advice=(*here, *_idle_gpus(machines, recipe.cluster), *plan.advice))


def _idle_gpus(machines: Machines, cluster: ClusterSection | None) -> list[str]:
    """A note about unused GPUs of the cluster section, or of this machine without a cluster section."""
    if cluster is not None:
        idle = Machines(cluster.nodes, cluster.gpus_per_node).processes - machines.processes
        return [f"{idle} of the cluster section's {idle + machines.processes} GPUs would be idle"] if idle > 0 else []
    available = count_local_gpus()
    if machines.processes >= available:
        return []
    idle = available - machines.processes
    return [f"{idle} of this machine's {available} GPUs would be idle: `nesso-tune launch` uses all"]


def doctor(
    folder: Annotated[
        Path, typer.Option("--output-dir", metavar="FOLDER", parser=file_path, help="Output folder of runs.")
    ] = Path("outputs"),
    timeout: Annotated[int, typer.Option(min=1, help="Seconds to wait for other processes.")] = 60,
) -> None:
    """Check versions, driver, GPUs, disk, cache and ports. A launcher's processes also compare machines and links."""
    from nesso_tune.cli.main import RANK0_PRINTS_S, end_process
    from nesso_tune.distributed.process_group import is_main_process, on_lost_rank, world_size
    from nesso_tune.launch.allocation import measure_allocation
    from nesso_tune.launch.doctor import inspect_machine

    on_lost_rank(end_process)
    machine = inspect_machine(folder, disks_too=os.environ.get("LOCAL_RANK", "0") == "0")
    facts, problems, table = list(machine.facts), list(machine.problems), []
    if world_size() > 1:
        allocation = measure_allocation(machine, folder, timeout)
        problems = allocation.problems()
        facts, table = [*facts, *allocation.facts()], ["", *allocation.table(problems)]
    if is_main_process():
        width = max(len(name) for name, _ in facts) + 2
        print_lines(*(f"{name:<{width}}{value}" for name, value in facts), *table)
    if problems:
        error = RunEnvironmentError(problems)
        if not is_main_process():
            time.sleep(RANK0_PRINTS_S)  # launchers end all processes when one has failed
        error.prints_message, error.on_all_ranks = is_main_process(), True  # all ranks have the same problems
        raise error
    if is_main_process():
        print_lines("no problems found")
