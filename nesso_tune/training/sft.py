"""Supervised fine-tuning on TRL's SFTTrainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from nesso_tune.training.collate import CountedBatch
from nesso_tune.training.tally import Tally
from nesso_tune.training.trainer import TrackedTrainer

NAMES = ("loss", "token_accuracy")


class ConversationTrainer(TrackedTrainer, SFTTrainer):
    """The loss is the sum over the supervised tokens of the whole global batch, divided by their number."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss (`loss_type="nll"`) without its per-batch synchronisation; sums by language go to the tally."""
        tokens, language_ids = int(inputs.pop("tokens")), inputs.pop("language_ids")
        outputs = model(**inputs, fused_lm_head=True)
        add_token_losses(self.track.tally, outputs, language_ids)
        self.track.tokens += tokens
        self.track.supervised_tokens += int(outputs.label_mask.sum())
        # `num_items_in_batch` counts all processes, and the gradients are averaged over them
        return -outputs.log_probs.sum() / num_items_in_batch * self.accelerator.num_processes


def add_token_losses(tally: Tally, outputs: Any, language_ids: Tensor) -> None:
    """Adds the negative log-likelihood and accuracy of every supervised token to a tally, by language."""
    mask = outputs.label_mask
    languages, ones = language_ids[:, 1:][mask], torch.ones_like(outputs.log_probs[mask])
    tally.add("loss", languages, -outputs.log_probs[mask], ones)
    tally.add("token_accuracy", languages, outputs.is_top1[mask].float(), ones)


@torch.no_grad()
def evaluate_loss(trainer: ConversationTrainer, batches: list[CountedBatch]) -> dict[str, float]:
    """Token-weighted loss and accuracy over batches, whole and by language.

    `batches` are those of this process, as many as every other has; one that is not counted only keeps step.
    """
    tally = Tally(NAMES, trainer.track.tally.languages, trainer.accelerator.device)
    for batch, counted in batches:
        inputs = trainer._prepare_inputs({name: value for name, value in batch.items() if name != "tokens"})
        language_ids = inputs.pop("language_ids")
        with trainer.compute_loss_context_manager():
            outputs = trainer.model_wrapped(**inputs, fused_lm_head=True)
        if counted:
            add_token_losses(tally, outputs, language_ids)
    return {f"eval_{name}": value for name, value in tally.means(trainer.sum_over_processes).items()}
