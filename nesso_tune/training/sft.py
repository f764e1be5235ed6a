"""Supervised fine-tuning on TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl import SFTTrainer

from nesso_tune.training.dataset import NON_MODEL_KEYS, CountedBatch
from nesso_tune.training.grouped_metrics import GroupedMetrics, Groups, MetricSpec
from nesso_tune.training.trainer import BaseTrainer

FIGURES = MetricSpec(("loss", "token_accuracy"))


class ConversationTrainer(BaseTrainer, SFTTrainer):
    """The loss is the sum over the supervised tokens of the whole global batch, divided by their number."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss (`loss_type="nll"`) without its per-batch synchronisation; sums by group go to the tally."""
        own = {name: inputs.pop(name) for name in NON_MODEL_KEYS if name in inputs}
        outputs = model(**inputs, fused_lm_head=True)
        add_sft_metrics(self.track.tally, outputs, own["group_ids"])
        self.track.tokens += int(own["tokens"])
        self.track.supervised_tokens += int(outputs.label_mask.sum())
        # `num_items_in_batch` counts all processes, and the gradients are averaged over them
        return -outputs.log_probs.sum() / num_items_in_batch * self.accelerator.num_processes


@torch.no_grad()
def add_sft_metrics(tally: GroupedMetrics, outputs: Any, group_ids: Tensor) -> None:
    """Adds the negative log-likelihood and accuracy of every supervised token to a tally, by group."""
    mask = outputs.label_mask
    groups, losses = group_ids[:, 1:][mask], -outputs.log_probs[mask]
    ones = torch.ones_like(losses)
    tally.add("loss", groups, losses, ones)
    tally.add("token_accuracy", groups, outputs.is_top1[mask].float(), ones)


@torch.no_grad()
def evaluate_sft(trainer: ConversationTrainer, batches: Iterable[CountedBatch], groups: Groups) -> dict[str, float]:
    """Token-weighted loss and accuracy over batches, whole, by language and by source.

    `batches` are those of this process, as many as every other has; one that is not counted only keeps step.
    """
    tally = GroupedMetrics(FIGURES, groups, trainer.accelerator.device)
    for batch, counted in batches:
        inputs = send_to_device(batch, trainer.accelerator.device)
        own = {name: inputs.pop(name) for name in NON_MODEL_KEYS if name in inputs}
        with trainer.compute_loss_context_manager():
            outputs = trainer.model_wrapped(**inputs, fused_lm_head=True)
        if counted:
            add_sft_metrics(tally, outputs, own["group_ids"])
    return {f"eval_{name}": value for name, value in tally.means(trainer.sum_over_processes).items()}
