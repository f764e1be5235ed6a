"""Memory and peak bfloat16 throughput of GPUs, by name."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass

from nesso_tune.errors import RecipeError, closest

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: name for `--gpu`.
        memory: bytes.
        teraflops: dense bfloat16 peak in TFLOP/s; None if unknown.
        bfloat16: whether it supports bfloat16.
    """

    name: str
    memory: int
    teraflops: float | None = None
    bfloat16: bool = True


# Name: (GiB, dense bfloat16 TFLOP/s from NVIDIA's data sheets; None: no bfloat16 support)
GPUS: dict[str, tuple[int, float | None]] = {
    "t4-16gb": (15, None),
    "v100-16gb": (16, None),
    "v100-32gb": (32, None),
    "rtx-3090-24gb": (24, 71),
    "rtx-4090-24gb": (24, 165),
    "rtx-5090-32gb": (32, 209),
    "a10g-24gb": (22, 70),
    "l4-24gb": (22, 121),
    "a40-48gb": (45, 150),
    "a6000-48gb": (48, 155),
    "l40s-48gb": (45, 362),
    "a100-40gb": (40, 312),
    "a100-64gb": (64, 312),
    "a100-80gb": (80, 312),
    "h100-80gb": (80, 989),
    "h200-141gb": (140, 989),
    "b200-180gb": (179, 2250),
}

# Variants with another peak: (kind, variant), both words of the device name: TFLOP/s
VARIANT_PEAKS = {("h100", "pcie"): 756.0, ("h100", "nvl"): 835.0, ("h200", "nvl"): 836.0}
UNLISTED_VARIANTS = {"mig", "laptop", "max", "ti", "d", "super"}  # partitions and variants with an unlisted peak


def bf16_peak(device_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by its device name, e.g. `NVIDIA A100-SXM4-80GB`.

    None if the GPU or its variant is not listed.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for (kind, variant), peak in VARIANT_PEAKS.items():
        if {kind, variant} <= words:
            return peak
    if words & UNLISTED_VARIANTS:
        return None
    return next((peak for name, (_, peak) in GPUS.items() if set(name.split("-")[:-1]) <= words), None)


NO_MPS = "Apple's GPU (MPS) is not supported: training runs on the CPU"


def has_apple_gpu() -> bool:
    """Whether this machine has Apple's GPU, which is not used."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def find_gpu(name: str) -> Gpu:
    """The GPU with a name such as `a100-80gb`.

    Raises:
        RecipeError: if the GPU is not listed; names the listed ones.
    """
    wanted = name.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    plain = wanted.replace("-", "")
    same_kind = [gpu for gpu in GPUS if plain in (gpu.replace("-", ""), gpu.rsplit("-", 1)[0].replace("-", ""))]
    if wanted not in GPUS and len(same_kind) == 1:  # `h200` is unambiguous
        wanted = same_kind[0]
    if wanted not in GPUS:
        guess = None if same_kind else closest(wanted, GPUS)
        remedy = f"did you mean `{guess}`?" if guess else f"use one of {', '.join(same_kind or GPUS)}"
        raise RecipeError("--gpu", f"`{name}` is not in the table of GPUs", remedy)
    memory, peak = GPUS[wanted]
    return Gpu(wanted, memory * GIB, peak, bfloat16=peak is not None)
