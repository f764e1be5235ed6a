"""`nesso-tune check` validates a recipe and shows its plan, `schema` prints the JSON Schema of recipes, and `doctor`
checks the environment of a run.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.cli.options import JsonOption, RecipeArgument, SetOption, file_path, load_all
from nesso_tune.data.estimate import estimate_volume
from nesso_tune.data.sources import check_output
from nesso_tune.errors import Problem, RunEnvironmentError
from nesso_tune.hub import check_local_base, missing_base_note
from nesso_tune.launch.command import Machines, count_local_gpus
from nesso_tune.logs import print_lines, print_text
from nesso_tune.planning.hardware import NO_MPS, find_gpu, has_apple_gpu
from nesso_tune.planning.plan import World, describe
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.json_schema import recipe_schema
from nesso_tune.recipes.sections import ClusterSection


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    print_text(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")


def check(
    recipe: RecipeArgument,
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
    """Validate a recipe and show its plan."""
    (loaded,) = load_all([recipe], settings)
    check_local_base(loaded.model)
    check_output(loaded)
    cluster = loaded.cluster or ClusterSection()
    machines = Machines(nodes or cluster.nodes, gpus_per_node or cluster.gpus_per_node)
    world = World(machines.processes, None if gpu is None else find_gpu(gpu))
    plan = make_plan(loaded, world, estimate_volume(loaded))
    here = (NO_MPS,) if gpu is None and has_apple_gpu() else ()
    plan = replace(plan, advice=(*here, *_idle_gpus(machines, loaded.cluster), *plan.advice))
    if as_json:
        print_text(json.dumps(plan.to_dict(), indent=2) + "\n")
    else:
        closing = ["", f"next: nesso-tune preview {shlex.quote(recipe)}"]
        print_lines(f"{recipe}: valid", "", *describe(plan, loaded, missing_base_note(loaded.model.base)), *closing)


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
    from nesso_tune.cli.main import end_process
    from nesso_tune.distributed.process_group import is_main_process, on_lost_rank, world_size
    from nesso_tune.launch.doctor import inspect_machine, measure_communication

    on_lost_rank(end_process)
    machine = inspect_machine(folder)
    facts, problems = list(machine.facts), list(machine.problems)
    if world_size() > 1:
        machines, measured, shared = measure_communication(machine, timeout)
        facts += measured
        # processes of one machine report the same problem
        own = dict.fromkeys((report.host, problem) for report in machines for problem in report.problems)
        problems = [Problem(f"{host}: {p.where}", p.what, p.remedy) for host, p in own] + shared
    if is_main_process():
        for name, value in facts:
            print_lines(f"{name:<14}{value}")
    if problems:
        raise RunEnvironmentError(problems)
    if is_main_process():
        print_lines("no problems found")
