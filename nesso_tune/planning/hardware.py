"""Sizes and speeds of GPUs, by name."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

from nesso_tune.errors import RecipeError, closest

GIB = 1 << 30
BINDING_VARIABLE = "NESSO_TUNE_CPU_BINDING"  # if set, each process runs on the cores near its GPU


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Speeds are None if unknown.

    Attributes:
        name: name for `--gpu`, or the name that the driver gives.
        memory: bytes.
        teraflops: dense bfloat16 peak in TFLOP/s.
        bfloat16: whether it supports bfloat16.
        bandwidth: memory bandwidth in bytes/s.
        processors: streaming multiprocessors (NVIDIA) or compute units (AMD).
        link: bandwidth to the other GPUs of a machine in bytes/s, each direction: NVLink, Infinity Fabric or PCIe.
        matmul_share: share of the peak that large matrix products reach.
        attention_share: share of the peak that flash attention reaches.
    """

    name: str
    memory: int
    teraflops: float | None = None
    bfloat16: bool = True
    bandwidth: float | None = None
    processors: int = 0
    link: float | None = None
    matmul_share: float = 0.85
    attention_share: float = 0.5


class Specification(NamedTuple):
    """A row of the table.

    GiB; dense bfloat16 TFLOP/s (None: no bfloat16); GB/s of the memory; processors; GB/s to other GPUs; shares of the
    peak in matrix products and in flash attention (see `Gpu`).
    """

    memory: int
    teraflops: float | None
    bandwidth: float
    processors: int
    link: float
    matmul_share: float = 0.85
    attention_share: float = 0.5


# From data sheets, but for the last two columns: what large products and FlashAttention-2 are known to reach.
# A device of MI250 and MI250X is one of its two dies.
GPUS: dict[str, Specification] = {
    "t4-16gb": Specification(15, None, 320, 40, 16),
    "v100-16gb": Specification(16, None, 900, 80, 150),
    "v100-32gb": Specification(32, None, 900, 80, 150),
    "rtx-3090-24gb": Specification(24, 71, 936, 82, 32),
    "rtx-4090-24gb": Specification(24, 165, 1008, 128, 32),
    "rtx-5090-32gb": Specification(32, 209, 1792, 170, 64),
    "a10g-24gb": Specification(22, 70, 600, 80, 32),
    "l4-24gb": Specification(22, 121, 300, 58, 32, 0.6),
    "a40-48gb": Specification(45, 150, 696, 84, 32),
    "a6000-48gb": Specification(48, 155, 768, 84, 32),
    "l40s-48gb": Specification(45, 362, 864, 142, 32, 0.7, 0.4),
    "a100-40gb": Specification(40, 312, 1555, 108, 300, 0.87, 0.55),
    "a100-64gb": Specification(64, 312, 1635, 108, 300, 0.87, 0.55),
    "a100-80gb": Specification(80, 312, 2039, 108, 300, 0.87, 0.55),
    "h100-80gb": Specification(80, 989, 3350, 132, 450, 0.8, 0.35),
    "h200-141gb": Specification(140, 989, 4800, 132, 450, 0.8, 0.35),
    "b200-180gb": Specification(179, 2250, 7700, 148, 900, 0.75, 0.2),
    "mi250x-64gb": Specification(64, 191.5, 1638, 110, 100, 0.77, 0.4),
    "mi250-64gb": Specification(64, 181, 1638, 104, 100, 0.77, 0.4),
    "mi300x-192gb": Specification(192, 1307, 5300, 304, 448, 0.55, 0.25),
    "mi325x-256gb": Specification(256, 1307, 6000, 304, 448, 0.55, 0.25),
}

