"""The frozen reference of DPO: the log-probabilities under the weights that the run starts from, computed once.

They stand in the cache, for later runs of the same pairs from the same weights, and in the run directory, since after a
resume the model is no longer what the run started from.
"""

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
from torch.utils.data import ConcatDataset

from nesso_tune import cache
from nesso_tune.data.packing import Rows
from nesso_tune.errors import NumericalError, RunEnvironmentError
from nesso_tune.files import atomic_replace
from nesso_tune.recipes.schema import DPORecipe
from nesso_tune.runs.checkpoint import safetensors_errors
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.training.dataset import PairCollator
from nesso_tune.training.dpo import PairTrainer, Reference, answer_log_probs, score_pairs

FILE = "reference.safetensors"
KIND, CACHED = "reference", 2  # its place in the cache, and the version of what is there
CALLED = "the reference of these pairs"


@torch.no_grad()
def compute_reference(trainer: PairTrainer, parts: Sequence[Rows], collate: PairCollator) -> Reference:
    """Scores every pair with the model as it is now; the processes share the pairs.

    Pairs of like length stand in one batch. Every process computes the same number of batches, as a sharded model
    needs all of them to take part.

    Args:
        trainer: its model is scored, as it is wrapped.
        parts: pairs to train on and pairs held out.
        collate: pairs to a batch.
    """
    rows: Sequence[dict[str, Any]] = ConcatDataset(parts)  # type: ignore[arg-type, assignment]
    sizes = [int(size) for part in parts for size in part.documents.lengths[part.entries]]
    batches = in_batches(sizes, trainer.args.per_device_train_batch_size)
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    scored: list[tuple[int, float, float]] = []
    trainer.model.eval()
    for i in range(-(-len(batches) // world)):
        some = [rows[row] for row in batches[min(i * world + rank, len(batches) - 1)]]
        outputs, inputs, own = score_pairs(trainer, collate(some))
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


def in_batches(sizes: Sequence[int], micro_batch: int) -> list[list[int]]:
    """Rows of these sizes in batches, long ones first: none has more tokens than a micro batch of training may have."""
    ordered = sorted(range(len(sizes)), key=lambda row: -sizes[row])
    most = sum(sizes[row] for row in ordered[:micro_batch])
    batches: list[list[int]] = []
    room = 0
    for row in ordered:
        if sizes[row] > room:
            batches.append([])
            room = most
        batches[-1].append(row)
        room -= sizes[row]
    return batches


def reference_key(recipe: DPORecipe, facts: RunFacts, parts: Sequence[Rows]) -> str:
    """Hash of everything that decides the log-probabilities: the model, how it computes, and the pairs' token ids."""
    model = recipe.model
    what = [
        facts.base, facts.tokenizer, facts.attention, facts.device, facts.versions,
        recipe.seed if model.random_init else None,
        model.adapter.type if model.adapter is not None else None,
        model.dtype, recipe.data.sequence_len, recipe.dpo.ld_alpha,
    ]  # fmt: skip
    digest = hashlib.sha256()
    for part in parts:
        for entry in part.entries.tolist():
            lengths = [part.documents.input_ids(entry, i) for i in range(part.documents.parts)]
            digest.update(f"{part.first_pair + entry} {[len(ids) for ids in lengths]}".encode())
            for ids in lengths:
                digest.update(ids.tobytes())
    return cache.key_of([CACHED, *what, digest.hexdigest()])


def cached_reference(key: str) -> Reference | None:
    """The reference of this key that an earlier run left in the cache, if it is there and whole."""
    return cache.look_up(KIND, key, _opened, CALLED)


def cache_reference(key: str, reference: Reference) -> None:
    """Leaves a reference for later runs."""

    def build(staging: Path) -> dict[str, Any]:
        save_reference(staging, reference, key)
        return {"pairs": len(reference)}

    cache.make(KIND, key, build, _opened, CALLED)


def _opened(folder: Path, _: dict[str, Any]) -> Reference:
    try:
        return load_reference(folder, folder.name)
    except RunEnvironmentError as error:
        raise cache.Damaged(str(error)) from None


def save_reference(run: Path, reference: Reference, fingerprint: str) -> None:
    """Keeps the reference beside the checkpoints: after a resume the model is no longer what the run started from."""
    pairs = sorted(reference)
    tensors = {"pairs": torch.tensor(pairs), "log_probs": torch.tensor([reference[pair] for pair in pairs])}
    with atomic_replace(run / FILE) as staging, safetensors_errors(staging):
        save_file(tensors, staging, metadata={"fingerprint": fingerprint, "sha256": _hash_of(tensors)})


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
