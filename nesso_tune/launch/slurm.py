"""Writes the sbatch files of a run, and submits them as a chain.

Nodes, GPUs, processes, threads and rendezvous are consistent by construction: the `#SBATCH` lines and three variables
are written from the same values, the script computes the rest from these variables, and it exits if the allocation
differs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from nesso_tune.errors import Preempted, RunEnvironmentError
from nesso_tune.launch.command import EXIT_FILE, MODULE, Machines, Rendezvous, accelerate_arguments
from nesso_tune.launch.container import ContainerWords, container_words
from nesso_tune.logs import STAMP_VARIABLE
from nesso_tune.planning.hardware import BINDING_VARIABLE
from nesso_tune.recipes.sections import ClusterSection

JobKind = Literal["train", "doctor", "prepare"]
RENDEZVOUS = Rendezvous("$SLURM_NODEID", "$MAIN_ADDRESS", "$MAIN_PORT")
# Defaults, which the environment of the job and `cluster.env` override. RCCL reads NCCL's variables.
DEFAULT_VARIABLES = {
    "NCCL_DEBUG": "WARN",
    "TORCH_FR_BUFFER_SIZE": "2000",  # torch's flight recorder: the last collective operations of each rank,
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # written when one of them times out
    "TORCH_FR_DUMP_TEMP_FILE": "$BESIDE_RUN.flight-recorder-$SLURM_JOB_ID-rank-",
    STAMP_VARIABLE: "1",
    BINDING_VARIABLE: "1",
}
POINT = "--point"  # option of `sweep`: the combination that one task of an array trains
FIRST_LINES = ("#!/bin/bash", "# Written by nesso-tune. To change a number, write the file again.")
MAX_IDLE_STARTS = 3  # without a new checkpoint, before a job is not queued again
NODE_ANSWERS_S = 60  # for a node to start an empty step
# Exit codes after which the job asks whether a node is lost: of the environment, and of srun or a signal
LOST_NODE_CODES = f"{RunEnvironmentError.exit_code} | 1 | 1[2-9]?"


@dataclass(frozen=True)
class Job:
    """A job of Slurm.

    Attributes:
        name: its name.
        machines: nodes and GPUs; of a job of kind `prepare`, one node without GPUs.
        cluster: further options of the cluster.
        steps: arguments of `python -m nesso_tune`, one list for each command; they run in order.
        folder: working directory, to which relative paths of the recipe refer.
        run_dirs: run directories of the recipes; files of the job are written beside the first.
        kind: a `train` job resumes when it is queued again; `doctor` starts processes like it, `prepare` starts none.
        mounts: folders that a container needs, as `HOST:CONTAINER`.
        caches: folders of the caches by variable.
        timeout_s: seconds in which all machines must join.
        array: number of tasks of a job array, each of which trains one combination of a sweep; 0: no array.
        parallel: tasks of the array that run at the same time; 0: as many as there is room for.
    """

    name: str
    machines: Machines
    cluster: ClusterSection
    steps: Sequence[Sequence[str]]
    folder: str
    run_dirs: Sequence[Path]
    kind: JobKind = "train"
    mounts: Sequence[str] = ()
    caches: Mapping[str, str] = field(default_factory=dict)
    timeout_s: int = 1800
    array: int = 0
    parallel: int = 0

    @property
    def variables(self) -> dict[str, str]:
        """Variables that the job sets, with values in shell syntax, in order."""
        own = {"HF_HUB_OFFLINE": "1"} if self.cluster.offline else {}
        own["OMP_NUM_THREADS"] = str(self.cluster.prepare.cpus) if self.kind == "prepare" else "$CPUS_PER_GPU"
        used = {STAMP_VARIABLE: "1"} if self.kind == "prepare" else DEFAULT_VARIABLES
        defaults = {name: f'"${{{name}-{value}}}"' for name, value in used.items()}  # an empty value stays empty
        caches = {name: shlex.quote(value) for name, value in self.caches.items()}
        user = {name: shlex.quote(value) for name, value in self.cluster.env.items()}
        return {**defaults, **caches, **user, **own}


def sbatch_text(job: Job) -> str:
    """The text of an sbatch file."""
    words = container_words(job.cluster.container, job.mounts, job.folder, _passed_on(job))
    lines = [
        *FIRST_LINES,
        "# shellcheck disable=SC1090,SC1091,SC2016  # files of the site, and variables that the nodes expand",
        *(f"#SBATCH {option}" for option in _options(job)),
        "",
        "set -euo pipefail",
        *_sizes(job),
        f"cd {shlex.quote(job.folder)}",
        f"mkdir -p {shlex.join(_written_folders(job))}",
        *([] if job.kind == "prepare" else [f"BESIDE_RUN={shlex.quote(str(job.run_dirs[0]))}"]),
        "unset SLURM_EXPORT_ENV  # where jobs start without an environment, srun would not pass this one on",
        *_setup(job),
        *(f"export {name}={value}" for name, value in job.variables.items()),
    ]
    lines += _prepare_lines(job, words) if job.kind == "prepare" else _run_lines(job, words)
    return "\n".join([*lines, ""])


def is_job_file(file: Path) -> bool:
    """Whether a file is a job that `sbatch_text` made."""
    try:
        with file.open(encoding="utf-8") as stream:
            return [line.rstrip("\n") for line in islice(stream, len(FIRST_LINES))] == list(FIRST_LINES)
    except (OSError, UnicodeDecodeError):
        return False


def submit_chain(files: Sequence[Path]) -> list[str]:
    """Submits jobs, each of which starts when the one before has completed; returns their ids.

    Raises:
        RunEnvironmentError: if sbatch is not installed or rejects a job.
    """
    if shutil.which("sbatch") is None:
        command = next(iter(chain_commands(files)))
        raise RunEnvironmentError("sbatch", "is not installed on this machine", f"run `{command}` on the login node")
    jobs: list[str] = []
    for file in files:
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        done = subprocess.run(["sbatch", "--parsable", *after, str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            queued = f"; `scancel {' '.join(jobs)}` cancels the jobs before it" if jobs else ""
            raise RunEnvironmentError(
                "sbatch", f"rejected the job ({done.stderr.strip()})", f"correct the cluster section{queued}"
            )
        jobs.append(done.stdout.strip().split(";")[0])
    return jobs


def chain_commands(files: Sequence[Path]) -> list[str]:
    """The commands that submit jobs as `submit_chain` does."""
    names = [shlex.quote(str(file)) for file in files]
    if len(names) == 1:
        return [f"sbatch {names[0]}"]
    after = "sbatch --parsable --dependency=afterok:$job --kill-on-invalid-dep=yes"
    return [f"job=$(sbatch --parsable {names[0]})", *(f"job=$({after} {name})" for name in names[1:])]


def _written_folders(job: Job) -> list[str]:
    """Folders that must exist: those of the run directories and, to be mounted, of the caches."""
    caches = [] if job.cluster.container is None else list(job.caches.values())
    return list(dict.fromkeys([*(str(run.parent) for run in job.run_dirs), *caches]))


def _options(job: Job) -> list[str]:
    cluster, gpus = job.cluster, job.machines.gpus_per_node
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.name).strip("-") or "nesso-tune"
    options = [f"--job-name={name}", f"--nodes={job.machines.nodes}", "--ntasks-per-node=1"]
    own = cluster.prepare if job.kind == "prepare" else None
    if own is not None:
        options += [f"--cpus-per-task={own.cpus}"]
    else:
        typed = f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else str(gpus)
        asked = {"gres": f"--gres=gpu:{typed}", "none": ""}.get(cluster.gpu_option, f"--{cluster.gpu_option}={typed}")
        options += [*filter(None, [asked]), f"--cpus-per-task={gpus * cluster.cpus_per_gpu}"]
    options += [f"--array=0-{job.array - 1}{f'%{job.parallel}' if job.parallel else ''}"] if job.array else []
    options += [f"--output={name}-{'%A-%a' if job.array else '%j'}.log", "--open-mode=append"]
    options += ["--requeue", f"--signal=USR1@{cluster.save_before_s}"] if job.kind == "train" else ["--no-requeue"]
    named = {
        "time": (own and own.time) or cluster.time, "partition": (own and own.partition) or cluster.partition,
        "account": cluster.account,
    }  # fmt: skip
    options += [f"--{option}={value}" for option, value in named.items() if value is not None]
    return [*options, *(cluster.extra if own is None else own.extra)]


def _sizes(job: Job) -> list[str]:
    """The variables with the size of the job, and checks of the allocation."""
    if job.kind == "prepare":
        return []
    return [
        f"NODES={job.machines.nodes} GPUS_PER_NODE={job.machines.gpus_per_node} "
        f"CPUS_PER_GPU={job.cluster.cpus_per_gpu}",
        'if [ "$SLURM_NNODES" -ne "$NODES" ]; then',
        '  echo "this job was written for $NODES nodes but got $SLURM_NNODES: write it again for that number" >&2',
        "  exit 2",
        "fi",
        'if [ "${SLURM_GPUS_ON_NODE:-$GPUS_PER_NODE}" -ne "$GPUS_PER_NODE" ]; then',
        '  echo "this job was written for $GPUS_PER_NODE GPUs per node but got $SLURM_GPUS_ON_NODE" >&2',
        "  exit 2",
        "fi",
    ]


def _setup(job: Job) -> list[str]:
    """Modules and lines of the site, which may read variables that are not set and change the folder."""
    cluster = job.cluster
    if not cluster.modules and not cluster.setup:
        return []
    lines = ["set +u"]
    if cluster.modules:  # a job is not a login shell, and commands of a profile may fail
        lines += ["type module > /dev/null 2>&1 || { set +e; . /etc/profile; set -e; }"]
    lines += [f"module load {shlex.quote(module)}" for module in cluster.modules]
    return [*lines, *cluster.setup, "set -u", *([f"cd {shlex.quote(job.folder)}"] if cluster.setup else [])]


def _run_lines(job: Job, words: ContainerWords) -> list[str]:
    """Starts one task on each node, and decides by its exit code whether the job is queued again."""
    return [
        'NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        # not `| head`: with pipefail, a scontrol that still writes would end the job with SIGPIPE
        "MAIN_ADDRESS=${NODE_NAMES%%$'\\n'*}",
        "MAIN_PORT=$((20000 + 2 * (SLURM_JOB_ID % 6000)))  # below the ports that the system gives to clients",
        f"{EXIT_FILE}=$BESIDE_RUN.exit-$SLURM_JOB_ID",
        f'rm -f "${EXIT_FILE}"',
        f"trap 'rm -f \"${EXIT_FILE}\"' EXIT",
        f"export MAIN_ADDRESS MAIN_PORT {EXIT_FILE}",
        *words.lines,
        *(_saved_lines(job) if job.kind == "train" else []),
        "",
        "code=0",
        f"{_srun(job, words)} bash -c {shlex.quote(_node_command(job))} || code=$?",
        f'if [ "$code" -ne 0 ] && [ -s "${EXIT_FILE}" ]; then code=$(cat "${EXIT_FILE}"); fi',
        *(_requeue_lines(job) if job.kind == "train" else []),
        'exit "$code"',
    ]


def _saved_lines(job: Job) -> list[str]:
    """Defines the function that lists what the runs have saved, and calls it before they start."""
    runs = [job.run_dirs[0].with_name("*")] if job.array else job.run_dirs  # of an array: the runs of all its tasks
    patterns = " ".join(f"{shlex.quote(str(run.parent))}/{run.name if job.array else shlex.quote(run.name)}/{what}"
                        for run in runs for what in ("checkpoint-*", "final"))  # fmt: skip
    return [
        f"saved() {{ ls -d {patterns} 2> /dev/null || true; }}",
        "SAVED=$(saved)",
        "IDLE=$BESIDE_RUN.idle-$SLURM_JOB_ID",
    ]


def _requeue_lines(job: Job) -> list[str]:
    """Queues the job again if the run was preempted, or if a node does not start a step any more.

    A job that saves nothing in several starts, one after the other, would be queued again without end.
    """
    # the id of one task of an array is also that of the array, and would queue all its tasks again
    own = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.array else "$SLURM_JOB_ID"
    options = "".join(f" {shlex.quote(option)}" for option in job.cluster.srun_options)
    empty_step = f'timeout {NODE_ANSWERS_S} srun --overlap --nodes=1 --ntasks=1 --nodelist="$node"{options} true'
    return [
        'case "$code" in',
        '  0) rm -f "$IDLE" ;;',
        f"  {Preempted.exit_code})  # preempted: continue in a new job",
        '    if [ "$(saved)" = "$SAVED" ]; then echo idle >> "$IDLE"; else rm -f "$IDLE"; fi',
        f'    if [ -f "$IDLE" ] && [ "$(wc -l < "$IDLE")" -ge {MAX_IDLE_STARTS} ]; then',
        f'      echo "$(date -u +%FT%TZ) $(hostname): stopped {MAX_IDLE_STARTS} times without a new checkpoint; '
        'this job is not queued again: raise cluster.time, or lower cluster.save_before_s" >&2',
        '      rm -f "$IDLE"',
        "    else",
        f'      scontrol requeue "{own}"',
        "    fi ;;",
        f"  {LOST_NODE_CODES})",
        "    answered=0 lost=",
        "    for node in $NODE_NAMES; do",
        f"      if {empty_step} 2> /dev/null; then answered=$((answered + 1)); else lost=\"$lost $node\"; fi",
        "    done",
        '    if [ "$answered" -gt 0 ] && [ -n "$lost" ]; then',
        '      echo "$(date -u +%FT%TZ) $(hostname): does not answer:$lost; this job is queued again, and resumes" >&2',
        f'      scontrol requeue "{own}"',
        "    fi ;;",
        "esac",
    ]  # fmt: skip


def _srun(job: Job, words: ContainerWords) -> str:
    """One task per node with all its cores; since Slurm 22.05, srun does not take their number from sbatch.

    If one task fails, Slurm kills all.
    """
    options = [
        "srun --kill-on-bad-exit=1", '--ntasks="$NODES" --ntasks-per-node=1',
        '--cpus-per-task="$((GPUS_PER_NODE * CPUS_PER_GPU))"',
        *map(shlex.quote, job.cluster.srun_options), *words.srun_options,
    ]  # fmt: skip
    return " ".join([*options, *words.before])


def _node_command(job: Job) -> str:
    """The command of each node. The job's variables give its rank and the rendezvous."""
    ((verb, *arguments),) = job.steps
    launch = accelerate_arguments(job.machines, replace(RENDEZVOUS, timeout_s=job.timeout_s))
    launcher = " ".join(word if word.startswith("$") else shlex.quote(word) for word in launch)
    task = f" {POINT} $SLURM_ARRAY_TASK_ID" if job.array else ""
    # USR1 would kill the launcher; the processes of the run install a handler
    return f"trap '' USR1; exec {shlex.quote(job.cluster.python)} {launcher} {verb}{task} {shlex.join(arguments)}"


def _prepare_lines(job: Job, words: ContainerWords) -> list[str]:
    """Starts the commands on the single node, one after the other."""
    options = ["srun --ntasks=1", f"--cpus-per-task={job.cluster.prepare.cpus}"]
    options += [*map(shlex.quote, job.cluster.srun_options), *words.srun_options, *words.before]
    python = f"{shlex.quote(job.cluster.python)} -m {MODULE}"
    commands = " && ".join(f"{python} {shlex.join(arguments)}" for arguments in job.steps)
    return [*words.lines, "", f"{' '.join(options)} bash -c {shlex.quote(commands)}"]


def _passed_on(job: Job) -> list[str]:
    """Names of the variables that a container must have."""
    rendezvous = [] if job.kind == "prepare" else ["MAIN_ADDRESS", "MAIN_PORT", EXIT_FILE]
    return [*job.variables, *rendezvous]
