"""Writes the sbatch file of a run.

Nodes, GPUs, processes, threads and rendezvous are consistent by construction: the `#SBATCH` lines and three variables
are written from the same values, the script computes the rest from these variables, and it exits if the allocation
differs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace

from nesso_tune.errors import Preempted
from nesso_tune.launch.command import EXIT_FILE, Machines, Rendezvous, accelerate_arguments
from nesso_tune.recipes.sections import ClusterSection

RENDEZVOUS = Rendezvous("$SLURM_NODEID", "$MAIN_ADDRESS", "$MAIN_PORT")


def sbatch_text(
    name: str,
    machines: Machines,
    cluster: ClusterSection,
    arguments: Sequence[str],
    folder: str,
    timeout_s: int = 1800,
) -> str:
    """The text of an sbatch file.

    Args:
        name: name of the job.
        machines: nodes and GPUs.
        cluster: further options of the cluster.
        arguments: `train RECIPE…`.
        folder: working directory, to which relative paths of the recipe refer.
        timeout_s: seconds in which all machines must join.
    """
    command = _node_command(cluster, machines, arguments, timeout_s)
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by `nesso-tune launch --slurm`. To change a number, write the file again.",
            *(f"#SBATCH {option}" for option in _options(name, machines, cluster)),
            "",
            "set -euo pipefail",
            f"NODES={machines.nodes} GPUS_PER_NODE={machines.gpus_per_node} CPUS_PER_GPU={cluster.cpus_per_gpu}",
            'if [ "$SLURM_NNODES" -ne "$NODES" ]; then',
            '  echo "this job was written for $NODES nodes but got $SLURM_NNODES: write it again with --nodes" >&2',
            "  exit 2",
            "fi",
            'if [ "${SLURM_GPUS_ON_NODE:-$GPUS_PER_NODE}" -ne "$GPUS_PER_NODE" ]; then',
            '  echo "this job was written for $GPUS_PER_NODE GPUs per node but got $SLURM_GPUS_ON_NODE" >&2',
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
            f"{_srun(cluster)} bash -c {shlex.quote(command)} || code=$?",
            f'if [ "$code" -ne 0 ] && [ -s "${EXIT_FILE}" ]; then code=$(cat "${EXIT_FILE}"); fi',
            f'if [ "$code" -eq {Preempted.exit_code} ]; then  # preempted with a checkpoint: continue in a new job',
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
    """One task per node with all its cores; since Slurm 22.05, srun does not take their number from sbatch.

    If one task fails, Slurm kills all.
    """
    container = f" --container-image={shlex.quote(cluster.container)}" if cluster.container else ""
    cores = '--cpus-per-task="$((GPUS_PER_NODE * CPUS_PER_GPU))"'
    return f'srun --kill-on-bad-exit=1 --ntasks="$NODES" --ntasks-per-node=1 {cores}{container}'


def _node_command(cluster: ClusterSection, machines: Machines, arguments: Sequence[str], timeout_s: int) -> str:
    """The command of each node. The job's variables give its rank and the rendezvous."""
    launch = accelerate_arguments(machines, replace(RENDEZVOUS, timeout_s=timeout_s))
    launcher = " ".join(word if word.startswith("$") else shlex.quote(word) for word in launch)
    # USR1 would kill the launcher; the processes of the run install a handler
    return f"trap '' USR1; exec {shlex.quote(cluster.python)} {launcher} {shlex.join(arguments)}"
