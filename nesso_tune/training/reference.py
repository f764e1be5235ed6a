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
from nesso_tune.training.collate import PairCollator
from nesso_tune.training.dpo import PairTrainer, Reference, answer_log_probs

FILE = "reference.safetensors"


@torch.no_grad()
def compute_reference(
    trainer: PairTrainer, rows: Sequence[dict[str, Any]], collate: PairCollator, batch_size: int
) -> Reference:
    """Scores every pair with the model as it is now; the processes share the pairs.

    Pairs of like length stand in one batch. Every process computes the same number of batches, as a sharded model
    needs all of them to take part.
    """
    ordered = sorted(
        rows, key=lambda row: -len(row["prompt_ids"]) - max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    )
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    rounds = -(-len(batches) // world)
    scored: list[tuple[int, float, float]] = []
    trainer.model.eval()
    for i in range(rounds):
        batch = trainer._prepare_inputs(collate(batches[min(i * world + rank, len(batches) - 1)]))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with trainer.compute_loss_context_manager():
            outputs = trainer.model_wrapped(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
            )
        sums = answer_log_probs(outputs.log_probs, batch["completion_mask"], trainer.ld_alpha)
        chosen, rejected = sums.float().cpu().chunk(2)
        scored += zip(batch["entries"].tolist(), chosen.tolist(), rejected.tolist(), strict=True)
    trainer.model.train()
    everyone = gather_object(scored) if world > 1 else scored
    if wrong := sorted({pair for pair, *sums in everyone if not all(map(math.isfinite, sums))}):
        raise NumericalError(
            "reference", f"log-probabilities of {len(wrong)} of {len(rows)} pairs are not finite (first: {wrong[0]})",
            "see whether the base answers sensibly (nesso-tune chat), or set model.dtype: float32",
        )  # fmt: skip
    return {pair: (better, worse) for pair, better, worse in everyone}


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
