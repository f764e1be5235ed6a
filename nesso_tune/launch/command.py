"""The commands that start a run: on this machine, and on each machine of a job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODULE = "nesso_tune"
EXIT_FILE = "NESSO_TUNE_EXIT_FILE"  # names the file in which rank 0 records its exit code
DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder a GPU


@dataclass(frozen=True)
class Machines:
    """Where a run is to go: the only source of how many processes there are.

    Attributes:
        nodes: machines.
        gpus_per_node: GPUs, and so processes, on each of them.
    """

    nodes: int = 1
    gpus_per_node: int = 1

    @property
    def processes(self) -> int:
        """Processes of the whole run."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Rendezvous:
    """Where the machines of a job find each other. Each part may be a variable of the shell.

    Attributes:
        rank: of this machine.
        address: of the first one.
        port: on that one.
        timeout_s: seconds in which all must have come.
    """

    rank: str
    address: str
    port: str
    timeout_s: int = 1800


def count_local_gpus() -> int:
    """GPUs that a run on this machine could use, without asking a library: what the driver lists, or a part of it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    return there if chosen is None else min(there, len([name for name in chosen.split(",") if name.strip()]))


def train_arguments(recipes: Sequence[str], settings: Sequence[str] = (), flags: Sequence[str] = ()) -> list[str]:
    """`train RECIPE… --set …`, as it stands behind `-m nesso_tune`."""
    words = ["train", *recipes, *(word for setting in settings for word in ("--set", setting)), *flags]
    if any(recipe.startswith("-") for recipe in recipes):  # or it would be taken for an option
        words = ["train", *words[1 + len(recipes) :], "--", *recipes]
    return words


def accelerate_arguments(machines: Machines, meeting: Rendezvous | None = None, module: str = MODULE) -> list[str]:
    """The `accelerate launch` before those words, without the interpreter.

    What it may decide is only who runs where: precision, sharding and compilation are the recipe's, and every knob of
    accelerate's own for them is set to nothing, so that no configuration file of the user's can say otherwise.
    """
    words = ["-m", f"{MODULE}.launch.accelerate", "launch", "--num_machines", str(machines.nodes)]
    words += ["--num_processes", str(machines.processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    if machines.processes > 1:
        words.append("--multi_gpu")
    if meeting is not None:
        words += ["--machine_rank", meeting.rank, "--main_process_ip", meeting.address]
        words += ["--main_process_port", meeting.port, "--rdzv_conf", f"timeout={meeting.timeout_s}"]
    elif machines.processes > 1:
        words += ["--main_process_port", "0"]  # any free one
    return [*words, "-m", module]


def local_command(machines: Machines, words: Sequence[str]) -> list[str]:
    """The command that starts a run on this machine."""
    return [sys.executable, *accelerate_arguments(machines), *words]
