"""The LM head on supervised positions only.

With a vocabulary of 128k the logits of a whole batch are the largest tensor of a training step, and about half of a
chat's positions are not learned. This head scores the learned ones, in chunks, and answers in the form that TRL's
trainers ask their models for (`fused_lm_head=True`). Rows of `AttentionSpans` go through the model without padding.

Some models do more between hidden states and logits than one product. Which head a model is trained with, and in which
batches, is its `ForwardPath`; `model/forward.py` chooses it.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from nesso_tune.model.attention import AttentionSpans, last_hidden_states
from nesso_tune.planning.memory import HEAD_CHUNK_BACKWARD, HEAD_CHUNK_FORWARD

GenerationMode = Literal["batch", "alone", "uncached"]
LossPair = tuple[float, float]  # mean loss of some tokens: on the path that was tried, and by the model's own forward


@dataclass(frozen=True)
class ForwardPath:
    """How a model is trained so that it computes what its own forward computes for each document alone.

    Attributes:
        head: `supervised` is the head of this module; `trl` the one that TRL attaches, which knows some models that cap
            or scale their logits; `own` takes the logits of the model's own forward.
        padding_free: the model attends by document, so that batches need no padding.
        packs_by_position_ids: without `padding_free`, documents of a row are kept apart by `position_ids` that restart.
        padding: how rows of unequal length are padded to the right: with an attention mask, without one, or not at all
            (each row goes through the model by itself).
        max_positions: tokens that the model has learned positions for; None if there is no such limit.
        generation: how greedy answers are those of the model's own forward: prompts padded to the left in a batch, each
            prompt alone, or each alone and without a cache.
        head_losses: of the `supervised` head, where it is not the one that is used.
        packing_losses: of packed documents, where they are not kept apart.
    """

    head: Literal["supervised", "trl", "own"] = "supervised"
    padding_free: bool = False
    packs_by_position_ids: bool = True
    padding: Literal["mask", "none", "alone"] = "mask"
    max_positions: int | None = None
    generation: GenerationMode = "batch"
    head_losses: LossPair | None = None
    packing_losses: LossPair | None = None

    @property
    def supports_packing(self) -> bool:
        """Whether packed rows can be trained on."""
        return self.padding_free or self.packs_by_position_ids


def forward_path(model: PreTrainedModel) -> ForwardPath:
    """The path that was chosen for a model when it was loaded."""
    return getattr(model, "nesso_forward_path", ForwardPath())


@dataclass(frozen=True)
class PackedRow:
    """A batch of sequences as one row of tokens, none of them padding.

    Attributes:
        input_ids: [1, row].
        spans: which of its tokens attend to each other.
        logits_to_keep: [supervised] row index of the hidden state that predicts each supervised token, in the order of
            the labels of the batch.
    """

    input_ids: Tensor
    spans: AttentionSpans
    logits_to_keep: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        """The same on a device."""
        return PackedRow(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.spans.to(device, non_blocking),
            self.logits_to_keep.to(device, non_blocking=non_blocking),
        )


def attach_supervised_head(model: PreTrainedModel, path: ForwardPath | None = None) -> None:
    """Gives `model` the head of its path instead of the one that TRL attached; `generate` is untouched.

    With `packed_row=`, a `PackedRow` of the same sequences as `labels`, the model computes on that row alone.

    Args:
        model: attends by document, if rows are to be given.
        path: the model's own by default.
    """
    path = path or forward_path(model)
    if path.head == "trl":
        return
    scored = _own_scores if path.head == "own" else _head_scores
    whole_forward = types.MethodType(type(model).forward, model)

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return whole_forward(*args, **kwargs)
        labels, row = kwargs.pop("labels"), kwargs.pop("packed_row", None)
        targets = labels[:, 1:]
        mask = targets != -100
        if row is not None:
            learned = last_hidden_states(self, row.input_ids, row.spans)[0].index_select(0, row.logits_to_keep)
            return fused_output(*token_log_probs(learned, self.get_output_embeddings(), targets[mask]), mask)
        batches = _alone(kwargs) if path.padding == "alone" else [kwargs]
        if path.padding == "none":
            kwargs.pop("attention_mask", None)
        parts, start = [], 0
        for batch in batches:
            rows, length = batch["input_ids"].shape
            part = slice(start, start + rows)
            parts.append(scored(self, batch, targets[part, : length - 1], mask[part, : length - 1]))
            start += rows
        log_probs, top1 = (torch.cat(found) for found in zip(*parts, strict=True))
        return fused_output(log_probs, top1, mask)

    # `generate` reads which arguments a model takes from the signature
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def plain_logits(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """What plain transformers computes, [batch, length, vocabulary]; nothing is cached."""
    forward = type(model).forward
    taken = inspect.signature(forward).parameters
    # a router's balance is no part of the loss
    off = {name: False for name in ("use_cache", "output_router_logits") if name in taken}
    own = {name: value for name, value in batch.items() if name not in ("use_cache", "output_router_logits")}
    logits: Tensor = forward(model, **own, **off).logits
    return logits


def _own_scores(model: PreTrainedModel, batch: dict[str, Any], targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the learned tokens from the model's own logits, and whether each was the likeliest."""
    logits, wanted = plain_logits(model, batch)[:, :-1][mask], targets[mask]
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, wanted[:, None]).squeeze(-1)
    return log_probs, logits.detach().argmax(dim=-1) == wanted


def _head_scores(model: PreTrainedModel, batch: dict[str, Any], targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the last hidden states and the output embeddings."""
    hidden = model.base_model(**batch | {"use_cache": False}).last_hidden_state[:, :-1][mask]
    return token_log_probs(hidden, model.get_output_embeddings(), targets[mask])


def _alone(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Each row of a batch that is padded to the right by itself, without its padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(dim=1).tolist()
    return [{"input_ids": row[None, :length]} for row, length in zip(ids, lengths, strict=True)]


def token_log_probs(hidden: Tensor, head: nn.Linear, targets: Tensor) -> tuple[Tensor, Tensor]:
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


def fused_output(log_probs: Tensor, top1: Tensor, mask: Tensor) -> FusedCausalLMOutput:
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
        for part in _parts(rows, weight, HEAD_CHUNK_FORWARD):
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
        for part in _parts(rows, weight, HEAD_CHUNK_BACKWARD):
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
