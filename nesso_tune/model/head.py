"""The LM head on supervised positions only.

With a vocabulary of 128k the logits of a whole batch are the largest tensor of a training step, and about half of a
chat's positions are not learned. This head scores the learned ones, in chunks, and answers in the form that TRL's
trainers ask their models for (`fused_lm_head=True`).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

CHUNK_ELEMENTS = 1 << 27  # logits held at once: 512 MiB in float32
SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def attach_supervised_head(model: PreTrainedModel) -> bool:
    """Gives `model` this head instead of the one that TRL attached; `generate` is untouched.

    Returns:
        False where the model scales or caps its logits: TRL's head, which knows those, then stays.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in SCALED_HEADS):
        return False
    whole_forward = types.MethodType(type(model).forward, model)

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return whole_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        return score(hidden, self.get_output_embeddings(), labels)

    # `generate` reads which arguments a model takes from the signature
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return True


def score(hidden: Tensor, head: nn.Linear, labels: Tensor) -> FusedCausalLMOutput:
    """Log-probabilities of the next tokens where they are learned.

    Args:
        hidden: last hidden states, [batch, length, width].
        head: the LM head.
        labels: unshifted labels, [batch, length]; -100 where not learned.

    Returns:
        `log_probs`, `entropy`, `mean_logits`, `is_top1` and `label_mask`, each [batch, length - 1]; zero where not
        learned. Only `log_probs` carries a gradient.
    """
    hidden, targets = hidden[:, :-1], labels[:, 1:]
    mask = targets != -100
    rows, wanted = hidden[mask], targets[mask]
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, head.bias))
    parts = [_scored(r, weight, bias, w) for r, w in _chunks(rows, wanted, weight.shape[0])]
    log_probs, entropy, mean_logits, top1 = (torch.cat(kind) for kind in zip(*parts, strict=True))

    def spread(values: Tensor) -> Tensor:
        # masked_scatter keeps the graph connected when no position is learned
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return FusedCausalLMOutput(
        log_probs=spread(log_probs),
        entropy=spread(entropy),
        mean_logits=spread(mean_logits),
        is_top1=spread(top1),
        label_mask=mask,
    )


def _chunks(rows: Tensor, wanted: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return zip(rows.split(size), wanted.split(size), strict=True)


def _scored(rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> tuple[Tensor, ...]:
    """One chunk; its logits are computed again in the backward pass instead of being kept."""
    if torch.is_grad_enabled() and rows.shape[0] * weight.shape[0] >= CHUNK_ELEMENTS // 2:
        return checkpoint(_score_rows, rows, weight, bias, wanted, use_reentrant=False)
    return _score_rows(rows, weight, bias, wanted)


def _score_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> tuple[Tensor, ...]:
    logits = functional.linear(rows, weight, bias).float()
    normalizer = logits.logsumexp(dim=-1)
    log_probs = logits.gather(-1, wanted[:, None]).squeeze(-1) - normalizer
    with torch.no_grad():
        entropy = normalizer - (logits.sub(normalizer[:, None]).exp() * logits).sum(dim=-1)
        top1 = logits.argmax(dim=-1) == wanted
        return log_probs, entropy, logits.mean(dim=-1), top1
