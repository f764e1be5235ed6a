"""Command lines that start a run: on this machine, and on each machine of a job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODULE = "nesso_tune"
EXIT_FILE = "NESSO_TUNE_EXIT_FILE"  # names the file in which rank 0 records its exit code
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")  # one folder per NVIDIA GPU
AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")  # one folder per CPU socket and AMD GPU
# Variables that hide GPUs from a process: of both vendors, and of AMD alone
VISIBLE_DEVICES, AMD_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Machines:
    """Size of a run: machines and GPUs per machine.

    Attributes:
        nodes: number of machines.
        gpus_per_node: GPUs, and so processes, on each machine.
    """

    nodes: int = 1
    gpus_per_node: int = 1

    @property
    def processes(self) -> int:
        """Number of processes of the run."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Rendezvous:
    """Where the machines of a job connect. Values can be shell variables.

    Attributes:
        rank: rank of this machine.
        address: address of the first machine.
        port: port on the first machine.
        timeout_s: seconds in which all machines must join.
    """

    rank: str
    address: str
    port: str
    timeout_s: int = 1800


def count_local_gpus() -> int:
    """Number of GPUs that a run on this machine can use, from the drivers and the variables that hide GPUs.

    torch would say the same, but takes seconds to load.
    """
    nvidia = len(list(DRIVER_GPUS.iterdir())) if DRIVER_GPUS.is_dir() else 0
    count, hiding = (nvidia, VISIBLE_DEVICES) if nvidia else (count_amd_gpus(), VISIBLE_DEVICES + AMD_VISIBLE_DEVICES)
    visible = [os.environ[name] for name in hiding if name in os.environ]
    return min([count, *(len([name for name in text.split(",") if name.strip()]) for text in visible)])


def count_amd_gpus() -> int:
    """Number of AMD GPUs of this machine, from the driver. The nodes of its list without SIMD units are CPUs."""
    count = 0
    for file in AMD_NODES.glob("*/properties"):
        try:
            lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        except OSError:  # GPUs that this process may not use
            continue
        count += any(line[0] == "simd_count" and line[1] != "0" for line in lines if len(line) == 2)
    return count


def train_arguments(recipes: Sequence[str], settings: Sequence[str] = (), flags: Sequence[str] = ()) -> list[str]:
    """Arguments `train RECIPE… --set …`, after `-m nesso_tune`."""
    return verb_arguments("train", recipes, settings, flags)


def verb_arguments(
    verb: str, recipes: Sequence[str], settings: Sequence[str] = (), flags: Sequence[str] = ()
) -> list[str]:
    """Arguments of a verb that takes recipes, after `-m nesso_tune`."""
    options = [*(word for setting in settings for word in ("--set", setting)), *flags]
    if any(recipe.startswith("-") for recipe in recipes):  # it would be parsed as an option
        return [verb, *options, "--", *recipes]
    return [verb, *recipes, *options]


def accelerate_arguments(machines: Machines, meeting: Rendezvous | None = None, module: str = MODULE) -> list[str]:
    """Arguments of `accelerate launch`, before those of `train` and without the interpreter.

    Accelerate only places processes. Precision, sharding and compilation are set by the recipe, so accelerate's own
    options for them are disabled, whatever its configuration file sets.
    """
    arguments = ["-m", f"{MODULE}.launch.accelerate", "launch", "--num_machines", str(machines.nodes)]
    arguments += ["--num_processes", str(machines.processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    if machines.processes > 1:
        arguments.append("--multi_gpu")
    if meeting is not None:
        arguments += ["--machine_rank", meeting.rank, "--main_process_ip", meeting.address]
        arguments += ["--main_process_port", meeting.port, "--rdzv_conf", f"timeout={meeting.timeout_s}"]
    elif machines.processes > 1:
        arguments += ["--main_process_port", "0"]  # any free port
    return [*arguments, "-m", module]


def local_command(machines: Machines, arguments: Sequence[str]) -> list[str]:
    """The command that starts a run on this machine."""
    return [sys.executable, *accelerate_arguments(machines), *arguments]
