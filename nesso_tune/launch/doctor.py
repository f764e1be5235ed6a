"""Checks of `nesso-tune doctor`: one machine (versions, GPUs, disk, ports), and all machines of a launcher together."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from nesso_tune.distributed.process_group import (
    broadcast_from_rank0,
    init_process_group,
    process_group_of_run,
    report_lost_ranks,
    world_size,
)
from nesso_tune.errors import Problem
from nesso_tune.files import format_bytes
from nesso_tune.model.attention import choose_attention
from nesso_tune.planning.hardware import GIB, NO_MPS, has_apple_gpu

PACKAGE = "nesso-tune"
DEFAULT_PORT = 29500  # of torchrun and accelerate
MIN_DISK_BYTES = MIN_SHARED_MEMORY_BYTES = GIB
MESSAGE_SIZE = 16 << 20  # elements of the test message: 64 MiB in float32
ROUNDS = 5
SLOW_LINK = 0.5  # report links below this fraction of the median bandwidth


@dataclass(frozen=True)
class MachineReport:
    """State of one machine, as seen by one of its processes.

    Attributes:
        host: host name.
        versions: versions of Python, of each required package, of CUDA in torch, and of the driver.
        gpus: names of the GPUs that torch sees, in order.
        facts: (label, value) lines to print.
        problems: problems that would stop or harm a run.
    """

    host: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]


def inspect_machine(folder: Path) -> MachineReport:
    """Checks this machine.

    Args:
        folder: output folder of runs; it need not exist.
    """
    versions, problems = package_versions()
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    driver, shown = query_driver()
    versions |= {"CUDA of torch": str(torch.version.cuda or "none"), "driver": driver or "none"}
    problems += [*_gpu_problems(gpus, shown, driver), *_disk_problems(folder, len(gpus))]
    return MachineReport(socket.gethostname(), versions, gpus, tuple(_facts(versions, gpus, folder)), tuple(problems))


def package_versions() -> tuple[dict[str, str], list[Problem]]:
    """Versions of the required packages, and a problem for each that does not satisfy the requirement."""
    versions, problems = {"python": platform.python_version()}, []
    for requirement in (Requirement(line) for line in metadata.requires(PACKAGE) or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        versions[requirement.name] = installed
        if installed == "missing" or not requirement.specifier.contains(installed, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            problems.append(Problem(requirement.name, f"is {installed}, not {wanted}", f"pip install '{wanted}'"))
    return versions, problems


def query_driver() -> tuple[str | None, tuple[str, ...]]:
    """Version of the NVIDIA driver and names of its GPUs, from nvidia-smi; (None, ()) without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None, ()
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None, ()
    rows = [line.split(", ", 1) for line in output.splitlines() if ", " in line]
    return (rows[0][0], tuple(name for _, name in rows)) if rows else (None, ())


def _gpu_problems(gpus: tuple[str, ...], shown: tuple[str, ...], driver: str | None) -> list[Problem]:
    problems = []
    if shown and torch.version.cuda is None:
        problems.append(Problem("torch", f"{torch.__version__} is built without CUDA, and there are {len(shown)} GPUs",
                                "install a CUDA build of torch, see pytorch.org"))  # fmt: skip
    elif shown and not gpus and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        problems.append(Problem("driver", f"{driver} does not support CUDA {torch.version.cuda} of torch",
                                "update the driver, or install torch for an older CUDA"))  # fmt: skip
    if len(set(gpus)) > 1:
        kinds = ", ".join(sorted(set(gpus)))
        problems.append(Problem("GPUs", f"are of different types ({kinds}): all wait for the slowest",
                                "select equal ones with CUDA_VISIBLE_DEVICES"))  # fmt: skip
    if gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(Problem("bfloat16", f"is not supported by {gpus[0]}", "set model.dtype: float32"))
    return problems


def _disk_problems(folder: Path, gpus: int) -> list[Problem]:
    problems = []
    for what, place in (("runs", folder), ("hub cache", Path(HF_HUB_CACHE))):
        place = _existing(place)
        if not os.access(place, os.W_OK):
            problems.append(Problem(str(place), f"cannot be written ({what})", "check its permissions"))
        elif (free := shutil.disk_usage(place).free) < MIN_DISK_BYTES:
            problems.append(Problem(str(place), f"has {format_bytes(free)} left ({what})", "free some space"))
    shared = Path("/dev/shm")
    if gpus > 1 and shared.is_dir() and (free := shutil.disk_usage(shared).free) < MIN_SHARED_MEMORY_BYTES:
        problems.append(Problem("/dev/shm", f"has {format_bytes(free)}, but NCCL uses it for communication",
                                "start the container with --shm-size=8g, or --ipc=host"))  # fmt: skip
    return problems