# Variants, by two words of the device name, and in what they differ from the table.
VARIANTS: dict[tuple[str, str], dict[str, float]] = {
    ("a100", "pcie"): {"link": 32},
    ("h100", "pcie"): {"teraflops": 756, "bandwidth": 2000, "processors": 114, "link": 64},
    ("h100", "nvl"): {"teraflops": 835, "bandwidth": 3900, "link": 300},
    ("h200", "nvl"): {"teraflops": 836},
}
UNLISTED_VARIANTS = {"mig", "laptop", "max", "ti", "d", "super"}  # partitions and variants with an unlisted peak


def gpu_of_device(device_name: str, memory: int, bfloat16: bool = True) -> Gpu:
    """The GPU of a device, with the speeds of the table if it is listed.

    Args:
        device_name: as the driver says it, e.g. `NVIDIA A100-SXM4-80GB`.
        memory: of the device in bytes; GPUs of one kind differ in it.
        bfloat16: whether the device supports bfloat16.
    """
    unknown = Gpu(device_name, memory, bfloat16=bfloat16)
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    listed = [row for name, row in GPUS.items() if set(name.split("-")[:-1]) <= words]
    variant = next((row for both, row in VARIANTS.items() if set(both) <= words), None)
    if not listed or (variant is None and words & UNLISTED_VARIANTS):
        return unknown
    row = min(listed, key=lambda row: abs(row.memory * GIB - memory))
    if variant is not None:
        row = row._replace(**variant)  # type: ignore[arg-type]
    return replace(_gpu(device_name, row), memory=memory, bfloat16=bfloat16)


def bf16_peak(device_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by its device name; None if the GPU or its variant is not listed."""
    return gpu_of_device(device_name, 0).teraflops


def _gpu(name: str, row: Specification) -> Gpu:
    return Gpu(
        name, row.memory * GIB, row.teraflops, row.teraflops is not None, row.bandwidth * 1e9, row.processors,
        row.link * 1e9, row.matmul_share, row.attention_share,
    )  # fmt: skip


NO_MPS = "Apple's GPU (MPS) is not supported: training runs on the CPU"


def has_apple_gpu() -> bool:
    """Whether this machine has Apple's GPU, which is not used."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def find_gpu(name: str) -> Gpu:
    """The GPU with a name such as `a100-80gb`, or as a driver or a data sheet names it.

    Raises:
        RecipeError: if the GPU is not listed; names the listed ones.
    """
    wanted = name.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    plain = wanted.replace("-", "")
    same_kind = [gpu for gpu in GPUS if plain in (gpu.replace("-", ""), gpu.rsplit("-", 1)[0].replace("-", ""))]
    if wanted not in GPUS and len(same_kind) == 1:  # `h200` is unambiguous
        wanted = same_kind[0]
    if wanted not in GPUS and (device := _as_device(name)) is not None:
        return device
    if wanted == "mps":
        raise RecipeError("--gpu", NO_MPS, "leave --gpu out for a plan on the CPU")
    if wanted not in GPUS:
        guess = None if same_kind else closest(wanted, GPUS)
        remedy = f"did you mean `{guess}`?" if guess else f"use one of {', '.join(same_kind or GPUS)}"
        raise RecipeError("--gpu", f"`{name}` is not in the table of GPUs", remedy)
    return _gpu(wanted, GPUS[wanted])


def _as_device(name: str) -> Gpu | None:
    """A listed GPU by a name such as `NVIDIA GeForce RTX 4090`, `4090` or `H100 PCIe`; None if not exactly one fits."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    sizes = {word for word in words if re.fullmatch(r"\d+gb", word)}
    fitting = [
        key for key in GPUS
        if set(key.split("-")[:-1]) - {"rtx"} <= words and (not sizes or key.rsplit("-", 1)[-1] in sizes)
    ]  # fmt: skip
    if len(fitting) != 1 or "nvl" in words:  # NVL variants have another memory
        return None
    device = gpu_of_device(f"{fitting[0]} {name}", GPUS[fitting[0]].memory * GIB)
    return replace(device, name=name) if device.teraflops else None
