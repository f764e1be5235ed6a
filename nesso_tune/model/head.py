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
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits held at once; small enough for a CPU's cache
SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def attach_supervised_head(model: PreTrainedModel, statistics: bool) -> bool:
    """Gives `model` this head instead of the one that TRL attached; `generate` is untouched.

    `statistics` adds entropy and mean logit, which TRL's DPO asks for.

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
        return score(hidden, self.get_output_embeddings(), labels, statistics)

    # `generate` reads which arguments a model takes from the signature
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return True


def score(hidden: Tensor, head: nn.Linear, labels: Tensor, statistics: bool = True) -> FusedCausalLMOutput:
    """Log-probabilities of the next tokens where they are learned.

    Args:
        hidden: last hidden states, [batch, length, width].
        head: the LM head.
        labels: unshifted labels, [batch, length]; -100 where not learned.
        statistics: also `entropy` and `mean_logits`.

    Returns:
        `log_probs`, `is_top1` and `label_mask`, each [batch, length - 1], and the statistics; zero where not learned.
        Only `log_probs` carries a gradient.
    """
    hidden, targets = hidden[:, :-1], labels[:, 1:]
    mask = targets != -100
    own = (head.weight, getattr(head, "bias", None))  # peft's wrapper of a head has no bias
    weight: Tensor
    bias: Tensor | None
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in own)
    rows, device = hidden[mask], hidden.device.type
    if torch.is_autocast_enabled(device):
        precision = torch.get_autocast_dtype(device)
        rows, weight = rows.to(precision), weight.to(precision)
        bias = bias if bias is None else bias.to(precision)
    log_probs, top1, entropy, mean_logits = _ChunkedLogProbs.apply(rows, weight, bias, targets[mask], statistics)

    def spread(values: Tensor) -> Tensor:
        # masked_scatter keeps the graph connected when no position is learned
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return FusedCausalLMOutput(
        log_probs=spread(log_probs),
        entropy=spread(entropy) if statistics else None,
        mean_logits=spread(mean_logits) if statistics else None,
        is_top1=spread(top1),
        label_mask=mask,
    )


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(rows @ weight.T + bias) at the wanted tokens; logits exist for one chunk of rows at a time.

    The backward pass computes them again: d log p_t / d logits = onehot(t) - softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        log_probs, normalizer = (torch.empty(rows.shape[0], device=rows.device) for _ in range(2))
        top1 = torch.empty_like(wanted, dtype=torch.bool)
        entropy, mean = (torch.empty_like(log_probs) if statistics else None for _ in range(2))
        for part in _parts(rows, weight):
            logits = functional.linear(rows[part], weight, bias).float()
            highest, best = logits.max(dim=-1)
            picked = logits.gather(-1, wanted[part, None]).squeeze(-1)
            if entropy is not None and mean is not None:
                mean[part] = logits.mean(dim=-1)
                total = logits.logsumexp(dim=-1)
                entropy[part] = total - (logits.sub(total[:, None]).exp_().mul_(logits)).sum(dim=-1)
            else:
                total = highest + logits.sub_(highest[:, None]).exp_().sum(dim=-1).log_()
            log_probs[part], normalizer[part], top1[part] = picked - total, total, best == wanted[part]
        ctx.save_for_backward(rows, weight, bias, wanted, normalizer)
        ctx.mark_non_differentiable(top1, *(x for x in (entropy, mean) if x is not None))
        return log_probs, top1, entropy, mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, weight, bias, wanted, normalizer = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        to_rows = torch.empty_like(rows) if needs_rows else None
        to_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        to_bias = torch.zeros(weight.shape[0], device=weight.device) if needs_bias else None
        for part in _parts(rows, weight):
            logits = functional.linear(rows[part], weight, bias).float()
            slope = logits.sub_(normalizer[part, None]).exp_().mul_(-grad[part, None])
            slope.scatter_add_(-1, wanted[part, None], grad[part, None])
            if to_bias is not None:
                to_bias += slope.sum(dim=0)
            slope = slope.to(rows.dtype)
            if to_rows is not None:
                to_rows[part] = slope @ weight
            if to_weight is not None:
                to_weight += slope.T @ rows[part]
        return (
            to_rows,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None or bias is None else to_bias.to(bias.dtype),
            None,
            None,
        )


def _parts(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS.get(rows.device.type, 1 << 24) // weight.shape[0])
    return (slice(start, start + size) for start in range(0, rows.shape[0], size))
