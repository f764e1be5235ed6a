"""Losses of SFT and DPO, from the log-probabilities of supervised tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

SFT = "sft"  # the term of `dpo.loss` that is a mean over the tokens of the chosen answers


def nll_loss(log_probs: Tensor, num_tokens: Tensor | int, scale: int) -> Tensor:
    """Negative log-likelihood of some tokens as a share of a step's mean over `num_tokens` tokens.

    Args:
        log_probs: of the supervised tokens of a micro batch; 0 elsewhere.
        num_tokens: supervised tokens of the whole step, over all micro batches and processes.
        scale: number of micro batches or processes over which this share will be averaged.
    """
    return -log_probs.sum() / num_tokens * scale


def preference_loss(trainer: DPOTrainer, model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """TRL's DPO loss without its sft term: a mean over the pairs, except for losses that sort the pairs.

    `DPOTrainer._compute_loss` is called with a stand-in for the trainer. TRL's own metrics are discarded, because
    `GroupedMetrics` has them by group and over all processes; `gather` returns a constant 0, so that computing them
    does not synchronise with the device.

    Args:
        trainer: has the terms of the loss and their settings.
        model: called by TRL with the inputs.
        inputs: a batch [2 * pairs, length] with the log-probabilities of the reference.
    """
    terms = [term for term in zip(trainer.loss_types, trainer.loss_weights, strict=True) if term[0] != SFT]
    zero = torch.zeros(())
    stand_in = SimpleNamespace(
        **{name: getattr(trainer, name) for name in _TRL_SETTINGS},
        loss_types=[name for name, _ in terms],
        loss_weights=[weight for _, weight in terms],
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=trainer.accelerator.device, gather=lambda _: zero, gather_for_metrics=lambda _: zero
        ),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss: Tensor | float = DPOTrainer._compute_loss(stand_in, model, inputs, False)
    # without terms, TRL returns a plain 0
    return loss if isinstance(loss, Tensor) else torch.tensor(loss, device=trainer.accelerator.device)


# Attributes that TRL's `_compute_loss` reads from its trainer, besides the terms of the loss.
_TRL_SETTINGS = ("beta", "ld_alpha", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
                 "use_weighting", "precompute_ref_logps", "aux_loss_enabled", "args")  # fmt: skip


def preference_loss_of_rows(trainer: DPOTrainer, outputs: Any, inputs: dict[str, Any], rows: Tensor) -> Tensor:
    """`preference_loss` of some pairs of a batch, from outputs already computed; without gradient."""
    both = torch.cat([rows, rows + len(inputs["ref_chosen_logps"])])
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    of_rows = SimpleNamespace(**{name: getattr(outputs, name).detach()[both] for name in fields})
    names = ("input_ids", "attention_mask", "completion_mask")
    inputs = {n: v[rows] for n, v in inputs.items() if n.startswith("ref_")} | {n: inputs[n][both] for n in names}
    return preference_loss(trainer, lambda **_: of_rows, inputs)


def answer_log_probs(log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Log-probability of each answer, [2 * pairs], from that of each token.

    Args:
        log_probs: [2 * pairs, length - 1].
        completion_mask: [2 * pairs, length]; 1 for tokens of an answer.
        ld_alpha: weight of the tokens beyond the length of the shorter answer (LD-DPO, arXiv:2409.06411).
    """
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    mask = completion_mask[:, 1:]
    shorter = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    beyond = mask.cumsum(dim=1) > shorter[:, None]
    return (log_probs * torch.where(beyond, ld_alpha, 1.0)).sum(dim=1)


def chosen_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Predicted positions of the tokens of the chosen answers, [pairs, length - 1], boolean."""
    mask: Tensor = inputs["completion_mask"].chunk(2)[0][:, 1:]
    return mask.bool()
