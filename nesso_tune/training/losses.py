"""Losses of SFT and DPO, from the log-probabilities of supervised tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
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


class _PerPair(Tensor):
    """Log-probabilities with which TRL's loss returns the loss of each pair, and does not wait for the device.

    TRL reduces a vector of losses by `mean`: here, that returns the vector. It selects positions by a boolean mask only
    to sum them: here, the other positions become 0 instead, because the host must know the size of a selection.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.mean and len(args) == 1 and args[0].ndim == 1 and not kwargs:
            return args[0]
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0] * args[1]
        return super().__torch_function__(func, types, args, kwargs or {})


def preference_losses(trainer: DPOTrainer, model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """TRL's DPO loss of each pair, without its sft term, [pairs]; the loss of the batch is their mean.

    For losses that sort the pairs, a value belongs to no single pair; only the mean has a meaning.

    `DPOTrainer._compute_loss` is called with a stand-in for the trainer. TRL's own metrics are discarded, because
    `GroupedMetrics` has them by group and over all processes; `gather` returns a constant 0, so that computing them
    does not wait for the device.

    Args:
        trainer: has the terms of the loss and their settings.
        model: called by TRL with the inputs; returns the output of the fused head.
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

    def per_pair_model(**kwargs: Any) -> Any:
        outputs = model(**kwargs)
        fields = {name: getattr(outputs, name).as_subclass(_PerPair) for name in ("log_probs", "mean_logits")}
        return replace(outputs, **fields)

    loss: Tensor | float = DPOTrainer._compute_loss(stand_in, per_pair_model, inputs, False)
    if isinstance(loss, Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return loss.as_subclass(Tensor)
    return inputs["ref_chosen_logps"].new_zeros(len(inputs["ref_chosen_logps"]))  # without terms, TRL returns a plain 0


# Attributes that TRL's `_compute_loss` reads from its trainer, besides the terms of the loss.
_TRL_SETTINGS = ("beta", "ld_alpha", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
                 "use_weighting", "precompute_ref_logps", "aux_loss_enabled", "args")  # fmt: skip


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
