"""Checks of `nesso-tune doctor` on one machine: versions, GPUs, disks, ports. `allocation.py` compares several."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from nesso_tune.cache import cache_root
from nesso_tune.errors import Problem
from nesso_tune.files import format_bytes, fsync
from nesso_tune.launch.command import count_amd_gpus
from nesso_tune.launch.container import cache_variables
from nesso_tune.model.attention import choose_attention
from nesso_tune.planning.hardware import GIB, NO_MPS, has_apple_gpu

PACKAGE = "nesso-tune"
DEFAULT_PORT = 29500  # of torchrun and accelerate
MIN_DISK_BYTES = MIN_SHARED_MEMORY_BYTES = GIB
PROBE_BYTES, PROBE_FILES = 16 << 20, 10
AMD_DRIVER, AMD_DEVICE = Path("/sys/module/amdgpu/version"), Path("/dev/kfd")


@dataclass(frozen=True)
class Disk:
    """A file system that a run uses.

    Attributes:
        label: what it is for.
        free: bytes.
        write_rate: bytes/s of a write of 16 MiB with fsync.
        latency_s: median seconds to create, sync, rename and remove a small file.
        locks: whether it supports file locks.
    """

    label: str
    free: int
    write_rate: float
    latency_s: float
    locks: bool


@dataclass(frozen=True)
class Driver:
    """The GPU driver of a machine: its version, and the names of its GPUs; None and () without one.

    Attributes:
        version: as the vendor says it.
        gpus: names of the GPUs that the driver sees; those of AMD have no names here.
        amd: whether it is AMD's.
    """

    version: str | None = None
    gpus: tuple[str, ...] = ()
    amd: bool = False


@dataclass(frozen=True)
class MachineReport:
    """State of one machine, as seen by one of its processes.

    Attributes:
        host: host name.
        versions: versions of Python, of each required package, of CUDA in torch, and of the driver.
        gpus: names of the GPUs that torch sees, in order.
        facts: (label, value) lines to print.
        problems: problems that would stop or harm a run.
        disks: of the output folder, and of the caches.
    """

    host: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]
    disks: tuple[Disk, ...] = ()


def inspect_machine(folder: Path, disks_too: bool = True) -> MachineReport:
    """Checks this machine.

    Args:
        folder: output folder of runs; it need not exist.
        disks_too: also write to the disks; of several processes on a machine, one does.
    """
    versions, problems = package_versions()
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    driver = find_driver()
    versions |= {
        _platform(): str(torch.version.hip or torch.version.cuda or "none"),
        "driver": driver.version or "none",
    }
    places = {"runs": folder, "data cache": cache_root(), "hub cache": Path(HF_HUB_CACHE)}
    disks = []
    for label, place in places.items() if disks_too else ():
        found = probe_disk(label, existing_folder(place))
        if isinstance(found, Disk):
            disks.append(found)
        problems += [found] if isinstance(found, Problem) else _disk_problems(existing_folder(place), found)
    problems += [*gpu_problems(gpus, driver), *_shared_memory_problems(len(gpus))]
    facts = tuple(_facts(versions, gpus, places, disks))
    return MachineReport(socket.gethostname(), versions, gpus, facts, tuple(problems), tuple(disks))


def _platform() -> str:
    return "ROCm of torch" if torch.version.hip else "CUDA of torch"


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


def find_driver() -> Driver:
    """The GPU driver, from nvidia-smi, or from the files of AMD's driver."""
    amd = count_amd_gpus()
    if shutil.which("nvidia-smi") is None:
        version = AMD_DRIVER.read_text(encoding="utf-8").strip() if AMD_DRIVER.is_file() else "of the kernel"
        return Driver(version, ("AMD",) * amd, amd=True) if amd else Driver()
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return Driver()
    rows = [line.split(", ", 1) for line in output.splitlines() if ", " in line]
    return Driver(rows[0][0], tuple(name for _, name in rows)) if rows else Driver()


