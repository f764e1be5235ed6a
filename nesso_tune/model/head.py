"""The LM head on supervised positions only.

With a vocabulary of 128k the logits of a whole batch are the largest tensor of a training step, and about half of a
chat's positions are not learned. This head scores the learned ones, in chunks, and answers in the form that TRL's
trainers ask their models for (`fused_lm_head=True`). Rows of `Segments` go through the model without padding.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from nesso_tune.model.attention import Segments, through

# Logits that are held at once, 6 bytes each in bfloat16 (8 in float32) while they are scored, 4 (8) on the way back.
SCORED = {"cpu": 1 << 25, "cuda": 1 << 27}
DERIVED = {"cpu": 1 << 26, "cuda": 1 << 27}
SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass(frozen=True)
class Row:
    """A batch of sequences as one row of tokens, none of them padding.

    Attributes:
        ids: [1, row].
        segments: how the row is made up.
        before: [learned] where in the row the hidden state stands that each learned token is predicted from, in the
            order of the labels of the batch.
    """

    ids: Tensor
    segments: Segments
    before: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Row:
        """The same on a device."""
        return Row(
            self.ids.to(device, non_blocking=non_blocking),
            self.segments.to(device, non_blocking),
            self.before.to(device, non_blocking=non_blocking),
        )


def attach_supervised_head(model: PreTrainedModel) -> bool:
    """Gives `model` this head instead of the one that TRL attached; `generate` is untouched.

    With `row=`, a `Row` of the same sequences as `labels`, the model computes on that row alone.

    Args:
        model: attends by document, if rows are to be given.

    Returns:
        False where the model scales or caps its logits: TRL's head, which knows those, then stays.
    """
    if not has_plain_head(model):
        return False
    whole_forward = types.MethodType(type(model).forward, model)

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return whole_forward(*args, **kwargs)
        labels, row = kwargs.pop("labels"), kwargs.pop("row", None)
        targets = labels[:, 1:]
        mask = targets != -100
        if row is None:
            kwargs["use_cache"] = False
            learned = self.base_model(*args, **kwargs).last_hidden_state[:, :-1][mask]
        else:
            learned = through(self, row.ids, row.segments)[0].index_select(0, row.before)
        return spread(*score(learned, self.get_output_embeddings(), targets[mask]), mask)

    # `generate` reads which arguments a model takes from the signature
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return True


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are the head's products and nothing more."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) is None for name in SCALED_HEADS)


def score(hidden: Tensor, head: nn.Linear, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, each from the hidden state before it.

    Args:
        hidden: [learned, width].
        head: the LM head.
        targets: the tokens, [learned].

    Returns:
        Log-probabilities in float32, and whether each token was the likeliest, both [learned]; only the first carries
        a gradient.
    """
    own = (head.weight, getattr(head, "bias", None))  # peft's wrapper of a head has no bias
    weight: Tensor
    bias: Tensor | None
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in own)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        found: tuple[Tensor, Tensor] = _LogProbs.apply(hidden, weight, bias, targets)
    return found


def spread(log_probs: Tensor, top1: Tensor, mask: Tensor) -> FusedCausalLMOutput:
    """Scores at the places of a mask, [batch, length - 1]; zero elsewhere.

    Entropy and mean logit, which TRL's DPO reads only to report them, are not computed: they are 0.
    """

    def placed(values: Tensor) -> Tensor:
        # masked_scatter keeps the graph connected when no position is learned
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    nothing = torch.zeros((), device=mask.device).expand(mask.shape)
    return FusedCausalLMOutput(
        log_probs=placed(log_probs), entropy=nothing, mean_logits=nothing, is_top1=placed(top1), label_mask=mask
    )


class _LogProbs(torch.autograd.Function):
    """log softmax(rows @ weight.T + bias) at the wanted tokens; logits exist for one chunk of rows at a time.

    The backward pass computes them again: d log p_t / d logits = onehot(t) - softmax. Products are in the precision
    of `rows`, sums over the vocabulary in float32; the weight comes, and its gradient goes, in the weight's precision.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> tuple[Tensor, Tensor]:
        cast, own_bias = (None if tensor is None else tensor.to(rows.dtype) for tensor in (weight, bias))
        assert cast is not None
        log_probs = torch.empty(rows.shape[0], device=rows.device)
        top1 = torch.empty_like(wanted, dtype=torch.bool)
        for part in _parts(rows, weight, SCORED):
            logits = functional.linear(rows[part], cast, own_bias)
            top1[part] = logits.max(dim=-1).indices == wanted[part]
            all_of_them = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            log_probs[part] = all_of_them.gather(-1, wanted[part, None]).squeeze(-1)
            del logits, all_of_them  # or they would be held while the next chunk is computed
        ctx.save_for_backward(rows, weight, cast, own_bias, wanted, log_probs)
        ctx.mark_non_differentiable(top1)
        return log_probs, top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, weight, cast, bias, wanted, log_probs = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        to_rows = torch.empty_like(rows) if needs_rows else None
        to_weight: Tensor | None = None
        to_bias = torch.zeros(weight.shape[0], device=weight.device) if needs_bias else None
        scale = -grad[:, None]
        for part in _parts(rows, weight, DERIVED):
            slope = torch.softmax(functional.linear(rows[part], cast, bias), dim=-1)
            # the wanted token's own, which may be almost 1, is known in float32: 1 is taken off before it is rounded
            slope.scatter_(-1, wanted[part, None], torch.expm1(log_probs[part, None]).to(slope.dtype))
            if to_rows is not None:
                to_rows[part] = (slope @ cast) * scale[part]
            if needs_weight:
                share = slope.T @ (rows[part] * scale[part]).to(rows.dtype)
                to_weight = share.to(weight.dtype) if to_weight is None else to_weight.add_(share)
            if to_bias is not None:
                to_bias += (slope * scale[part]).sum(dim=0)
            del slope
        if needs_weight and to_weight is None:
            to_weight = torch.zeros_like(weight)
        return to_rows, to_weight, to_bias, None


def _parts(rows: Tensor, weight: Tensor, most: dict[str, int]) -> Iterator[slice]:
    """Parts of equal size, none of more logits than `most` says for the device."""
    count = rows.shape[0]
    parts = max(1, math.ceil(count * weight.shape[0] / most.get(rows.device.type, most["cuda"])))
    size = max(1, math.ceil(count / parts))
    return (slice(start, start + size) for start in range(0, count, size))