def _facts(versions: dict[str, str], gpus: tuple[str, ...], folder: Path) -> list[tuple[str, str]]:
    shown = ("python", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "CUDA of torch", "driver")
    kinds = " + ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
    offline = ", HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
    cache = Path(HF_HUB_CACHE)
    return [
        *((name, versions[name]) for name in shown),
        ("GPUs", kinds or (NO_MPS if has_apple_gpu() else "none: training runs on the CPU")),
        ("attention", str(choose_attention("auto", "bfloat16"))),
        ("runs", f"{format_bytes(shutil.disk_usage(_existing(folder)).free)} free in {_existing(folder)}"),
        ("hub cache", f"{format_bytes(shutil.disk_usage(_existing(cache)).free)} free in {cache}{offline}"),
        ("port", f"{DEFAULT_PORT} is {_port_state()}"),
    ]


def _port_state() -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError:
            return "in use: give torchrun --master_port, accelerate --main_process_port (`nesso-tune launch` finds one)"
    return "free"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def measure_communication(
    machine: MachineReport, timeout_s: int
) -> tuple[list[MachineReport], list[tuple[str, str]], list[Problem]]:
    """Measures the bandwidth between processes, in a process group of its own.

    Args:
        machine: report of this process.
        timeout_s: seconds for each step.

    Returns:
        Reports of all processes, (label, value) lines to print, and problems; the same on all processes.

    Raises:
        RunEnvironmentError: if a process did not join or is lost.
    """
    with process_group_of_run():
        init_process_group(timeout_s)
        with report_lost_ranks():
            machines = gather_object([machine])
            reduce_s = _median_time(dist.all_reduce)
            reduce_s = broadcast_from_rank0(reduce_s)
            links = _links(machines)
    n = world_size()
    rate = 2 * (n - 1) / n * MESSAGE_SIZE * 4 / reduce_s / 1e9  # of each link in a ring all-reduce
    facts = [("processes", f"{n} on {len({m.host for m in machines})} machine(s)"),
             ("all-reduce", f"64 MiB in {reduce_s * 1e3:.0f} ms, {rate:.1f} GB/s")]  # fmt: skip
    facts += [("link", f"process 0 to {name}: {speed:.1f} GB/s") for name, speed in links]
    return machines, facts, [*find_differences(machines), *slow_links(links)]


def find_differences(machines: Sequence[MachineReport]) -> list[Problem]:
    """Problems with machines that differ from the majority in GPUs or versions."""
    problems = []
    for name in dict.fromkeys(name for machine in machines for name in machine.versions):
        problems += _outliers(name, [(m.host, m.versions.get(name, "missing")) for m in machines])
    return problems + _outliers("GPUs", [(m.host, ", ".join(m.gpus) or "none") for m in machines])


def _outliers(name: str, values: list[tuple[str, str]]) -> list[Problem]:
    """Problems with the hosts whose value is not the most common one; `values` are (host, value)."""
    common = statistics.mode(value for _, value in values)
    outliers = dict.fromkeys((host, value) for host, value in values if value != common)
    remedy = "use the same on all machines"
    return [Problem(host, f"{name} is {value}, on the others {common}", remedy) for host, value in outliers]


def slow_links(links: Sequence[tuple[str, float]]) -> list[Problem]:
    """Problems with links, given as (name, GB/s), whose bandwidth is far below the median."""
    if not links:
        return []
    median = statistics.median(speed for _, speed in links)
    return [
        Problem(name, f"bandwidth {speed:.1f} GB/s (median: {median:.1f})", "check its network, or exclude it")
        for name, speed in links if speed < SLOW_LINK * median
    ]  # fmt: skip


def _links(machines: Sequence[MachineReport]) -> list[tuple[str, float]]:
    """GB/s between rank 0 and one process of every other machine, or every process if there is a single machine."""
    rank, seen, peers = dist.get_rank(), {machines[0].host}, []
    single_machine = len({machine.host for machine in machines}) == 1
    for other, machine in enumerate(machines[1:], 1):
        if single_machine or machine.host not in seen:
            peers.append(other)
            seen.add(machine.host)
    links = []
    for peer in peers:
        took = _median_time(partial(_ping_pong, rank, peer)) if rank in (0, peer) else None
        dist.barrier()
        links.append(
            (f"{machines[peer].host} (process {peer})", 2 * MESSAGE_SIZE * 4 / broadcast_from_rank0(took) / 1e9)
        )
    return links


def _ping_pong(rank: int, peer: int, message: torch.Tensor) -> None:
    if rank == 0:
        dist.send(message, peer)
        dist.recv(message, peer)
    else:
        dist.recv(message, 0)
        dist.send(message, 0)


def _median_time(operation: Callable[[torch.Tensor], Any]) -> float:
    """Median seconds of an operation on the test message, without the first call, which initializes connections."""
    on_gpu = torch.cuda.is_available()
    message = torch.zeros(MESSAGE_SIZE, device="cuda" if on_gpu else "cpu")
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        operation(message)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
