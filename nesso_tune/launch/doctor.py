"""What one machine offers a run: versions, GPUs, disk, cache, ports."""

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

from nesso_tune.distributed.process_group import come_together, contact, from_first, world_size
from nesso_tune.errors import Problem
from nesso_tune.files import format_bytes
from nesso_tune.model.attention import choose_attention
from nesso_tune.planning.hardware import GIB

PACKAGE = "nesso-tune"
LAUNCHERS_PORT = 29500  # what torchrun and accelerate take unless they are told another
LEAST_DISK = LEAST_SHARED_MEMORY = GIB


@dataclass(frozen=True)
class Machine:
    """What `doctor` found on one machine, as one of its processes sees it.

    Attributes:
        host: its name.
        versions: of Python, of each package that a run needs, of CUDA as torch was built, and of the driver.
        gpus: their names, in order, as torch sees them.
        facts: (what, how it is) for people, in order.
        problems: what would stop or harm a run.
    """

    host: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]


def examine(folder: Path) -> Machine:
    """Looks at this machine.

    Args:
        folder: where runs are to be written, or a folder above it.
    """
    versions, problems = package_versions()
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    driver, shown = ask_driver()
    versions |= {"CUDA of torch": str(torch.version.cuda or "none"), "driver": driver or "none"}
    problems += [*_gpu_problems(gpus, shown, driver), *_disk_problems(folder, len(gpus))]
    return Machine(socket.gethostname(), versions, gpus, tuple(_facts(versions, gpus, folder)), tuple(problems))


