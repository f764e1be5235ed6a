"""Learning rates that are known to work, with the model and the batch they were tuned for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from nesso_tune.recipes.shape import ModelShape


@dataclass(frozen=True)
class TunedRun:
    """A run whose learning rate is known to be good.

    Attributes:
        parameters: size of the model.
        learning_rate: its peak.
        batch: tokens (SFT) or pairs (DPO) per optimizer step.
        source: where it comes from.
    """

    parameters: float
    learning_rate: float
    batch: int
    source: str


# Ordered by size. Between two sizes the learning rate is interpolated on log scales.
TUNED: dict[str, tuple[TunedRun, ...]] = {
    "sft": (
        TunedRun(1e6, 1e-3, 512, "nesso-tune quickstart"),
        TunedRun(4.38e8, 1e-3, 256 * 4096, "Nesso-0.4B-instruct"),
        TunedRun(8e9, 1e-5, 128 * 4096, "the usual rate for 8B models"),
    ),
    "dpo": (
        TunedRun(1e6, 3e-4, 8, "nesso-tune quickstart"),
        TunedRun(4.38e8, 1e-6, 128, "SmolLM2-360M-Instruct (arXiv:2502.02737)"),
        TunedRun(8e9, 5e-7, 128, "Llama-3.1-8B, Tulu 3 (arXiv:2411.15124)"),
    ),
}
FALLBACK = {"sft": 2e-5, "dpo": 1e-6}  # of a model whose size is unknown
ADAPTER = {"sft": 2e-4, "dpo": 5e-6}  # the usual rates of low-rank adapters, which need more than whole weights


def auto_learning_rate(method: str, shape: ModelShape | None, adapter: bool = False) -> float:
    """The learning rate for a model of this size: that of the tuned runs around it, to two digits."""
    if adapter:
        return ADAPTER[method]
    if shape is None:
        return FALLBACK[method]
    runs = TUNED[method]
    size = min(max(float(shape.parameters), runs[0].parameters), runs[-1].parameters)
    for small, large in pairwise(runs):
        if size <= large.parameters:
            way = math.log(size / small.parameters) / math.log(large.parameters / small.parameters)
            rate = small.learning_rate * (large.learning_rate / small.learning_rate) ** way
            return float(f"{rate:.1e}")
    return runs[-1].learning_rate


def tuned_near(method: str, shape: ModelShape) -> TunedRun:
    """The tuned run whose model is closest in size."""
    return min(TUNED[method], key=lambda run: abs(math.log(run.parameters / shape.parameters)))


@dataclass(frozen=True)
class FarBatch:
    """A tuned run of another batch, and the learning rate that would go with this one."""

    run: TunedRun
    rate: float


def far_batch(method: str, shape: ModelShape, learning_rate: float, rows: int, per_row: int) -> FarBatch | None:
    """The tuned run of such a model and rate, if its batch is far from this one; None if it is near, or the rate is.

    The proposed rate follows the square root of the batch (Malladi et al., 2022, arXiv:2205.10287).

    Args:
        method: `sft` or `dpo`.
        shape: the model's.
        learning_rate: the peak.
        rows: packed rows (SFT) or pairs (DPO) a step.
        per_row: tokens of a row (SFT); 1 for pairs.
    """
    run = tuned_near(method, shape)
    ratio = rows * per_row / run.batch
    if 1 / 4 < ratio < 4 or not 1 / 2 <= learning_rate / run.learning_rate <= 2:
        return None
    return FarBatch(run, learning_rate * math.sqrt(ratio))
