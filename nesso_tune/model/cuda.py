"""Settings of a process with a GPU: memory allocator, deterministic algorithms, and the cores near the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch

from nesso_tune.errors import RecipeError
from nesso_tune.planning.hardware import BINDING_VARIABLE

# torch reads the first of these at the first allocation; the others are its older names, which still work
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # with others, cuBLAS may choose another algorithm on each call

PCI_DEVICES = Path("/sys/bus/pci/devices")


def bind_to_near_cores() -> None:
    """Keeps this process on the cores near its GPU, of those that it may use, if `BINDING_VARIABLE` is set.

    Nothing changes without a GPU, where the system does not say which cores are near, or where they are fewer than the
    threads of the process (`OMP_NUM_THREADS`). accelerate's own binding needs another package, and fails where Slurm
    gives a job none of these cores.
    """
    asked = os.environ.get(BINDING_VARIABLE) and hasattr(os, "sched_setaffinity")
    if not asked or not torch.cuda.is_available():
        return
    device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK") or "0"))
    address = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    try:
        near = _cores((PCI_DEVICES / address / "local_cpulist").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    allowed = near & os.sched_getaffinity(0)
    if len(allowed) >= int(os.environ.get("OMP_NUM_THREADS") or "1"):
        os.sched_setaffinity(0, allowed)


def _cores(text: str) -> set[int]:
    """The cores of a list such as `0-3,8`."""
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return {core for end in ends for core in range(int(end[0]), int(end[-1]) + 1)}


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Lets CUDA's allocator grow its segments, unless the user has configured it: rows of changing length then fragment
    the memory less. Has no effect after the first allocation on a GPU."""
    if torch.version.cuda is not None and not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Makes operations on GPUs deterministic if `enabled`; on CPUs they are, and nothing changes.

    Raises:
        RecipeError: if CUBLAS_WORKSPACE_CONFIG is set to a value with which cuBLAS is not deterministic.
    """
    if not enabled or not torch.cuda.is_available():
        yield
        return
    chosen = os.environ.setdefault(WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    if torch.version.cuda is not None and chosen not in DETERMINISTIC_WORKSPACES:
        raise RecipeError(
            "train.deterministic", f"cuBLAS is not deterministic with {WORKSPACE}={chosen}",
            f"unset {WORKSPACE}, or set it to {DETERMINISTIC_WORKSPACES[0]}",
        )  # fmt: skip
    before, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention is not deterministic; torch 2.15 prefers it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