def package_versions() -> tuple[dict[str, str], list[Problem]]:
    """Versions of what nesso-tune requires, and what does not satisfy it."""
    versions, problems = {"python": platform.python_version()}, []
    for requirement in (Requirement(line) for line in metadata.requires(PACKAGE) or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            have = "missing"
        versions[requirement.name] = have
        if have == "missing" or not requirement.specifier.contains(have, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            problems.append(Problem(requirement.name, f"is {have}, not {wanted}", f"pip install '{wanted}'"))
    return versions, problems


def ask_driver() -> tuple[str | None, tuple[str, ...]]:
    """The NVIDIA driver's version and the names of the GPUs it sees; (None, ()) where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None, ()
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None, ()
    rows = [line.split(", ", 1) for line in said.splitlines() if ", " in line]
    return (rows[0][0], tuple(name for _, name in rows)) if rows else (None, ())


def _gpu_problems(gpus: tuple[str, ...], shown: tuple[str, ...], driver: str | None) -> list[Problem]:
    problems = []
    if shown and torch.version.cuda is None:
        problems.append(Problem("torch", f"{torch.__version__} is built without CUDA, and there are {len(shown)} GPUs",
                                "install torch's CUDA build, as pytorch.org says"))  # fmt: skip
    elif shown and not gpus and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        problems.append(Problem("driver", f"{driver} does not serve torch's CUDA {torch.version.cuda}",
                                "update the driver, or install a torch built for an older CUDA"))  # fmt: skip
    if len(set(gpus)) > 1:
        kinds = ", ".join(sorted(set(gpus)))
        problems.append(Problem("GPUs", f"are not of one kind ({kinds}): all wait for the slowest",
                                "choose equal ones with CUDA_VISIBLE_DEVICES"))  # fmt: skip
    if gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(Problem("bfloat16", f"{gpus[0]} does not compute in it", "set model.dtype: float32"))
    return problems


def _disk_problems(folder: Path, gpus: int) -> list[Problem]:
    problems = []
    for what, place in (("runs", folder), ("hub cache", Path(HF_HUB_CACHE))):
        place = _existing(place)
        if not os.access(place, os.W_OK):
            problems.append(Problem(str(place), f"cannot be written ({what})", "check its permissions"))
        elif (free := shutil.disk_usage(place).free) < LEAST_DISK:
            problems.append(Problem(str(place), f"has {format_bytes(free)} left ({what})", "free some space"))
    shared = Path("/dev/shm")
    if gpus > 1 and shared.is_dir() and (free := shutil.disk_usage(shared).free) < LEAST_SHARED_MEMORY:
        problems.append(Problem("/dev/shm", f"has {format_bytes(free)}: NCCL's processes exchange data through it",
                                "start the container with --shm-size=8g, or --ipc=host"))  # fmt: skip
    return problems


def _facts(versions: dict[str, str], gpus: tuple[str, ...], folder: Path) -> list[tuple[str, str]]:
    shown = ("python", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "CUDA of torch", "driver")
    kinds = " + ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
    offline = ", HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
    cache = Path(HF_HUB_CACHE)
    return [
        *((name, versions[name]) for name in shown),
        ("GPUs", kinds or "none: training computes on the CPU"),
        ("attention", str(choose_attention("auto"))),
        ("runs", f"{format_bytes(shutil.disk_usage(_existing(folder)).free)} free in {_existing(folder)}"),
        ("hub cache", f"{format_bytes(shutil.disk_usage(_existing(cache)).free)} free in {cache}{offline}"),
        ("port", f"{LAUNCHERS_PORT} is {_port_state()}"),
    ]


def _port_state() -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", LAUNCHERS_PORT))
        except OSError:
            return "in use: give torchrun --master_port, accelerate --main_process_port (`nesso-tune launch` finds one)"
    return "free"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


MESSAGE = 16 << 20  # numbers of one test message: 64 MiB in float32
ROUNDS = 5
SLOW = 0.5  # of the median: below it a link is named


def compare(machines: Sequence[Machine]) -> list[Problem]:
    """What differs between machines: each that is not as most are, by name."""
    problems = []
    for name in dict.fromkeys(name for machine in machines for name in machine.versions):
        problems += _odd(name, [(m.host, m.versions.get(name, "missing")) for m in machines])
    return problems + _odd("GPUs", [(m.host, ", ".join(m.gpus) or "none") for m in machines])


def _odd(what: str, of: list[tuple[str, str]]) -> list[Problem]:
    usual = statistics.mode(value for _, value in of)
    odd = dict.fromkeys((host, value) for host, value in of if value != usual)
    return [Problem(host, f"{what} is {value}, elsewhere {usual}", "make the machines alike") for host, value in odd]


def meet(machine: Machine, timeout_s: int) -> tuple[list[Machine], list[tuple[str, str]], list[Problem]]:
    """Brings all processes together and measures how they talk.

    Args:
        machine: what this process found.
        timeout_s: seconds for each step.

    Returns:
        What every process found, facts for people, and problems; the same on all processes.

    Raises:
        RunEnvironmentError: if a process is missing or lost.
    """
    come_together(timeout_s)
    with contact():
        machines = gather_object([machine])
        reduce_s = _median_time(dist.all_reduce)
        reduce_s = from_first(reduce_s)
        links = _links(machines)
    n = world_size()
    rate = 2 * (n - 1) / n * MESSAGE * 4 / reduce_s / 1e9  # what a ring moves over each link
    facts = [("processes", f"{n} on {len({m.host for m in machines})} machine(s)"),
             ("all-reduce", f"64 MiB in {reduce_s * 1e3:.0f} ms, {rate:.1f} GB/s")]  # fmt: skip
    facts += [("link", f"process 0 to {name}: {speed:.1f} GB/s") for name, speed in links]
    return machines, facts, [*compare(machines), *slow(links)]


def slow(links: Sequence[tuple[str, float]]) -> list[Problem]:
    """The links (name, GB/s) that are far below the others."""
    if not links:
        return []
    usual = statistics.median(speed for _, speed in links)
    return [
        Problem(name, f"talks at {speed:.1f} GB/s, the others at {usual:.1f}", "look at its network, or leave it out")
        for name, speed in links if speed < SLOW * usual
    ]  # fmt: skip


def _links(machines: Sequence[Machine]) -> list[tuple[str, float]]:
    """GB/s from the first process to one process of every other machine, in turn; on one machine, to each process."""
    rank, seen, peers = dist.get_rank(), {machines[0].host}, []
    alone = len({machine.host for machine in machines}) == 1
    for other, machine in enumerate(machines[1:], 1):
        if alone or machine.host not in seen:
            peers.append(other)
            seen.add(machine.host)
    links = []
    for peer in peers:
        took = _median_time(partial(_there_and_back, rank, peer)) if rank in (0, peer) else None
        dist.barrier()
        links.append((f"{machines[peer].host} (process {peer})", 2 * MESSAGE * 4 / from_first(took) / 1e9))
    return links


def _there_and_back(rank: int, peer: int, message: torch.Tensor) -> None:
    if rank == 0:
        dist.send(message, peer)
        dist.recv(message, peer)
    else:
        dist.recv(message, 0)
        dist.send(message, 0)


def _median_time(operation: Callable[[torch.Tensor], Any]) -> float:
    """Seconds that an operation on the test message takes; the first time, which sets things up, does not count."""
    on_gpu = torch.cuda.is_available()
    message = torch.zeros(MESSAGE, device="cuda" if on_gpu else "cpu")
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        operation(message)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
