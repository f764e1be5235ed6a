"""Supervised fine-tuning on TRL's SFTTrainer."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl import SFTTrainer

from nesso_tune.logs import logger
from nesso_tune.training.dataset import NON_MODEL_KEYS, Batch, CountedBatch
from nesso_tune.training.grouped_metrics import GroupedMetrics, Groups, MetricSpec
from nesso_tune.training.losses import nll_loss
from nesso_tune.training.trainer import BaseTrainer

SFT_METRICS = MetricSpec(("loss", "token_accuracy"))


class ConversationTrainer(BaseTrainer, SFTTrainer):
    """The loss is the sum over the supervised tokens of the global batch, divided by their number."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss (`loss_type="nll"`) without its synchronisation per micro batch; metrics go to the run state."""
        extra = {name: inputs.pop(name) for name in NON_MODEL_KEYS if name in inputs}
        outputs = model(**inputs, fused_lm_head=True)
        state = self.run_state
        add_sft_metrics(state.metrics, outputs, extra["group_ids"], inputs["supervised_index"])
        state.tokens += extra["tokens"]
        state.supervised_tokens += extra["supervised_tokens"]
        # `num_items_in_batch` counts all processes, and gradients are averaged over them
        return nll_loss(outputs.log_probs, num_items_in_batch, self.accelerator.num_processes)

    def warm_up(self) -> None:
        """Compiles the layers in a forward and a backward pass of the first rows. Weights and RNG states do not change.

        Every process must call this, before the first step.
        """
        start, device = time.monotonic(), self.accelerator.device
        batch = self.data_collator([self.run_dataset[i] for i in range(self.plan.micro_batch)])
        inputs = {name: value for name, value in batch.items() if name not in NON_MODEL_KEYS}
        self.model_wrapped.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with self.compute_loss_context_manager():
                outputs = self.model_wrapped(**send_to_device(inputs, device), fused_lm_head=True)
            outputs.log_probs.sum().backward()
        self.model_wrapped.zero_grad()
        logger.info(f"compiled the decoder layers in {time.monotonic() - start:.0f} s")

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Supervised tokens of a step, over all processes, as counted by the collator."""
        if not batch_samples:
            return None
        count = torch.tensor(float(sum(batch["supervised_tokens"] for batch in batch_samples)))
        return count if self.accelerator.num_processes == 1 else self.sum_over_processes(count)


@torch.no_grad()
def evaluate_sft(trainer: ConversationTrainer, batches: Iterable[CountedBatch], groups: Groups) -> dict[str, float]:
    """Loss and accuracy per supervised token over batches, in total, by language and by source.

    Args:
        trainer: its model is evaluated.
        batches: of this process; the number of batches must be equal on all processes.
        groups: of the batches.
    """
    metrics = GroupedMetrics(SFT_METRICS, groups, trainer.accelerator.device)
    for batch, counted in batches:
        outputs, inputs, group_ids = _score_rows(trainer, batch)
        if counted:
            add_sft_metrics(metrics, outputs, group_ids, inputs["supervised_index"])
    return {f"eval_{name}": value for name, value in metrics.means(trainer.sum_over_processes).items()}


@torch.no_grad()
def conversation_log_likelihood(trainer: ConversationTrainer, batch: Batch) -> float:
    """The summed log-probability of the supervised tokens of a batch of the collator."""
    outputs, inputs, _ = _score_rows(trainer, batch)
    return float(outputs.log_probs.flatten().index_select(0, inputs["supervised_index"]).double().sum())


def _score_rows(trainer: ConversationTrainer, batch: Batch) -> tuple[Any, dict[str, Any], Tensor]:
    """Runs the model on a batch; also returns the inputs on the device, and the group of each token."""
    inputs = send_to_device(batch, trainer.accelerator.device)
    extra = {name: inputs.pop(name) for name in NON_MODEL_KEYS if name in inputs}
    with trainer.compute_loss_context_manager():
        outputs = trainer.model_wrapped(**inputs, fused_lm_head=True)
    return outputs, inputs, extra["group_ids"]


@torch.no_grad()
def add_sft_metrics(metrics: GroupedMetrics, outputs: Any, group_ids: Tensor, index: Tensor) -> None:
    """Adds loss and accuracy of every supervised token.

    Args:
        metrics: of `SFT_METRICS`.
        outputs: of the model on a batch.
        group_ids: group of each token, [rows, length].
        index: of the supervised tokens in `labels[:, 1:]`, flattened.
    """
    groups, log_probs, is_top1 = (
        values.flatten().index_select(0, index) for values in (group_ids[:, 1:], outputs.log_probs, outputs.is_top1)
    )
    ones = torch.ones_like(log_probs)
    metrics.add("loss", groups, -log_probs, ones)
    metrics.add("token_accuracy", groups, is_top1.float(), ones)
