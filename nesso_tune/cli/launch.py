"""`nesso-tune launch`: starts a run on the GPUs of this machine, or writes a Slurm job."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.cli.options import (
    SetOption,
    check_bases,
    check_before_start,
    check_flags,
    check_folders,
    file_path,
    load_all,
)
from nesso_tune.data.files import is_local
from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError
from nesso_tune.hub import has_weights, local_base_folder
from nesso_tune.launch.command import Machines, local_command, train_arguments
from nesso_tune.launch.slurm import sbatch_text
from nesso_tune.logs import print_lines, print_text
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.builtin import flag_path, is_run_output
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import SLURM_WORD, ClusterSection


def launch(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="As for `train`: run in order.")],
    settings: SetOption = [],  # noqa: B006 - typer copies it
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of machines (with --slurm).")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs, and so processes, per machine; without --slurm by default all.")
    ] = None,
    slurm: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=file_path, help="Write an sbatch file instead.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of the job, e.g. 24:00:00.")] = None,
    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", parser=flag_path, help="As for `train`.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="As for `train`; not with --slurm.")] = False,
    allow_changes: Annotated[str, typer.Option(metavar="KEY,...", help="As for `train`.")] = "",
    submit: Annotated[bool, typer.Option("--submit", help="Submit the sbatch file.")] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print the command or the sbatch file, and do nothing else.")
    ] = False,
) -> None:
    """Start a run on several GPUs: on this machine, or through Slurm on many."""
    loaded = load_all(recipes, settings)
    cluster = _cluster(recipes, loaded, {"partition": partition, "account": account, "time": time})
    check_folders(recipes, loaded)
    check_flags(loaded, resume, allow_changes)
    arguments = train_arguments(recipes, settings, _flags(resume, overwrite, allow_changes))
    if slurm is None:
        _check_slurm_options({"--nodes": nodes, "--partition": partition, "--account": account, "--time": time,
                           "--submit": submit or None})  # fmt: skip
        _check_plans(loaded, machines := Machines(1, gpus_per_node or _count_gpus()))
        command = local_command(machines, arguments)
        if show:
            print_lines(shlex.join(command))
            return
        sys.stdout.flush()
        os.execv(command[0], command)  # the launcher replaces this process and receives its signals
    machines = Machines(nodes or cluster.nodes, gpus_per_node or cluster.gpus_per_node)
    _check_plans(loaded, machines)
    _check_job(overwrite, resume, submit and show)
    timeout_s = max(recipe.distributed.timeout_s for recipe in loaded)
    text = sbatch_text(Path(recipes[0]).stem, machines, cluster, arguments, os.getcwd(), timeout_s)
    if show:
        print_text(text)
        return
    if cluster.offline:
        _check_cached(recipes, loaded)
    check_bases(loaded)
    check_before_start(loaded, machines.processes)
    slurm.parent.mkdir(parents=True, exist_ok=True)
    slurm.write_text(text, encoding="utf-8")
    print_lines(f"{slurm}: {machines.nodes} nodes x {machines.gpus_per_node} GPUs = {machines.processes} processes")
    if submit:
        _submit(slurm)
    else:
        print_lines(f"next: sbatch {shlex.quote(str(slurm))}")


def _cluster(names: list[str], recipes: list[Recipe], flags: dict[str, str | None]) -> ClusterSection:
    """The cluster section of the recipes of a job, with the flags applied.

    Raises:
        RecipeError: if the sections differ, or if a flag is not a single word.
    """
    sections = {recipe.cluster.model_dump_json(): name for name, recipe in zip(names, recipes, strict=True)
                if recipe.cluster is not None}  # fmt: skip
    if len(sections) > 1:
        first, other = list(sections.values())[:2]
        raise RecipeError(
            f"{other}: cluster", f"differs from that of {first}, but a job has one cluster section", "make them equal"
        )
    section = next((recipe.cluster for recipe in recipes if recipe.cluster is not None), ClusterSection())
    for name, value in flags.items():
        if value is not None and not re.fullmatch(SLURM_WORD, value):
            raise RecipeError(f"--{name}", f"must be one word without quotes or #, not {value!r}", "correct it")
    return section.model_copy(update={name: value for name, value in flags.items() if value is not None})


def _check_job(overwrite: bool, resume: str, submit_and_show: bool) -> None:
    """Raises RecipeError for flags that would do harm when the job is requeued after its time limit."""
    if overwrite:
        raise RecipeError(
            "--overwrite", "would remove the checkpoints of the job itself", "remove the run directory by hand"
        )
    if resume != "auto":
        raise RecipeError(
            "--resume", "would discard or reject the checkpoints of the job itself", "omit it: the job resumes"
        )
    if submit_and_show:
        raise RecipeError("--submit", "has no effect with --print, which does nothing", "remove one of the two")


def _flags(resume: str, overwrite: bool, allow_changes: str) -> list[str]:
    flags = [] if resume == "auto" else ["--resume", resume]
    flags += ["--overwrite"] if overwrite else []
    return [*flags, "--allow-changes", allow_changes] if allow_changes else flags


def _check_slurm_options(given: dict[str, object]) -> None:
    for option in (name for name, value in given.items() if value is not None):
        raise RecipeError(option, "has no effect without --slurm FILE", "add it, or remove the option")


def _check_plans(recipes: list[Recipe], machines: Machines) -> None:
    """Raises RecipeError if a global batch size is not divisible by the number of processes."""
    for recipe in recipes:
        make_plan(recipe, World(machines.processes))


def _count_gpus() -> int:
    """Number of GPUs of this machine; 1 without a GPU."""
    import torch

    count: int = torch.cuda.device_count()
    return max(1, count)


def _check_cached(names: list[str], recipes: list[Recipe]) -> None:
    """Raises RunEnvironmentError if a base model or data is not in the cache, for nodes without network access."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # look into the cache only
    from nesso_tune.data.sources import is_cached

    missing: list[Problem] = []
    for name, recipe in zip(names, recipes, strict=True):
        base = recipe.model.base
        folder = local_base_folder(base, recipe.model.revision)
        uncached = [] if is_run_output(base) or (folder and has_weights(folder)) or recipe.model.random_init else [base]
        sources = (*recipe.data.sources, *recipe.data.validation_sources)
        uncached += [source.path for source in sources if not is_local(source.path) and not is_cached(source)]
        remedy = f"run `nesso-tune prepare {shlex.quote(name)}` on the login node, or set cluster.offline: false"
        missing += [
            Problem(name, f"{what} is not in the cache, and the nodes have no network access", remedy)
            for what in uncached
        ]
    if missing:
        raise RunEnvironmentError(missing)


def _submit(file: Path) -> None:
    if shutil.which("sbatch") is None:
        raise RunEnvironmentError(
            "sbatch", "is not installed on this machine", f"run `sbatch {file}` on the login node"
        )
    done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunEnvironmentError("sbatch", f"rejected the job ({done.stderr.strip()})", "correct the cluster section")
    print_text(done.stdout.strip() + "\n")
