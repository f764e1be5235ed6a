"""`nesso-tune launch`: starts a run on the GPUs of this machine, or writes the jobs of Slurm."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import typer

from nesso_tune.cli.options import (
    ChangesOption,
    SetOption,
    VerifyOption,
    check_bases,
    check_before_start,
    check_flags,
    check_folders,
    file_path,
    keys_of,
    load_all,
    settings_of,
)
from nesso_tune.data.files import is_local
from nesso_tune.errors import Problem, RecipeError, RunEnvironmentError
from nesso_tune.hub import has_weights, local_base_folder
from nesso_tune.launch.command import Machines, local_command, train_arguments, verb_arguments
from nesso_tune.launch.container import cache_variables, container_mounts
from nesso_tune.launch.slurm import Job, JobKind, chain_commands, is_job_file, sbatch_text, submit_chain
from nesso_tune.logs import output_flags, print_lines, print_text
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.builtin import flag_path, is_run_output
from nesso_tune.recipes.cluster_rules import SLURM_TIMES, SLURM_WORD, slurm_seconds
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import ClusterSection

DOCTOR: Literal["doctor"] = "doctor"  # in the place of a recipe
DOCTOR_TIMEOUT_S = 300  # many processes that load Python from a shared file system start slowly


@dataclass(frozen=True)
class JobRecipes:
    """The recipes that run in one job: consecutive ones with equal cluster sections.

    Attributes:
        names: the recipes, as on the command line.
        recipes: the same, loaded.
        cluster: their section, with the flags applied.
        machines: nodes and GPUs.
    """

    names: list[str]
    recipes: list[Recipe]
    cluster: ClusterSection
    machines: Machines


def launch(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="As for `train`, in order; or `doctor`, which checks the machines."),
    ],
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
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Prepare the data in a CPU job before (with --slurm).")
    ] = False,
    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", parser=flag_path, help="As for `train`.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="As for `train`; not with --slurm.")] = False,
    changes: ChangesOption = [],  # noqa: B006 - typer copies it
    verify: VerifyOption = "sample",
    submit: Annotated[bool, typer.Option("--submit", help="Submit the sbatch file.")] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print the command or the sbatch file, and do nothing else.")
    ] = False,
) -> None:
    """Start a run on several GPUs: on this machine, or through Slurm on many."""
    is_doctor, allow_changes = recipes[0] == DOCTOR, ",".join(changes)
    names = recipes[1:] if is_doctor else recipes
    loaded = load_all(names, settings)
    words = {"partition": partition, "account": account, "time": time}
    if slurm is None:
        check_slurm_options({"--nodes": nodes, **{f"--{name}": word for name, word in words.items()},
                              "--prepare": prepare or None, "--submit": submit or None})  # fmt: skip
    groups = group_recipes(names, loaded, words, nodes, gpus_per_node, is_doctor)
    check_folders(names, loaded)
    check_flags(loaded, resume, allow_changes)
    if is_doctor:
        _check_doctor(resume, overwrite, allow_changes, verify, prepare)
    flags = [*_flags(resume, overwrite, allow_changes, verify), *output_flags()]
    if slurm is None:
        machines = Machines(1, gpus_per_node or _count_gpus())
        if not is_doctor:
            check_plans(loaded, machines)
        arguments = _doctor_arguments(loaded) if is_doctor else train_arguments(names, settings, flags)
        _start_here(local_command(machines, arguments), show)
        return
    _check_job(overwrite, resume)
    if is_doctor:
        jobs = [make_job(DOCTOR, groups[0], [_doctor_arguments(loaded)], DOCTOR)]
    else:
        for group in groups:
            check_plans(group.recipes, group.machines)
        jobs = [_train_job(group, settings, allow_changes, verify) for group in groups]
        if prepare:
            jobs = [*prepare_jobs(groups, settings), *jobs]
    if not show and not is_doctor:
        check_start(groups, loaded)
    write_jobs(jobs, slurm, show, submit)


def _start_here(command: list[str], show: bool) -> None:
    """Prints the command, or replaces this process by the launcher, which then receives its signals."""
    if show:
        print_lines(shlex.join(command))
        return
    sys.stdout.flush()
    os.execv(command[0], command)


def group_recipes(
    names: list[str],
    recipes: list[Recipe],
    flags: Mapping[str, str | None] = MappingProxyType({}),
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    is_doctor: bool = False,
) -> list[JobRecipes]:
    """The recipes by job. A recipe without a cluster section has that of the one before, or else of the next.

    Raises:
        RecipeError: if a flag is not a single word.
    """
    for name, value in flags.items():
        if value is not None and not re.fullmatch(SLURM_WORD, value):
            raise RecipeError(f"--{name}", f"must be one word without quotes or #, not {value!r}", "correct it")
    given = {name: value for name, value in flags.items() if value is not None}
    if "time" in given and slurm_seconds(given["time"]) is None:
        raise RecipeError("--time", f"{given['time']} is not a time of Slurm", SLURM_TIMES)
    section = next((recipe.cluster for recipe in recipes if recipe.cluster is not None), ClusterSection())
    groups: list[JobRecipes] = []
    for name, recipe in zip(names, recipes, strict=True):
        section = recipe.cluster or section
        cluster = section.model_copy(update=given)
        if not groups or (groups[-1].cluster != cluster and not is_doctor):
            machines = Machines(nodes or cluster.nodes, gpus_per_node or cluster.gpus_per_node)
            groups.append(JobRecipes([], [], cluster, machines))
        groups[-1].names.append(name)
        groups[-1].recipes.append(recipe)
    if not groups:  # `launch doctor` alone
        cluster = section.model_copy(update=given)
        groups = [JobRecipes([], [], cluster, Machines(nodes or cluster.nodes, gpus_per_node or cluster.gpus_per_node))]
    return groups


def _train_job(group: JobRecipes, settings: list[str], allow_changes: str, verify: str) -> Job:
    flags = [*_flags("auto", False, ",".join(keys_of(group.recipes, allow_changes)), verify), *output_flags()]
    arguments = train_arguments(group.names, settings_of(group.names, settings), flags)
    return make_job(Path(group.names[0]).stem, group, [arguments], "train")


def prepare_jobs(groups: Sequence[JobRecipes], settings: list[str]) -> list[Job]:
    """The CPU job that prepares the data of all recipes but those whose base does not exist (its tokenizer is needed),
    and those with other caches or another Python than the first.
    """
    first = groups[0].cluster
    outputs = {(Path(recipe.output_dir) / "final").resolve() for group in groups for recipe in group.recipes}
    ready: list[tuple[str, Recipe]] = []
    for group in groups:
        for name, recipe in zip(group.names, group.recipes, strict=True):
            reason = ""
            if Path(recipe.model.base).resolve() in outputs:
                reason = "the base is the model of an earlier recipe"
            elif any(getattr(group.cluster, key) != getattr(first, key) for key in ("env", "python", "container")):
                reason = "cluster.env, python or container are not those of the first recipe"
            if reason:
                print_lines(f"{name}: its own job prepares its data, because {reason}")
            else:
                ready.append((name, recipe))
    if not ready:
        return []
    of_job = JobRecipes([name for name, _ in ready], [recipe for _, recipe in ready], first, Machines())
    steps = [verb_arguments("prepare", [name], settings_of([name], settings)) for name in of_job.names]
    return [make_job("prepare", of_job, steps, "prepare")]


def make_job(name: str, group: JobRecipes, steps: list[list[str]], kind: JobKind) -> Job:
    """The job of some recipes; that of `doctor` may have none."""
    caches = cache_variables({**os.environ, **group.cluster.env})
    runs = [Path(os.path.abspath(recipe.output_dir)) for recipe in group.recipes] or [Path.cwd() / "outputs" / DOCTOR]
    mounts = container_mounts(group.names, group.recipes, group.cluster, caches)
    timeout_s = max((recipe.distributed.timeout_s for recipe in group.recipes), default=DOCTOR_TIMEOUT_S)
    timeout_s = DOCTOR_TIMEOUT_S if kind == "doctor" else timeout_s
    return Job(name, group.machines, group.cluster, steps, os.getcwd(), runs, kind, mounts, caches, timeout_s)


def _doctor_arguments(recipes: list[Recipe]) -> list[str]:
    folder = Path(recipes[0].output_dir).parent if recipes else Path("outputs")
    return [DOCTOR, "--output-dir", str(folder), "--timeout", str(DOCTOR_TIMEOUT_S)]


def write_jobs(jobs: list[Job], file: Path, show: bool, submit: bool) -> None:
    """Writes one sbatch file for each job, or prints them; `submit` also submits them as a chain.

    Raises:
        RecipeError: if they are to be submitted and only printed, if a file exists that is none of ours, or if
            `cluster.setup` is not valid bash.
        RunEnvironmentError: as `submit_chain`.
    """
    if submit and show:
        raise RecipeError("--submit", "has no effect with --print, which does nothing", "remove one of the two")
    stem, suffix = file.stem, file.suffix
    files = [file] if len(jobs) == 1 else [
        file.with_name(f"{stem}-{i}-{job.name}{suffix}") for i, job in enumerate(jobs, 1)
    ]  # fmt: skip
    texts = [sbatch_text(job) for job in jobs]
    for path, job, text in zip(files, jobs, texts, strict=True):
        _check_setup(job, text)
        if not show and path.exists() and not is_job_file(path):
            raise RecipeError(
                "--slurm", f"{path} exists and is no job of nesso-tune", "name another file, or remove it"
            )
    for path, job, text in zip(files, jobs, texts, strict=True):
        if show:
            print_text(("" if len(jobs) == 1 else f"# {path}\n") + text)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        size = f"{job.machines.nodes} nodes x {job.machines.gpus_per_node} GPUs = {job.machines.processes} processes"
        tasks = f"{job.array} tasks, each on " if job.array else ""
        print_lines(f"{path}: {tasks}{f'{job.cluster.prepare.cpus} CPUs' if job.kind == 'prepare' else size}")
    if submit and not show:
        print_lines(*(f"Submitted batch job {job}" for job in submit_chain(files)))
    elif not show:
        first, *rest = chain_commands(files)
        print_lines(f"next: {first}", *(f"      {command}" for command in rest))


def _check_setup(job: Job, text: str) -> None:
    """Raises RecipeError if the lines of `cluster.setup` break the job script."""
    bash = shutil.which("bash")
    if bash is None or not job.cluster.setup:
        return
    done = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        fault = done.stderr.strip().splitlines()[0].partition(": ")[2]
        raise RecipeError("cluster.setup", f"is not valid bash ({fault})", "correct it")


def _check_doctor(resume: str, overwrite: bool, allow_changes: str, verify: str, prepare: bool) -> None:
    """Raises RecipeError for an option of training."""
    given = {"--resume": resume != "auto", "--overwrite": overwrite, "--allow-changes": bool(allow_changes),
             "--verify": verify != "sample", "--prepare": prepare}  # fmt: skip
    for option in (name for name, is_given in given.items() if is_given):
        raise RecipeError(option, "has no effect with `doctor`, which trains nothing", "remove it")


def _check_job(overwrite: bool, resume: str) -> None:
    """Raises RecipeError for flags that would do harm when the job is requeued."""
    if overwrite:
        raise RecipeError(
            "--overwrite", "would remove the checkpoints of the job itself", "remove the run directory by hand"
        )
    if resume != "auto":
        raise RecipeError(
            "--resume", "would discard or reject the checkpoints of the job itself", "omit it: the job resumes"
        )


def check_start(groups: list[JobRecipes], loaded: list[Recipe]) -> None:
    """Checks bases, data and caches of all jobs before one of them waits in the queue."""
    given = groups[0].cluster.env
    each = [cache_variables({**os.environ, **group.cluster.env}) for group in groups]
    os.environ.update({name: path for name, path in each[0].items() if name in given})  # the hub's libraries read them
    for group, caches in zip(groups, each, strict=True):
        if group.cluster.offline and caches == each[0]:
            _check_cached(group.names, group.recipes)
        elif group.cluster.offline:
            print_lines(f"{', '.join(group.names)}: not looked for in its caches, which are not those of the first job")
    check_bases(loaded)
    for group in groups:
        check_before_start(group.recipes, group.machines.processes)


def _flags(resume: str, overwrite: bool, allow_changes: str, verify: str) -> list[str]:
    flags = [] if resume == "auto" else ["--resume", resume]
    flags += ["--overwrite"] if overwrite else []
    flags += [] if verify == "sample" else ["--verify", verify]
    return [*flags, "--allow-changes", allow_changes] if allow_changes else flags


def check_slurm_options(given: dict[str, object]) -> None:
    """Raises RecipeError for an option that is given and has no effect without a job."""
    for option in (name for name, value in given.items() if value is not None):
        raise RecipeError(option, "has no effect without --slurm FILE", "add it, or remove the option")


def check_plans(recipes: list[Recipe], machines: Machines) -> None:
    """Raises RecipeError if a global batch size is not divisible by the number of processes."""
    for recipe in recipes:
        make_plan(recipe, World(machines.processes, per_node=machines.gpus_per_node))


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
        command = f"nesso-tune prepare --fetch-only {shlex.quote(name)}"
        remedy = f"run `{command}` on the login node, or set cluster.offline: false"
        missing += [
            Problem(name, f"{what} is not in the cache, and the nodes have no network access", remedy)
            for what in uncached
        ]
    if missing:
        raise RunEnvironmentError(dict.fromkeys(missing))  # the runs of a sweep miss the same
