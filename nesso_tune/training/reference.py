"""The frozen reference of DPO: the log-probabilities under the weights that the run starts from, computed once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nesso_tune.errors import NumericalError, RunEnvironmentError
from nesso_tune.training.checkpoint import as_environment_error, sync
from nesso_tune.training.collate import PairCollator, pair_tokens
from nesso_tune.training.dpo import PairTrainer, Reference, answer_log_probs, score_pairs

FILE = "reference.safetensors"


@torch.no_grad()
def compute_reference(trainer: PairTrainer, rows: Sequence[dict[str, Any]], collate: PairCollator) -> Reference:
    """Scores every pair with the model as it is now; the processes share the pairs.

    Pairs of like length stand in one batch. Every process computes the same number of batches, as a sharded model
    needs all of them to take part.
    """
    batches = in_batches(rows, trainer.args.per_device_train_batch_size)
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    scored: list[tuple[int, float, float]] = []
    trainer.model.eval()
    for i in range(-(-len(batches) // world)):
        outputs, inputs, own = score_pairs(trainer, collate(batches[min(i * world + rank, len(batches) - 1)]))
        sums = answer_log_probs(outputs.log_probs, inputs["completion_mask"], trainer.ld_alpha)
        chosen, rejected = sums.float().cpu().chunk(2)
        scored += zip(own["entries"].tolist(), chosen.tolist(), rejected.tolist(), strict=True)
    trainer.model.train()
    everyone = gather_object(scored) if world > 1 else scored
    if wrong := sorted({pair for pair, *sums in everyone if not all(map(math.isfinite, sums))}):
        raise NumericalError(
            "reference", f"log-probabilities of {len(wrong)} of {len(rows)} pairs are not finite (first: {wrong[0]})",
            "see whether the base answers sensibly (nesso-tune chat), or set model.dtype: float32",
        )  # fmt: skip
    return {pair: (better, worse) for pair, better, worse in everyone}


def in_batches(rows: Sequence[dict[str, Any]], micro_batch: int) -> list[list[dict[str, Any]]]:
    """Pairs in batches, long ones first: never more tokens than the largest micro batch of training may have."""
    ordered = sorted(rows, key=pair_tokens, reverse=True)
    most = sum(map(pair_tokens, ordered[:micro_batch]))
    batches: list[list[dict[str, Any]]] = []
    room = 0
    for row in ordered:
        if pair_tokens(row) > room:
            batches.append([])
            room = most
        batches[-1].append(row)
        room -= pair_tokens(row)
    return batches


def save_reference(run: Path, reference: Reference, fingerprint: str) -> None:
    """Keeps the reference beside the checkpoints: after a resume the model is no longer what the run started from."""
    pairs = sorted(reference)
    tensors = {"pairs": torch.tensor(pairs), "log_probs": torch.tensor([reference[pair] for pair in pairs])}
    staging = run / f".{FILE}.partial"
    with as_environment_error(staging):
        save_file(tensors, staging, metadata={"fingerprint": fingerprint, "sha256": _hash_of(tensors)})
    sync(staging)
    staging.replace(run / FILE)


def load_reference(run: Path, fingerprint: str) -> Reference:
    """What `save_reference` kept.

    Raises:
        RunEnvironmentError: if it is missing, damaged, or of other data or another base.
    """
    remedy = "start anew with --overwrite"
    try:
        with safe_open(run / FILE, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                raise RunEnvironmentError(str(run / FILE), "belongs to other data or another base", remedy)
            tensors = {name: file.get_tensor(name) for name in ("pairs", "log_probs")}
            if (file.metadata() or {}).get("sha256") != _hash_of(tensors):
                raise RunEnvironmentError(str(run / FILE), "is damaged", remedy)
    except OSError:
        raise RunEnvironmentError(str(run / FILE), "is missing", remedy) from None
    except Exception as error:
        if isinstance(error, RunEnvironmentError):
            raise
        raise RunEnvironmentError(str(run / FILE), "is damaged", remedy) from None
    pairs, values = (tensors[name].tolist() for name in ("pairs", "log_probs"))
    return {pair: (better, worse) for pair, (better, worse) in zip(pairs, values, strict=True)}


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