def gpu_problems(gpus: tuple[str, ...], driver: Driver) -> list[Problem]:
    """Problems of the GPUs that torch sees, `gpus`, and of those that the driver has."""
    problems, count = [], len(driver.gpus)
    kind, built = ("ROCm", torch.version.hip) if driver.amd else ("CUDA", torch.version.cuda)
    if count and built is None:
        problems.append(Problem("torch", f"{torch.__version__} is built without {kind}, and there are {count} GPUs",
                                f"install a {kind} build of torch, see pytorch.org"))  # fmt: skip
    elif driver.amd and not os.access(AMD_DEVICE, os.R_OK | os.W_OK):
        problems.append(Problem(str(AMD_DEVICE), "cannot be opened by this user",
                                "ask for the group of this device (render), or pass it to the container"))  # fmt: skip
    elif count and not gpus and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        problems.append(Problem("driver", f"{driver.version} does not support {kind} {built} of torch",
                                f"update the driver, or install torch for an older {kind}"))  # fmt: skip
    if len(set(gpus)) > 1:
        kinds = ", ".join(sorted(set(gpus)))
        problems.append(Problem("GPUs", f"are of different types ({kinds}): all wait for the slowest",
                                "select equal ones with CUDA_VISIBLE_DEVICES"))  # fmt: skip
    if gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(Problem("bfloat16", f"is not supported by {gpus[0]}", "set model.dtype: float32"))
    return problems


def probe_disk(label: str, folder: Path) -> Disk | Problem:
    """Writes, syncs, renames, locks and removes files in a folder; the problem if this fails."""
    times = []
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
            content = os.urandom(PROBE_BYTES // 16) * 16
            began = time.perf_counter()
            (large := Path(name) / "large").write_bytes(content)
            fsync(large)
            rate = PROBE_BYTES / (time.perf_counter() - began)
            for i in range(PROBE_FILES):
                began = time.perf_counter()
                (small := Path(name) / f"{i}.partial").write_bytes(b"x")
                fsync(small)
                small.rename(final := Path(name) / str(i))
                final.unlink()
                times.append(time.perf_counter() - began)
            locks = _locks(Path(name) / "lock")
    except OSError as error:
        what = f"cannot be written ({label}: {(error.strerror or str(error)).lower()})"
        return Problem(str(folder), what, "check its permissions and its free space")
    return Disk(label, shutil.disk_usage(folder).free, rate, statistics.median(times), locks)


def _locks(file: Path) -> bool:
    try:
        FileLock(file).acquire(timeout=0).lock.release()
    except (OSError, NotImplementedError):
        return False
    return True


def _disk_problems(folder: Path, disk: Disk) -> list[Problem]:
    problems = []
    if disk.free < MIN_DISK_BYTES:
        problems.append(Problem(str(folder), f"has {format_bytes(disk.free)} left ({disk.label})", "free some space"))
    if not disk.locks:
        problems.append(Problem(str(folder), f"does not support file locks ({disk.label})",
                                "mount it with locks (Lustre: -o flock), or use another folder"))  # fmt: skip
    return problems


def _shared_memory_problems(gpus: int) -> list[Problem]:
    shared = Path("/dev/shm")
    if gpus > 1 and shared.is_dir() and (free := shutil.disk_usage(shared).free) < MIN_SHARED_MEMORY_BYTES:
        return [Problem("/dev/shm", f"has {format_bytes(free)}, but NCCL uses it for communication",
                        "start the container with --shm-size=8g, or --ipc=host")]  # fmt: skip
    return []


def _facts(
    versions: dict[str, str], gpus: tuple[str, ...], places: dict[str, Path], disks: list[Disk]
) -> list[tuple[str, str]]:
    shown = ("python", "torch", "transformers", "trl", "accelerate", "datasets", "peft", _platform(), "driver")
    kinds = " + ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
    offline = ", HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
    facts = [
        *((name, versions[name]) for name in shown),
        ("GPUs", kinds or (NO_MPS if has_apple_gpu() else "none: training runs on the CPU")),
        ("attention", str(choose_attention("auto", "bfloat16"))),
    ]
    for disk in disks:
        place = existing_folder(places[disk.label]) if disk.label == "runs" else places[disk.label]
        facts.append((disk.label, f"{format_bytes(disk.free)} free in {place}{offline * (disk.label == 'hub cache')}"))
        facts.append(("", f"writes {disk.write_rate / 1e6:.0f} MB/s, {disk.latency_s * 1e3:.1f} ms for a small file"))
    facts += list(cache_variables(os.environ).items())
    return [*facts, ("port", f"{DEFAULT_PORT} is {_port_state()}")]


def _port_state() -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError:
            return "in use: give torchrun --master_port, accelerate --main_process_port (`nesso-tune launch` finds one)"
    return "free"


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
