"""The frozen reference of DPO: log-probabilities of all pairs under the initial weights, computed once.

They are kept in the cache, for later runs with the same pairs and weights, and in the run directory, because the model
of a resumed run is no longer the reference.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from nesso_tune import cache
from nesso_tune.data.packing import Rows, sequential_rows
from nesso_tune.data.prepare import PreparedData
from nesso_tune.distributed.process_group import broadcast_from_rank0
from nesso_tune.errors import NumericalError, RunEnvironmentError
from nesso_tune.files import atomic_replace
from nesso_tune.logs import logger
from nesso_tune.recipes.schema import DPORecipe
from nesso_tune.runs.checkpoint import safetensors_errors
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.runs.run_directory import RunDir
from nesso_tune.training.dataset import PairCollator
from nesso_tune.training.dpo import PairTrainer, Reference, score_pairs
from nesso_tune.training.grouped_metrics import Groups
from nesso_tune.training.losses import answer_log_probs

REFERENCE_FILE = "reference.safetensors"
CACHE_KIND, CACHE_VERSION = "reference", 2
DESCRIPTION = "the reference of these pairs"


def prepare_reference(
    trainer: PairTrainer, data: PreparedData, recipe: DPORecipe, run: RunDir, facts: RunFacts
) -> Reference:
    """Loads the reference of a resumed run; for a new run, takes it from the cache or computes it.

    Every process must call this. A new run writes a line to `metrics.jsonl`.

    Args:
        trainer: its model is the reference if the run is new.
        data: the pairs to train on and to validate on.
        recipe: has the settings that the log-probabilities depend on.
        run: the run directory, where the reference is kept.
        facts: provenance of the run.

    Raises:
        NumericalError: if log-probabilities are not finite.
        RunEnvironmentError: if the reference of a resumed run is missing, damaged, or of other data or another base.
    """
    if run.checkpoint is not None:
        return load_reference(run.path, facts.start)
    start, is_main = time.monotonic(), trainer.is_world_process_zero()
    parts = [sequential_rows(data.stream.documents, data.stream.records, None), data.validation]
    parts = [part for part in parts if len(part)]
    key = reference_key(recipe, facts, parts) if is_main else ""
    reference: Reference | None = broadcast_from_rank0(cached_reference(key) if is_main else None)
    cached, pairs = reference is not None, sum(map(len, parts))
    logger.info(f"reference: {pairs:,} pairs, {'from the cache' if cached else 'computing log-probabilities once'}")
    if reference is None:
        groups = Groups.of(*(part.documents for part in parts))
        collate = PairCollator(data.chat.pad_id, groups, trainer.data_collator.by_document)
        reference = compute_reference(trainer, parts, collate)
    if is_main:
        if not cached:
            cache_reference(key, reference)
        save_reference(run.path, reference, facts.start)
    seconds = round(time.monotonic() - start, 3)
    trainer.metrics_log.write({"step": 0, "event": "reference", "pairs": pairs, "cached": cached, "seconds": seconds})
    return reference


@torch.no_grad()
def compute_reference(trainer: PairTrainer, parts: Sequence[Rows], collate: PairCollator) -> Reference:
    """Computes the log-probabilities of all pairs under the current model. Every process must call this.

    Batches have pairs of similar length. The processes share the batches, and each computes the same number of them,
    because a sharded model needs all processes.

    Args:
        trainer: its wrapped model is used.
        parts: pairs to train on and pairs to validate on.
        collate: pairs to a batch.

    Raises:
        NumericalError: if log-probabilities are not finite.
    """
    rows: Sequence[dict[str, Any]] = ConcatDataset(parts)  # type: ignore[arg-type, assignment]
    sizes = [int(size) for part in parts for size in part.documents.lengths[part.records]]
    micro_batch = trainer.args.per_device_train_batch_size
    max_tokens = broadcast_from_rank0(tokens_without_gradient(trainer.model))  # all ranks must make the same batches
    batches = length_sorted_batches(sizes, micro_batch, max_tokens)
    world_size, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    own: list[tuple[int, float, float]] = []
    trainer.model.eval()
    for i in range(-(-len(batches) // world_size)):
        batch = batches[min(i * world_size + rank, len(batches) - 1)]
        scored, pairs = score_pairs(trainer, collate([rows[row] for row in batch]))
        log_probs = answer_log_probs(scored.outputs.log_probs, scored.inputs["completion_mask"], trainer.ld_alpha)
        chosen, rejected = log_probs.float().cpu().chunk(2)
        own += zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)
    trainer.model.train()
    everything = gather_object(own) if world_size > 1 else own
    if wrong := sorted({pair for pair, *values in everything if not all(map(math.isfinite, values))}):
        raise NumericalError(
            "reference", f"log-probabilities of {len(wrong)} of {len(rows)} pairs are not finite (first: {wrong[0]})",
            "check the answers of the base model (nesso-tune chat), or set model.dtype: float32",
        )  # fmt: skip
    return {pair: (chosen, rejected) for pair, chosen, rejected in everything}


def tokens_without_gradient(model: nn.Module) -> int:
    """Tokens that fit into a forward pass without gradient, in a quarter of the free memory of the GPU; 0 on a CPU.

    No layer keeps its activations, so the largest live tensors are those of one layer: the residual, the inputs and
    outputs of the attention, and the projections of the MLP, in float32 at most. On a CPU, larger ones are not faster.
    """
    if not torch.cuda.is_available():
        return 0
    free, _ = torch.cuda.mem_get_info()
    config = model.config.get_text_config()
    width = 8 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return int(free // 4 // (4 * width))


def length_sorted_batches(sizes: Sequence[int], micro_batch: int, max_tokens: int = 0) -> list[list[int]]:
    """Batches of row indices, long rows first.

    Args:
        sizes: tokens of each row.
        micro_batch: a batch may have as many tokens as this many of the longest rows together.
        max_tokens: or as many as this, if it is more.
    """
    ordered = sorted(range(len(sizes)), key=lambda row: -sizes[row])
    max_tokens = max(max_tokens, sum(sizes[row] for row in ordered[:micro_batch]))
    batches: list[list[int]] = []
    left = 0  # tokens that still fit into the last batch
    for row in ordered:
        if sizes[row] > left:
            batches.append([])
            left = max_tokens
        batches[-1].append(row)
        left -= sizes[row]
    return batches


def reference_key(recipe: DPORecipe, facts: RunFacts, parts: Sequence[Rows]) -> str:
    """Hash of everything that the log-probabilities depend on: model, numerics, and the token ids of the pairs.

    Args:
        recipe: has the settings.
        facts: provenance of the run, as in its manifest.
        parts: the pairs.
    """
    model = recipe.model
    settings = [
        facts.base, facts.tokenizer, facts.attention, facts.device, facts.versions,
        recipe.seed if model.random_init else None,
        model.adapter.type if model.adapter is not None else None,
        model.dtype, recipe.data.sequence_len, recipe.dpo.ld_alpha,
    ]  # fmt: skip
    digest = hashlib.sha256()
    for part in parts:
        for entry in part.records.tolist():
            lengths = [part.documents.input_ids(entry, i) for i in range(part.documents.documents_per_record)]
            digest.update(f"{part.first_pair + entry} {[len(ids) for ids in lengths]}".encode())
            for ids in lengths:
                digest.update(ids.tobytes())
    return cache.key_of([CACHE_VERSION, *settings, digest.hexdigest()])


def cached_reference(key: str) -> Reference | None:
    """The reference of this key in the cache; None if it is missing or damaged."""
    return cache.load(CACHE_KIND, key, _open, DESCRIPTION)


def cache_reference(key: str, reference: Reference) -> None:
    """Writes a reference to the cache."""

    def build(staging: Path) -> dict[str, Any]:
        save_reference(staging, reference, key)
        return {"pairs": len(reference)}

    cache.get_or_build(CACHE_KIND, key, build, _open, DESCRIPTION)


def _open(folder: Path, _: dict[str, Any]) -> Reference:
    try:
        return load_reference(folder, folder.name)
    except RunEnvironmentError as error:
        raise cache.Damaged(str(error)) from None


def save_reference(run: Path, reference: Reference, fingerprint: str) -> None:
    """Writes `reference.safetensors` into a folder, with a fingerprint of what it belongs to."""
    pairs = sorted(reference)
    tensors = {"pairs": torch.tensor(pairs), "log_probs": torch.tensor([reference[pair] for pair in pairs])}
    with atomic_replace(run / REFERENCE_FILE) as staging, safetensors_errors(staging):
        save_file(tensors, staging, metadata={"fingerprint": fingerprint, "sha256": _hash_of(tensors)})


def load_reference(run: Path, fingerprint: str) -> Reference:
    """Reads what `save_reference` wrote.

    Raises:
        RunEnvironmentError: if it is missing, damaged, or of other data or another base.
    """
    remedy = "start again with --overwrite"
    try:
        with safe_open(run / REFERENCE_FILE, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                raise RunEnvironmentError(str(run / REFERENCE_FILE), "belongs to other data or another base", remedy)
            tensors = {name: file.get_tensor(name) for name in ("pairs", "log_probs")}
            if (file.metadata() or {}).get("sha256") != _hash_of(tensors):
                raise RunEnvironmentError(str(run / REFERENCE_FILE), "is damaged", remedy)
    except OSError:
        raise RunEnvironmentError(str(run / REFERENCE_FILE), "is missing", remedy) from None
    except Exception as error:
        if isinstance(error, RunEnvironmentError):
            raise
        raise RunEnvironmentError(str(run / REFERENCE_FILE), "is damaged", remedy) from None
    pairs, values = (tensors[name].tolist() for name in ("pairs", "log_probs"))
    return {pair: (chosen, rejected) for pair, (chosen, rejected) in zip(pairs, values, strict=True)}


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
