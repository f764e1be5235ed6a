"""What one machine offers a run: versions, GPUs, disk, cache, ports."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from nesso_tune.errors import Problem
from nesso_tune.files import size
from nesso_tune.model.attention import choose_attention
from nesso_tune.recipes.gpus import GIB

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
            problems.append(Problem(str(place), f"has {size(free)} left ({what})", "free some space"))
    shared = Path("/dev/shm")
    if gpus > 1 and shared.is_dir() and (free := shutil.disk_usage(shared).free) < LEAST_SHARED_MEMORY:
        problems.append(Problem("/dev/shm", f"has {size(free)}: NCCL's processes exchange data through it",
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
        ("runs", f"{size(shutil.disk_usage(_existing(folder)).free)} free in {_existing(folder)}"),
        ("hub cache", f"{size(shutil.disk_usage(_existing(cache)).free)} free in {cache}{offline}"),
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
