"""A Slurm job from one source: nodes, GPUs, processes, threads and rendezvous cannot disagree.

The numbers stand once, in the `#SBATCH` lines and two variables written from the same values; everything else is
computed from those variables, and the job ends at once if Slurm gave it other machines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace

from nesso_tune.errors import Preempted
from nesso_tune.launch.command import EXIT_FILE, Machines, Rendezvous, accelerate_arguments
from nesso_tune.recipes.sections import ClusterSection

MEETING = Rendezvous("$SLURM_NODEID", "$MAIN_ADDRESS", "$MAIN_PORT")


def sbatch_text(
    name: str,
    machines: Machines,
    cluster: ClusterSection,
    words: Sequence[str],
    folder: str,
    timeout_s: int = 1800,
) -> str:
    """The text of an sbatch file.

    Args:
        name: of the job.
        machines: nodes and GPUs.
        cluster: what the cluster wants to know besides.
        words: `train RECIPE…`.
        folder: from which relative paths of the recipe are resolved.
        timeout_s: seconds in which the machines must have found each other.
    """
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by `nesso-tune launch --slurm`: write it again rather than edit a number here.",
            *(f"#SBATCH {option}" for option in _options(name, machines, cluster)),
            "",
            "set -euo pipefail",
            f"NODES={machines.nodes} GPUS_PER_NODE={machines.gpus_per_node} CPUS_PER_GPU={cluster.cpus_per_gpu}",
            'if [ "$SLURM_NNODES" -ne "$NODES" ]; then',
            '  echo "this job was written for $NODES nodes and got $SLURM_NNODES: write it again with --nodes" >&2',
            "  exit 2",
            "fi",
            'if [ "${SLURM_GPUS_ON_NODE:-$GPUS_PER_NODE}" -ne "$GPUS_PER_NODE" ]; then',
            '  echo "this job was written for $GPUS_PER_NODE GPUs a node and got $SLURM_GPUS_ON_NODE" >&2',
            "  exit 2",
            "fi",
            f"cd {shlex.quote(folder)}",
            *(f"module load {shlex.quote(module)}" for module in cluster.modules),
            *(f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()),
            *(["export HF_HUB_OFFLINE=1"] if cluster.offline else []),
            "export OMP_NUM_THREADS=$CPUS_PER_GPU",
            'MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MAIN_PORT=$((20000 + 2 * (SLURM_JOB_ID % 10000)))",
            f"{EXIT_FILE}=$(mktemp)",
            f"trap 'rm -f \"${EXIT_FILE}\"' EXIT",
            f"export MAIN_ADDRESS MAIN_PORT {EXIT_FILE}",
            "",
            "code=0",
            f"{_srun(cluster)} bash -c {shlex.quote(_inner(cluster, machines, words, timeout_s))} || code=$?",
            f'if [ "$code" -ne 0 ] && [ -s "${EXIT_FILE}" ]; then code=$(cat "${EXIT_FILE}"); fi',
            f'if [ "$code" -eq {Preempted.exit_code} ]; then  # saved before the time ran out: it goes on in a new job',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def _options(name: str, machines: Machines, cluster: ClusterSection) -> list[str]:
    job = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "nesso-tune"
    options = [
        f"--job-name={job}",
        f"--nodes={machines.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={machines.gpus_per_node}",
        f"--cpus-per-task={machines.gpus_per_node * cluster.cpus_per_gpu}",
        f"--output={job}-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{cluster.save_before_s}",
    ]
    named = {"time": cluster.time, "partition": cluster.partition, "account": cluster.account}
    options += [f"--{option}={value}" for option, value in named.items() if value is not None]
    return [*options, *cluster.extra]


def _srun(cluster: ClusterSection) -> str:
    """One task a node, with all its cores (since Slurm 22.05 srun does not take their number from sbatch).

    If one task ends badly, all are ended.
    """
    container = f" --container-image={shlex.quote(cluster.container)}" if cluster.container else ""
    cores = '--cpus-per-task="$((GPUS_PER_NODE * CPUS_PER_GPU))"'
    return f'srun --kill-on-bad-exit=1 --ntasks="$NODES" --ntasks-per-node=1 {cores}{container}'


def _inner(cluster: ClusterSection, machines: Machines, words: Sequence[str], timeout_s: int) -> str:
    """What runs on each node. Its own number and the meeting point come from the job's variables."""
    launch = accelerate_arguments(machines, replace(MEETING, timeout_s=timeout_s))
    launcher = " ".join(word if word.startswith("$") else shlex.quote(word) for word in launch)
    # the launcher would die of USR1; the processes of the run set a handler of their own
    return f"trap '' USR1; exec {shlex.quote(cluster.python)} {launcher} {shlex.join(words)}"
